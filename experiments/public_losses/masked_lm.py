"""BERT's masked language model: a mean over the tokens to predict, few or many in a text.

Devlin et al., https://arxiv.org/abs/1810.04805; the loss of Hugging Face's `BertForMaskedLM`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxaccum
from experiments import _text
from experiments.models.bert import BertForMaskedLM, Config
from experiments.public_losses import (
    PublicLoss,
    _texts,
    cross_entropy,
    initial,
    masked_mean,
    mean_of_batch,
    stateless,
)

MODEL = BertForMaskedLM(
    Config(
        vocab_size=_texts.VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=_texts.LENGTH,
    )
)


def plain(params: Any, batch: _texts.Batch) -> jax.Array:
    """The mean over the tokens to predict of the texts at hand."""
    return masked_mean(per_token(params, batch), batch["weight"])


def tagged(params: Any, batch: _texts.Batch) -> jaxaccum.Mean:
    """The mean over those of the whole batch."""
    return mean_of_batch(per_token(params, batch), batch["weight"])


def per_token(params: Any, batch: _texts.Batch) -> jax.Array:
    """Each token's cross entropy."""
    scores = jnp.asarray(MODEL.apply(params, batch["ids"], batch["attention"]))
    return cross_entropy(scores, batch["labels"])


def task(steps: int) -> PublicLoss:
    """8 texts in 4 microbatches."""
    random = np.random.default_rng(2)
    masked = lambda ids: _text.masked(ids, random, vocabulary=_texts.VOCABULARY)
    evaluated = masked(_texts.held_out())
    batches = [masked(ids) for ids in _texts.shuffled(_texts.training(), steps=steps)]
    return stateless(
        plain,
        tagged,
        num_microbatches=_texts.MICROBATCHES,
        evaluate=lambda params: plain(params, evaluated),
        published="BERT, arXiv 1810.04805; Hugging Face",
        alone="divides by the number of its own masked tokens",
        params=initial(MODEL.init, batches[0]["ids"], batches[0]["attention"]),
        batches=batches,
    )
