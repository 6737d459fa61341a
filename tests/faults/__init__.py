"""Deliberate faults in the library: those that are listed, and those that are drawn from its
source."""
