"""The accumulators, and what they report."""
