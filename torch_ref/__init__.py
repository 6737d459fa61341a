"""The oracle in PyTorch: the same losses, weights and loops as the JAX side, and nothing shared
with it but numpy."""
