"""Whether a NaN may come up: among the numbers that a loss is called with, or written in its
program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxaccum._audit.equation import Op
from jaxaccum._audit.folding import Constant, is_numeric
from jaxaccum._audit.lattice import Value
from jaxaccum._jaxpr.compat import ClosedJaxpr, opened


def any_nan(numbers: Iterable[Constant]) -> bool:
    """Whether one of them is NaN or has a NaN entry; of what has no value yet, that is not
    known."""
    return any(map(_is_nan, numbers))


def are_finite(numbers: Iterable[Constant]) -> bool:
    """Whether all of them are known, and neither NaN nor infinite."""
    return all(map(_is_finite, numbers))


def _is_finite(x: Constant) -> bool:
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return False
    if not is_numeric(x) or not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        return True
    return getattr(x, "is_fully_addressable", True) and bool(np.isfinite(np.asarray(x)).all())


def are_never_nan(op: Op, ins: Sequence[Value]) -> bool:
    """Whether an equation of finite numbers has results that are not NaN, but for an overflow."""
    if not all(x.never_nan for x in ins):
        return False
    if op.name == "integer_pow":
        return op.eqn.params["y"] >= 0
    if op.name == "div":
        divisor = ins[1].at
        return divisor is not None and bool(np.all(divisor[0]) and np.all(divisor[1]))
    return op.name in _MAKE_NO_NAN


_MAKE_NO_NAN = frozenset({
    "add", "sub", "mul", "neg", "abs", "sign", "square", "max", "min", "clamp", "tanh", "logistic",
    "erf", "sin", "cos", "floor", "ceil", "round", "stop_gradient", "convert_element_type",
    "reduce_precision", "copy", "select_n", "iota", "reshape", "broadcast_in_dim", "squeeze",
    "expand_dims", "transpose", "rev", "slice", "dynamic_slice", "concatenate", "pad",
    "dot_general", "reduce_sum", "reduce_max", "reduce_min", "cumsum", "cummax", "cummin", "eq",
    "ne", "lt", "le", "gt", "ge", "and", "or", "not",
})  # fmt: skip
"""Primitives that make a NaN of infinite numbers alone, or of none. `gather` makes one of what lies
out of bounds."""


def constants(jaxpr: object) -> Iterator[Constant]:
    """The numbers of a program: its constants, and those that are written in its equations."""
    inner, consts = opened(jaxpr)
    yield from consts
    for eqn in inner.eqns:
        yield from (v.val for v in eqn.invars if isinstance(v, jex.Literal))
        for body in _bodies(eqn.params.values()):
            yield from constants(body)


def _bodies(parameters: Iterable[object]) -> Iterator[object]:
    """The jaxprs among the parameters of an equation, with their constants."""
    for x in parameters:
        if isinstance(x, jex.Jaxpr | ClosedJaxpr):
            yield x
        elif isinstance(x, tuple | list):
            yield from _bodies(x)


def _is_nan(x: Constant) -> bool:
    if isinstance(x, float | complex):
        return x != x
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) or not hasattr(x, "dtype"):
        return False
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return False
    # Nothing can be read of an array that lies on other hosts.
    return not getattr(x, "is_fully_addressable", True) or bool(np.isnan(np.asarray(x)).any())
