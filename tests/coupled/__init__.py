"""Losses whose examples interact: collectives over the loop's axis."""
