"""A researcher's own accumulators, and what is refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxaccum as ja
from jaxaccum import accumulators as acc
from tests.accumulators.test_accumulators import (
    AXES,
    M,
    W,
    X,
    expected,
    loss,
    per_example,
    plain_mean,
)
from tests.support.helpers import EXACT, normwise, refused


def agreement_filter(threshold):
    """Gradient agreement filtering (arXiv 2412.18052): take in a microbatch whose cosine to the sum
    is high enough."""
    dot = lambda a, b: sum(
        jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )

    def update(state, g, weight, index):
        total, count = state
        cosine = dot(total, g) / jnp.sqrt(dot(total, total) * dot(g, g))
        agrees = (count == 0) | (cosine >= threshold)
        return jax.tree.map(
            lambda t, x: jnp.where(agrees, t + x, t), total, g
        ), count + agrees.astype(count.dtype)

    finalize = lambda state: (jax.tree.map(lambda t: t / state[1], state[0]), {"agreed": state[1]})
    return acc.Accumulator(
        lambda p: (jax.tree.map(jnp.zeros_like, p), jnp.zeros(())), update, finalize
    )


def test_gradient_agreement_filtering_in_ten_lines():
    ones = jnp.ones(7)
    step = jax.jit(
        ja.grad(loss, in_axes=AXES, microbatch_size=1, accumulator=agreement_filter(0.2))
    )
    grads, report = step(W, X, ones)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    total, count = np.zeros(9), 0
    for row in X[:, None]:
        g = flat(jax.grad(expected)(W, row, jnp.ones(1)))
        if count == 0 or total @ g >= 0.2 * np.linalg.norm(total) * np.linalg.norm(g):
            total, count = total + g, count + 1
    assert 1 < count < 7
    assert int(report["agreed"]) == count
    assert normwise(flat(grads), total / count) < EXACT


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fun", "says"),
    [
        (lambda w, x, m: {"a": loss(w, x, m), "b": loss(w, x, m)}, "2 terms"),
        (lambda w, x, m: ja.Sum(jnp.sum(per_example(w, x))), "Sum"),
        (lambda w, x, m: ja.Mean(jnp.sum(x), jnp.sum(w["a"]) ** 2), "stop_gradient"),
        (
            lambda w, x, m: ja.Mean(lax.psum(jnp.sum(w["a"]) * jnp.sum(x), "microbatch"), 1.0),
            "collective",
        ),
    ],
)
def test_one_denominator_is_needed(fun, says):
    for made in (acc.skip_nonfinite(), plain_mean()):
        step = ja.value_and_grad(fun, in_axes=AXES, num_microbatches=1, accumulator=made)
        refused(lambda step=step: step(W, X, M), "custom accumulator", says)


def test_what_is_no_record_and_what_breaks_its_word():
    run = lambda a, **o: ja.value_and_grad(
        loss, in_axes=AXES, microbatch_size=2, accumulator=a, **o
    )(W, X, M)
    own = lambda **functions: types.SimpleNamespace(**(vars(plain_mean()) | functions))
    refused(lambda: run("mean"), "accumulator", "'mean'", "init", "in_place()")
    refused(lambda: run(acc.in_place), "accumulator", "update")
    refused(lambda: run(own(update=lambda s, g, w, i: s[0])), "update", "structure")
    refused(lambda: run(own(update=lambda s, g, w, i: (s[0], i))), "update", "int32", "float")
    refused(lambda: run(own(finalize=lambda s: s[0])), "finalize", "(grads, report)")
    refused(lambda: run(own(finalize=lambda s: ([s[1]], None))), "finalize", "structure")
    refused(lambda: run(acc.compensated(), argnums=1), "argument 1", "argnums")
