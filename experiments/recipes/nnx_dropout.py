"""Flax nnx: dropout that does not depend on the microbatches.

Command   python -m experiments.recipes.nnx_dropout

One call of an nnx model draws one mask for all its examples, so the masks of a batch cannot be
those of its parts. With `example_streams`, each example draws from a key of its own. The check
draws the masks of one example at a time, in Python.
"""

import jax
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
    loss, grads = nnx.value_and_grad(cross_entropy)(model, batch)
    optimizer.update(model, grads)
    return loss


def accumulated(model, optimizer, batch):
    """The same step in 4 microbatches."""
    step = jaxaccum.nnx.value_and_grad(cross_entropy, num_microbatches=4, example_streams="dropout")
    loss, grads = step(model, batch)
    optimizer.update(model, grads)
    return loss


def usual(model, optimizer, batch):
    """The usual loop: each microbatch takes the next key of the model."""
    grads = [nnx.grad(cross_entropy)(model, part) for part in _check.parts(batch, 4)]
    optimizer.update(model, _check.mean(grads))


def one_by_one(model, optimizer, batch):
    """The step of an example alone with its own key, for each of them: their mean."""
    keys = jax.random.split(model.dropout.rngs.key[...], len(batch["x"]))
    grads = []
    for key, part in zip(keys, _check.parts(batch, len(keys)), strict=True):
        own = nnx.clone(model)
        own.dropout.rngs.key[...] = key
        grads.append(nnx.grad(cross_entropy)(own, part))
    optimizer.update(model, _check.mean(grads))


def check() -> _check.Errors:
    """One step on 8 texts."""
    batch, ends = _texts.letters(8), []
    for step in (one_by_one, accumulated, usual):
        model, optimizer = made()
        nnx.jit(step)(model, optimizer, batch)
        ends.append(nnx.as_pure(nnx.state(model, nnx.Param)))
    start = nnx.as_pure(nnx.state(made()[0], nnx.Param))
    return _check.errors(start=start, full=ends[0], ours=ends[1], usual=ends[2])


if __name__ == "__main__":
    _check.main(check)
