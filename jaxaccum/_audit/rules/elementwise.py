"""Functions applied entry by entry: examples stay apart, and a nonlinear function undoes a sum."""

from __future__ import annotations

import dataclasses

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxaccum._audit.lattice import (
    IRREGULAR,
    PLAIN,
    UNIT,
    FaultKind,
    Scale,
    Value,
    faults_of,
    fixed,
    origin_of,
    rows,
    statistic,
)
from jaxaccum._audit.registry import IDENTITIES, RULES, rule
from jaxaccum._audit.rules.operands import (
    Faults,
    all_scalar,
    all_unscaled,
    both,
    faulty,
    is_weighted,
    layout_of,
    rows_among,
    same_layout,
    summaries_among,
)
from jaxaccum._audit.walk import Op, Walk

_NONLINEAR = """
    abs floor ceil round nextafter exp exp2 log log1p expm1 tanh logistic sin cos tan asin acos
    atan sinh cosh asinh acosh atanh atan2 erf erfc erf_inv lgamma digamma igamma igammac
    igamma_grad_a random_gamma_grad polygamma zeta regularized_incomplete_beta bessel_i0e bessel_i1e
    cbrt is_finite not xor rem min clamp shift_left mulhi shift_right_logical shift_right_arithmetic
    population_count clz lt_to le_to eq_to log2 one_minus_square polynomial
"""
_LINEAR = "neg conj real imag reduce_precision"


@rule(_NONLINEAR, uniform=True, pointwise=True)
def combine(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A function of its operands that is linear in none of them."""
    parts, layout = rows_among(ins), layout_of(ins)
    if (extremum := _extremum_of(op, ins)) is not None:
        return statistic(ins[0].origin, extremum=extremum)
    if summaries := summaries_among(ins):
        return walk.couple(op, summaries, layout=layout)
    if layout is None:
        scalar = RULES[op.name].uniform and all_scalar(ins)  # a convolution has borders
        return fixed(UNIT if _constant(op, ins) else IRREGULAR, scalar=scalar)
    if not same_layout(parts):
        note = "different examples are combined"
        return walk.couple(op, parts, kind=FaultKind.PAIRWISE, note=note, layout=layout)
    if scaled := list(filter(is_weighted, parts)):
        note = "an example scaled by a statistic of the batch enters"
        return walk.couple(op, scaled, note=note, layout=layout)
    faults: Faults = frozenset()
    if not _constant(op, ins):
        note = "a value that changes with the batch size enters"
        faults = faulty(walk, op, FaultKind.BATCH_SIZE, note)
    return rows(layout, faults=faults, origin=origin_of(parts))


@rule("sign", uniform=True, pointwise=True, scales=True)
def sign(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """The sign, which no power of the batch's size changes: that of a gradient of a mean over the
    microbatch is that of a mean over the batch."""
    (x,) = ins
    if x.summary or x.scale.weights or not x.scale.power:
        return combine(walk, op, ins)
    return x.but(terms=PLAIN, scalar=x.scalar)


_INCREASING = frozenset(
    ("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sqrt", "cbrt", "erf", "asinh",
     "sinh", "atan", "sign", "floor", "ceil")
)  # fmt: skip


def _extremum_of(op: Op, ins: list[Value]) -> str | None:
    """The extremum that it is too: an increasing function of one, or the larger of two maxima;
    with a constant, the smaller one too."""
    live = [v for v in ins if not (op.name in ("max", "min", "clamp") and _is_constant(v))]
    kinds = {v.extremum for v in live}
    if len(kinds) != 1 or faults_of(ins):
        return None
    (kind,) = kinds
    increasing = op.name in _INCREASING or len(live) < len(ins)
    return kind if increasing or op.name == kind else None


def _is_constant(x: Value) -> bool:
    """Whether it is the same for every microbatch and at every batch size."""
    return x.fixed and x.scale.trivial and not x.placed


def _constant(op: Op, ins: list[Value]) -> bool:
    """Whether neither the function nor its operands change with the batch size."""
    mine, other = both(op, _function_of)
    return mine == other and all_unscaled(ins)


def _function_of(eqn: jex.JaxprEqn) -> dict[str, object]:
    """The parameters that say which function it is."""
    said = {}
    for name, value in eqn.params.items():
        if _says(name):
            said[name] = text_of(value) if "jaxpr" in name else value
    return said


def _says(parameter: str) -> bool:
    """Whether a parameter says which function it is; placements and shapes do not."""
    return not any(word in parameter for word in ("sharding", "computation", "shape", "sizes"))


def text_of(body: object) -> object:
    """What a jaxpr does, whose identity says nothing; with constants it is like no other."""
    open_ = getattr(body, "jaxpr", body)
    has_constants = getattr(body, "consts", ()) or getattr(open_, "constvars", ())
    return body if has_constants else str(open_)


@rule("bitcast_convert_type", uniform=True)
def bits(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """The same bits in another dtype: of a wider one, several numbers along a new last axis."""
    value, one_to_one = combine(walk, op, ins), op.shapes() == op.out_shapes()
    return value if one_to_one else value.like(scalar=False, known=None)


@rule(_LINEAR, uniform=True, pointwise=True)
def linear(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A linear function of one operand; that turns its sign makes a minimum of a maximum."""
    (x,) = ins
    opposite = {"max": "min", "min": "max", None: None}[x.extremum]
    return x.but(scalar=x.scalar, extremum=opposite if op.name == "neg" else None)


@rule(" ".join(IDENTITIES), uniform=True, pointwise=True)
def identity(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The operands themselves."""
    return list(ins)


@rule("stop_gradient", uniform=True, pointwise=True)
def stopped(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """The same number without a gradient: it cancels with nothing that has one."""
    (x,) = ins
    if not x.params:
        return [x]
    if is_weighted(x):
        return walk.couple(op, [x], note=_STOPPED, layout=x.layout)
    return x.like(number=walk.fresh(), root=None, weight=_without_gradient(walk, x))


def _without_gradient(walk: Walk, x: Value) -> Scale | None:
    """A divisor whose totals are others than those that have a gradient."""
    if x.weight is None:
        return None
    weights = (dataclasses.replace(w, number=walk.fresh()) for w in x.weight.weights)
    return dataclasses.replace(x.weight, weights=frozenset(weights))


_STOPPED = "a ratio over one microbatch is taken without its gradient"


@rule("convert_element_type", uniform=True, pointwise=True)
def convert(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A change of dtype: linear, except from inexact to integer, to boolean, and to an integer that
    wraps."""
    if holds(op.eqn.outvars[0].aval.dtype, op.eqn.invars[0].aval.dtype):
        return ins[0].like(number=-1)
    return combine(walk, op, ins)


def holds(new: np.dtype, old: np.dtype) -> bool:
    """Whether a dtype holds the numbers of another one, but for rounding: of integers those of 32
    bits, which count examples."""
    if jnp.issubdtype(new, jnp.inexact) or old == jnp.bool_:
        return True
    if jnp.issubdtype(old, jnp.inexact) or new == jnp.bool_:
        return False
    few, many = jnp.iinfo(new), jnp.iinfo(old)
    return few.min <= max(many.min, -(2**31)) and few.max >= min(many.max, 2**31 - 1)
