"""Batches of real text for the language models, and texts held out."""

import functools
from typing import Any

import numpy as np

from experiments import _text

LENGTH, VOCABULARY, HELD_OUT = 32, 500, 64
BATCH, MICROBATCHES = 8, 4  # the seed's question: 4 microbatches of 2 against 8 at once
Batch = dict[str, Any]  # numpy outside, traced inside


@functools.cache
def corpus() -> _text.Corpus:
    """The texts, cut to 32 tokens."""
    return _text.corpus(length=LENGTH, vocabulary=VOCABULARY)


def training() -> np.ndarray:
    """The texts to train on."""
    return corpus().ids[HELD_OUT:]


def held_out() -> np.ndarray:
    """The texts to evaluate on."""
    return corpus().ids[:HELD_OUT]


def next_tokens(ids: np.ndarray) -> Batch:
    """Tokens, those that follow them, and which of these count: all but padding."""
    counts = ids[:, 1:] != _text.PAD
    return {"ids": ids[:, :-1], "targets": ids[:, 1:], "mask": counts.astype(float)}


def shuffled(rows: np.ndarray, *, steps: int, batch_size: int = BATCH) -> list[np.ndarray]:
    """`steps` batches of the rows, epoch after epoch, each in a new order."""
    random = np.random.default_rng(1)
    epochs = -(-steps * batch_size // len(rows))
    order = np.concatenate([random.permutation(len(rows)) for _ in range(epochs)])
    return [rows[chosen] for chosen in order[: steps * batch_size].reshape(steps, batch_size)]
