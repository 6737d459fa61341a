"""The audit: what it says of a loss, where, and that the numbers agree."""
