"""Whether a NaN may come up: among the numbers that a loss is called with, or written in its
program."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxaccum._audit.folding import Constant
from jaxaccum._jaxpr.compat import ClosedJaxpr, opened


def any_nan(numbers: Iterable[Constant]) -> bool:
    """Whether one of them is NaN or has a NaN entry; of what has no value yet, that is not
    known."""
    return any(map(_is_nan, numbers))


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
