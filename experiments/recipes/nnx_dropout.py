"""Flax nnx: dropout, with the masks of the whole batch.

Command   python -m experiments.recipes.nnx_dropout

The model draws one mask for all its rows. In a microbatch it draws the rows of the mask that the
whole batch has.
"""

import optax
from flax import nnx

import jaxaccum
import jaxaccum.nnx
from experiments.recipes import _check, _texts


class Net(nnx.Module):
    """A hidden layer with dropout."""

    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(26, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        """The logits."""
        return self.head(self.dropout(nnx.relu(self.hidden(x))))


def made():
    """The model, in float64, and its optimizer."""
    model = Net(nnx.Rngs(0, dropout=1))
    nnx.update(model, _check.wide(nnx.state(model, nnx.Param)))
    return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)


def cross_entropy(model, batch):
    """The mean over the examples."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["label"]).mean()


def plain(model, optimizer, batch):
    """The training step as anybody would write it."""
    grad_fn = nnx.value_and_grad(cross_entropy)
    loss, grads = grad_fn(model, batch)
    optimizer.update(model, grads)
    return loss


def accumulated(model, optimizer, batch):
    """The same step in 4 microbatches."""
    grad_fn = jaxaccum.nnx.value_and_grad(cross_entropy, num_microbatches=4)
    loss, grads = grad_fn(model, batch)
    optimizer.update(model, grads)
    return loss


def usual(model, optimizer, batch):
    """The usual loop: each microbatch takes the next key of the model."""
    grads = [nnx.grad(cross_entropy)(model, part) for part in _check.parts(batch, 4)]
    optimizer.update(model, _check.mean(grads))


def check() -> _check.Errors:
    """One step on 8 texts."""
    batch, ends = _texts.letters(8), []
    for step in (plain, accumulated, usual):
        model, optimizer = made()
        nnx.jit(step)(model, optimizer, batch)
        ends.append(nnx.as_pure(nnx.state(model, nnx.Param)))
    start = nnx.as_pure(nnx.state(made()[0], nnx.Param))
    return _check.errors(start=start, full=ends[0], ours=ends[1], usual=ends[2])


if __name__ == "__main__":
    _check.main(check)
