"""jax.pmap: every device has texts of its own, and of other lengths.

Command   python -m experiments.recipes.pmap
"""

import jax
import jax.numpy as jnp
import optax

import jaxaccum
from experiments.recipes import _check, _texts
from experiments.recipes._language import cross_entropy, loss, parameters

OPT = optax.sgd(0.1)
DEVICES = 4


def plain(params, opt_state, batch):
    """The training step as anybody would write it."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jnp.sum(ce * mask) / jax.lax.pmean(jnp.sum(mask), "device")

    grads = jax.grad(loss_fn)(params, batch)
    grads = jax.lax.pmean(grads, "device")
    updates, opt_state = OPT.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state


def accumulated(params, opt_state, batch):
    """The same step in 2 microbatches per device."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jaxaccum.Mean(jnp.sum(ce * mask), jnp.sum(mask))

    grads = jaxaccum.grad(loss_fn, num_microbatches=2, mesh_axes="device")(params, batch)
    updates, opt_state = OPT.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state


def usual(params, opt_state, batch):
    """The usual loop: a mean over devices of means over microbatches of their means."""
    grads = _check.mean([jax.grad(loss)(params, part) for part in _check.parts(batch, 2)])
    updates, opt_state = OPT.update(jax.lax.pmean(grads, "device"), opt_state)
    return optax.apply_updates(params, updates), opt_state


def check() -> _check.Errors:
    """One step on 32 texts, 8 per device; the full batch is computed on one device."""
    params, batch = parameters(), _texts.tokens(32, 48)
    divided = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
    args, rows = (params, OPT.init(params), divided), (None, None, 0)
    ends = []
    for step in (plain, accumulated, usual):
        on_devices = jax.pmap(step, "device", in_axes=rows, devices=jax.devices()[:DEVICES])
        ends.append(jax.tree.map(lambda x: x[0], on_devices(*args)[0]))
    grads = jax.grad(loss)(params, batch)
    full = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    return _check.errors(start=params, full=full, plain=ends[0], ours=ends[1], usual=ends[2])


if __name__ == "__main__":
    _check.main(check)
