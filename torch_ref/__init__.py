"""The oracle in PyTorch: the same losses, weights and loops, sharing nothing but numpy."""
