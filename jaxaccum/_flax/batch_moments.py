"""Mean and variance of a whole batch, from the count, mean and squares of each of its parts.

The parts are microbatches or devices. Part i has nᵢ entries, their mean μᵢ, and the sum of squared
deviations from it, sᵢ = Σ |x − μᵢ|². Parts of any sizes are joined about a pivot p, which is the
mean as first computed:

    n = Σ nᵢ,   e = Σ nᵢ (μᵢ − p) / n,   μ = p + e,   s = Σ sᵢ + Σ nᵢ |μᵢ − p|² − n |e|²

E[x²] − E[x]² subtracts two large numbers; this does not. The error e takes away the rounding of p,
which is a constant to every derivative.

Two microbatches, (0, 2) and (4): n = 2, 1; μ = 1, 4; s = 2, 0. With p = 2, e = 0:
s = 2 + (2 · 1 + 1 · 4) = 8, the variance is 8/3, as that of (0, 2, 4).

Cost: over the axis of a loop one gather, so one cut of a coupled program; over the axes of a mesh,
two sums.

Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983): the corrected two-pass
algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxaccum._base.trees import cast, ratio
from jaxaccum._base.types import Array
from jaxaccum._program.validate import axis_names, is_bound

Groups = Sequence[Sequence[int]]
"""``axis_index_groups`` of JAX: the parts of an axis that belong together."""


class Moments(NamedTuple):
    """Of the entries along the reduced axes: count, mean, and sum of squared deviations from it."""

    counted: Array
    mean: Array
    squares: Array

    @property
    def variance(self) -> Array:
        """``s / n``, and 0 where nothing was counted."""
        return ratio(self.squares, self.counted)

    @property
    def unbiased_variance(self) -> Array:
        """``s / (n − 1)``, and 0 where one value or none was counted."""
        return ratio(self.squares, jnp.maximum(self.counted - 1, 0))


def moments(x: Array, axes: tuple[int, ...], mask: ArrayLike | None = None) -> Moments:
    """The moments of `x` along `axes`; `mask` broadcasts to `x` and selects entries."""
    real = jnp.real(x).dtype
    if mask is None:
        kept = lambda x: x
        counted = jnp.sum(jnp.ones(x.shape, real), axes)
    else:
        selected = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
        kept = lambda x: jnp.where(selected, x, jnp.zeros_like(x))
        counted = cast(jnp.sum(selected, axes), real)
    pivot = lax.stop_gradient(ratio(jnp.sum(kept(x), axes), counted))
    apart = kept(x - jnp.expand_dims(pivot, axes))
    return _about(pivot, counted, jnp.sum(apart, axes), jnp.sum(_square(apart), axes))


def over_axes(own: Moments, axis_names: Sequence[str], groups: Groups | None = None) -> Moments:
    """The moments of all parts along the named axes; `own` are those of the caller's part.

    Args:
        own: the moments of the caller's part.
        axis_names: names of bound axes.
        groups: the parts of an axis that belong together.
    """
    in_space = [name for name in axis_names if groups is not None or name in _mesh_axes()]
    for name in axis_names:
        if name not in in_space:
            own = _joined(Moments(*lax.all_gather(tuple(own), name)))
    return _summed(own, tuple(in_space), groups) if in_space else own


def bound(axis_name: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names that are bound to an axis here: none where a model is initialized or evaluated."""
    return tuple(filter(is_bound, axis_names(axis_name)))


def _joined(parts: Moments) -> Moments:
    """The moments of parts that lie along a leading axis."""
    return _together(parts, lambda x: jnp.sum(x, 0), lambda x: x[None])


def _summed(own: Moments, axis_names: tuple[str, ...], groups: Groups | None) -> Moments:
    """The same by sums, from which JAX knows that every device of a mesh has the same value."""
    return _together(own, lambda x: lax.psum(x, axis_names, axis_index_groups=groups), lambda x: x)


def _together(
    parts: Moments, total: Callable[[Array], Array], spread: Callable[[Array], Array]
) -> Moments:
    weighted = lambda x: cast(parts.counted, x.dtype) * x
    counted = total(parts.counted)
    pivot = lax.stop_gradient(ratio(total(weighted(parts.mean)), counted))
    apart = parts.mean - spread(pivot)
    squares = total(parts.squares + weighted(_square(apart)))
    return _about(pivot, counted, total(weighted(apart)), squares)


def _about(pivot: Array, counted: Array, sums: Array, squares: Array) -> Moments:
    """The moments, from the sums of deviations from a pivot and of their squares."""
    error = ratio(sums, counted)
    return Moments(counted, pivot + error, jnp.maximum(squares - counted * _square(error), 0))


def _square(x: Array) -> Array:
    """``|x|²``, real and differentiable for complex numbers too."""
    return jnp.real(x) ** 2 + jnp.imag(x) ** 2 if jnp.iscomplexobj(x) else lax.square(x)


def _mesh_axes() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
