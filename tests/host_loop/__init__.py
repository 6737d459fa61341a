"""The loop on the host: `MultiSteps`, and checkpoints of a run."""
