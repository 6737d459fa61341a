"""Experiments: one claim per file, each ends in a check and writes one JSON file and one
picture."""
