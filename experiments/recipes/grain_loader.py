"""Grain: the pipeline yields microbatches, and the optimizer runs once per batch.

Command   python -m experiments.recipes.grain_loader
"""

import grain
import jax
import numpy as np
import optax

import jaxaccum
from experiments.recipes import _check, _texts
from experiments.recipes._language import loss, parameters


def rows_of(tree):
    """One text after the other, on the host."""
    host = jax.tree.map(np.asarray, tree)
    return [jax.tree.map(lambda x, i=i: x[i], host) for i in range(64)]


def plain(params, texts):
    """The training loop as anybody would write it."""
    opt = optax.sgd(0.1, momentum=0.9)
    opt_state, grad_fn = opt.init(params), jax.jit(jax.grad(loss))
    for batch in grain.MapDataset.source(texts).batch(32):
        grads = grad_fn(params, batch)
        updates, opt_state = opt.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def accumulated(params, texts):
    """The same loop in microbatches of 8: 4 of them are one step."""
    opt = jaxaccum.MultiSteps(optax.sgd(0.1, momentum=0.9), 4)
    opt_state, grad_fn = opt.init(params), jax.jit(jax.grad(loss))
    for batch in grain.MapDataset.source(texts).batch(8):
        grads = grad_fn(params, batch)
        updates, opt_state = opt.update(grads, opt_state, params, weight=batch["mask"][:, 2:].sum())
        params = optax.apply_updates(params, updates)
    return params


def usual(params, texts):
    """The usual loop: `optax.MultiSteps`, for which all microbatches are equally heavy."""
    opt = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 4)
    opt_state, grad_fn = opt.init(params), jax.jit(jax.grad(loss))
    for batch in grain.MapDataset.source(texts).batch(8):
        grads = grad_fn(params, batch)
        updates, opt_state = opt.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


def check() -> _check.Errors:
    """Two steps on 64 texts."""
    params, texts = parameters(), rows_of(_texts.tokens(64, 48))
    full, ours, other = (step(params, texts) for step in (plain, accumulated, usual))
    return _check.errors(start=params, full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
