"""DP-SGD: a `Sum` of clipped gradients of examples, and noise once per batch.

Command   python -m experiments.recipes.dp_sgd

A sum over microbatches is exact in the usual loop too. What goes wrong there is the clipping, of
a microbatch in the place of an example, which ends the guarantee of privacy. The noise is the same
in both.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import jaxaccum
from experiments.recipes import _check, _texts

OPT = optax.sgd(0.1)
CLIP, NOISE = 0.5, 1.0


def loss(params, example):
    """Of one text."""
    logits = jnp.tanh(example["x"] @ params["hidden"]) @ params["out"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])


def clipped(grads):
    """A gradient of norm at most `CLIP`."""
    norm = optax.tree.norm(grads)
    return jax.tree.map(lambda g: g * jnp.minimum(1.0, CLIP / norm), grads)


def noisy(total, count, key):
    """The mean of `count` gradients with the noise that hides any one of them."""
    leaves, treedef = jax.tree.flatten(total)
    keys = jax.random.split(key, len(leaves))
    noise = [
        NOISE * CLIP * jax.random.normal(k, leaf.shape)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(
        [(leaf + own) / count for leaf, own in zip(leaves, noise, strict=True)]
    )


def plain(params, batch, key):
    """The training step as anybody would write it."""

    def clipped_sum(params, batch):
        grads = jax.vmap(lambda example: clipped(jax.grad(loss)(params, example)))(batch)
        return jax.tree.map(lambda g: jnp.sum(g, axis=0), grads)

    grads = noisy(clipped_sum(params, batch), len(batch["x"]), key)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def accumulated(params, batch, key):
    """The same step, the gradients of 4 examples at a time."""

    @functools.partial(jaxaccum.microbatch, microbatch_size=4)
    def clipped_sum(params, batch):
        grads = jax.vmap(lambda example: clipped(jax.grad(loss)(params, example)))(batch)
        return jaxaccum.Sum(jax.tree.map(lambda g: jnp.sum(g, axis=0), grads))

    grads = noisy(clipped_sum(params, batch), len(batch["x"]), key)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def usual(params, batch, key):
    """What is written without gradients of examples: each microbatch's mean gradient is clipped."""
    mean_loss = lambda params, part: jnp.mean(jax.vmap(loss, (None, 0))(params, part))
    grads = [clipped(jax.grad(mean_loss)(params, part)) for part in _check.parts(batch, 4)]
    grads = noisy(jax.tree.map(lambda *g: 4 * sum(g), *grads), len(batch["x"]), key)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def check() -> _check.Errors:
    """One step on 16 texts."""
    params, key = _check.normal(hidden=(26, 16), out=(16, 10)), jax.random.key(1)
    full, ours, other = (
        jax.jit(step)(params, _texts.letters(16), key) for step in (plain, accumulated, usual)
    )
    return _check.errors(start=params, full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
