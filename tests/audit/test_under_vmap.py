"""The audit follows collectives under `jax.vmap`: there an axis with a name has become one of the
array's own.

Flax's and Equinox's BatchNorm under `jax.vmap`, with statistics over ``("example", "microbatch")``,
are of this kind.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxaccum as ja
from tests.support import jitted
from tests.support.helpers import EXACT, INEXACT, data, normwise

X, W = data(16, 3), data(3, seed=1)
BOTH = ("example", "microbatch")
WAYS = {
    "mean": lambda h, axes: lax.pmean(h, axes),
    "sum": lambda h, axes: lax.psum(h, axes),
    "maximum": lambda h, axes: lax.pmax(lax.stop_gradient(h), axes),
    "two at once": lambda h, axes: lax.psum((h, h * h), axes)[1],
}


def loss(statistic, axes):
    """A mean over examples of how far each is from a statistic over `axes`."""

    def one(w, x):
        h = jnp.tanh(x * w)
        return jnp.sum((h - statistic(h, axes)) ** 3)

    return lambda w, x: jnp.mean(jax.vmap(one, in_axes=(None, 0), axis_name="example")(w, x))


@pytest.mark.parametrize("name", WAYS)
def test_statistics_over_both_axes_are_exact_and_no_warning_says_otherwise(name):
    full = jitted.grad(loss(WAYS[name], "example"))(W, X)
    fun = loss(WAYS[name], BOTH)
    assert ja.audit(fun, W, X).exact
    assert normwise(ja.grad(fun, num_microbatches=4)(W, X), full) < EXACT


@INEXACT
@pytest.mark.parametrize("name", WAYS)
def test_statistics_over_the_examples_alone_are_those_of_a_microbatch(name):
    fun = loss(WAYS[name], "example")
    assert ja.audit(fun, W, X).verdict == "COUPLED"
    assert not ja.audit(fun, W, X).exact
    assert normwise(ja.grad(fun, num_microbatches=4)(W, X), jitted.grad(fun)(W, X)) > 0.01


def test_a_sum_that_leaves_vmap_is_one_microbatchs():
    def fun(w, x):
        total = jax.vmap(
            lambda row: lax.psum(jnp.tanh(row * w), "example"), axis_name="example", out_axes=None
        )(x)
        return ja.Sum(jnp.sum(total**2))

    assert ja.audit(fun, W, X).verdict == "COUPLED"
