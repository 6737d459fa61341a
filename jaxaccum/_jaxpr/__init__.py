"""Programs as JAX traces them.

A function or its jaxpr enters; a jaxpr that computes the same leaves, in another form: with sums of
gradients threaded through it, with equal equations as calls of one function, without what is never
read. `compat` holds all that is private or experimental in JAX. It imports `_base`.
"""
