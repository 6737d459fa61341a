"""Steps of random programs over devices, and over microbatches as if they were devices."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

AXIS = "microbatch"
_NUMBERS = jnp.arange(6.0)[:, None]


def _devices(body, *args):
    """The body on two devices, each with half of the examples."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    specs = tuple(P("data") if x.ndim == 2 else P() for x in args)
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("data"))(*args)


def _gathered(h):
    return lax.all_gather(h, AXIS, tiled=True)


def _six(h):
    """As many rows on each device."""
    return jnp.concatenate([h] * (6 // len(h)))


def _around():
    return [(i, (i + 1) % lax.axis_size(AXIS)) for i in range(lax.axis_size(AXIS))]


def _own_places(c):
    return lax.axis_index(AXIS) * c.n + jnp.arange(c.n, dtype=jnp.int32)


APART = {
    "on_devices": lambda h, c: _devices(lambda h, x, w: jnp.tanh(h * w[None]) + x, h, c.x, c.w),
}
MIXING = {
    "centered_on_devices": lambda h, c: _devices(
        lambda h: h - lax.pmean(h.mean(0), "data")[None], h
    ),
    "by_device": lambda h, c: _devices(lambda h: h * (1.0 + lax.axis_index("data")), h),
}
DECLARED = {
    "centered_as_declared": lambda h, c: h - lax.pmean(h.mean(0), AXIS)[None],
    "weighted_as_declared": lambda h, c: h * c.mask[:, None] / lax.psum(c.mask.sum(), AXIS),
    "normalized_as_declared": lambda h, c: (
        h / jnp.sqrt(1.0 + lax.psum(jnp.sum(h**2), AXIS) / lax.psum(c.n, AXIS))
    ),
    "bounded_as_declared": lambda h, c: (
        h / (2.0 + lax.pmax(jnp.max(c.x), AXIS) - lax.pmin(jnp.min(c.x), AXIS))
    ),
    "others_as_declared": lambda h, c: jax.nn.softmax(h @ _gathered(h).T, axis=1) @ _gathered(c.x),
    "merged_as_declared": lambda h, c: h * lax.all_gather(c.x, AXIS).reshape(-1, 3).std(0)[None],
    "own_place_as_declared": lambda h, c: h + jnp.take(_gathered(h), _own_places(c), axis=0),
    "keys_as_declared": lambda h, c: (
        h * jax.vmap(jax.random.normal)(_keys_of(_own_places(c)))[:, None]
    ),
    "added_rows": lambda h, c: h + lax.psum(h, AXIS),
    "swapped_rows": lambda h, c: (
        h * (lax.all_gather(c.x, AXIS).swapaxes(0, 1).reshape(-1, 3) * _NUMBERS).sum(0)[None]
    ),
    "sum_of_roots": lambda h, c: h * lax.psum(jnp.sqrt(1.0 + jnp.sum(h**2)), AXIS),
    "sum_of_means": lambda h, c: h - lax.psum(h.mean(0), AXIS)[None],
    "traded_rows": lambda h, c: h + lax.all_to_all(_six(h), AXIS, 0, 0, tiled=True)[: c.n],
    "shares_of_a_sum": lambda h, c: h + lax.psum_scatter(_six(h), AXIS, tiled=True)[: c.n],
    "shifted_rows": lambda h, c: h + lax.ppermute(h, AXIS, _around()),
}
"""With a collective over the microbatches: a statistic of the batch, as declared, or by no other
name."""


def _keys_of(places):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), places)
