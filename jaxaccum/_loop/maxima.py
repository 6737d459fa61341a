"""Gradients that are maxima over examples, and so combine by maximum: a quantized layer's next
scales.

    microbatch 1 -> 3.0,  microbatch 2 -> 5.0      together 5.0
    all examples are padding                       what the layer had before

A maximum that has seen no example is the lowest number of its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._base.trees import cast
from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._program.argument_slots import Slot


def lowest(value: Array, dtype: Any) -> Array:
    """The maximum of no examples: of the shape and the devices of the value."""
    return varying.vary(jnp.full_like(value, _lowest(dtype), dtype), varying.varying_axes(value))


def combine(olds: list[Array], news: list[Array]) -> list[Array]:
    """The maxima of both, one by one."""
    return jax.tree.map(larger, olds, news)


def larger(old: Array, new: Array) -> Array:
    """The maximum of two, in the dtype of the first."""
    return jnp.maximum(old, cast(new, old.dtype))


def next_values(
    slots: Sequence[Slot], arrays: Sequence[Array], wrt: Sequence[int], grads: Sequence[Array]
) -> list[Array]:
    """The gradients of the slots `wrt`; a maximum that has seen no example is the value that was
    there."""
    pairs = list(zip(wrt, grads, strict=True))
    return [or_kept(grad, arrays[i]) if slots[i].overwritten else grad for i, grad in pairs]


def or_kept(maximum: Array, value: Array) -> Array:
    """The maximum; where it has seen no example, the value."""
    return jnp.where(maximum == _lowest(maximum.dtype), cast(value, maximum.dtype), maximum)


def _lowest(dtype: Any) -> Any:
    return jnp.finfo(dtype).min
