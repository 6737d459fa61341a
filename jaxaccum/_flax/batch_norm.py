"""What the BatchNorm layers of linen and nnx share: the computation, but not the variables."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._base.trees import cast, promote
from jaxaccum._base.types import Array
from jaxaccum._flax import batch_moments
from jaxaccum._flax.batch_moments import Groups, Moments

Statistics = Literal["flax", "torch"]


def rule(value: Any) -> Statistics:
    """The rule of the running variance that the user asks for."""
    if value not in get_args(Statistics):
        raise ValueError(
            'statistics must be "flax" (the variance that normalizes) or "torch" (the unbiased '
            f"one); got {value!r}."
        )
    return value


def reduced_axes(rank: int, features: int | Sequence[int]) -> tuple[int, ...]:
    """The axes to average over: all but those of `features`."""
    named = np.atleast_1d(features) % rank
    return tuple(axis for axis in range(rank) if axis not in named)


def moments(
    x: Array,
    axes: tuple[int, ...],
    *,
    dtype: DTypeLike,
    mask: ArrayLike | None,
    axis_name: str | Sequence[str] | None = None,
    groups: Groups | None = None,
) -> Moments:
    """The moments of the whole batch, taken in `dtype`; `axis_name` counts where it is bound."""
    names = batch_moments.bound(axis_name)
    if not names:
        return batch_moments.moments(cast(x, dtype), axes, mask)
    groups = None if groups is None else tuple(map(tuple, groups))
    return whole_batch_moments(x, mask, axes=axes, dtype=dtype, axis_names=names, groups=groups)


@functools.partial(jax.jit, static_argnames=("axes", "dtype", "axis_names", "groups"))
def whole_batch_moments(
    x: Array,
    mask: ArrayLike | None,
    *,
    axes: tuple[int, ...],
    dtype: DTypeLike,
    axis_names: Sequence[str],
    groups: Groups | None,
) -> Moments:
    """The moments of all parts of the batch. The audit knows this function by its name."""
    own = batch_moments.moments(cast(x, dtype), axes, mask)
    return batch_moments.over_axes(own, axis_names, groups)


def update(
    old: tuple[Array, Array], new: Moments, *, momentum: float, rule: Statistics
) -> tuple[Array, Array]:
    """The running mean and variance after one more batch; unchanged where nothing was counted."""
    if jnp.iscomplexobj(new.mean) and not jnp.iscomplexobj(old[0]):
        raise TypeError(
            f"the running mean is {old[0].dtype}, and the batch's mean is {new.mean.dtype}. "
            "Initialize the layer with an input of that dtype."
        )

    def moved(before: Array, batch: Array) -> Array:
        average = momentum * before + (1 - momentum) * cast(batch, before.dtype)
        return lax.stop_gradient(jnp.where(new.counted > 0, average, before))

    variance = new.variance if rule == "flax" else new.unbiased_variance
    return moved(old[0], new.mean), moved(old[1], variance)


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    *,
    axes: tuple[int, ...],
    scale: Array | None,
    bias: Array | None,
    epsilon: float,
) -> Array:
    """``(x − mean) · scale / √(var + epsilon) + bias``, in the widest of their dtypes."""
    dtype = _common_dtype(x, mean, var, scale, bias)
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    spread = lambda a: cast(a.reshape(shape), dtype)
    factor = spread(lax.rsqrt(var + jnp.asarray(epsilon, var.dtype)))
    factor = factor if scale is None else factor * spread(scale)
    y = (cast(x, dtype) - spread(mean)) * factor
    return y if bias is None else y + spread(bias)


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """The dtype in which values of `dtype` are averaged."""
    return promote(dtype, jnp.float32)


def mean_dtype(dtype: DTypeLike, inputs: DTypeLike) -> DTypeLike:
    """The dtype of a running mean that is kept in `dtype`: complex where the inputs are."""
    return promote(dtype, inputs) if jnp.issubdtype(inputs, jnp.complexfloating) else dtype


def output_dtype(*arrays: Array | None) -> np.dtype:
    """The dtype of the output where the user gives none: that of input and parameters together."""
    dtype = _common_dtype(*arrays)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else promote(dtype, jnp.float32)


def _common_dtype(*arrays: Array | None) -> np.dtype:
    """The widest of the dtypes; None is a parameter that the layer does not have."""
    return promote(*(a.dtype for a in arrays if a is not None))
