"""Packed texts: several in one row, kept apart by attention, under T5X's loss with its z-loss.

Raffel et al., https://arxiv.org/abs/1910.10683: cross entropy + 1e-4 · log² Z, over the number of
tokens. A text's last token has no next one, so a row of many texts counts fewer tokens than others.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxaccum
from experiments import _text
from experiments.models.language import Decoder
from experiments.public_losses import (
    PublicLoss,
    _texts,
    cross_entropy,
    initial,
    masked_mean,
    mean_of_batch,
    stateless,
)

MODEL = Decoder(_texts.VOCABULARY)
LENGTH, Z_LOSS = 48, 1e-4


def plain(params: Any, batch: _texts.Batch) -> jax.Array:
    """The mean over the tokens of the rows at hand."""
    return masked_mean(per_token(params, batch), batch["mask"])


def tagged(params: Any, batch: _texts.Batch) -> jaxaccum.Mean:
    """The mean over the tokens of the whole batch."""
    return mean_of_batch(per_token(params, batch), batch["mask"])


def per_token(params: Any, batch: _texts.Batch) -> jax.Array:
    """Each token's cross entropy, and a little of its normalizer's square."""
    segments = batch["segments"]
    scores = jnp.asarray(MODEL.apply(params, batch["ids"], segments, method="scores"))
    z_loss = Z_LOSS * jax.nn.logsumexp(scores, axis=-1) ** 2
    return cross_entropy(scores, batch["targets"]) + z_loss


def packed(texts: np.ndarray) -> np.ndarray:
    """Rows (rows, 2, length), filled text after text: tokens, and the number of their text."""
    rows, used, number = [], LENGTH, 0
    for text in texts:
        tokens = text[text != _text.PAD]
        if used + len(tokens) > LENGTH:
            rows.append(np.zeros((2, LENGTH), np.int32))  # 0 is padding, and the number of none
            used, number = 0, 0
        number += 1
        rows[-1][:, used : used + len(tokens)] = tokens, np.full(len(tokens), number)
        used += len(tokens)
    return np.stack(rows)


def next_tokens(rows: np.ndarray) -> _texts.Batch:
    """As of texts in rows of their own, but a token counts where the one before is of its text."""
    ids, segments = rows[:, 0], rows[:, 1]
    same = segments[:, 1:] == segments[:, :-1]
    batch = _texts.next_tokens(ids)
    return batch | {"segments": segments[:, :-1], "mask": batch["mask"] * same}


def task(steps: int) -> PublicLoss:
    """8 rows in 4 microbatches."""
    rows = _texts.shuffled(packed(_texts.training()), steps=steps)
    batches = [next_tokens(chosen) for chosen in rows]
    evaluated = next_tokens(packed(_texts.held_out()))
    return stateless(
        plain,
        tagged,
        num_microbatches=_texts.MICROBATCHES,
        evaluate=lambda params: plain(params, evaluated),
        published="T5, arXiv 1910.10683; T5X",
        alone="divides by the number of its own tokens",
        params=initial(MODEL.init, batches[0]["ids"]),
        batches=batches,
    )
