"""Coupled programs: collectives over the loop's axis, against the same function under `jax.vmap(axis_name=…)`."""

import jax
import jax.numpy as jnp
import pytest
from helpers import EXACT, data, normwise
from jax import lax

import jaxaccum as ja

AXIS = "microbatch"
W = {"a": data(4, 5), "b": data(5, 5), "scale": data(5)}
X = data(8, 4, seed=1) * jnp.arange(1.0, 9.0)[:, None] / 4
SETTINGS = ["min", "store", None, 800]


def normalize(h):
    """Batch normalization over all microbatches; returns its mean too."""
    mean = lax.pmean(jnp.mean(h, axis=0), AXIS)
    var = lax.pmean(jnp.mean(h**2, axis=0), AXIS) - mean**2
    return (h - mean[None]) * lax.rsqrt(var + 1e-3)[None], mean


def network(w, x):
    """Two normalizations and a skip connection."""
    h, first = normalize(jnp.tanh(x @ w["a"]))
    g, second = normalize(jax.nn.relu(h @ w["b"]) * w["scale"][None])
    return g + h, (first, second)


def loss(w, x):
    """An untagged mean, and one output of every kind."""
    h, means = network(w, x)
    aux = {"means": ja.Last(means), "rows": ja.Concat(h), "total": ja.Sum(jnp.sum(x)), "max": ja.Max(jnp.max(h))}
    return jnp.mean(h**3) + jnp.mean(h @ w["b"]), aux


def full(fun, **options):
    return jax.jit(jax.value_and_grad(ja.full_batch(fun), has_aux=True, **options))


@pytest.mark.parametrize("memory", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "options", [{"num_microbatches": 2}, {"microbatch_size": 1}, {"num_microbatches": 4, "split": "strided"}], ids=str
)
def test_value_gradient_and_aux_are_the_full_batchs(memory, options):
    ours = ja.value_and_grad(loss, argnums=(0, 1), has_aux=True, memory=memory, **options)
    (value, aux), grads = jax.jit(ours)(W, X)
    (truth, expected), wanted = full(loss, argnums=(0, 1))(W, X)
    assert normwise(value, truth) < EXACT
    assert normwise(grads, wanted) < EXACT
    assert normwise(aux, expected) < EXACT
