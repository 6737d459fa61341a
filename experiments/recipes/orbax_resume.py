"""Orbax: a run is saved and resumed in the middle of a window.

Command   python -m experiments.recipes.orbax_resume
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import jaxaccum
from experiments.recipes import _check, _texts
from experiments.recipes._language import loss, parameters

OPT = optax.sgd(0.1, momentum=0.9)


def resumed(state):
    """Saved, and read again by a run that knows what such a state looks like."""
    like = jax.tree.map(jnp.zeros_like, state)
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        path = pathlib.Path(folder) / "state"
        checkpointer.save(path, state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


def plain(params, batches, killed):
    """The training loop as anybody would write it; it is killed once, and resumed."""
    opt = OPT
    opt_state, grad_fn = opt.init(params), jax.jit(jax.grad(loss))
    for i, batch in enumerate(batches):
        grads = grad_fn(params, batch)
        updates, opt_state = opt.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if i == killed:
            params, opt_state = resumed((params, opt_state))
    return params


def accumulated(params, batches, killed):
    """The same loop in windows of 4 microbatches; it is killed in the middle of the second."""
    opt = jaxaccum.MultiSteps(OPT, 4)
    opt_state, grad_fn = opt.init(params), jax.jit(jax.grad(loss))
    for i, batch in enumerate(batches):
        grads = grad_fn(params, batch)
        updates, opt_state = opt.update(grads, opt_state, params, weight=batch["mask"][:, 2:].sum())
        params = optax.apply_updates(params, updates)
        if i == killed:
            params, opt_state = resumed((params, opt_state))
    return params


def usual(params, batches, killed):
    """What is usually saved: parameters and optimizer, without the open window."""
    opt = jaxaccum.MultiSteps(OPT, 4)
    opt_state, grad_fn = opt.init(params), jax.jit(jax.grad(loss))
    for i, batch in enumerate(batches):
        grads = grad_fn(params, batch)
        updates, opt_state = opt.update(grads, opt_state, params, weight=batch["mask"][:, 2:].sum())
        params = optax.apply_updates(params, updates)
        if i == killed:
            params, optimizer = resumed((params, opt_state.inner_opt_state))
            opt_state = opt.init(params)._replace(inner_opt_state=optimizer)
    return params


def check() -> _check.Errors:
    """Two steps on 64 texts."""
    params, texts = parameters(), _texts.tokens(64, 48)
    full = plain(params, _check.parts(texts, 2), killed=0)
    ours, other = (step(params, _check.parts(texts, 8), killed=5) for step in (accumulated, usual))
    return _check.errors(start=params, full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
