"""Calls with example streams, and what a model holds afterwards: for the tests of both."""

import jax
import jax.numpy as jnp
from flax import nnx

import jaxaccum as ja


def step(fun, *, example_streams=None, **options):
    """`jaxaccum.nnx.value_and_grad`, by default with example streams."""
    return ja.nnx.value_and_grad(fun, example_streams=example_streams, **options)


def state(model):
    """Everything but the parameters, keys as integers."""
    rest = nnx.state(model, nnx.Not(nnx.Param))
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    integers = lambda x: jax.random.key_data(x) if is_key(x) else x
    return jax.tree.map(integers, nnx.to_pure_dict(rest))
