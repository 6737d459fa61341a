"""Experiments: one claim per file, which ends in a check and writes a JSON file and a picture."""
