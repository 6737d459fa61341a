"""Sums, products, quotients and powers, with the factor common to all examples: the normalizer."""

from __future__ import annotations

from fractions import Fraction

import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._audit.lattice import (
    Addend,
    FaultKind,
    Index,
    Kind,
    Scale,
    Value,
    Weight,
    faults_of,
    fixed,
    origin_of,
    rows,
    statistic,
)  # fmt: skip
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.rules.elementwise import combine
from jaxaccum._audit.rules.operands import (
    Addends,
    all_fixed,
    all_scalar,
    any_rows,
    any_summary,
    both,
    common_scale,
    faulty,
    layout_of,
    nonzero,
    note_terms,
    once,
    products,
    same_layout,
    summaries_among,
    terms_of,
    with_faults,
)
from jaxaccum._audit.walk import Op, Walk

# -- totals as divisors ----------------------------------------------------------------------------


def as_weight(x: Value) -> Scale | None:
    """A total over the batch as a divisor, or what a guard makes of one; None if it is neither."""
    if x.weight is not None or x.kind is not Kind.TOTAL or len(x.terms) != 1:
        return x.weight
    (term,) = x.terms
    own = Scale(term.scale.power, frozenset([Weight(x.number)]))
    return None if term.fixed or term.scale.weights else own


def normalizer(x: Value) -> Scale | None:
    """The same, of one number that divides everything."""
    return as_weight(x) if x.summary and x.scalar else None


def _noted(walk: Walk, op: Op, scale: Scale) -> Scale:
    """The scale, with the line that divides by its weights noted for the report."""
    for weight in scale.weights:
        walk.weights.setdefault(weight.number, walk.site(op))
    return scale


def guarded(x: Value, ins: list[Value]) -> Value:
    """A weight kept from 0, as a statistic: its maximum with a constant, or its sum with one."""
    weight = as_weight(x)
    kept = None if weight is None else weight.guarded()
    return statistic(x.origin, weight=kept, scalar=all_scalar(ins))


# -- sums ------------------------------------------------------------------------------------------


@rule("add add_any", uniform=True, pointwise=True)
def add(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """x + y. The first example of the microbatch plus a row is the example's place in the batch."""
    for x, y in (ins, ins[::-1]):
        if x.index is Index.START and y.index is Index.ROW:
            assert y.layout is not None
            apart = not walk.in_order
            place = rows(y.layout, faults=faults_of(ins), by_order=apart, own_place=apart)
            return Settled([place])
        if x.index is not Index.MICROBATCH:
            continue
        if y.known == 0:  # as JAX writes the index along several axes
            return Settled([x])
        if not y.placed and y.fixed and y.scale == _OF_A_DEVICE:
            return Settled([with_faults(x, y.faults)])
    return added(walk, op, ins)


_OF_A_DEVICE = Scale(Fraction(-1))
"""A device's place times its number of microbatches, by which the microbatches of all devices are
counted."""


@rule("sub complex", uniform=True, pointwise=True)
def sub(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """x - y, or x + iy."""
    return added(walk, op, ins)


def added(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A sum, or whatever is linear like one: the addends of all operands."""
    live = nonzero(ins)
    summaries = summaries_among(live)
    if all_fixed(live):
        return _added_fixed(op, ins)
    if len(live) == 1:
        return live[0].but(scalar=all_scalar(ins), weight=as_weight(live[0]))
    if summaries and any_rows(live):
        return combine(walk, op, live)
    if len(summaries) == 1 and _divides(summaries[0]):
        return guarded(summaries[0], ins)
    if not same_layout(live) or not all(map(_has_addends, live)):
        return combine(walk, op, live)
    terms = _addends(walk, op, live, apart=bool(summaries))
    if (layout := layout_of(live)) is not None:
        return rows(layout, terms=terms, origin=origin_of(live))
    weight = guarded(summaries[0], ins).weight if len(summaries) == 1 else None
    return summaries[0].but(scalar=all_scalar(ins), terms=terms, weight=weight)


def _has_addends(x: Value) -> bool:
    """Whether the analysis knows what a value is a sum of."""
    return x.kind is not Kind.STATISTIC


def _divides(x: Value) -> bool:
    """Whether it is a total that a guard has made another statistic of."""
    return x.kind is Kind.STATISTIC and x.weight is not None


def _added_fixed(op: Op, ins: list[Value]) -> Value:
    return fixed(common_scale(ins), known=_known_sum(op, ins), scalar=all_scalar(ins))


def _known_sum(op: Op, ins: list[Value]) -> complex | None:
    """The sum or the difference of two numbers that are known."""
    if op.name not in ("add", "sub"):
        return None
    x, y = ins
    if x.known is None or y.known is None:
        return None
    return x.known + y.known if op.name == "add" else x.known - y.known


def _addends(walk: Walk, op: Op, ins: list[Value], *, apart: bool) -> Addends:
    """The addends of all operands; with `apart`, what is independent of the batch enters once."""
    terms: Addends = frozenset()
    for v in ins:
        own = once(v) if v.fixed and apart else v.terms
        note_terms(walk, own, v.origin or walk.site(op))
        terms |= own
    return terms


# -- products --------------------------------------------------------------------------------------


@rule("mul", uniform=True, pointwise=True, scales=True)
def mul(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """x · y. The microbatch's place times its size is the place of its first example."""
    if ins[0].root is not None and ins[0].number == ins[1].number:
        return Settled([ins[0].root])
    for x, y in (ins, ins[::-1]):
        if x.index is Index.MICROBATCH and y.known == 1:
            return Settled([x])
        if x.index is Index.MICROBATCH and _is_batch_size(walk, op, y):
            return x.but(scalar=True, index=Index.START)
    for x, y in (ins, ins[::-1]):
        if y.fixed:
            return _scaled(walk, op, x, y)
        ratio = normalizer(y) if y.kind is Kind.STATISTIC and x.kind is not Kind.STATISTIC else None
        if ratio is not None:
            return x.scaled(_noted(walk, op, ratio)).like(origin=x.origin or y.origin)
        if (undone := _undivided(x, y)) is not None:
            return undone
    return times(walk, op, ins)


def _undivided(x: Value, y: Value) -> Value | None:
    """``(total / y) * y``: the total again, plus y times what enters once; None otherwise."""
    scale = normalizer(y) if x.kind is Kind.TOTAL and y.kind is Kind.TOTAL else None
    if scale is None:
        return None
    own = {term.times(scale) for term in x.terms if not term.fixed}
    left = {weight.number for term in own for weight in term.scale.weights if weight.exponent}
    if left & _numbers(scale):
        return None
    apart = frozenset(term for term in x.terms if term.fixed)
    return x.but(scalar=x.scalar, terms=products(y.terms, apart) | own)


def _numbers(scale: Scale) -> frozenset[int]:
    """Which totals over the batch a scale holds."""
    return frozenset(weight.number for weight in scale.weights)


def times(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A product of rows with rows of the same examples."""
    x, y = ins
    layout = layout_of(ins)
    if layout is None or not (x.rows and y.rows and same_layout(ins)):
        return combine(walk, op, ins)
    return rows(layout, terms=products(x.terms, y.terms), origin=origin_of(ins))


def _is_batch_size(walk: Walk, op: Op, x: Value) -> bool:
    """Whether a factor is the size of a microbatch, written as a number."""
    first, second = walk.sizes.first, walk.sizes.second
    equal = first * walk.axis_sizes[0] == second * walk.axis_sizes[1] and not walk.mesh_axes
    return x.fixed and equal and both(op, _numbers_written) == ([first], [second])


def _numbers_written(eqn: jex.JaxprEqn) -> list[object]:
    """The operands of an equation that are numbers of the program."""
    return [v.val for v in eqn.invars if isinstance(v, jex.Literal)]


def _scaled(walk: Walk, op: Op, x: Value, factor: Value) -> Value:
    """A value times a factor that is independent of the batch."""
    if x.rows and not factor.scale.trivial:
        walk.sized = walk.sized or walk.site(op)
    known = weight = None
    if x.known is not None and factor.known is not None:
        known = x.known * factor.known
    if factor.scalar and (own := as_weight(x)) is not None:
        weight = own * factor.scale
    scalar = x.scalar and factor.scalar
    return x.scaled(factor.scale).like(scalar=scalar, known=known, weight=weight)


@rule("div", uniform=True, pointwise=True, scales=True)
def div(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """x / y; of integers it is rounded, and so linear in neither."""
    x, y = ins
    layout = layout_of(ins)
    if not jnp.issubdtype(op.eqn.outvars[0].aval.dtype, jnp.inexact):
        return combine(walk, op, ins)
    if y.fixed:
        return _scaled(walk, op, x, fixed(y.scale.inverse(), scalar=y.scalar))
    if y.summary and x.kind is not Kind.STATISTIC and (scale := normalizer(y)) is not None:
        inverse = _noted(walk, op, scale).inverse()
        if x.fixed:
            return statistic(y.origin, weight=inverse * x.scale, scalar=x.scalar)
        return x.scaled(inverse).like(origin=x.origin or y.origin)
    if layout is not None and y.rows and not x.summary and same_layout(ins) and len(y.terms) == 1:
        return rows(layout, terms=x.scaled(y.scale.inverse()).terms, origin=origin_of(ins))
    return combine(walk, op, ins)


# -- powers ----------------------------------------------------------------------------------------

_EXPONENTS = {
    "square": Fraction(2),
    "sqrt": Fraction(1, 2),
    "rsqrt": Fraction(-1, 2),
    "reciprocal": Fraction(-1),
}


@rule("pow", uniform=True, pointwise=True)
def power_of(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """x to the power y; to the power 2.0, a root is the total again."""
    x, y = ins
    if x.root is not None and y.known == 2:
        return Settled([x.root])
    return combine(walk, op, ins)


@rule("square sqrt rsqrt reciprocal integer_pow", uniform=True, pointwise=True, scales=True)
def power(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """x to a constant power; the square of a total's root is the total."""
    (x,) = ins
    exponent = _EXPONENTS.get(op.name) or Fraction(op.params["y"])
    if exponent == 2 and x.root is not None:
        return Settled([x.root])
    if op.name == "sqrt" and x.kind is Kind.TOTAL:
        return combine(walk, op, ins).like(root=x)
    same = op.eqn.params.get("y") == op.other.params.get("y")
    scale = x.scale
    if same and not x.summary and not scale.weights and scale.power is not None:
        return x.but(scalar=x.scalar, terms=frozenset([Addend(Scale(scale.power * exponent))]))
    if same and exponent == -1 and (weight := normalizer(x)) is not None:
        return statistic(x.origin, weight=_noted(walk, op, weight).inverse(), scalar=True)
    return combine(walk, op, ins)


# -- guards against an empty weight ----------------------------------------------------------------


@rule("max", uniform=True, pointwise=True)
def maximum(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """max(x, y): with a constant, it keeps a weight from 0."""
    for x, y in (ins, ins[::-1]):
        if x.summary and y.fixed and as_weight(x) is not None:
            return guarded(x, ins)
    return combine(walk, op, ins)


@rule("eq ne gt ge lt le and or", uniform=True, pointwise=True)
def compare(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A comparison, which may be a guard's: of a weight with a constant."""
    x, y = ins
    if op.name == "lt" and _is_place(x) and y.zero:  # which is never negative
        return Settled([with_faults(_never(walk), x.faults)])
    if op.name == "ne" and x.number == y.number and (x.summary or _is_known_not_nan(walk, x)):
        return _is_nan(walk, op, x)
    if op.name == "and" and (never := [v for v in ins if v.known is False]):
        return Settled([with_faults(_never(walk), never[0].faults)])
    summaries = summaries_among(ins)
    compared = list(map(_compared, summaries))
    if summaries and all(compared) and not any_rows(ins):
        compares = frozenset().union(*compared)
        return statistic(summaries[0].origin, compares=compares, scalar=all_scalar(ins))
    return combine(walk, op, ins)


def _is_place(x: Value) -> bool:
    return x.own_place or x.index not in (None, Index.GATHERED)


def _never(walk: Walk) -> Value:
    """A condition that is false everywhere."""
    return fixed(known=False, number=walk.fresh())


def _is_known_not_nan(walk: Walk, x: Value) -> bool:
    """Whether a value is made of finite numbers by what makes no NaN of them."""
    return x.never_nan and walk.is_finite()


def _is_nan(walk: Walk, op: Op, x: Value) -> Value | list[Value]:
    """``x != x``, which is true of a NaN alone: an empty mean is guarded so."""
    never = _never(walk)
    if walk.may_be_nan():
        return combine(walk, op, [x])
    note = "exact only if no value is NaN: else each microbatch replaces its own NaN"
    assumed = faulty(walk, op, FaultKind.ASSUMPTION, note)
    return Settled([with_faults(never, x.faults | assumed)])


def _compared(x: Value) -> frozenset[int]:
    """The totals that a condition compares, or that a divisor is made of."""
    weight = as_weight(x)
    return x.compares or (frozenset() if weight is None else _numbers(weight))


@rule("select_n", uniform=True, pointwise=True)
def select(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """One of the cases, by a condition."""
    which, *cases = ins
    if which.known is not None:
        return Settled([with_faults(cases[int(which.known)], which.faults)])
    if which.compares and which.scalar:
        return _guard(walk, op, ins)
    if which.fixed and not which.faults and not any_rows(cases):
        if not which.scale.trivial:
            return combine(walk, op, ins)
        return added(walk, op, cases).like(scalar=all_scalar(ins))
    if not any_summary(ins):
        return _select_rows(walk, op, ins)
    return combine(walk, op, ins)


def _guard(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """``where(w > 0, x, constant)``: x may be w itself, or what w has normalized."""
    which, *cases = ins
    live = nonzero(cases)
    if len(live) == 1 and _normalized_by(live[0], which.compares):
        terms = frozenset(Addend(t.scale.guarded(), t.fixed) for t in live[0].terms)
        return live[0].but(scalar=live[0].scalar, terms=terms)
    weights = summaries_among(cases)
    if len(weights) == 1 and _compared(weights[0]) == which.compares and not any_rows(cases):
        return guarded(weights[0], ins)
    return combine(walk, op, ins)


def _normalized_by(x: Value, weights: frozenset[int]) -> bool:
    """Whether every addend of a total is divided by all of the weights."""
    return x.kind is Kind.TOTAL and all(weights <= _numbers(term.scale) for term in x.terms)


def _select_rows(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A choice for each example: scaled like the cases that are not 0."""
    which, *cases = ins
    layout = layout_of(ins)
    if not same_layout(ins) or not which.scale.trivial:
        return combine(walk, op, ins)
    if layout is None:
        return _added_fixed(op, cases).like(scalar=all_scalar(ins))
    return rows(layout, terms=terms_of(cases), origin=origin_of(ins))
