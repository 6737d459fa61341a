"""FSDP on an explicit mesh: parameters, gradients and batch are divided over the devices.

Command   python -m experiments.recipes.explicit_fsdp
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, reshard
from jax.sharding import PartitionSpec as P

import jaxaccum
from experiments.recipes import _check, _texts
from experiments.recipes._language import loss, parameters

OPT = optax.sgd(0.1)


def cross_entropy(params, batch):
    """The model of `_language`, on a mesh: a lookup says where its result is."""
    table = reshard(params["embed"], P(None, None))
    rows = lambda ids: table.at[ids].get(out_sharding=P("data", None, None))
    whole = {name: reshard(params[name], P(None, None)) for name in ("first", "second", "out")}
    before, after = rows(batch["ids"][:, :-2]), rows(batch["ids"][:, 1:-1])
    logits = jnp.tanh(before @ whole["first"] + after @ whole["second"]) @ whole["out"]
    at_label = jax.nn.one_hot(batch["ids"][:, 2:], 128, dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, at_label), batch["mask"][:, 2:]


def plain(params, batch):
    """The training step as anybody would write it."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jnp.sum(ce * mask) / jnp.sum(mask)

    grads = jax.grad(loss_fn)(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def accumulated(params, batch):
    """The same step in 4 microbatches, each of rows from every device."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jaxaccum.Mean(jnp.sum(ce * mask), jnp.sum(mask))

    grads = jaxaccum.grad(loss_fn, num_microbatches=4)(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def usual(params, batch):
    """The usual loop, on one device: the mean of the microbatches' means."""
    grads = _check.mean([jax.grad(loss)(params, part) for part in _check.parts(batch, 4)])
    return optax.apply_updates(params, OPT.update(grads, OPT.init(params))[0])


def check() -> _check.Errors:
    """One step on 32 texts, 8 per device; the full batch is computed on one device."""
    params, batch = parameters(), _texts.tokens(32, 48)
    kinds = (AxisType.Explicit,)
    mesh = jax.make_mesh((4,), ("data",), axis_types=kinds, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, batch), P("data"))
        ends = [jax.jit(step)(*placed) for step in (plain, accumulated)]
    assert ends[1]["out"].sharding.spec == P("data", None)
    grads = jax.grad(loss)(params, batch)
    full = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    first, ours = jax.device_get(ends)
    other = jax.jit(usual)(params, batch)
    return _check.errors(start=params, full=full, plain=first, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
