"""A small language model for the recipes that are not about a model: the next character."""

import jax
import jax.numpy as jnp
import optax


def parameters():
    """The weights, of the default dtype."""
    shapes = {"embed": (128, 16), "first": (16, 32), "second": (16, 32), "out": (32, 128)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shapes[name]) / 4
        for name, key in zip(shapes, keys, strict=True)
    }


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
