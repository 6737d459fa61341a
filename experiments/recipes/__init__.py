"""Training steps of many libraries and kinds, each before and after: at most three lines differ, and a check says why."""
