"""jax.shard_map: data parallel, with one all-reduce per step.

Command   python -m experiments.recipes.shard_map
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum
from experiments.recipes import _check, _texts
from experiments.recipes._language import cross_entropy, loss, parameters

OPT = optax.sgd(0.1)


def plain(params, batch):
    """The training step of one device as anybody would write it."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jax.lax.psum(jnp.sum(ce * mask), "data") / jax.lax.psum(jnp.sum(mask), "data")

    grads = jax.grad(loss_fn)(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def accumulated(params, batch):
    """The same step in 2 microbatches per device."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jaxaccum.Mean(jnp.sum(ce * mask), jnp.sum(mask))

    grads = jaxaccum.grad(loss_fn, num_microbatches=2, mesh_axes="data")(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def usual(params, batch):
    """The usual loop: a mean over devices of means over microbatches of their means."""
    local = jax.lax.pcast(params, "data", to="varying")
    grads = _check.mean([jax.grad(loss)(local, part) for part in _check.parts(batch, 2)])
    updates, _ = OPT.update(jax.lax.pmean(grads, "data"), OPT.init(params))
    return optax.apply_updates(params, updates)


def check() -> _check.Errors:
    """One step on 32 texts, 8 per device; the full batch is computed on one device."""
    params, batch = parameters(), _texts.tokens(32, 48)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    on_mesh = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    ends = [jax.jit(on_mesh(step))(params, batch) for step in (plain, accumulated, usual)]
    grads = jax.grad(loss)(params, batch)
    full = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    return _check.errors(start=params, full=full, plain=ends[0], ours=ends[1], usual=ends[2])


if __name__ == "__main__":
    _check.main(check)
