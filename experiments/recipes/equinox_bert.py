"""Equinox: a BERT with dropout, on masked texts.

Command   python -m experiments.recipes.equinox_bert

The loss splits one key over its texts, as Equinox's models want it. In microbatches, each text has
the key that it has in the whole batch.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jaxaccum
from experiments.recipes import _check, _texts

OPT = optax.sgd(0.1)
HIDDEN = 127  # the character that stands for one to be guessed


class Bert(eqx.Module):
    """Attention over all characters of one text, with dropout."""

    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 3)
        self.embed, self.norm = eqx.nn.Embedding(128, 16, key=keys[0]), eqx.nn.LayerNorm(16)
        self.attention = eqx.nn.MultiheadAttention(2, 16, dropout_p=0.1, key=keys[1])
        self.head = eqx.nn.Linear(16, 128, key=keys[2])

    def __call__(self, ids, key):
        """The logits of one text."""
        x = jax.vmap(self.embed)(ids)
        x = jax.vmap(self.norm)(x + self.attention(x, x, x, key=key))
        return jax.vmap(self.head)(x)


def cross_entropy(model, batch, key):
    """One number for each character, and 1.0 where it was hidden."""
    keys = jax.random.split(key, len(batch["ids"]))
    hidden = batch["mask"] * (batch["ids"] % 7 == 3)
    logits = jax.vmap(model)(jnp.where(hidden > 0, HIDDEN, batch["ids"]), keys)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["ids"]), hidden


def plain(model, opt_state, batch, key):
    """The training step as anybody would write it."""

    def loss(model, batch, key):
        ce, hidden = cross_entropy(model, batch, key)
        return jnp.sum(ce * hidden) / jnp.sum(hidden)

    grads = eqx.filter_grad(loss)(model, batch, key)
    updates, opt_state = OPT.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state


def accumulated(model, opt_state, batch, key):
    """The same step in 4 microbatches."""

    def loss(model, batch, key):
        ce, hidden = cross_entropy(model, batch, key)
        return jaxaccum.Mean(jnp.sum(ce * hidden), jnp.sum(hidden))

    loss = jaxaccum.microbatch(loss, num_microbatches=4, in_axes=(None, 0, jaxaccum.BATCH_KEY))
    grads = eqx.filter_grad(loss)(model, batch, key)
    updates, opt_state = OPT.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state


def usual(model, opt_state, batch, key):
    """The usual loop: each microbatch folds the key, and divides by its own characters."""
    parts = _check.parts(batch, 4)
    ends = [
        plain(model, opt_state, part, jax.random.fold_in(key, i))[0] for i, part in enumerate(parts)
    ]
    return _check.mean([eqx.filter(model, eqx.is_inexact_array) for model in ends]), opt_state


def check() -> _check.Errors:
    """One step on 16 texts."""
    model = Bert(jax.random.key(0))
    arrays = lambda model: eqx.filter(model, eqx.is_inexact_array)
    args = model, OPT.init(arrays(model)), _texts.tokens(16, 48), jax.random.key(1)
    ends = [arrays(eqx.filter_jit(step)(*args)[0]) for step in (plain, accumulated, usual)]
    return _check.errors(start=arrays(model), full=ends[0], ours=ends[1], usual=ends[2])


if __name__ == "__main__":
    _check.main(check)
