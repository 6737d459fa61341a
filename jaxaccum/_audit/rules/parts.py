"""Parts of arrays, and arrays of parts: slices, splits, concatenations, padding and positions."""

from __future__ import annotations

import dataclasses
from itertools import compress

import jax.extend.core as jex

from jaxaccum._audit import fixes
from jaxaccum._audit.lattice import (
    ONE_EXAMPLE,
    FaultKind,
    Index,
    Layout,
    Sizes,
    Value,
    faults_of,
    fixed,
    origin_of,
    own_places,
    rows,
)
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.rules.arithmetic import added
from jaxaccum._audit.rules.elementwise import combine
from jaxaccum._audit.rules.operands import (
    all_fixed,
    all_unscaled,
    any_rows,
    any_summary,
    array_of,
    both,
    faulty,
    layout_of,
    layouts_of,
    lengths,
    lengths_along,
    params_at_both,
    rows_among,
    same_layout,
    terms_of,
    with_new_axis,
    without,
)
from jaxaccum._audit.rules.shapes import moved, reshaped
from jaxaccum._audit.walk import Op, Walk, varying


@rule("slice")
def slice_(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A part of an array: all examples, or whole views of them."""
    (x,) = ins
    if x.layout is None or not x.rows:
        if not x.placed and varying(op.shapes()) == varying(op.out_shapes()):
            return Settled([x.but(scalar=x.scalar)])
        return x.but()
    layout = x.layout
    if _is_the_only_example(walk, op, layout):
        return moved(x, ONE_EXAMPLE)
    if (step := _step(op, layout)) > 1:
        walk.groups.add(step)
        if layout.inner % step == 0:  # one row of each `step` of an example's
            return moved(x, dataclasses.replace(layout, inner=layout.inner // step))
    for axis in layout.axes:
        kept = _kept(op, axis, layout, walk.sizes)
        if kept is None:
            note = "examples are picked by their place in the batch"
            return _picked(walk, op, ins, note, layout)
        layout = dataclasses.replace(layout, outer=kept)
    return moved(x, layout)


def _is_the_only_example(walk: Walk, op: Op, layout: Layout) -> bool:
    """Whether ``x[0]`` reads the one example of a microbatch, as a loss for one example does."""
    if not walk.one_by_one or not layout.plain:
        return False
    (axis,) = layout.axes
    return both(op, lambda eqn: _bounds(eqn, axis)[:2]) == ((0, 1), (0, 1))


def _bounds(eqn: jex.JaxprEqn, axis: int) -> tuple[int, int, int]:
    """The start, the stop and the step of a slice along an axis."""
    of = eqn.params
    step = 1 if of["strides"] is None else of["strides"][axis]
    return of["start_indices"][axis], of["limit_indices"][axis], step


def _step(op: Op, layout: Layout) -> int:
    """The k of a slice that takes every k-th row of the batch, and a row of every k."""
    if len(layout.axes) != 1 or layout.looped:
        return 1
    (axis,) = layout.axes
    (_, _, step), (_, _, other) = both(op, lambda eqn: _bounds(eqn, axis))
    first, second = lengths(op.out_shapes(), axis)
    whole = lengths(op.shapes(), axis) == (step * first, step * second)
    return step if whole and step == other else 1


def _kept(op: Op, axis: int, layout: Layout, sizes: Sizes) -> int | None:
    """How many views of all examples remain; None where some examples go."""
    bounds, whole = both(op, lambda eqn: _bounds(eqn, axis)), lengths(op.shapes(), axis)
    first = _views_kept(bounds[0], whole[0], layout, sizes.first)
    second = _views_kept(bounds[1], whole[1], layout, sizes.second)
    return first[1] if first is not None and first == second else None


def _views_kept(
    bounds: tuple[int, int, int], length: int, layout: Layout, size: int
) -> tuple[int, int] | None:
    """The first view that a slice takes, and how many; None where it cuts one."""
    start, stop, step = bounds
    if step != 1:
        return None
    if (start, stop) == (0, length):
        return 0, layout.outer
    unit = size * layout.inner
    if len(layout.axes) != 1 or layout.looped or start % unit or stop % unit:
        return None
    return start // unit, (stop - start) // unit


@rule("split", uniform=True)
def split(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """An array in parts, along one axis."""
    (x,), axis, count = ins, op.params["axis"], op.num_outs
    if x.layout is None:
        return x.but()
    if axis not in x.layout.axes:
        return moved(x, x.layout)
    alike = len(set(op.params["sizes"])) == 1
    if alike and len(x.layout.axes) == 1 and x.layout.outer % count == 0:
        return moved(x, dataclasses.replace(x.layout, outer=x.layout.outer // count))
    note = "the batch axis is split by place"
    return _picked(walk, op, ins, note, x.layout)


@rule("unstack", uniform=True)
def unstack(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """The entries along one axis, each by itself."""
    (x,), axis = ins, op.params["axis"]
    if x.layout is None:
        return x.but()
    if axis in x.layout.axes:
        note = "examples are picked by their place in the batch"
        return _picked(walk, op, ins, note)
    return moved(x, without(x.layout, {axis}))


def _picked(walk: Walk, op: Op, ins: list[Value], note: str, layout: Layout | None = None) -> Value:
    """Some examples, by their place in the batch."""
    selection = FaultKind.SELECTION
    return walk.couple(op, ins, kind=selection, note=note, layout=layout, fix=fixes.PICKED)


@rule("concatenate", uniform=True)
def concatenate(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Arrays side by side: features of the same examples, or views of all of them."""
    axis, (shape, _) = op.params["dimension"], op.out_shapes()
    grows = axis in varying(op.out_shapes())
    columns = axis == len(shape) - 1 and set(_lengths_of_pieces(op, axis)) == {1}
    if columns and any(_places(ins)):
        return _indices(walk, op, ins)
    if grows and not any_summary(ins):
        return _views(walk, op, ins, axis)
    if not grows and not any_rows(ins):
        return array_of(added(walk, op, ins))
    if any_summary(ins) or not same_layout(ins):
        return combine(walk, op, ins)
    layout = layout_of(ins)
    if layout is None or axis in layout.axes:
        note = "the batch axis is extended"
        return walk.couple(op, ins, kind=FaultKind.UNKNOWN, note=note, layout=layout)
    return rows(layout, terms=terms_of(ins), origin=origin_of(ins))


def _places(ins: list[Value]) -> tuple[Index | None, ...]:
    """Which operands are places, by their one column."""
    return tuple(v.columns[0] if len(v.columns) == 1 else None for v in ins)


def _lengths_of_pieces(op: Op, axis: int) -> list[int]:
    return [v.aval.shape[axis] for v in op.eqn.invars]


def _indices(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A table of indices with a column that is the example's own place."""
    layouts = layouts_of(ins) | {v.layout for v in compress(ins, _places(ins))}
    others = [v for v in ins if not v.placed]
    if len(layouts) != 1 or any_summary(ins) or not all_unscaled(others):
        return combine(walk, op, ins)
    kind = (rows_among(ins) or ins)[0].kind
    return Settled([Value(kind, layouts.pop(), columns=_places(ins), faults=faults_of(ins))])


def _views(walk: Walk, op: Op, ins: list[Value], axis: int) -> Value:
    """Arrays one after the other along the axis of the examples, each with all of them."""
    if not all(_has_all(walk, op, i, x, axis) for i, x in enumerate(ins)):
        if all_fixed(ins):
            note = "a table with a row for each place in the batch"
            return fixed(faults=faulty(walk, op, FaultKind.POSITION, note))
        kind, note = FaultKind.SELECTION, "the batch axis is extended"
        return walk.couple(op, ins, kind=kind, note=note, layout=layout_of(ins))
    inners = {layout.inner for layout in layouts_of(ins) if layout is not None} or {1}
    unit = walk.sizes.first * max(inners)
    pieces = _lengths_of_pieces(op, axis)
    if len(inners) > 1 or any(length % unit for length in pieces):
        note = "views of the batch with different layouts"
        return walk.couple(op, ins, kind=FaultKind.UNKNOWN, note=note)
    layout = Layout((axis,), sum(pieces) // unit, max(inners))
    return rows(layout, terms=terms_of(ins), origin=origin_of(ins))


def _has_all(walk: Walk, op: Op, i: int, x: Value, axis: int) -> bool:
    """Whether operand `i` has all examples along the axis, once or several times, or is uniform."""
    if x.index is not None:
        return False
    if x.rows:
        return x.layout is not None and x.layout.axes == (axis,) and not x.layout.looped
    (first, second), sizes = lengths(op.shapes(i), axis), walk.sizes
    times = first // sizes.first
    return times > 0 and (first, second) == (times * sizes.first, times * sizes.second)


@rule("stack", uniform=True)
def stack(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Arrays along a new axis."""
    axis, layout = op.params["axis"], layout_of(ins)
    if layout is None:
        return array_of(added(walk, op, ins))
    if any_summary(ins) or not same_layout(ins):
        return combine(walk, op, ins)
    return rows(with_new_axis(layout, axis), terms=terms_of(ins), origin=origin_of(ins))


@rule("tile", uniform=True)
def tile(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """An array repeated: further views of all examples, or of what is the same for each."""
    (x,), reps, (shape, _) = ins, params_at_both(op, "reps"), op.shapes()
    changing = varying(reps)
    uniform = set(lengths_along(shape, changing)) <= {1}
    if x.rows and x.layout is not None:
        return _tiled_rows(walk, op, x, x.layout, uniform=uniform)
    if x.scalar or uniform:
        return reshaped(x)
    if x.fixed and len(changing) == 1:
        (axis,) = changing
        if lengths(reps, axis) == (walk.sizes.first, walk.sizes.second):
            return rows(Layout((axis,), inner=shape[axis]), terms=x.terms)
    return walk.unknown(op, "a table is repeated in a way that the analysis cannot follow")


def _tiled_rows(walk: Walk, op: Op, x: Value, layout: Layout, *, uniform: bool) -> Value:
    """Rows repeated: along their own axis, further views of all examples."""
    reps, others = params_at_both(op, "reps")
    times = {*lengths_along(reps, layout.axes), *lengths_along(others, layout.axes)}
    repeated = not times <= {1}
    if not repeated and uniform:
        return moved(x, layout)
    if not repeated or len(layout.axes) != 1 or layout.looped or reps != others:
        note = "the batch axis is repeated in a way that the analysis cannot follow"
        return walk.unknown(op, note)
    (axis,) = layout.axes
    return moved(x, dataclasses.replace(layout, outer=layout.outer * reps[axis]))


@rule("pad")
def pad(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """An array with a border of one value."""
    x, border = ins
    if not x.rows and not border.rows:
        return array_of(added(walk, op, ins))
    if x.layout is None or any_summary(ins) or not same_layout(ins):
        return combine(walk, op, ins)
    if any(tuple(op.params["padding_config"][a]) != (0, 0, 0) for a in x.layout.axes):
        kind, note = FaultKind.SELECTION, "the batch axis is padded"
        return walk.couple(op, ins, kind=kind, note=note, layout=x.layout)
    return rows(x.layout, terms=terms_of(ins), origin=x.origin)


@rule("iota", uniform=True)
def iota(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """0, 1, 2, … along an axis: along the batch's, the place of each example."""
    axis = op.params["dimension"]
    first, second = lengths(op.out_shapes(), axis)
    if first == second:
        return fixed()
    if inner := walk.sizes.entries(first, second):
        return own_places(axis, inner)
    note = "the result depends on the position of an example in its microbatch"
    return fixed(faults=faulty(walk, op, FaultKind.POSITION, note))
