"""Training steps of many libraries, before and after: at most three lines differ."""
