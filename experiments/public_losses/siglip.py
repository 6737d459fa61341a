"""SigLIP: every image with every caption of the batch, a sigmoid for each pair.

Zhai et al., https://arxiv.org/abs/2303.15343, with its first temperature and bias. The towers are
those of the experiment `contrastive`: image and caption are the upper and lower half of a digit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import contrastive
from experiments.public_losses import PublicLoss, _texts, float64, stateless

BATCH, IMAGES, HELD_OUT = 64, 1797, 256


def plain(params: Any, batch: Any) -> jax.Array:
    """Of all pairs at hand."""
    return pairs(params, *contrastive.embed(params, batch))


def tagged(params: Any, batch: Any) -> jax.Array:
    """Each microbatch scores its images against the captions of all, as devices do in the paper."""
    images, captions = contrastive.embed(params, batch)
    of_all = lax.all_gather(captions, "microbatch", tiled=True)
    return pairs(params, images, of_all, lax.axis_index("microbatch") * len(images))


def pairs(params: Any, images: jax.Array, captions: jax.Array, first: Any = 0) -> jax.Array:
    """The mean over images of the sum over captions; image i's own caption is `first` + i."""
    logits = jnp.exp(params["temperature"]) * images @ captions.T + params["bias"]
    own = first + jnp.arange(len(images), dtype=jnp.int32)
    sign = 2 * jax.nn.one_hot(own, len(captions), dtype=logits.dtype) - 1
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(sign * logits), axis=1))


def task(steps: int) -> PublicLoss:
    """64 pairs in 8 microbatches."""
    halves = np.stack(contrastive.halves(IMAGES), axis=1)
    divided = lambda rows: (rows[:, 0], rows[:, 1])
    # The loss grows with the captions at hand: held-out pairs are compared in batches, too.
    evaluated = halves[-HELD_OUT:].reshape(-1, BATCH, *halves.shape[1:])
    of_batch = lambda params, rows: plain(params, divided(rows))
    batches = _texts.shuffled(halves[:-HELD_OUT], steps=steps, batch_size=BATCH)
    towers = contrastive.towers(64, 2, jnp.float64)["towers"]
    return stateless(
        plain,
        tagged,
        num_microbatches=8,
        evaluate=lambda params: jnp.mean(lax.map(lambda rows: of_batch(params, rows), evaluated)),
        published="SigLIP, arXiv 2303.15343; big_vision",
        alone="compares its own images and captions alone",
        params=float64({"towers": towers, "temperature": np.log(10), "bias": -10.0}),
        batches=[divided(rows) for rows in batches],
    )
