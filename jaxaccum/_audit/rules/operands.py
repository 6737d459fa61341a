"""What the rules ask of several values at once, and what they do to several results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

import jax.core
import jax.extend.core as jex

from jaxaccum._audit.lattice import (
    IRREGULAR,
    PLAIN,
    UNIT,
    Addend,
    Fault,
    FaultKind,
    Layout,
    Scale,
    Value,
    statistic,
    total,
)
from jaxaccum._audit.sources import Site
from jaxaccum._audit.walk import Op, Walk

T = TypeVar("T")
Addends = frozenset[Addend]
Faults = frozenset[Fault]


# -- of which kinds they are -----------------------------------------------------------------------


def all_fixed(values: Iterable[Value]) -> bool:
    """Whether all are independent of the batch."""
    return all(v.fixed for v in values)


def all_unscaled(values: Iterable[Value]) -> bool:
    """Whether no scale changes with the batch."""
    return all(v.scale.trivial for v in values)


def all_scalar(values: Iterable[Value]) -> bool:
    """Whether each is one number."""
    return all(v.scalar for v in values)


def rows_among(values: Iterable[Value]) -> list[Value]:
    """Those that have one part per example."""
    return [v for v in values if v.rows]


def summaries_among(values: Iterable[Value]) -> list[Value]:
    """Those that are totals or other statistics of the batch."""
    return [v for v in values if v.summary]


def any_rows(values: Iterable[Value]) -> bool:
    """Whether one has a part per example."""
    return bool(rows_among(values))


def any_summary(values: Iterable[Value]) -> bool:
    """Whether one is a total or another statistic of the batch."""
    return bool(summaries_among(values))


def any_place(values: Iterable[Value]) -> bool:
    """Whether one is the place of an example or of a microbatch, or holds such places."""
    return any(v.placed for v in values)


def nonzero(values: Iterable[Value]) -> list[Value]:
    """Those that are not known to be 0."""
    return [v for v in values if not v.zero]


# -- where their examples lie ----------------------------------------------------------------------


def layouts_of(values: Iterable[Value]) -> set[Layout | None]:
    """The layouts of all rows."""
    return {v.layout for v in rows_among(values)}


def same_layout(values: Iterable[Value]) -> bool:
    """Whether all rows lie alike."""
    return len(layouts_of(values)) <= 1


def layout_of(values: Iterable[Value]) -> Layout | None:
    """Where the rows lie: those of the first value that has some."""
    parts = rows_among(values)
    return parts[0].layout if parts else None


def example_axes(x: Value) -> tuple[int, ...]:
    """The axes along which its examples lie."""
    return () if x.layout is None else x.layout.axes


def any_along(values: Iterable[Value], axis: int) -> bool:
    """Whether examples of one lie along the axis."""
    return any(axis in example_axes(v) for v in values)


def without_examples(axes: Iterable[int], x: Value) -> list[int]:
    """Those of the axes along which none of its examples lie."""
    return axes_except(axes, example_axes(x))


def relocated(layout: Layout, place: Callable[[int], int]) -> Layout:
    """The layout whose axes have gone to other places."""
    return layout.at(*map(place, layout.axes))


def without(layout: Layout, dropped: Collection[int]) -> Layout:
    """The layout once other axes are gone."""
    kept = axes_except(range(max(layout.axes, default=0) + 1), dropped)
    return relocated(layout, kept.index)


def with_new_axis(layout: Layout, new: int) -> Layout:
    """The layout once an axis was inserted."""
    return relocated(layout, lambda axis: axis + (axis >= new))


def axes_except(axes: Iterable[int], gone: Collection[int]) -> list[int]:
    """The axes without those that are gone."""
    return [a for a in axes if a not in gone]


# -- what they add up to ---------------------------------------------------------------------------


def is_weighted(x: Value) -> bool:
    """Whether a total over the batch scales the value."""
    return any(term.scale.weights for term in x.terms)


def kinds_of(faults: Iterable[Fault]) -> set[FaultKind]:
    """Of which kinds faults are."""
    return {fault.kind for fault in faults}


def terms_of(values: Iterable[Value]) -> Addends:
    """The addends of all of them, and of a 0 none."""
    return frozenset().union(*(v.terms for v in nonzero(values))) or PLAIN


def once(x: Value) -> Addends:
    """Its addends, as what enters a total once and not with each example; of a 0 none."""
    return frozenset() if x.zero else frozenset(Addend(term.scale, fixed=True) for term in x.terms)


def products(xs: Addends, ys: Addends) -> Addends:
    """The addends of a product of two sums."""
    return frozenset(x.times(y.scale) for x in xs for y in ys)


def common(scales: Iterable[Scale]) -> Scale:
    """The one scale; irregular where there are several."""
    different = set(scales)
    return different.pop() if len(different) == 1 else IRREGULAR


def common_scale(values: Iterable[Value]) -> Scale:
    """The scale that all share; a 0 has every scale."""
    live = nonzero(values)
    return common(v.scale for v in live) if live else UNIT


def summed(walk: Walk, op: Op, x: Value, axes: Collection[int]) -> Value:
    """Rows summed over axes: a total where all examples are, and else a statistic."""
    assert x.layout is not None
    site = walk.site(op)
    chunk = x.layout.looped and not x.layout.by_place  # its examples may be any
    if chunk or not set(x.layout.axes) <= set(axes):
        return statistic(x.origin or site)
    note_terms(walk, x.terms, site)
    return total(site, x.terms)


def note_terms(walk: Walk, terms: Addends, site: Site) -> None:
    """Note for the report where addends are first seen."""
    for term in terms:
        walk.sites.setdefault(term, site)


# -- loops -----------------------------------------------------------------------------------------


def of_an_earlier_step(walk: Walk, op: Op, x: Value, *, since: int) -> Faults:
    """The fault of a carried value that a step has divided by a total of its own.

    Numbers say which totals are equal, and a body is walked once for all steps: the next step's
    total has the number of the one that divides.
    """
    scales = (term.scale for term in x.terms)
    if all(w.number < since for scale in scales for w in scale.weights):
        return frozenset()
    note = "a loop carries to its next step what one step has divided by a total over the examples"
    return faulty(walk, op, FaultKind.UNKNOWN, note)


# -- results ---------------------------------------------------------------------------------------


def numbered(walk: Walk, x: Value) -> Value:
    """The value under a number of its own."""
    return x.like(number=walk.fresh())


def all_numbered(walk: Walk, values: Iterable[Value]) -> list[Value]:
    """Each value under a number of its own."""
    return [numbered(walk, x) for x in values]


def with_faults(x: Value, faults: Faults, *, params: bool = False) -> Value:
    """The value with further faults; `params` says that it depends on the parameters too."""
    return x.like(faults=x.faults | faults, params=x.params or params)


def all_with_faults(
    values: Iterable[Value], faults: Faults, *, params: bool = False
) -> list[Value]:
    """Each value with the same further faults."""
    return [with_faults(x, faults, params=params) for x in values]


def array_of(x: Value) -> Value:
    """What is put together of several values: not one number, nor a number that is known."""
    return x.like(known=None, scalar=False, weight=None)


def faulty(walk: Walk, op: Op, kind: FaultKind, note: str) -> Faults:
    """The one fault of this kind at the equation."""
    return frozenset([walk.fault(op, kind, note)])


def avals_of(variables: Iterable[jex.Var | jex.Literal]) -> list[jax.core.AbstractValue]:
    """The types of variables: shapes alone would lose how a mesh divides them."""
    return [v.aval for v in variables]


# -- both sizes ------------------------------------------------------------------------------------


def both(op: Op, read: Callable[[jex.JaxprEqn], T]) -> tuple[T, T]:
    """What is read of the equation, at each size."""
    return read(op.eqn), read(op.other)


def params_at_both(op: Op, name: str) -> tuple[Any, Any]:
    """A parameter, at each size."""
    return op.params[name], op.other.params[name]


def lengths_along(shape: Sequence[int], axes: Iterable[int]) -> list[int]:
    """How long the axes are."""
    return [shape[a] for a in axes]


def lengths(shapes: Sequence[tuple[int, ...]], axis: int) -> tuple[int, int]:
    """How long an axis is, at each size."""
    first, second = shapes
    return first[axis], second[axis]
