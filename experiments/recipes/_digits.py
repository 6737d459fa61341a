"""The handwritten digits that scikit-learn ships."""

import jax
import jax.numpy as jnp
from sklearn.datasets import load_digits


def digits(rows: int) -> dict[str, jax.Array]:
    """Images of 8 × 8 as `x` of shape (rows, 64), in [0, 1], and their `label`."""
    data, label = load_digits(return_X_y=True)
    return {"x": jnp.asarray(data[:rows] / 16), "label": jnp.asarray(label[:rows], jnp.int32)}
