"""Whether an equation, or a program, is the same function at both batch sizes: only sizes may
differ."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxaccum._jaxpr.compat import opened
from jaxaccum._program.example_keys import is_joined

_SIZES = {
    "shape", "new_sizes", "slice_sizes", "sizes", "reps", "fft_lengths", "length", "axis_size",
    "perm", "axis_index_groups", "result_avals",
}  # fmt: skip
"""Parameters that repeat the shapes of operands and results, or that a rule compares by itself."""
_BY_AXIS = {
    "start_indices", "limit_indices", "window_dimensions", "window_strides", "padding_config",
    "padding",
}  # fmt: skip
"""Parameters with an entry for each axis of the operand."""
_PLAIN = (bool, int, float, complex, str, type(None), np.dtype, np.generic, enum.Enum)


def same_function(eqn: Any, other: Any) -> bool:
    """Whether two equations do the same to arrays of two sizes.

    Functions and jaxprs among the parameters are not compared: those are walked, or have no rule.
    """
    if eqn.primitive is not other.primitive or eqn.params.keys() != other.params.keys():
        return False
    if _kinds(eqn.invars) != _kinds(other.invars) or _kinds(eqn.outvars) != _kinds(other.outvars):
        return False
    return all(_agree(name, eqn, other) for name in eqn.params)


def _kinds(variables: Sequence[Any]) -> list[Any]:
    """Dtypes and numbers of axes."""
    avals = [v.aval for v in variables]
    return [(_dtype(x), len(getattr(x, "shape", ()))) for x in avals]


def _dtype(aval: Any) -> Any:
    """The dtype; of a key that holds those of the examples, at any size, its name."""
    dtype: Any = getattr(aval, "dtype", None)
    if isinstance(dtype, np.dtype):  # nearly all of them, and they make their names anew each time
        return dtype
    return dtype.name if is_joined(dtype) else dtype


def _agree(name: str, eqn: Any, other: Any) -> bool:
    first, second = eqn.params[name], other.params[name]
    if name in _SIZES or not _is_plain(first):
        return True
    if name in _BY_AXIS and first is not None and second is not None:
        return _agree_by_axis(first, second, eqn, other)
    return _equal(first, second)


def _agree_by_axis(first: Sequence[Any], second: Sequence[Any], eqn: Any, other: Any) -> bool:
    """Whether entries differ only along axes whose size differs, before or after the equation."""
    before = _varies(eqn.invars[0], other.invars[0])
    after = _varies(eqn.outvars[0], other.outvars[0])
    changed = [not _equal(a, b) for a, b in zip(first, second, strict=True)]
    return not any(change and not before(i) and not after(i) for i, change in enumerate(changed))


def _varies(v: Any, w: Any) -> Callable[[int], bool]:
    return lambda axis: v.aval.shape[axis] != w.aval.shape[axis]


def _is_plain(x: Any) -> bool:
    """Whether a parameter is data: not a function, a jaxpr or a layout on a mesh."""
    if isinstance(x, tuple | list):
        return all(map(_is_plain, x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return all(_is_plain(getattr(x, field.name)) for field in dataclasses.fields(x))
    return isinstance(x, _PLAIN) or type(x) is type


def _equal(x: Any, y: Any) -> bool:
    both_nan = isinstance(x, float) and isinstance(y, float) and x != x and y != y
    return both_nan or bool(x == y)


_MOVES = {
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "slice", "dynamic_slice", "gather",
    "select_n", "transpose", "copy", "convert_element_type", "concatenate", "pad", "rev", "jit",
    "pjit",
}  # fmt: skip
"""Primitives that compute nothing new, which JAX leaves out or replaces where an axis has size
1."""


def same_work(first: Any, second: Any) -> bool:
    """Whether two programs compute with the same primitives, as often, but for what only moves
    numbers."""
    return Counter(_computing(opened(first)[0])) == Counter(_computing(opened(second)[0]))


def _computing(jaxpr: jex.Jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        inexact = any(
            jnp.issubdtype(getattr(v.aval, "dtype", bool), jnp.inexact) for v in eqn.outvars
        )
        if inexact and eqn.primitive.name not in _MOVES:
            yield eqn.primitive.name
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from _computing(inner)
