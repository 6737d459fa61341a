"""Real text at hand: the clauses of the license, as characters and as counts of letters."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

LICENSE = pathlib.Path(__file__).parents[2] / "LICENSE"


def clauses() -> list[str]:
    """The clauses of this project's license: English of unequal length that never changes."""
    text = re.sub(r"\s+", " ", LICENSE.read_text("ascii"))
    found = [clause.strip() for clause in re.split(r"[.,;:()\"]", text)]
    return list(dict.fromkeys(clause for clause in found if clause.count(" ") > 0))


def tokens(rows: int, length: int) -> dict[str, jax.Array]:
    """Clauses as characters, `ids` of shape (rows, length); `mask` is 1.0 where one is."""
    encoded = [clause.encode("ascii")[:length] for clause in clauses()[:rows]]
    ids = np.stack([np.frombuffer(row.ljust(length, b"\0"), np.uint8) for row in encoded])
    return {"ids": jnp.asarray(ids, jnp.int32), "mask": jnp.asarray(ids > 0, float)}


def letters(rows: int) -> dict[str, jax.Array]:
    """A clause as counts of its letters, `x` (rows, 26), and of its words: `label` ≤ 9."""
    chosen = clauses()[:rows]
    counts = [[clause.lower().count(chr(97 + i)) for i in range(26)] for clause in chosen]
    words = [min(len(clause.split()), 9) for clause in chosen]
    return {"x": jnp.asarray(counts, float) / 4, "label": jnp.asarray(words, jnp.int32)}
