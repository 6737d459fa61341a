"""Whether a loss does the same work on one example as on several.

The problem. JAX leaves out what moves nothing along an axis of length 1. So the program for one
example has other equations than that for the batch, and cannot be walked side by side with it. A
program for more examples can. But does it say what the program for one will do? With
``jnp.squeeze(x)`` the next axis becomes the first, and a mean over examples is one over features.

The idea. Equations that compute are in both programs, in the same order. What their shapes and
numbers are at two sizes tells what they must be at 1::

    batch of 12        2 examples        so at 1        found at 1
    (12, 4)            (2, 4)            (1, 4)         (4,), the same but for axes of length 1
    12.0               2.0               1.0            4.0, the number of features: another loss

The cost. One more trace, of a loss that is not exact otherwise and whose microbatches hold one
example.

The weakness. JAX leaves out many functions of integers, so of these it only matters that the
program for one has no other primitive, and none more often: not which numbers they read. And which
operands an equation reads is not compared: ``x if len(x) > 1 else z`` is not seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._audit.sizes import Sizes
from jaxaccum._jaxpr.compat import opened
from jaxaccum._jaxpr.equations import equations_inside

_MOVES = {
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "slice", "dynamic_slice", "gather",
    "select_n", "transpose", "copy", "convert_element_type", "concatenate", "pad", "rev", "jit",
    "pjit",
}  # fmt: skip
"""Primitives that compute nothing new, which JAX leaves out or replaces where an axis has size
1."""
_SHAPES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}
"""Primitives that may do no more than add or drop axes of length 1."""
_REDUCES = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod"}
"""Primitives that compute nothing along axes of length 1."""


def same_work(one: object, more: object, whole: object, sizes: Sizes) -> bool:
    """Whether a program for one example is what two programs of the same equations foretell.

    `whole` is the program for ``sizes.first`` examples, and `more` that for ``sizes.second``.
    """
    found, few, many = [_Program.of(jaxpr) for jaxpr in (one, more, whole)]
    if not found.of_integers <= many.of_integers:
        return False
    if len(few.computing) != len(many.computing):
        return False
    if not _are_foretold(found.moved, few.moved, many.moved, sizes):
        return False
    pairs = list(zip(few.computing, many.computing, strict=True))
    left = [eqn for eqn in found.computing if not _reduces_ones(eqn)]
    expected = [pair for pair in pairs if not _reduces_foretold_ones(*pair, sizes)]
    if len(left) != len(expected):
        return False
    return all(_is_foretold(eqn, *pair, sizes) for eqn, pair in zip(left, expected, strict=True))


class _Program(NamedTuple):
    """What a program computes, and the numbers that it moves."""

    computing: list[jex.JaxprEqn]
    moved: list[jex.Literal]
    of_integers: Counter[str]
    """How often each primitive computes integers or conditions."""

    @classmethod
    def of(cls, jaxpr: object) -> _Program:
        """The program of a jaxpr, closed or open."""
        every = list(equations_inside(opened(jaxpr)[0]))
        equations = [eqn for eqn in every if _computes_numbers(eqn)]
        others = [eqn for eqn in every if not _computes_numbers(eqn) and not _keeps_entries(eqn)]
        moves = [eqn for eqn in equations if eqn.primitive.name in _MOVES]
        computing = [eqn for eqn in equations if eqn.primitive.name not in _MOVES]
        of_integers = Counter(eqn.primitive.name for eqn in others)
        return cls(computing, [x for eqn in moves for x in _numbers(eqn)], of_integers)


def _computes_numbers(eqn: jex.JaxprEqn) -> bool:
    """Whether a result of an equation is inexact: no integer, and no condition."""
    return any(map(_is_inexact, eqn.outvars))


def _is_inexact(v: jex.Var) -> bool:
    return jnp.issubdtype(getattr(v.aval, "dtype", bool), jnp.inexact)


def _keeps_entries(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation only adds axes of length 1 to an array, or drops them."""
    if eqn.primitive.name not in _SHAPES or _numbers(eqn):
        return False
    lengths, others = ([n for n in _shape(v) if n != 1] for v in (eqn.invars[0], eqn.outvars[0]))
    return lengths == others


def _numbers(eqn: jex.JaxprEqn) -> list[jex.Literal]:
    """The numbers that are written in an equation."""
    return [x for x in eqn.invars if isinstance(x, jex.Literal)]


def _is_foretold(found: jex.JaxprEqn, few: jex.JaxprEqn, many: jex.JaxprEqn, sizes: Sizes) -> bool:
    """Whether an equation is what those at two sizes foretell for one example."""
    if not found.primitive is few.primitive is many.primitive:
        return False
    numbers, others, more = _numbers(found), _numbers(few), _numbers(many)
    if not len(numbers) == len(others) == len(more):
        return False
    if not all(_is_number(*x, sizes) for x in zip(numbers, others, more, strict=True)):
        return False
    results = zip(found.outvars, few.outvars, many.outvars, strict=True)
    return all(_is_shape(_shape(v), _shape(w), _shape(u), sizes) for v, w, u in results)


def _reduces_ones(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation reduces axes of length 1 alone; JAX leaves out such a sum where it
    transposes a broadcast."""
    return all(length == 1 for (length,) in _reduced(eqn))


def _reduces_foretold_ones(few: jex.JaxprEqn, many: jex.JaxprEqn, sizes: Sizes) -> bool:
    """Whether it will reduce axes of length 1 alone for one example."""
    if few.primitive is not many.primitive or few.params.get("axes") != many.params.get("axes"):
        return False
    return all(_length_at_one(a, b, sizes) == 1 for a, b in _reduced(few, many))


def _reduced(*eqns: jex.JaxprEqn) -> list[tuple[float, ...]]:
    """The lengths of the axes that a reduction reduces, in each program; of any other equation NaN,
    which is no length."""
    if eqns[0].primitive.name not in _REDUCES:
        return [(math.nan,) * len(eqns)]
    shapes = [_shape(eqn.invars[0]) for eqn in eqns]
    return [tuple(shape[axis] for shape in shapes) for axis in eqns[0].params["axes"]]


def _shape(v: jex.Var | jex.Literal) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def _is_shape(found: Sequence[int], few: Sequence[int], many: Sequence[int], sizes: Sizes) -> bool:
    """Whether a shape is the foretold one, but for axes of length 1."""
    foretold = [_length_at_one(*each, sizes) for each in zip(few, many, strict=True)]
    return [a for a in foretold if a != 1] == [a for a in found if a != 1]


def _length_at_one(few: float, many: float, sizes: Sizes) -> float:
    """The length of an axis for one example, as it grows by the same with each."""
    each = (many - few) / (sizes.first - sizes.second)
    return few - each * (sizes.second - 1)


def _is_number(found: jex.Literal, few: jex.Literal, many: jex.Literal, sizes: Sizes) -> bool:
    """Whether a number follows, down to one example, the power of the batch's size that it
    follows at the two sizes."""
    of_one = dataclasses.replace(sizes, second=1)
    return of_one.power(many.val, found.val) == sizes.power(many.val, few.val)


def _are_foretold(
    found: Sequence[jex.Literal], few: Sequence[jex.Literal], many: Sequence[jex.Literal],
    sizes: Sizes,
) -> bool:  # fmt: skip
    """Whether every number that is moved is a foretold one: JAX may have left out some moves."""
    if len(few) != len(many):
        return False
    foretold = list(zip(few, many, strict=True))
    return all(any(_is_number(x, *pair, sizes) for pair in foretold) for x in found)
