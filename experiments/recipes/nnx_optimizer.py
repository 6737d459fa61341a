"""Flax nnx: an Optimizer, BatchNorm and a rematerialized block.

Command   python -m experiments.recipes.nnx_optimizer
"""

import jax
import optax
from flax import nnx

import jaxaccum
import jaxaccum.nnx
from experiments.recipes import _check, _texts


class Block(nnx.Module):
    """Linear, BatchNorm, relu."""

    def __init__(self, din, dout, axis, rngs):
        self.linear = nnx.Linear(din, dout, rngs=rngs)
        self.norm = nnx.BatchNorm(dout, axis_name=axis, rngs=rngs)

    def __call__(self, x):
        """The block's output."""
        return nnx.relu(self.norm(self.linear(x)))


class Net(nnx.Module):
    """Two blocks, the second computed again in the backward pass."""

    def __init__(self, axis, rngs):
        self.first, self.second = Block(26, 32, axis, rngs), Block(32, 32, axis, rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        return self.head(nnx.remat(Block.__call__)(self.second, self.first(x)))


def made(axis):
    """The model, in float64, and its optimizer."""
    model = Net(axis, nnx.Rngs(0))
    nnx.update(model, _check.wide(nnx.state(model)))
    return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)


def cross_entropy(model, batch):
    """The mean over the examples."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["label"]).mean()


def plain(batch):
    """The training step as anybody would write it."""
    model, optimizer = made(None)

    @nnx.jit
    def train_step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(cross_entropy)(model, batch)
        optimizer.update(model, grads)
        return loss

    train_step(model, optimizer, batch)
    return nnx.as_pure(nnx.state(model))


def accumulated(batch):
    """The same step in 4 microbatches."""
    model, optimizer = made("microbatch")

    @nnx.jit
    def train_step(model, optimizer, batch):
        loss, grads = jaxaccum.nnx.value_and_grad(cross_entropy, num_microbatches=4)(model, batch)
        optimizer.update(model, grads)
        return loss

    train_step(model, optimizer, batch)
    return nnx.as_pure(nnx.state(model))


def usual(batch):
    """The usual loop: each microbatch has statistics of its own, and gradients are averaged."""
    model, optimizer = made(None)
    grads = [nnx.grad(cross_entropy)(model, part) for part in _check.parts(batch, 4)]
    optimizer.update(model, _check.mean(grads))
    return nnx.as_pure(nnx.state(model))


def check() -> _check.Errors:
    """One step on 16 texts: parameters and running statistics."""
    batch, start = _texts.letters(16), nnx.as_pure(nnx.state(made(None)[0]))
    return _check.errors(
        start=start, full=plain(batch), ours=accumulated(batch), usual=jax.jit(usual)(batch)
    )


if __name__ == "__main__":
    _check.main(check)
