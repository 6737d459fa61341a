"""The handwritten digits that scikit-learn ships, and the small networks that read them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import jaxaccum

Params = Any


def data() -> tuple[jax.Array, jax.Array]:
    """1797 images of 8 × 8, scaled to [0, 1], and their labels."""
    digits: Any = load_digits()
    return jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target, jnp.int32)


def network(seed: int, hidden: int) -> Params:
    """One hidden layer."""
    rng = np.random.default_rng(seed)
    w = lambda m, n: jnp.asarray(rng.normal(size=(m, n)) / np.sqrt(m), jnp.float32)
    return {"w": w(64, hidden), "b": jnp.zeros(hidden), "out": w(hidden, 10), "bias": jnp.zeros(10)}


def loss(params: Params, x: jax.Array, y: jax.Array) -> Any:
    """The cross entropy of one microbatch, a mean over its examples."""
    logits = jnp.tanh(x @ params["w"] + params["b"][None]) @ params["out"] + params["bias"][None]
    logp = jax.nn.log_softmax(logits)
    return jaxaccum.Mean(-jnp.sum(jnp.take_along_axis(logp, y[:, None], axis=1)), len(y))


def mean_loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The same, of a whole batch."""
    return jaxaccum.full_batch(loss, in_axes=(None, 0, 0))(params, x, y)
