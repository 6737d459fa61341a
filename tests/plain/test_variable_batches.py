"""Batches of any size up to a capacity: one trace, one compilation, and no microbatch of padding is
run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum as ja
from tests.support.helpers import EXACT, data, normwise

CAPACITY, W = 12, data(3)


def expected(w, x):
    return jnp.mean((x @ w - 1) ** 2)


@pytest.mark.parametrize(
    "accumulator", [None, ja.accumulators.compensated()], ids=["in_place", "compensated"]
)
def test_every_size_up_to_the_capacity(accumulator):
    traced, ran = [], []

    def seen(count):
        ran.append(int(count))
        return np.float64(0)

    def loss(w, x, mask, count):
        traced.append(len(x))
        error = jnp.sum(jnp.where(mask, (x @ w - 1) ** 2, 0.0))
        tick = jax.pure_callback(
            seen, jax.ShapeDtypeStruct((), jnp.float64), jax.lax.stop_gradient(jnp.sum(mask))
        )
        return ja.Mean(error + jax.lax.stop_gradient(tick), jnp.sum(jnp.where(mask, 1.0, 0.0)))

    step = jax.jit(
        ja.value_and_grad(
            loss,
            in_axes=(None, 0, 0, None),
            microbatch_size=3,
            num_examples_argnum=3,
            accumulator=accumulator,
            audit=None,
        )
    )
    for size in (5, 12, 1, 3, 4, 11, 6):
        x = data(size, 3, seed=size)
        padded, mask = ja.pad_batch(x, to=CAPACITY)
        ran.clear()
        got = step(W, padded, mask, size)
        jax.block_until_ready(got)
        assert normwise(got, jax.value_and_grad(expected)(W, x)) < EXACT
        assert ran == [min(3, size - i) for i in range(0, size, 3)]
    assert len(traced) == 1  # and so one compilation: jit's own count forgets in a long process


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64", "uint64"])
def test_the_number_of_examples_has_any_integer_dtype(dtype):
    """Also one in which the index of the last microbatch's first example, 300, would be another
    number."""
    loss = lambda w, x, mask, n: ja.Mean(
        jnp.sum(jnp.where(mask, (x @ w - 1) ** 2, 0.0)), jnp.sum(mask)
    )
    options = {"microbatch_size": 100, "in_axes": (None, 0, 0, None)}
    x = data(120, 3)
    padded, mask = ja.pad_batch(x, to=400)
    actual = ja.value_and_grad(loss, num_examples_argnum=3, **options)(
        W, padded, mask, jnp.asarray(120, dtype)
    )
    assert normwise(actual, jax.value_and_grad(expected)(W, x)) < EXACT
    one = lambda w, x, mask, n: ja.Sum(jnp.float64(1))
    ran = ja.microbatch(one, num_examples_argnum=3, audit=None, **options)
    assert ran(W, padded, mask, jnp.asarray(120, dtype)) == 2


def test_unpadded_batches_compile_anew():
    traced = []
    noted = lambda w, x: traced.append(len(x)) or expected(w, x)
    step = jax.jit(ja.value_and_grad(noted, microbatch_size=3, audit=None))
    for size in (5, 12, 4, 5):
        step(W, data(size, 3))
    assert traced == [3, 2, 3, 3, 1]
