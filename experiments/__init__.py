"""Experiments: one claim a file, each ends in a check and writes one JSON file and one picture."""
