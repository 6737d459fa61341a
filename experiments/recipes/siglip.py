"""SigLIP: a collective gathers the captions of the whole batch for each image.

Command   python -m experiments.recipes.siglip
"""

import jax
import jax.numpy as jnp
import optax

import jaxaccum
from experiments.recipes import _check
from experiments.recipes.clip import captioned, parameters, unit

OPT = optax.sgd(0.1)


def embedded(params, batch):
    """Images and captions as rows of length 1."""
    images, captions = batch["image"] @ params["image"], batch["caption"] @ params["text"]
    return unit(jnp.tanh(images)), unit(jnp.tanh(captions))


def plain(params, batch):
    """The training step as anybody would write it."""

    def loss_fn(params, batch):
        images, captions = embedded(params, batch)
        number = batch["number"]
        sign = jnp.where(batch["number"][:, None] == number[None], 1.0, -1.0)
        logits = jnp.exp(params["scale"]) * images @ captions.T + params["bias"]
        return -jax.nn.log_sigmoid(sign * logits).sum(axis=1).mean()

    grads = jax.grad(loss_fn)(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def accumulated(params, batch):
    """The same step in 4 microbatches."""

    def loss_fn(params, batch):
        images, captions = embedded(params, batch)
        captions, number = jax.lax.all_gather((captions, batch["number"]), "microbatch", tiled=True)
        sign = jnp.where(batch["number"][:, None] == number[None], 1.0, -1.0)
        logits = jnp.exp(params["scale"]) * images @ captions.T + params["bias"]
        return -jax.nn.log_sigmoid(sign * logits).sum(axis=1).mean()

    grads = jaxaccum.grad(loss_fn, num_microbatches=4)(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def usual(params, batch):
    """The usual loop: an image meets the captions of its own microbatch alone."""
    return _check.mean([plain(params, part) for part in _check.parts(batch, 4)])


def check() -> _check.Errors:
    """One step on 16 digits and their names."""
    params, batch = (
        parameters() | {"bias": jnp.asarray(-10.0)},
        captioned(16) | {"number": jnp.arange(16)},
    )
    full, ours, other = (jax.jit(step)(params, batch) for step in (plain, accumulated, usual))
    return _check.errors(start=params, full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
