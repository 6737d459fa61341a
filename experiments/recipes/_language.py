"""A small language model for the recipes that are not about a model: the next character."""

import jax.numpy as jnp
import optax

from experiments.recipes import _check


def parameters():
    """The weights, of the default dtype."""
    return _check.normal(embed=(128, 16), first=(16, 32), second=(16, 32), out=(32, 128))


def logits_and_labels(params, batch):
    """Logits and label of each character from the third on; 1.0 where it is not padding."""
    before, after = params["embed"][batch["ids"][:, :-2]], params["embed"][batch["ids"][:, 1:-1]]
    logits = jnp.tanh(before @ params["first"] + after @ params["second"]) @ params["out"]
    return logits, batch["ids"][:, 2:], batch["mask"][:, 2:]


def cross_entropy(params, batch):
    """One number for each character, and 1.0 where it is not padding."""
    logits, labels, mask = logits_and_labels(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), mask


def loss(params, batch):
    """The mean over all characters."""
    ce, mask = cross_entropy(params, batch)
    return jnp.sum(ce * mask) / jnp.sum(mask)
