"""Four devices whose texts have unequal numbers of tokens, under data parallelism.

Flax's examples and PyTorch's DistributedDataParallel average the devices' gradients, each of which
was divided by its own device's number of tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jaxaccum
from experiments.models.language import Decoder
from experiments.public_losses import (
    Gradient,
    PublicLoss,
    _texts,
    cross_entropy,
    initial,
    masked_mean,
    mean_of_batch,
    stateless,
    without_state,
)

MODEL = Decoder(_texts.VOCABULARY)
DEVICES, MICROBATCHES = 4, 2


def plain(params: Any, batch: _texts.Batch) -> jax.Array:
    """The mean over the tokens at hand."""
    return masked_mean(per_token(params, batch), batch["mask"])


def tagged(params: Any, batch: _texts.Batch) -> jaxaccum.Mean:
    """The mean over the tokens of all microbatches on all devices."""
    return mean_of_batch(per_token(params, batch), batch["mask"])


def per_token(params: Any, batch: _texts.Batch) -> jax.Array:
    """Each token's cross entropy."""
    scores = jnp.asarray(MODEL.apply(params, batch["ids"], method="scores"))
    return cross_entropy(scores, batch["targets"])


def averaged(params: Any, batch: _texts.Batch) -> Any:
    """The mean of the microbatches' gradients, and then of the devices'."""
    parts = jax.tree.map(lambda x: x.reshape(MICROBATCHES, -1, *x.shape[1:]), batch)
    grads = lax.map(functools.partial(jax.grad(plain), params), parts)
    return lax.pmean(jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), grads), "data")


def on_devices(gradient: Any, **options: Any) -> Gradient:
    """Every device has its share of the batch, and all parameters."""
    devices = jax.devices("cpu")[:DEVICES]
    if len(devices) < DEVICES:
        raise RuntimeError(f"four devices are needed, and JAX has begun with {len(devices)}")
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    specs: dict[str, Any] = {"in_specs": (P(), P("data")), "out_specs": P()}
    return without_state(jax.shard_map(gradient, mesh=mesh, **specs, **options))


def task(steps: int) -> PublicLoss:
    """8 texts on 4 devices, in 2 microbatches on each."""
    texts = _texts.shuffled(_texts.training(), steps=steps)
    batches = [_texts.next_tokens(ids) for ids in texts]
    evaluated = _texts.next_tokens(_texts.held_out())
    on_one = stateless(
        plain,
        tagged,
        num_microbatches=MICROBATCHES,
        evaluate=lambda params: plain(params, evaluated),
        published="data parallelism as in flax/examples/lm1b and DDP",
        alone="divides by its own number of tokens, and so does each device",
        params=initial(MODEL.init, batches[0]["ids"]),
        batches=batches,
    )
    ours = jaxaccum.grad(tagged, num_microbatches=MICROBATCHES, mesh_axes="data")
    # As under pmap, a gradient is the device's own until it is averaged: check_vma=False.
    usual = on_devices(averaged, check_vma=False)
    return dataclasses.replace(on_one, usual=usual, exact=on_devices(ours))
