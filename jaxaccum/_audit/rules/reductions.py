"""Reductions, windows and scans along an axis: where examples are summed or meet otherwise."""

from __future__ import annotations

from jaxaccum._audit import fixes
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
)
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.rules.elementwise import combine
from jaxaccum._audit.rules.operands import (
    all_fixed,
    any_along,
    any_summary,
    layout_of,
    same_layout,
    summed,
    without,
    without_examples,
)
from jaxaccum._audit.rules.shapes import moved
from jaxaccum._audit.walk import Op, Walk, beyond, varying


@rule("reduce_sum", uniform=True, scales=True)
def reduce_sum(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A sum over axes: over the examples, a total."""
    x, axes = ins[0], list(map(int, op.params["axes"]))
    growth = walk.growth(op.shapes(), without_examples(axes, x))
    if x.index is Index.GATHERED and x.layout is not None and set(x.layout.axes) <= set(axes):
        return Settled([fixed(faults=x.faults)])
    if x.fixed:
        return fixed(x.scale * walk.growth(op.shapes(), axes))
    if x.kind is Kind.STATISTIC:
        return combine(walk, op, ins) if axes else x
    if x.layout is None:
        return x.scaled(growth)
    if not set(axes) & set(x.layout.axes):
        return moved(x.scaled(growth), without(x.layout, set(axes)))
    return summed(walk, op, x.scaled(growth), axes)


def _extremum(op: Op) -> str | None:
    """Which extremum a reduction takes: any is the largest of booleans, and all is the smallest."""
    named = {"reduce_max": "max", "reduce_min": "min"}
    if op.eqn.invars[0].aval.dtype == bool:
        named |= {"reduce_or": "max", "reduce_and": "min"}
    return named.get(op.name)


@rule(
    "reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin", uniform=True
)
def reduce_otherwise(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A reduction other than a sum."""
    x, axes = ins[0], set(map(int, op.params["axes"]))
    if x.extremum is not None and _extremum(op) == x.extremum:
        return statistic(x.origin, extremum=x.extremum)
    if op.name in ("reduce_prod", "reduce_xor") and axes & set(beyond(op.shapes(), x)):
        if x.fixed:
            return fixed(IRREGULAR)
        note = "a product along an axis of the batch's size"
        return walk.couple(op, ins, kind=FaultKind.BATCH_SIZE, note=note)
    value = combine(walk, op, ins)
    if not value.rows or value.layout is None:
        return value
    own = set(value.layout.axes)
    if not axes & own:
        return moved(value, without(value.layout, axes))
    over_all = own <= axes and not value.layout.looped
    extremum = _extremum(op) if over_all and x.terms == PLAIN else None
    return statistic(x.origin or walk.site(op), faults=value.faults, extremum=extremum)


@rule("reduce")
def reduce_by(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A reduction by a function of the user's own."""
    axes, layout = set(op.params["dimensions"]), layout_of(ins)
    if layout is not None and axes & set(layout.axes):
        return walk.couple(op, ins, note="reduce runs along the batch axis")
    value = combine(walk, op, ins)
    if not value.rows or value.layout is None:
        return value
    return moved(value, without(value.layout, axes))


_SORTS = ("sort", "top_k", "approx_top_k")


@rule("cumsum cumprod cummax cummin cumlogsumexp sort top_k approx_top_k")
def along_an_axis(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Something that runs along one axis: along that of the examples it couples them."""
    axis = _axis(op)
    layout = layout_of(ins)
    if layout is not None and any_along(ins, axis) and not any_summary(ins):
        kind = FaultKind.COUPLING if same_layout(ins) else FaultKind.PAIRWISE
        note = f"{op.name} runs along the batch axis"
        fix = fixes.SORTED if op.name in _SORTS else fixes.RUNNING
        return walk.couple(op, ins, kind=kind, note=note, layout=layout, fix=fix)
    if op.name == "cumsum" and not ins[0].fixed and ins[0].kind is not Kind.STATISTIC:
        grows = axis in varying(op.shapes())
        return combine(walk, op, ins) if grows else ins[0].but()
    return combine(walk, op, ins)


_NAMES_OF_AN_AXIS = ("axis", "dimension", "reduction_dimension", "operand_axis")


def _axis(op: Op) -> int:
    """The axis that an operation runs along: the last one, where it names none."""
    given = next((op.params[name] for name in _NAMES_OF_AN_AXIS if name in op.params), -1)
    return int(given) % max(len(op.shapes()[0]), 1)


@rule("reduce_window_sum reduce_window_max reduce_window_min reduce_window")
def window(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A reduction over windows, as pooling is."""
    x = ins[0]
    if all_fixed(ins):
        return combine(walk, op, ins[:1])
    if not x.rows or x.layout is None or not all_fixed(ins[1:]):
        return _linear_window(walk, op, ins)
    if not _alone(op, x.layout):
        return walk.couple(op, ins, note="a window spans several examples", layout=x.layout)
    if op.name == "reduce_window_sum":
        return moved(x, x.layout)
    value = combine(walk, op, ins[:1])
    if value.layout is None:
        return value
    return rows(value.layout, faults=value.faults, origin=value.origin)


@rule("select_and_scatter_add select_and_gather_add", scales=True)
def window_derivative(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """The derivative of a maximum over windows: linear in the first operand; the second picks."""
    given, picks = ins
    layout = layout_of(ins)
    if layout is None or any_summary(ins) or not same_layout(ins) or not picks.scale.trivial:
        return combine(walk, op, ins)
    if not _alone(op, layout):
        return walk.couple(op, ins, note="a window spans several examples", layout=layout)
    return rows(layout, terms=given.terms, origin=given.origin)


def _alone(op: Op, layout: Layout) -> bool:
    """Whether windows hold one example each."""
    of = op.params
    dilations = of.get("base_dilation") or [1] * len(of["window_dimensions"])
    for axis in layout.axes:
        width, step = of["window_dimensions"][axis], of["window_strides"][axis]
        if tuple(of["padding"][axis]) != (0, 0) or {width, step, dilations[axis]} != {1}:
            return False
    return True


def _linear_window(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A sum over windows of a total is a total."""
    x = ins[0]
    if op.name == "reduce_window_sum" and x.kind is Kind.TOTAL and not varying(op.shapes()):
        return x.but()
    return combine(walk, op, ins)
