"""What tests share: how far two gradients are apart, what an error says, and a host loop as the
oracle."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxaccum.testing.bounds import normwise as normwise

EXACT = 1e-12
"""Normwise, in float64: thousands of roundings of 1e-16, and a thousandth of a billionth of any
wrong rule's error."""


INEXACT = pytest.mark.filterwarnings("ignore:.*exact over microbatches")
"""For tests whose losses depend on the partition on purpose: the audit warns of them, and nothing
else is silenced."""
UNDECIDED = pytest.mark.filterwarnings("ignore:.*may not be exact over microbatches")
"""For tests with exact losses that the audit does not follow: it says so, and that is all that is
silenced."""


def same(actual, expected) -> bool:
    """Bitwise equality of all leaves."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(e).tobytes() for a, e in pairs)


def bits(tree):
    """The tree with a key as the integers that it is made of, and numbers as arrays."""
    is_key = lambda x: jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key)
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else jnp.asarray(x), tree)


def refused(fun, *says, error=(ValueError, TypeError)):
    """`fun` raises one of ours, and its message has every fragment: the argument, both numbers,
    what to pass."""
    with pytest.raises(error) as info:
        fun()
    message = str(info.value)
    missing = [fragment for fragment in says if fragment not in message]
    assert not missing, f"{missing} not in: {message}"


def parts_of(batch, sizes):
    """The microbatches of a host loop: consecutive rows of every leaf."""
    bounds = np.cumsum([0, *sizes])
    return [jax.tree.map(lambda x, a=a, b=b: x[a:b], batch) for a, b in itertools.pairwise(bounds)]


def sizes_of(batch_size, *, num_microbatches=None, microbatch_size=None):
    """The sizes that the options ask for, by arithmetic of their own."""
    if microbatch_size is None:
        return [len(rows) for rows in np.array_split(np.arange(batch_size), num_microbatches)]
    return [min(microbatch_size, batch_size - i) for i in range(0, batch_size, microbatch_size)]


def mean_of_means(loss, params, batches):
    """The classic wrong answer: each microbatch's own gradient, averaged."""
    gradient = jax.jit(jax.grad(loss))
    grads = [gradient(params, batch) for batch in batches]
    return jax.tree.map(lambda *g: sum(g) / len(g), *grads)


def data(*shape, seed=0, dtype=jnp.float64):
    """Reproducible numbers of the given shape."""
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)
