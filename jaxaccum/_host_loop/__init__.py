"""Accumulation in a loop of Python: one microbatch per call, around optimizers of optax.

Gradients of microbatches enter, and updates leave: zero until the window ends. It imports `_base`,
`_jaxpr`, `_devices`, and of `_program` the checks and the partition.
"""
