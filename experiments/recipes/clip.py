"""CLIP: every image meets every caption of the batch; the towers run in microbatches.

Command   python -m experiments.recipes.clip
"""

import functools

import jax
import jax.numpy as jnp
import optax

import jaxaccum
from experiments.recipes import _check, _digits

OPT = optax.sgd(0.1)
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def captioned(rows):
    """Digits, and how often each letter is in their names."""
    batch = _digits.digits(rows)
    letters = jnp.array([[float(name.count(chr(97 + i))) for i in range(26)] for name in NAMES])
    return {"image": batch["x"], "caption": letters[batch["label"]]}


def unit(z):
    """Rows of length 1."""
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def parameters():
    """Both towers, and the scale of the logits."""
    return _check.normal(image=(64, 16), text=(26, 16)) | {"scale": jnp.asarray(2.0)}


def plain(params, batch):
    """The training step as anybody would write it."""

    def towers(params, batch):
        images, captions = batch["image"] @ params["image"], batch["caption"] @ params["text"]
        return unit(jnp.tanh(images)), unit(jnp.tanh(captions))

    def loss_fn(params, batch):
        images, captions = towers(params, batch)
        logits, labels = jnp.exp(params["scale"]) * images @ captions.T, jnp.arange(len(images))
        ce = optax.softmax_cross_entropy_with_integer_labels
        return (ce(logits, labels).mean() + ce(logits.T, labels).mean()) / 2

    grads = jax.grad(loss_fn)(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def accumulated(params, batch):
    """The same step with towers in 4 microbatches."""

    @functools.partial(jaxaccum.microbatch, num_microbatches=4)
    def towers(params, batch):
        images, captions = batch["image"] @ params["image"], batch["caption"] @ params["text"]
        return jaxaccum.Concat((unit(jnp.tanh(images)), unit(jnp.tanh(captions))))

    def loss_fn(params, batch):
        images, captions = towers(params, batch)
        logits, labels = jnp.exp(params["scale"]) * images @ captions.T, jnp.arange(len(images))
        ce = optax.softmax_cross_entropy_with_integer_labels
        return (ce(logits, labels).mean() + ce(logits.T, labels).mean()) / 2

    grads = jax.grad(loss_fn)(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def usual(params, batch):
    """The usual loop: an image meets the captions of its own microbatch alone."""
    return _check.mean([plain(params, part) for part in _check.parts(batch, 4)])


def check() -> _check.Errors:
    """One step on 16 digits and their names."""
    params, batch = parameters(), captioned(16)
    full, ours, other = (jax.jit(step)(params, batch) for step in (plain, accumulated, usual))
    return _check.errors(start=params, full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
