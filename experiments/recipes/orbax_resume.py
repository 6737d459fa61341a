"""Orbax: a run is saved and resumed in the middle of a window.

python -m experiments.recipes.orbax_resume
"""

import pathlib
import tempfile

import jax
import optax
import orbax.checkpoint as ocp

import jaxaccum
from experiments.recipes import _check, _texts
from experiments.recipes._language import loss, parameters

OPT = optax.sgd(0.1, momentum=0.9)


def resumed(state):
    """Saved, and read again by a run that knows what such a state looks like."""
    with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder) / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(
            pathlib.Path(folder) / "state", jax.tree.map(jax.numpy.zeros_like, state)
        )


def plain(params, texts):
    """The training loop as anybody would write it; it is killed after half of its batches."""
    opt, batches = OPT, _check.parts(texts, 2)
    opt_state, grad_fn = opt.init(params), jax.jit(jax.grad(loss))
    for i, batch in enumerate(batches):
        updates, opt_state = opt.update(grad_fn(params, batch), opt_state, params)
        params = optax.apply_updates(params, updates)
        if i == len(batches) // 2 - 1:
            params, opt_state = resumed((params, opt_state))
    return params


def accumulated(params, texts):
    """The same loop in windows of 4 microbatches; it is killed after 2 of the second window."""
    opt, batches = jaxaccum.MultiSteps(OPT, 4), _check.parts(texts, 8)
    opt_state, grad_fn = opt.init(params), jax.jit(jax.grad(loss))
    for i, batch in enumerate(batches):
        updates, opt_state = opt.update(
            grad_fn(params, batch), opt_state, params, weight=batch["mask"][:, 2:].sum()
        )
        params = optax.apply_updates(params, updates)
        if i == len(batches) // 2 + 1:
            params, opt_state = resumed((params, opt_state))
    return params


def usual(params, texts):
    """What is usually saved: parameters and optimizer, without the open window."""
    opt, batches = jaxaccum.MultiSteps(OPT, 4), _check.parts(texts, 8)
    opt_state, grad_fn = opt.init(params), jax.jit(jax.grad(loss))
    for i, batch in enumerate(batches):
        updates, opt_state = opt.update(
            grad_fn(params, batch), opt_state, params, weight=batch["mask"][:, 2:].sum()
        )
        params = optax.apply_updates(params, updates)
        if i == len(batches) // 2 + 1:
            params, optimizer = resumed((params, opt_state.inner_opt_state))
            opt_state = opt.init(params)._replace(inner_opt_state=optimizer)
    return params


def check() -> _check.Errors:
    """Two steps on 64 texts."""
    params, texts = parameters(), _texts.tokens(64, 48)
    full, ours, other = (step(params, texts) for step in (plain, accumulated, usual))
    return _check.errors(start=params, full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
