"""A ResNet with BatchNorm, whose statistics are those of the whole batch.

He et al., https://arxiv.org/abs/1512.03385. The usual loop normalizes each microbatch by itself,
and its running statistics move with each.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxaccum
from experiments.public_losses import (
    Batch,
    Gradient,
    Params,
    PublicLoss,
    State,
    _texts,
    cross_entropy,
    initial,
    usual,
    whole,
)

CLASSES, TEST, BATCH, MICROBATCHES = 10, 360, 32, 8


class ResNet(nn.Module):
    """The scores of images: a stem, then basic blocks, each of which halves the image."""

    axis_name: str | None = None
    widths: tuple[int, ...] = (8, 16)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images have the shape (examples, height, width, channels)."""
        x = nn.relu(self.normalized(self.convolved(x, self.widths[0], 3, 1), train))
        for width in self.widths:
            y = nn.relu(self.normalized(self.convolved(x, width, 3, 2), train))
            y = self.normalized(self.convolved(y, width, 3, 1), train)
            x = nn.relu(y + self.normalized(self.convolved(x, width, 1, 2), train))
        return nn.Dense(CLASSES)(jnp.mean(x, axis=(1, 2)))

    @nn.nowrap
    def convolved(self, x: jax.Array, width: int, size: int, stride: int) -> jax.Array:
        """A convolution without bias, as before every normalization."""
        return nn.Conv(width, (size, size), stride, padding=size // 2, use_bias=False)(x)

    @nn.nowrap
    def normalized(self, x: jax.Array, train: bool) -> jax.Array:
        """Over the images at hand; over all microbatches where the axis is named."""
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)
        return norm(x)


MODEL = ResNet()


def loss(model: ResNet, params: Params, state: State, batch: Batch) -> tuple[jax.Array, State]:
    """The mean over images, and the new running statistics."""
    variables = {"params": params, "batch_stats": state}
    pair: Any = model.apply(variables, batch["x"], True, mutable=["batch_stats"])
    scores, new = pair
    return jnp.mean(cross_entropy(scores, batch["y"])), new["batch_stats"]


def plain(params: Params, state: State, batch: Batch) -> tuple[jax.Array, State]:
    """BatchNorm over the images at hand."""
    return loss(MODEL, params, state, batch)


def tagged(params: Params, state: State, batch: Batch) -> tuple[jax.Array, jaxaccum.Last]:
    """BatchNorm over all microbatches; its new statistics are the same in each."""
    value, new = loss(MODEL.clone(axis_name="microbatch"), params, state, batch)
    return value, new


def exact() -> Gradient:
    """The gradient, and the new state."""
    step = jax.jit(
        jaxaccum.value_and_grad(
            tagged, has_aux=True, num_microbatches=MICROBATCHES, in_axes=(None, None, 0)
        )
    )

    def gradient(params: Params, state: State, batch: Batch) -> tuple[Params, State]:
        (_, new), grads = step(params, state, batch)
        return grads, new

    return gradient


def task(steps: int) -> PublicLoss:
    """32 images in 8 microbatches; evaluated as in use, by the running statistics."""
    images, labels = load_digits(return_X_y=True)
    digits = {"x": images.reshape(-1, 8, 8, 1) / 16, "y": labels}
    chosen = lambda rows: jax.tree.map(lambda leaf: leaf[rows], digits)
    training, test = np.arange(len(labels) - TEST), chosen(slice(-TEST, None))
    variables = initial(functools.partial(MODEL.init, train=True), digits["x"][:2])

    def evaluate(params: Params, state: State) -> jax.Array:
        scores: Any = MODEL.apply({"params": params, "batch_stats": state}, test["x"], False)
        return jnp.mean(cross_entropy(scores, test["y"]))

    order = _texts.shuffled(training, steps=steps, batch_size=BATCH)
    return PublicLoss(
        published="ResNet, arXiv 1512.03385; flax/examples/imagenet",
        alone="normalizes by its own statistics, and moves the running ones",
        params=variables["params"],
        state=variables["batch_stats"],
        batches=[chosen(rows) for rows in order],
        whole=whole(plain),
        usual=usual(plain, MICROBATCHES),
        exact=exact(),
        evaluate=jax.jit(evaluate),
        optimizer=optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9),
    )
