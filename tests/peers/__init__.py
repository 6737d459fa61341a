"""Other libraries: PyTorch as the oracle, bugs that made the news, and their own suites."""
