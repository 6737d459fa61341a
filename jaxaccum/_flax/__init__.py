"""What Flax's models need: BatchNorm over the whole batch, and models of nnx as arguments.

Models and batches enter; moments of the whole batch leave, and pure functions of a model's state.
It imports `_base`, `_jaxpr`, `_devices` and `_program`.
"""
