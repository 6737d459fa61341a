"""How one array combines over microbatches: what the loop keeps of it, and what it writes out."""

from __future__ import annotations

import enum
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaccum._base.types import Array
from jaxaccum._devices import varying


class Reduction(enum.Enum):
    """The rule of one array; the first five live in the loop's state, the last two are written row
    by row.

    Every `match` over it names all of them, so that pyright points to what a new one lacks.
    """

    SUM = "sum"
    MAX = "max"
    MIN = "min"
    LAST = "last"
    CARRY = "carry"
    CONCAT = "concat"
    STACK = "stack"

    @property
    def stacked(self) -> bool:
        """Whether the loop writes one entry per microbatch and keeps no state."""
        return self in (Reduction.CONCAT, Reduction.STACK)

    @property
    def of_partition(self) -> bool:
        """Whether the result depends on the partition by its meaning."""
        return self in (Reduction.STACK, Reduction.LAST, Reduction.CARRY)

    @property
    def moves(self) -> bool:
        """Whether values only change their place, so that those that are no numbers, keys, may."""
        return self.stacked or self in (Reduction.LAST, Reduction.CARRY)

    @property
    def differentiable(self) -> bool:
        """Whether a cotangent passes; the others are constants to every derivative."""
        return self.stacked or self is Reduction.SUM


def initial(reduction: Reduction, aval: Any) -> Array:
    """The state before the first microbatch: the neutral element, over a mesh as its type says."""
    match reduction:
        case Reduction.MAX:
            neutral = _lowest(aval.dtype)
        case Reduction.MIN:
            neutral = _highest(aval.dtype)
        case Reduction.SUM | Reduction.LAST | Reduction.CARRY:
            neutral = 0
        case Reduction.CONCAT | Reduction.STACK:
            raise AssertionError(f"{reduction} keeps no state")
    return varying.full(aval, neutral)


def update(reduction: Reduction, state: Array, x: Array) -> Array:
    """The state after one more microbatch."""
    match reduction:
        case Reduction.SUM:
            return state + x
        case Reduction.MAX:
            return jnp.maximum(state, x)
        case Reduction.MIN:
            return jnp.minimum(state, x)
        case Reduction.LAST | Reduction.CARRY:
            return x
        case Reduction.CONCAT | Reduction.STACK:
            raise AssertionError(f"{reduction} keeps no state")


def over_mesh(reduction: Reduction, x: Array, mesh_axes: tuple[str, ...]) -> Array:
    """The value over all shards of the batch; rows and stacks stay the device's own."""
    if not mesh_axes:
        return x
    match reduction:
        case Reduction.SUM:
            return varying.sum_shards(x, mesh_axes)
        case Reduction.MAX:
            return lax.pmax(x, mesh_axes)
        case Reduction.MIN:
            return lax.pmin(x, mesh_axes)
        case Reduction.LAST:
            return varying.last_shard(x, mesh_axes)
        case Reduction.CARRY | Reduction.CONCAT | Reduction.STACK:
            return x


def _lowest(dtype: Any) -> Any:
    if dtype == jnp.bool_:
        return False
    return _extreme(dtype, -jnp.inf) if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
    if dtype == jnp.bool_:
        return True
    return _extreme(dtype, jnp.inf) if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max


def _extreme(dtype: Any, infinity: float) -> Any:
    """The infinity, or the last finite number of a dtype that has none, as most of 8 bits."""
    if not np.isnan(np.asarray(infinity).astype(dtype)):
        return infinity
    return jnp.finfo(dtype).max if infinity > 0 else jnp.finfo(dtype).min
