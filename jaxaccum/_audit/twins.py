"""Whether an equation, or a program, is the same function at both batch sizes: only sizes may
differ."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

import jax.extend.core as jex
import numpy as np

from jaxaccum._program.batch_keys import is_batch_key

_Atom = jex.Var | jex.Literal
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


def same_function(eqn: jex.JaxprEqn, other: jex.JaxprEqn) -> bool:
    """Whether two equations do the same to arrays of two sizes.

    Functions and jaxprs among the parameters are not compared: those are walked, or have no rule.
    """
    if eqn.primitive is not other.primitive or eqn.params.keys() != other.params.keys():
        return False
    if not _are_alike(eqn.invars, other.invars) or not _are_alike(eqn.outvars, other.outvars):
        return False
    return all(_agree(name, eqn, other) for name in eqn.params)


def _are_alike(variables: Sequence[_Atom], others: Sequence[_Atom]) -> bool:
    """Whether variables have the same dtypes and numbers of axes."""
    if len(variables) != len(others):
        return False
    for v, w in zip(variables, others, strict=True):
        if v.aval is w.aval:
            continue
        if len(_shape(v)) != len(_shape(w)) or _dtype(v) != _dtype(w):
            return False
    return True


def _shape(v: _Atom) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def _dtype(v: _Atom) -> object:
    """The dtype; of a key of the batch, at any size, its name."""
    dtype = getattr(v.aval, "dtype", None)
    if dtype is None or isinstance(dtype, np.dtype):  # whose name NumPy makes anew each time
        return dtype
    return dtype.name if is_batch_key(dtype) else dtype


def _agree(name: str, eqn: jex.JaxprEqn, other: jex.JaxprEqn) -> bool:
    first, second = eqn.params[name], other.params[name]
    if first is second or name in _SIZES or not _is_plain(first):
        return True
    if name in _BY_AXIS and _has_entry_for_each_axis(first, second, eqn):
        return _agree_by_axis(first, second, eqn, other)
    return _equal(first, second)


def _has_entry_for_each_axis(first: object, second: object, eqn: jex.JaxprEqn) -> bool:
    """Whether a parameter is about all axes: the padding of a convolution is about some."""
    axes = len(_shape(eqn.invars[0]))
    return all(isinstance(x, tuple | list) and len(x) == axes for x in (first, second))


def _agree_by_axis(
    first: Sequence[object], second: Sequence[object], eqn: jex.JaxprEqn, other: jex.JaxprEqn
) -> bool:
    """Whether entries differ only along axes whose size differs, before or after the equation."""
    before, after = (eqn.invars[0], other.invars[0]), (eqn.outvars[0], other.outvars[0])
    for axis, (a, b) in enumerate(zip(first, second, strict=True)):
        if not _equal(a, b) and not _varies(*before, axis) and not _varies(*after, axis):
            return False
    return True


def _varies(v: _Atom, w: _Atom, axis: int) -> bool:
    return _shape(v)[axis] != _shape(w)[axis]


def _is_plain(x: object) -> bool:
    """Whether a parameter is data: not a function, a jaxpr or a layout on a mesh."""
    if isinstance(x, tuple | list):
        return all(map(_is_plain, x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return all(_is_plain(getattr(x, field.name)) for field in dataclasses.fields(x))
    return isinstance(x, _PLAIN) or type(x) is type


def _equal(x: object, y: object) -> bool:
    both_nan = isinstance(x, float) and isinstance(y, float) and x != x and y != y
    return both_nan or bool(x == y)
