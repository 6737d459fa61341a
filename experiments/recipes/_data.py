"""Real data at hand: sentences of unequal length, and handwritten digits."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

LICENSE = pathlib.Path(__file__).parents[2] / "LICENSE"


def clauses() -> list[str]:
    """The clauses of the license of this project: English text that never changes, of 2 to 60 words."""
    text = re.sub(r"\s+", " ", LICENSE.read_text("ascii"))
    found = [clause.strip() for clause in re.split(r"[.,;:()\"]", text)]
    return list(dict.fromkeys(clause for clause in found if clause.count(" ") > 0))


def tokens(rows: int, length: int) -> dict[str, jax.Array]:
    """Clauses as characters: `ids` of shape (rows, length), and `mask`, 1.0 where a character is and 0.0 behind."""
    encoded = [clause.encode("ascii")[:length] for clause in clauses()[:rows]]
    ids = np.stack([np.frombuffer(row.ljust(length, b"\0"), np.uint8) for row in encoded])
    return {"ids": jnp.asarray(ids, jnp.int32), "mask": jnp.asarray(ids > 0, float)}


def digits(rows: int) -> dict[str, jax.Array]:
    """The handwritten digits that scikit-learn ships: `x` of shape (rows, 64) in [0, 1], and their `label`."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return {
        "x": jnp.asarray(loaded.data[:rows] / 16),  # pyright: ignore[reportAttributeAccessIssue]
        "label": jnp.asarray(loaded.target[:rows], jnp.int32),  # pyright: ignore[reportAttributeAccessIssue]
    }
