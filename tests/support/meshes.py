"""Meshes of eight simulated devices, and a small batch with its parameters laid out on them."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.support.helpers import data

BATCH, WIDTH = 32, 6
W = {"a": data(3, WIDTH), "b": data(WIDTH, seed=1), "c": data(WIDTH, 2, seed=2)}
X, MASK = (
    data(BATCH, 3, seed=3),
    jnp.abs(data(BATCH, seed=4)) * jnp.float64(jnp.arange(BATCH) % 3 > 0),
)
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit, "manual": AxisType.Auto}


@functools.cache
def mesh_of(shape, kind):
    """One mesh per shape and a kind."""
    names = ("data", "other")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(KINDS[kind],) * len(shape))


def laid_out(mesh, axes):
    """The parameters on every device, the rows and their mask divided over `axes`."""
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    return put(W, P()), put((X, MASK), P(axes))


EXPLICIT = mesh_of((4, 2), "explicit")
ROWS = NamedSharding(EXPLICIT, P("data"))


def on_mesh(fun, *args):
    """A call with the parameters on every device and the rows divided, compiled."""
    put = lambda x, sharding: jax.device_put(x, sharding)
    return jax.jit(fun)(put(W, NamedSharding(EXPLICIT, P())), put(X, ROWS), *args)
