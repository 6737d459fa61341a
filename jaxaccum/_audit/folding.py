"""Equations of shapes alone, computed: ``jnp.maximum(len(x), 1)`` is one number at each batch size.

Python computes with shapes before JAX sees anything. With `jnp`, the same arithmetic becomes
equations of constants. They are computed here, by numpy, so that their results are constants again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxaccum._base.trees import is_array

LARGEST = 64
"""The most entries of a constant that is computed with: shapes are short."""

Constant = Any
"""What JAX holds as a constant of a program: a number, an array, a key, or a tracer."""
Params = Mapping[str, Any]
"""The parameters of an equation."""
Fold = Callable[..., np.ndarray]
"""``(parameters, *operands) -> result``."""


def _elementwise(function: Callable[..., np.ndarray]) -> Fold:
    return lambda params, *operands: function(*operands)


def _along_axes(function: Callable[..., np.ndarray]) -> Fold:
    return lambda params, x: function(x, axis=tuple(params["axes"]))


def _quotient(params: Params, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """JAX rounds the quotient of integers towards zero."""
    if np.issubdtype(x.dtype, np.integer):
        return np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y))
    return x / y


def _broadcast(params: Params, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _slice(params: Params, x: np.ndarray) -> np.ndarray:
    steps = params["strides"] or [1] * x.ndim
    return x[tuple(map(slice, params["start_indices"], params["limit_indices"], steps))]


FOLDS: dict[str, Fold] = {
    "add": _elementwise(np.add),
    "sub": _elementwise(np.subtract),
    "mul": _elementwise(np.multiply),
    "div": _quotient,
    "rem": _elementwise(np.fmod),
    "max": _elementwise(np.maximum),
    "min": _elementwise(np.minimum),
    "pow": _elementwise(np.power),
    "neg": _elementwise(np.negative),
    "abs": _elementwise(np.abs),
    "sign": _elementwise(np.sign),
    "floor": _elementwise(np.floor),
    "ceil": _elementwise(np.ceil),
    "sqrt": _elementwise(np.sqrt),
    "rsqrt": _elementwise(lambda x: 1 / np.sqrt(x)),
    "square": _elementwise(np.square),
    "exp": _elementwise(np.exp),
    "log": _elementwise(np.log),
    "integer_pow": lambda params, x: x ** np.asarray(params["y"], x.dtype),
    "eq": _elementwise(np.equal),
    "ne": _elementwise(np.not_equal),
    "lt": _elementwise(np.less),
    "le": _elementwise(np.less_equal),
    "gt": _elementwise(np.greater),
    "ge": _elementwise(np.greater_equal),
    "not": _elementwise(np.invert),
    "and": _elementwise(np.bitwise_and),
    "or": _elementwise(np.bitwise_or),
    "is_finite": _elementwise(np.isfinite),
    "clamp": _elementwise(lambda low, x, high: np.minimum(np.maximum(x, low), high)),
    "select_n": _elementwise(lambda which, *cases: np.choose(which.astype(int), cases)),
    "convert_element_type": lambda params, x: x.astype(params["new_dtype"]),
    "copy": _elementwise(np.array),
    "copy_p": _elementwise(np.array),
    "stop_gradient": _elementwise(np.array),
    "broadcast_in_dim": _broadcast,
    "reshape": lambda params, x: x.reshape(params["new_sizes"]),
    "squeeze": lambda params, x: np.squeeze(x, tuple(params["dimensions"])),
    "expand_dims": lambda params, x: np.expand_dims(x, tuple(params["dimensions"])),
    "slice": _slice,
    "concatenate": lambda params, *operands: np.concatenate(operands, params["dimension"]),
    "stack": lambda params, *operands: np.stack(operands, params["axis"]),
    "reduce_sum": _along_axes(np.sum),
    "reduce_prod": _along_axes(np.prod),
    "reduce_max": _along_axes(np.max),
    "reduce_min": _along_axes(np.min),
    "reduce_and": _along_axes(np.all),
    "reduce_or": _along_axes(np.any),
}


def folded(eqn: jex.JaxprEqn, operands: Sequence[np.ndarray]) -> np.ndarray | None:
    """The result of an equation of constants; None where it has no rule here or is large."""
    fold = FOLDS.get(eqn.primitive.name)
    if fold is None or not eqn.outvars:
        return None
    out: Any = eqn.outvars[0].aval
    if out.size > LARGEST or not isinstance(out.dtype, np.dtype):
        return None
    own = []
    for x, v in zip(operands, eqn.invars, strict=True):
        aval: Any = v.aval
        if x.shape != aval.shape:
            return None
        own.append(np.asarray(x, aval.dtype))
    with np.errstate(all="ignore"):  # a division by zero that a choice then leaves out
        return np.asarray(fold(eqn.params, *own), out.dtype)


def is_numeric(x: Constant) -> bool:
    """Whether a constant is a number, or an array of numbers."""
    if isinstance(x, bool | int | float | complex):
        return True
    if not is_array(x):  # as a variable of Flax's own type, which has a dtype too
        return False
    return jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jnp.bool_)


def same(a: Constant, b: Constant) -> bool:
    """Whether two constants, numbers or keys, are equal."""
    if a is b or not (hasattr(a, "dtype") and hasattr(b, "dtype")):
        return a is b
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) and a.dtype == b.dtype:
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    inexact = jnp.issubdtype(a.dtype, jnp.inexact)
    return is_numeric(a) and np.array_equal(np.asarray(a), np.asarray(b), equal_nan=inexact)


def is_arange(x: np.ndarray) -> bool:
    """Whether it counts: 0, 1, 2, …, as ``np.arange(len(x))`` does."""
    counts = x.ndim == 1 and jnp.issubdtype(x.dtype, jnp.integer)
    return counts and np.array_equal(x, np.arange(x.size))


def may_be_key(x: Constant) -> bool:
    """Whether a constant is a typed key, or has the type of the numbers of one."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and (dtype == jnp.uint32 or jnp.issubdtype(dtype, jax.dtypes.prng_key))
