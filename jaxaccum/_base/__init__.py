"""Types, trees of arrays, and lines of source: what every other room reads.

Nothing enters but what a user passes, and names, dtypes and places in files leave. It imports
nothing of ours.
"""
