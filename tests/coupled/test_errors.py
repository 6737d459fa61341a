"""Bad input of coupled losses: refused when traced, with the line of the collective and what to do
instead."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxaccum as ja
from tests.support import jitted
from tests.support.helpers import EXACT, UNDECIDED, normwise, refused

AXIS = "microbatch"
W, X = jnp.ones((3, 3)), jnp.arange(18.0).reshape(6, 3)
total = lambda h: lax.psum(h, AXIS)


def looped(w, x):
    return lax.while_loop(
        lambda c: jnp.sum(c) < 10, total, lax.stop_gradient(jnp.sum(x @ w))
    ) * jnp.sum(w)


def branched(w, x):
    return lax.cond(jnp.sum(w) > 0, total, lambda h: h, jnp.sum(x @ w))


@jax.custom_vjp
def ruled(h):
    return total(h)


ruled.defvjp(lambda h: (total(h), None), lambda _, ct: (ct,))


@jax.custom_jvp
def derived(h):
    return total(h)


derived.defjvp(lambda primals, tangents: (total(primals[0]), tangents[0]))


def nested(w, x):
    inner = ja.microbatch(
        lambda w, x: jnp.mean(x @ w - lax.pmean(jnp.mean(x @ w), AXIS)), num_microbatches=2
    )
    return inner(w, x)


def grouped(w, x):
    return lax.psum(jnp.sum(x @ w), AXIS, axis_index_groups=[[0], [1]])


def plain(w, x):
    return jnp.mean((x @ w - lax.pmean(jnp.mean(x @ w), AXIS)) ** 2)


LINE = "test_errors.py:"
ROWS = [
    (looped, {"num_microbatches": 2}, ["psum", "'microbatch'", "while", LINE, "lax.scan"]),
    (branched, {"num_microbatches": 2}, ["psum", "lax.cond", LINE, "before the branches"]),
    (
        lambda w, x: ruled(jnp.sum(x @ w)),
        {"num_microbatches": 2},
        ["psum", "custom_vjp", LINE, "outside"],
    ),
    (
        lambda w, x: derived(jnp.sum(x @ w)),
        {"num_microbatches": 2},
        ["psum", "custom_jvp", LINE, "outside"],
    ),
    (nested, {"num_microbatches": 3}, ["psum", "'microbatch'", LINE, "axis_name"]),
    (grouped, {"num_microbatches": 2}, ["psum", "axis_index_groups", LINE]),
    (
        plain,
        {"num_microbatches": 4},
        ["psum", LINE, "2 of 2 examples", "2 of 1", "pad_batch", "mask"],
    ),
    (
        plain,
        {"microbatch_size": 4},
        ["psum", LINE, "1 of 4 examples", "1 of 2", "pad_batch", "mask"],
    ),
]


@pytest.mark.parametrize(
    ("fun", "options", "says"), ROWS, ids=[" ".join(says[:3]) for _, _, says in ROWS]
)
def test_is_refused(fun, options, says):
    refused(lambda: ja.value_and_grad(fun, **options)(W, X), *says)
    refused(lambda: jitted.grad(ja.microbatch(fun, **options))(W, X), *says)


def test_an_axis_of_that_name_around_it():
    mapped = jax.vmap(ja.grad(plain, num_microbatches=2), (None, 0), axis_name=AXIS)
    refused(lambda: mapped(W, jnp.stack([X, X])), "psum", LINE, "axis_name")


def test_a_carried_state_of_one_microbatch():
    def fun(w, x, state):
        return plain(w, x), ja.Carry(state + jnp.sum(x))

    options = {"in_axes": (None, 0, ja.CARRY), "has_aux": True, "num_microbatches": 2}
    refused(
        lambda: ja.value_and_grad(fun, **options)(W, X, 0.0),
        "Carry",
        "differs between microbatches",
        "pmean",
    )


def test_a_state_that_is_drawn_from_a_key():
    """What a collective makes the same for all microbatches, a key of their own makes different
    again."""

    def fun(w, x, state, key):
        mean = lax.pmean(jnp.mean(x), AXIS)
        return plain(w, x), ja.Carry(state + mean * jax.random.uniform(key))

    options = {"in_axes": (None, 0, ja.CARRY, ja.KEY), "has_aux": True, "num_microbatches": 2}
    step = ja.value_and_grad(fun, **options)
    refused(lambda: step(W, X, 0.0, jax.random.key(0)), "Carry", "random stream")


def test_a_carried_state_is_updated_once():
    def fun(w, x, state):
        return plain(w, x), ja.Carry(0.9 * state + 0.1 * lax.pmean(jnp.mean(x), AXIS))

    options = {"in_axes": (None, 0, ja.CARRY), "has_aux": True, "num_microbatches": 3}
    (_, state), _ = ja.value_and_grad(fun, **options)(W, X, 2.0)
    assert float(state) == pytest.approx(0.9 * 2.0 + 0.1 * 8.5, abs=1e-14)


@UNDECIDED
def test_distinct_names_nest():
    """Each microbatch is normalized over its own two halves, and the loss over all microbatches."""
    inner = lambda w, x: ja.Concat(x @ w - lax.pmean(jnp.mean(x @ w), "inner"))
    halves = ja.microbatch(inner, num_microbatches=2, axis_name="inner")

    def outer(w, x):
        h = halves(w, x)
        return jnp.mean((h - lax.pmean(jnp.mean(h**2), AXIS)) ** 2)

    def whole(w):
        h = jnp.concatenate([x @ w - jnp.mean(x @ w) for x in (X[:2], X[2:4], X[4:])])
        return jnp.mean((h - jnp.mean(h**2)) ** 2)

    w = W * jnp.arange(3.0)[None]
    actual = ja.value_and_grad(outer, num_microbatches=3)(w, X)
    assert normwise(actual, jitted.value_and_grad(whole)(w)) < EXACT
