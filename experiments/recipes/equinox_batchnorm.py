"""Equinox: BatchNorm, whose running statistics are a state next to the model.

Command   python -m experiments.recipes.equinox_batchnorm
"""

import functools

import equinox as eqx
import jax
import optax

import jaxaccum
from experiments.recipes import _check, _texts

OPT = optax.sgd(0.1)


class Net(eqx.Module):
    """A hidden layer with BatchNorm, for one example."""

    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, axis, key):
        first, second = jax.random.split(key)
        self.hidden, self.head = eqx.nn.Linear(26, 32, key=first), eqx.nn.Linear(32, 10, key=second)
        self.norm = eqx.nn.BatchNorm(32, axis_name=axis, mode="batch")

    def __call__(self, x, state):
        """The logits, and the new running statistics."""
        x, state = self.norm(self.hidden(x), state)
        return self.head(jax.nn.relu(x)), state


def plain(batch, key):
    """The training step as anybody would write it."""
    model, state = eqx.nn.make_with_state(Net)("example", key)
    opt_state = OPT.init(eqx.filter(model, eqx.is_inexact_array))

    def loss_fn(model, state, batch):
        batched = jax.vmap(model, axis_name="example", in_axes=(0, None), out_axes=(0, None))
        logits, state = batched(batch["x"], state)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return ce.mean(), state

    grad_fn = eqx.filter_grad(loss_fn, has_aux=True)
    grads, state = grad_fn(model, state, batch)
    updates, opt_state = OPT.update(grads, opt_state)
    return eqx.apply_updates(model, updates), state


def accumulated(batch, key):
    """The same step in 4 microbatches."""
    model, state = eqx.nn.make_with_state(Net)(("example", "microbatch"), key)
    opt_state = OPT.init(eqx.filter(model, eqx.is_inexact_array))

    @functools.partial(jaxaccum.microbatch, num_microbatches=4, in_axes={"batch": 0})
    def loss_fn(model, state, batch):
        batched = jax.vmap(model, axis_name="example", in_axes=(0, None), out_axes=(0, None))
        logits, state = batched(batch["x"], state)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return ce.mean(), state

    grad_fn = eqx.filter_grad(loss_fn, has_aux=True)
    grads, state = grad_fn(model, state, batch)
    updates, opt_state = OPT.update(grads, opt_state)
    return eqx.apply_updates(model, updates), state


def usual(batch, key):
    """The usual loop: each microbatch has statistics of its own, and gradients are averaged."""
    ends = [plain(part, key) for part in _check.parts(batch, 4)]
    models = [eqx.filter(model, eqx.is_inexact_array) for model, _ in ends]
    return _check.mean(models), ends[-1][1]


def check() -> _check.Errors:
    """One step on 16 texts: parameters and running statistics."""
    batch, key = _texts.letters(16), jax.random.key(0)
    results = [eqx.nn.make_with_state(Net)("example", key)]
    results += [eqx.filter_jit(step)(batch, key) for step in (plain, accumulated, usual)]
    start, *ends = (jax.tree.leaves(eqx.filter(result, eqx.is_inexact_array)) for result in results)
    return _check.errors(start=start, full=ends[0], ours=ends[1], usual=ends[2])


if __name__ == "__main__":
    _check.main(check)
