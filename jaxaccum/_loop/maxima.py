"""Gradients that are maxima over examples, and so combine by maximum: a quantized layer's next
scales.

    microbatch 1 -> 3.0,  microbatch 2 -> 5.0      together 5.0
    all examples are padding                       what the layer had before

A maximum that has seen no example is the lowest number of its dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._base.trees import cast
from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._program.argument_slots import Slot


def lowest(value: Array, dtype: DTypeLike) -> Array:
    """The maximum of no examples: of the shape and the devices of the value."""
    return varying.full(jax.typeof(value), _lowest(dtype), dtype)


def combine(olds: list[Array], news: list[Array]) -> list[Array]:
    """The maxima of both, one by one."""
    return jax.tree.map(larger, olds, news)


def larger(old: Array, new: Array) -> Array:
    """The maximum of two, in the dtype of the first."""
    return jnp.maximum(old, cast(new, old.dtype))


def next_values(
    slots: Sequence[Slot],
    arrays: Sequence[Array],
    wrt: Sequence[int],
    grads: Sequence[Array],
    axes: Callable[[int, Array], tuple[str, ...]] = lambda slot, maximum: (),
) -> list[Array]:
    """The gradients of the slots `wrt`; a maximum that has seen no example is the value that was
    there. `axes` are those of the mesh over which a maximum is combined first."""
    news = list(grads)
    for place, i in enumerate(wrt):
        if slots[i].overwritten:
            maximum, value = news[place], arrays[i]
            if names := axes(i, maximum):
                maximum, value = lax.pmax((maximum, value), names)
            news[place] = _or_kept(maximum, value)
    return news


def _or_kept(maximum: Array, value: Array) -> Array:
    """The maximum; where it has seen no example, the value."""
    return jnp.where(maximum == _lowest(maximum.dtype), cast(value, maximum.dtype), maximum)


def _lowest(dtype: DTypeLike) -> ArrayLike:
    return jnp.finfo(dtype).min
