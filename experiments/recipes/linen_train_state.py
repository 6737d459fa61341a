"""Flax linen: a TrainState with dropout and BatchNorm.

Command   python -m experiments.recipes.linen_train_state

The model drops entries of all rows from one key. In microbatches, each row drops what it drops in
the whole batch, and BatchNorm takes its statistics over the microbatches.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

import jaxaccum
from experiments.recipes import _check, _texts


class Net(nn.Module):
    """A hidden layer with BatchNorm and dropout."""

    axis: str | None = None

    @nn.compact
    def __call__(self, x):
        """The logits."""
        x = nn.Dense(32)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, axis_name=self.axis)(x))
        return nn.Dense(10)(nn.Dropout(0.5, deterministic=False)(x))


class TrainState(train_state.TrainState):
    """Flax's, with the running statistics."""

    batch_stats: Any


def plain(state, batch, key):
    """The training step as anybody would write it."""
    model = Net()

    def loss(params, batch, key):
        variables, rngs = {"params": params, "batch_stats": state.batch_stats}, {"dropout": key}
        logits, new = model.apply(variables, batch["x"], rngs=rngs, mutable=["batch_stats"])
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(ce), new["batch_stats"]

    grad_fn = jax.value_and_grad(loss, has_aux=True)
    (value, batch_stats), grads = grad_fn(state.params, batch, key)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), value


def accumulated(state, batch, key):
    """The same step in 4 microbatches."""
    model = Net(axis="microbatch")

    def loss(params, batch, key):
        variables, rngs = {"params": params, "batch_stats": state.batch_stats}, {"dropout": key}
        logits, new = model.apply(variables, batch["x"], rngs=rngs, mutable=["batch_stats"])
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.mean(ce), new["batch_stats"]

    loss = jaxaccum.microbatch(loss, num_microbatches=4, in_axes=(None, 0, jaxaccum.BATCH_KEY))
    grad_fn = jax.value_and_grad(loss, has_aux=True)
    (value, batch_stats), grads = grad_fn(state.params, batch, key)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), value


def usual(state, batch, key):
    """The usual loop: each microbatch has statistics and a key of its own."""
    states = []
    for i, part in enumerate(_check.parts(batch, 4)):
        states.append(plain(state, part, jax.random.fold_in(key, i))[0])
        state = state.replace(batch_stats=states[-1].batch_stats)
    return states[-1].replace(params=_check.mean([state.params for state in states])), None


def check() -> _check.Errors:
    """One step on 16 texts: parameters and running statistics."""
    model, batch, key = Net(), _texts.letters(16), jax.random.key(0)
    variables = _check.wide(model.init({"params": key, "dropout": key}, batch["x"]))
    state = TrainState.create(apply_fn=model.apply, tx=optax.sgd(0.1), **variables)
    steps = [jax.jit(step)(state, batch, key)[0] for step in (plain, accumulated, usual)]
    start, *ends = ({"params": s.params, "stats": s.batch_stats} for s in (state, *steps))
    return _check.errors(start=start, full=ends[0], ours=ends[1], usual=ends[2])


if __name__ == "__main__":
    _check.main(check)
