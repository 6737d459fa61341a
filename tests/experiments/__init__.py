"""The experiments, the recipes and the notebook run, and their checks can fail."""
