"""Reductions, windows and scans of values along an axis: where examples are summed, and where they
meet otherwise."""

from __future__ import annotations

import dataclasses

from jaxaccum._audit.lattice import (
    IRREGULAR,
    PLAIN,
    FaultKind,
    Index,
    Kind,
    Layout,
    Value,
    fixed,
    rows,
    statistic,
    total,
)
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.rules.elementwise import combine, layout_of, same_layout
from jaxaccum._audit.rules.shapes import moved, without
from jaxaccum._audit.walk import Op, Walk, beyond, varying


@rule("reduce_sum", uniform=True, scales=True)
def reduce_sum(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A sum over axes: over the examples, a total."""
    x, axes = ins[0], [int(a) for a in op.params["axes"]]
    others = [a for a in axes if x.layout is None or a not in x.layout.axes]
    growth = walk.growth(op.shapes(), others)
    if x.index is Index.GATHERED and x.layout is not None and set(x.layout.axes) <= set(axes):
        return Settled([fixed(faults=x.faults)])
    if x.fixed:
        return fixed(x.scale * walk.growth(op.shapes(), axes))
    if x.kind is Kind.STATISTIC:
        return combine(walk, op, ins) if axes else x
    if x.layout is None:
        return x.scaled(growth)
    return _summed_rows(walk, op, x.scaled(growth), axes)


def _summed_rows(walk: Walk, op: Op, x: Value, axes: list[int]) -> Value:
    assert x.layout is not None
    summed = set(axes) & set(x.layout.axes)
    if not summed:
        return moved(x, without(x.layout, set(axes)))
    if len(summed) == len(x.layout.axes) and not x.layout.looped:
        site = walk.site(op)
        for term in x.terms:
            walk.sites.setdefault(term, site)
        return total(site, x.terms)
    return statistic(x.origin or walk.site(op))  # over a part of the examples


def _extremum(op: Op) -> str | None:
    """Of which kind a reduction is: any is the largest of booleans, and all is the smallest."""
    named = {"reduce_max": "max", "reduce_min": "min"}
    if op.eqn.invars[0].aval.dtype == bool:
        named |= {"reduce_or": "max", "reduce_and": "min"}
    return named.get(op.name)


@rule(
    "reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin", uniform=True
)
def reduce_otherwise(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A reduction that is no sum."""
    x, axes = ins[0], {int(a) for a in op.params["axes"]}
    if x.extremum is not None and _extremum(op) == x.extremum:
        return statistic(x.origin, extremum=x.extremum)
    if op.name in ("reduce_prod", "reduce_xor") and axes & set(beyond(op.shapes(), x)):
        note = "a product along an axis of the batch's size"
        return (
            fixed(IRREGULAR)
            if x.fixed
            else walk.couple(op, ins, kind=FaultKind.BATCH_SIZE, note=note)
        )
    if x.fixed:
        return combine(walk, op, ins)
    value = combine(walk, op, ins)
    if not value.rows or value.layout is None:
        return value
    if not axes & set(value.layout.axes):
        return moved(value, without(value.layout, axes))
    extremum = _extremum(op)
    clean = len(value.layout.axes) == len(axes & set(value.layout.axes)) and not value.layout.looped
    return dataclasses.replace(
        statistic(x.origin or walk.site(op)),
        faults=value.faults,
        extremum=extremum if clean and x.terms == PLAIN else None,
    )


@rule("reduce")
def reduce_by(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A reduction by a function of the user's own."""
    axes, layout = set(op.params["dimensions"]), layout_of(ins)
    if layout is not None and axes & set(layout.axes):
        return walk.couple(op, ins, note="reduce runs along the batch axis")
    value = combine(walk, op, ins)
    return (
        value
        if not value.rows or value.layout is None
        else moved(value, without(value.layout, axes))
    )


@rule("cumsum cumprod cummax cummin cumlogsumexp sort top_k approx_top_k")
def along_an_axis(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Something that runs along one axis: along that of the examples it couples them."""
    axis = _axis(op)
    layout = layout_of(ins)
    if (
        layout is not None
        and not any(v.summary for v in ins)
        and any(v.layout and axis in v.layout.axes for v in ins)
    ):
        kind = FaultKind.COUPLING if same_layout(ins) else FaultKind.PAIRWISE
        return walk.couple(
            op, ins, kind=kind, note=f"{op.name} runs along the batch axis", layout=layout
        )
    if op.name == "cumsum" and not ins[0].fixed and ins[0].kind is not Kind.STATISTIC:
        grows = axis in varying(op.shapes())
        return combine(walk, op, ins) if grows else ins[0].but()
    return combine(walk, op, ins)


def _axis(op: Op) -> int:
    ndim = len(op.shapes()[0])
    given = next(
        (
            op.params[k]
            for k in ("axis", "dimension", "reduction_dimension", "operand_axis")
            if k in op.params
        ),
        -1,
    )
    return int(given) % max(ndim, 1)


@rule("reduce_window_sum reduce_window_max reduce_window_min reduce_window")
def window(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A reduction over windows, as pooling is."""
    x = ins[0]
    if not x.rows or x.layout is None or not all(v.fixed for v in ins[1:]):
        return (
            combine(walk, op, ins[:1])
            if all(v.fixed for v in ins)
            else _linear_window(walk, op, ins)
        )
    if not _alone(op, x.layout):
        return walk.couple(op, ins, note="a window spans several examples", layout=x.layout)
    if op.name == "reduce_window_sum":
        return moved(x, x.layout)
    value = combine(walk, op, ins[:1])
    return (
        rows(value.layout, faults=value.faults, origin=value.origin)
        if value.layout is not None
        else value
    )


@rule("select_and_scatter_add select_and_gather_add", scales=True)
def window_derivative(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """The derivative of a maximum over windows: linear in the first operand, which the second one
    picks from."""
    given, picks = ins
    layout = layout_of(ins)
    if (
        layout is None
        or given.summary
        or not same_layout(ins)
        or not picks.scale.trivial
        or picks.summary
    ):
        return combine(walk, op, ins)
    if not _alone(op, layout):
        return walk.couple(op, ins, note="a window spans several examples", layout=layout)
    return rows(layout, terms=given.terms, origin=given.origin)


def _alone(op: Op, layout: Layout) -> bool:
    """Whether windows hold one example each."""
    of = op.params
    steps = [of["window_dimensions"], of["window_strides"], of.get("base_dilation")]
    return all(
        tuple(of["padding"][a]) == (0, 0) and all(step is None or step[a] == 1 for step in steps)
        for a in layout.axes
    )


def _linear_window(walk: Walk, op: Op, ins: list[Value]) -> Value:
    linear = (
        op.name == "reduce_window_sum" and ins[0].kind is Kind.TOTAL and not varying(op.shapes())
    )
    return ins[0].but() if linear else combine(walk, op, ins)
