"""A compiled function in the loss closes over arrays: they are constants of it, not of the loss.

Where the library opens such a function, for a collective or the index of the microbatch, its
constants go along.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxaccum as ja
from tests.support.helpers import EXACT, data, normwise

X, W = data(8, 3), data(3, seed=1)
SCALE, NUMPY = jnp.array([[1.0, 2.0, 3.0]]), np.arange(3.0)[None]
AXIS = "microbatch"


@jax.jit
def centered(h):
    return h - SCALE * lax.pmean(jnp.mean(h, 0, keepdims=True), AXIS)


@jax.jit
def of_numpy(h):
    return (h - NUMPY * lax.pmean(jnp.mean(h * SCALE, 0, keepdims=True), AXIS))[
        :, np.array([2, 0, 1])
    ]


@jax.jit
def written(h):
    mean = lax.pmean(jnp.mean(h, 0, keepdims=True), AXIS)
    return h - jnp.zeros((1, 3)).at[...].set(mean)


@jax.jit
def compared(h):
    return jnp.tanh(h @ lax.all_gather(h, AXIS, tiled=True).T) @ jnp.ones((8, 3)) * SCALE


@jax.jit
def indexed(h):
    return h * SCALE * jnp.ones(8)[lax.axis_index(AXIS)]


@jax.custom_jvp
def with_rule(h):
    return jnp.sin(h) * SCALE


with_rule.defjvp(lambda primals, tangents: (with_rule(*primals), tangents[0] * SCALE))


def looped(layer):
    return lambda h: lax.scan(lambda h, _: (jnp.tanh(layer(h)) * NUMPY, None), h, None, 2)[0]


LAYERS = {
    "jit": centered,
    "numpy": of_numpy,
    "written": written,
    "gathered": compared,
    "jit in jit": jax.jit(lambda h: centered(h) * NUMPY),
    "scan": looped(centered),
    "checkpoint": jax.checkpoint(centered),
    "vmap": jax.jit(lambda h: jax.vmap(centered, 1, 1)(jnp.stack([h, 2 * h], 1)).sum(1)),
    "rule": jax.jit(lambda h: with_rule(centered(h))),
    "index": indexed,
    "index in a scan": looped(indexed),
    "both": lambda h: indexed(centered(h)),
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_they_are_read(name, count):
    loss = lambda w, x: jnp.mean(jnp.tanh(LAYERS[name](x * w[None])) ** 2)
    expected = jax.jit(jax.value_and_grad(ja.full_batch(loss)))(W, X)
    options = {"num_microbatches": count, "audit": None}
    assert normwise(jax.jit(ja.value_and_grad(loss, **options))(W, X), expected) < EXACT
    spread = jax.jit(jax.value_and_grad(ja.microbatch(loss, **options)))
    assert normwise(spread(W, X), expected) < EXACT


def test_another_constant_has_another_gradient():
    """The negative control."""
    other = lambda h: h - (SCALE + 1) * lax.pmean(jnp.mean(h, 0, keepdims=True), AXIS)
    loss = lambda layer: lambda w, x: jnp.mean(jnp.tanh(layer(x * w[None])) ** 2)
    expected = jax.grad(ja.full_batch(loss(centered)))(W, X)
    assert normwise(ja.grad(loss(other), num_microbatches=4)(W, X), expected) > 0.01
