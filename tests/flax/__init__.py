"""Models of Flax: nnx, linen, their random streams and normalization layers."""
