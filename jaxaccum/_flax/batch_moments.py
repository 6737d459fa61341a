"""Mean and variance of a batch that lies apart, in time or in space, from each part's own count,
mean and squares.

Every part takes its moments about its own mean, and parts of any sizes are joined by

    n = Σ nᵢ,   μ = p + e,   s = Σ sᵢ + Σ nᵢ |μᵢ − p|² − n |e|²,   e = Σ nᵢ (μᵢ − p) / n   (sᵢ = Σ
    |x − μᵢ|²)

about a pivot p, their mean as it comes out at first. So no two large numbers are subtracted, as
E[x²] − E[x]² does, and e takes away the rounding of p, which is a constant to every derivative.
Over the axis of a loop it takes one gather, so one cut of a coupled program; over the axes of a
mesh, two sums.

Chan, Golub, LeVeque, "Algorithms for computing the sample variance" (1983): the corrected two-pass
algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.trees import cast, ratio
from jaxaccum._base.types import Array


class Moments(NamedTuple):
    """How many were counted, their mean and the sum of squared deviations from it, along the axes
    that were reduced."""

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


def moments(x: Array, axes: tuple[int, ...], mask: Any = None) -> Moments:
    """The moments of `x` along `axes`, of the entries that `mask` selects (an array that broadcasts
    to `x`)."""
    real = jnp.real(x).dtype
    if mask is None:
        kept, counted = (lambda x: x), jnp.sum(jnp.ones(x.shape, real), axes)
    else:
        mask = jnp.broadcast_to(jnp.asarray(mask, bool), x.shape)
        kept, counted = (
            (lambda x: jnp.where(mask, x, jnp.zeros_like(x))),
            cast(jnp.sum(mask, axes), real),
        )
    pivot = lax.stop_gradient(ratio(jnp.sum(kept(x), axes), counted))
    apart = kept(x - jnp.expand_dims(pivot, axes))
    return _about(pivot, counted, jnp.sum(apart, axes), jnp.sum(_square(apart), axes))


def over_axes(own: Moments, axis_names: Sequence[str], groups: Any = None) -> Moments:
    """The moments of all parts along the named axes, of which `own` are those of one part.

    Args:
        own: the moments of the caller's part.
        axis_names: names of bound axes.
        groups: ``axis_index_groups`` of JAX: the parts of an axis that belong together.
    """
    in_space = [name for name in axis_names if groups is not None or name in _mesh_axes()]
    for name in axis_names:
        if name not in in_space:
            own = _joined(Moments(*lax.all_gather(tuple(own), name)))
    return _summed(own, tuple(in_space), groups) if in_space else own


def bound(axis_name: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names that are bound to an axis here: none of them where a model is initialized,
    evaluated or just called."""
    names = (
        ()
        if axis_name is None
        else (axis_name,)
        if isinstance(axis_name, str)
        else tuple(axis_name)
    )
    return tuple(name for name in names if _is_bound(name))


def _joined(parts: Moments) -> Moments:
    """The moments of parts that lie along a leading axis."""
    return _together(parts, lambda x: jnp.sum(x, 0), lambda x: x[None])


def _summed(own: Moments, axis_names: tuple[str, ...], groups: Any) -> Moments:
    """The same by sums, which give every device of a mesh one value and let JAX know that it is
    one."""
    return _together(own, lambda x: lax.psum(x, axis_names, axis_index_groups=groups), lambda x: x)


def _together(
    parts: Moments, total: Callable[[Array], Array], spread: Callable[[Array], Array]
) -> Moments:
    weighted = lambda x: cast(parts.counted, x.dtype) * x
    counted = total(parts.counted)
    pivot = lax.stop_gradient(ratio(total(weighted(parts.mean)), counted))
    apart = parts.mean - spread(pivot)
    return _about(
        pivot, counted, total(weighted(apart)), total(parts.squares + weighted(_square(apart)))
    )


def _about(pivot: Array, counted: Array, sums: Array, squares: Array) -> Moments:
    """The moments, from the sums of deviations from a pivot and of their squares."""
    error = ratio(sums, counted)
    return Moments(counted, pivot + error, jnp.maximum(squares - counted * _square(error), 0))


def _square(x: Array) -> Array:
    """``|x|²``, real and differentiable for complex numbers too."""
    return jnp.real(x) ** 2 + jnp.imag(x) ** 2 if jnp.iscomplexobj(x) else lax.square(x)


def _mesh_axes() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _is_bound(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True
