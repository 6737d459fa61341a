"""Sums, products, quotients and powers, with the factor that is common to all examples: the
normalizer."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import jax.numpy as jnp

from jaxaccum._audit.lattice import (
    IRREGULAR,
    PLAIN,
    UNIT,
    FaultKind,
    Index,
    Kind,
    Scale,
    Term,
    Value,
    Weight,
    fixed,
    rows,
    statistic,
)  # fmt: skip
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.rules.elementwise import combine, layout_of, origin_of, same_layout
from jaxaccum._audit.walk import Op, Walk

# -- totals as divisors ----------------------------------------------------------------------------


def as_weight(x: Value) -> Scale | None:
    """A total over the batch as a divisor, or what a guard has made of one; None where it is
    neither."""
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
    """A statistic that is a weight kept from 0: its maximum with a constant, or its sum with
    one."""
    weight = as_weight(x)
    scalar = all(v.scalar for v in ins)
    return statistic(x.origin, weight=None if weight is None else weight.guarded(), scalar=scalar)


# -- sums ------------------------------------------------------------------------------------------


@rule("add add_any", uniform=True)
def add(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """x + y. The first example of the microbatch plus a row is the example's place in the batch: a
    datum of its own."""
    if {v.index for v in ins} == {Index.START, Index.ROW}:
        row = next(v for v in ins if v.index is Index.ROW)
        assert row.layout is not None
        return Settled([rows(row.layout, faults=ins[0].faults | ins[1].faults)])
    for x, y in (ins, ins[::-1]):
        if (
            x.index is Index.MICROBATCH and y.known == 0
        ):  # as JAX writes the index along several axes
            return Settled([x])
        if x.index is Index.MICROBATCH and y.index is None and y.fixed and y.scale == _OF_A_DEVICE:
            return Settled([dataclasses.replace(x, faults=x.faults | y.faults)])
    return added(walk, op, ins)


_OF_A_DEVICE = Scale(Fraction(-1))
"""A device's place times its number of microbatches, by which the microbatches of all devices are
counted."""


@rule("sub complex", uniform=True)
def sub(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """x - y, or x + iy."""
    return added(walk, op, ins)


def added(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A sum, or whatever is linear like one: the addends of all operands."""
    live = [v for v in ins if not v.zero]
    summaries = [v for v in live if v.summary]
    if all(v.fixed for v in live):
        return _added_fixed(op, ins)
    if len(live) == 1:
        return dataclasses.replace(
            live[0].but(scalar=all(v.scalar for v in ins)), weight=as_weight(live[0])
        )
    if summaries and not all(v.fixed for v in live if v not in summaries):
        return combine(walk, op, live)
    if (
        len(summaries) == 1
        and summaries[0].kind is Kind.STATISTIC
        and summaries[0].weight is not None
    ):
        return guarded(summaries[0], ins)
    if any(v.kind is Kind.STATISTIC for v in live) or not same_layout(live):
        return combine(walk, op, live)
    terms = _addends(walk, op, live, apart=bool(summaries))
    if (layout := layout_of(live)) is not None:
        return rows(layout, terms=terms, origin=origin_of(live))
    weight = guarded(summaries[0], ins).weight if len(summaries) == 1 else None
    return dataclasses.replace(
        summaries[0].but(scalar=all(v.scalar for v in ins)), terms=terms, weight=weight
    )


def _added_fixed(op: Op, ins: list[Value]) -> Value:
    scales = {v.scale for v in ins if not v.zero} or {UNIT}
    known = None
    if op.name in ("add", "sub") and all(v.known is not None for v in ins):
        x, y = (v.known for v in ins)
        known = x + y if op.name == "add" else x - y
    return fixed(
        scales.pop() if len(scales) == 1 else IRREGULAR,
        known=known,
        scalar=all(v.scalar for v in ins),
    )


def _addends(walk: Walk, op: Op, ins: list[Value], *, apart: bool) -> frozenset[Term]:
    """The addends of all operands; `apart` keeps those that are independent of the batch, which
    stand once."""
    terms: set[Term] = set()
    for v in ins:
        own = (
            {dataclasses.replace(term, fixed=True) for term in v.terms}
            if v.fixed and apart
            else v.terms
        )
        for term in own:
            walk.sites.setdefault(term, v.origin or walk.site(op))
        terms |= own
    return frozenset(terms)


# -- products --------------------------------------------------------------------------------------


@rule("mul", uniform=True, scales=True)
def mul(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """x · y. The microbatch's place times its size is the place of its first example."""
    if ins[0].root is not None and ins[0].number == ins[1].number:
        return Settled([ins[0].root])
    for x, y in (ins, ins[::-1]):
        if x.index is Index.MICROBATCH and y.known == 1:
            return Settled([x])
        if x.index is Index.MICROBATCH and _is_batch_size(walk, op, y):
            return dataclasses.replace(x.but(scalar=True), index=Index.START)
    for x, y in (ins, ins[::-1]):
        if y.fixed:
            return _scaled(walk, op, x, y)
        if (
            y.kind is Kind.STATISTIC
            and x.kind is not Kind.STATISTIC
            and (scale := normalizer(y)) is not None
        ):
            return dataclasses.replace(
                x.scaled(_noted(walk, op, scale)), origin=x.origin or y.origin
            )
        if (undone := _undivided(x, y)) is not None:
            return undone
    return times(walk, op, ins)


def _undivided(x: Value, y: Value) -> Value | None:
    """``(total / y) * y``: the total again, plus y times what stands once; None where y divides no
    total."""
    scale = normalizer(y) if x.kind is Kind.TOTAL and y.kind is Kind.TOTAL else None
    if scale is None:
        return None
    own = {term.times(scale) for term in x.terms if not term.fixed}
    once = {y_term.times(term.scale) for term in x.terms if term.fixed for y_term in y.terms}
    left = {weight.number for term in own for weight in term.scale.weights if weight.exponent}
    if left & {weight.number for weight in scale.weights}:
        return None
    return dataclasses.replace(x.but(scalar=x.scalar), terms=frozenset(own | once))


def times(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A product of rows with rows of the same examples."""
    x, y = ins
    layout = layout_of(ins)
    if layout is None or not (x.rows and y.rows and same_layout(ins)):
        return combine(walk, op, ins)
    terms = frozenset(s.times(t.scale) for s in x.terms for t in y.terms)
    return rows(layout, terms=terms, origin=origin_of(ins))


def _is_batch_size(walk: Walk, op: Op, x: Value) -> bool:
    values = [getattr(v, "val", None) for eqn in (op.eqn, op.other) for v in eqn.invars]
    given = [v for v in values if v is not None]
    first, second = walk.sizes.first, walk.sizes.second
    equal = first * walk.axis_sizes[0] == second * walk.axis_sizes[1] and not walk.mesh_axes
    return x.fixed and equal and given == [first, second]


def _scaled(walk: Walk, op: Op, x: Value, factor: Value) -> Value:
    """A value times a factor that is independent of the batch."""
    if x.rows and not factor.scale.trivial:
        walk.sized = walk.sized or walk.site(op)
    scalar = x.scalar and factor.scalar
    known = x.known * factor.known if x.known is not None and factor.known is not None else None
    value = dataclasses.replace(x.scaled(factor.scale), scalar=scalar, known=known)
    weight = as_weight(x) if factor.scalar else None
    return value if weight is None else dataclasses.replace(value, weight=weight * factor.scale)


@rule("div", uniform=True, scales=True)
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
        return dataclasses.replace(x.scaled(inverse), origin=x.origin or y.origin)
    if layout is not None and y.rows and not x.summary and same_layout(ins) and len(y.terms) == 1:
        return rows(
            layout,
            terms=frozenset(term.times(y.scale.inverse()) for term in x.terms),
            origin=origin_of(ins),
        )
    return combine(walk, op, ins)


# -- powers ----------------------------------------------------------------------------------------

_EXPONENTS = {
    "square": Fraction(2),
    "sqrt": Fraction(1, 2),
    "rsqrt": Fraction(-1, 2),
    "reciprocal": Fraction(-1),
}


@rule("pow", uniform=True)
def power_of(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """x to the power y; to the power 2.0, a root is the total again."""
    x, y = ins
    return Settled([x.root]) if x.root is not None and y.known == 2 else combine(walk, op, ins)


@rule("square sqrt rsqrt reciprocal integer_pow", uniform=True, scales=True)
def power(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """x to a constant power; the square of a total's root is the total."""
    (x,) = ins
    exponent = _EXPONENTS.get(op.name) or Fraction(op.params["y"])
    if exponent == 2 and x.root is not None:
        return Settled([x.root])
    if op.name == "sqrt" and x.kind is Kind.TOTAL:
        return dataclasses.replace(combine(walk, op, ins), root=x)
    same = op.eqn.params.get("y") == op.other.params.get("y")
    scale = x.scale
    if same and not x.summary and not scale.weights and scale.power is not None:
        terms = frozenset([Term(Scale(scale.power * exponent))])
        return dataclasses.replace(x.but(scalar=x.scalar), terms=terms)
    if same and exponent == -1 and (weight := normalizer(x)) is not None:
        return statistic(x.origin, weight=_noted(walk, op, weight).inverse(), scalar=True)
    return combine(walk, op, ins)


# -- guards against an empty weight ----------------------------------------------------------------


@rule("max", uniform=True)
def maximum(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """max(x, y): with a constant, it keeps a weight from 0."""
    for x, y in (ins, ins[::-1]):
        if x.summary and y.fixed and as_weight(x) is not None:
            return guarded(x, ins)
    return combine(walk, op, ins)


@rule("eq ne gt ge lt le and or", uniform=True)
def compare(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A comparison, which may be a guard's: of a weight with a constant."""
    x, y = ins
    if op.name == "lt" and x.index is not None and y.zero:
        return fixed(
            known=False, number=walk.fresh()
        )  # no place is negative: the index is taken as it stands
    if op.name == "ne" and x.number == y.number and (x.summary or (x.rows and x.params)):
        return _is_nan(walk, op, x)
    if op.name == "and" and any(v.known is False for v in ins):
        return Settled([fixed(known=False, number=walk.fresh())])
    summaries = [v for v in ins if v.summary]
    compared = [_compared(v) for v in summaries]
    if summaries and all(compared) and not any(v.rows for v in ins):
        return statistic(
            summaries[0].origin,
            compares=frozenset().union(*compared),
            scalar=all(v.scalar for v in ins),
        )
    return combine(walk, op, ins)


def _is_nan(walk: Walk, op: Op, x: Value) -> Value | list[Value]:
    """Only a NaN differs from itself. Nothing is, where the loss rests on that: an empty mean, and
    `jnp.nanmean`."""
    never = fixed(known=False, number=walk.fresh())
    if x.summary:
        return Settled([never])
    if walk.may_be_nan():
        return combine(walk, op, [x])
    note = "exact where no value is NaN: each microbatch counts its own"
    return Settled(
        [dataclasses.replace(never, faults=x.faults | {walk.fault(op, FaultKind.ASSUMPTION, note)})]
    )


def _compared(x: Value) -> frozenset[int]:
    weight = as_weight(x)
    return x.compares or (
        frozenset(w.number for w in weight.weights) if weight is not None else frozenset()
    )


@rule("select_n", uniform=True)
def select(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """One of the cases, by a condition."""
    which, *cases = ins
    if which.known is not None:
        return Settled([cases[int(which.known)]])
    if which.compares and which.scalar:
        return _guard(walk, op, ins)
    if which.fixed and not which.faults and not any(v.rows for v in cases):
        return added(walk, op, cases) if which.scale.trivial else combine(walk, op, ins)
    if not which.summary and not any(v.summary for v in cases):
        return _select_rows(walk, op, ins)
    return combine(walk, op, ins)


def _guard(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """``where(w > 0, x, constant)``: x may be w itself, or what w has normalized."""
    which, *cases = ins
    live = [v for v in cases if not v.zero]
    if len(live) == 1 and _normalized_by(live[0], which.compares):
        terms = frozenset(Term(t.scale.guarded(), t.fixed) for t in live[0].terms)
        return dataclasses.replace(live[0].but(scalar=live[0].scalar), terms=terms)
    weights = [v for v in cases if v.summary]
    if (
        len(weights) == 1
        and _compared(weights[0]) == which.compares
        and all(v.fixed for v in cases if v not in weights)
    ):
        return guarded(weights[0], ins)
    return combine(walk, op, ins)


def _normalized_by(x: Value, weights: frozenset[int]) -> bool:
    """Whether every addend of a total is divided by all of the weights."""
    scales = [{w.number for w in term.scale.weights} for term in x.terms]
    return x.kind is Kind.TOTAL and all(weights <= scale for scale in scales)


def _select_rows(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A choice for each example: scaled like the cases, of which a 0 does not count."""
    layout = layout_of(ins)
    if not same_layout(ins) or not ins[0].scale.trivial:
        return combine(walk, op, ins)
    if layout is None:
        return _added_fixed(op, ins[1:])
    terms = frozenset().union(*(v.terms for v in ins[1:] if not v.zero)) or PLAIN
    return rows(layout, terms=terms, origin=origin_of(ins))
