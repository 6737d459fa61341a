"""Parts of arrays, and arrays of parts: slices, splits, concatenations, padding and positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxaccum._audit.lattice import (
    ONE_EXAMPLE,
    PLAIN,
    FaultKind,
    Index,
    Layout,
    Sizes,
    Value,
    fixed,
    rows,
)
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.rules.arithmetic import added
from jaxaccum._audit.rules.elementwise import combine, layout_of, origin_of, same_layout
from jaxaccum._audit.rules.shapes import moved, reshaped, without
from jaxaccum._audit.walk import Op, Walk, varying


@rule("slice")
def slice_(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A part of an array: all examples, or whole views of them."""
    (x,) = ins
    if x.layout is None or not x.rows:
        cut = set(varying(op.shapes())) ^ set(varying(op.out_shapes()))
        return (
            Settled([dataclasses.replace(x.but(scalar=x.scalar), faults=x.faults)])
            if not cut and x.index is None
            else x.but()
        )
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
            return walk.couple(op, ins, kind=FaultKind.SELECTION, note=note, layout=layout)
        layout = dataclasses.replace(layout, outer=kept)
    return moved(x, layout)


def _is_the_only_example(walk: Walk, op: Op, layout: Layout) -> bool:
    """Whether ``x[0]`` reads all that a microbatch of one example has: a loss that is written for
    one example."""
    if not walk.one_by_one or not layout.plain:
        return False
    (axis,) = layout.axes
    taken = {
        (e.params["start_indices"][axis], e.params["limit_indices"][axis])
        for e in (op.eqn, op.other)
    }
    return taken == {(0, 1)}


def _step(op: Op, layout: Layout) -> int:
    """Of a slice that takes every k-th row of the batch, and as many of each k: the number k."""
    if len(layout.axes) != 1 or layout.looped or op.params["strides"] is None:
        return 1
    (axis,) = layout.axes
    steps = {eqn.params["strides"][axis] for eqn in (op.eqn, op.other)}
    step = steps.pop()
    whole = all(
        old[axis] == step * new[axis] for old, new in zip(op.shapes(), op.out_shapes(), strict=True)
    )
    return step if whole and not steps else 1


def _kept(op: Op, axis: int, layout: Layout, sizes: Sizes) -> int | None:
    """How many views of all examples remain; None where some examples go."""
    found = []
    for eqn, size in ((op.eqn, sizes.first), (op.other, sizes.second)):
        whole, unit = eqn.invars[0].aval.shape[axis], size * layout.inner
        start, stop = eqn.params["start_indices"][axis], eqn.params["limit_indices"][axis]
        step = (eqn.params["strides"] or (1,) * (axis + 1))[axis]
        if step == 1 and (start, stop) == (0, whole):
            found.append((0, layout.outer))
        elif (
            step == 1
            and start % unit == 0
            and stop % unit == 0
            and len(layout.axes) == 1
            and not layout.looped
        ):
            found.append((start // unit, stop // unit - start // unit))
        else:
            return None
    return found[0][1] if found[0] == found[1] else None


@rule("split", uniform=True)
def split(walk: Walk, op: Op, ins: list[Value]) -> list[Value] | Value:
    """An array in parts, along one axis."""
    (x,), axis, count = ins, op.params["axis"], op.num_outs
    if x.layout is None or axis not in x.layout.axes:
        return [moved(x, x.layout) if x.layout is not None else x.but()] * count
    if (
        len(set(op.params["sizes"])) == 1
        and x.layout.outer % count == 0
        and len(x.layout.axes) == 1
    ):
        return [moved(x, dataclasses.replace(x.layout, outer=x.layout.outer // count))] * count
    note = "the batch axis is split by place"
    return walk.couple(op, ins, kind=FaultKind.SELECTION, note=note, layout=x.layout)


@rule("unstack", uniform=True)
def unstack(walk: Walk, op: Op, ins: list[Value]) -> list[Value] | Value:
    """The entries along one axis, each by itself."""
    (x,), axis = ins, op.params["axis"]
    if x.layout is None:
        return [x.but() for _ in range(op.num_outs)]
    if axis in x.layout.axes:
        note = "examples are picked by their place in the batch"
        return walk.couple(op, ins, kind=FaultKind.SELECTION, note=note)
    return [moved(x, without(x.layout, {axis})) for _ in range(op.num_outs)]


@rule("concatenate", uniform=True)
def concatenate(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Arrays side by side: features of the same examples, or views of all of them."""
    axis, last = op.params["dimension"], len(op.out_shapes()[0]) - 1
    if (
        axis == last
        and any(v.index is Index.ROW for v in ins)
        and all(v.aval.shape[-1] == 1 for v in op.eqn.invars)
    ):
        return _indices(walk, op, ins)
    if axis in varying(op.out_shapes()) and not any(v.summary for v in ins):
        return _views(walk, op, ins, axis)
    if not any(v.rows for v in ins) and axis not in varying(op.out_shapes()):
        return dataclasses.replace(added(walk, op, ins), known=None, scalar=False, weight=None)
    if any(v.summary for v in ins) or not same_layout(ins):
        return combine(walk, op, ins)
    (layout,) = {v.layout for v in ins if v.rows}
    if layout is None or axis in layout.axes:
        return walk.couple(
            op, ins, kind=FaultKind.UNKNOWN, note="the batch axis is extended", layout=layout
        )
    return rows(layout, terms=_union(ins), origin=origin_of(ins))


def _union(ins: Sequence[Value]) -> frozenset:
    return frozenset().union(*(v.terms for v in ins if not v.zero)) or PLAIN


def _indices(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A table of indices, one column of which is the example's own place."""
    places = [v.index is Index.ROW for v in ins]
    layouts = {v.layout for v in ins if v.rows or v.index is Index.ROW}
    if len(layouts) != 1 or any(v.summary for v in ins):
        return combine(walk, op, ins)
    faults = frozenset().union(*(v.faults for v in ins))
    kind = next((v.kind for v in ins if v.rows), ins[0].kind)
    return Settled([Value(kind, layouts.pop(), columns=tuple(places), faults=faults)])


def _views(walk: Walk, op: Op, ins: list[Value], axis: int) -> Value:
    """Arrays one after the other along the axis of the examples, each with all of them."""
    layouts = [v.layout if v.rows else _uniform(op, i, axis, walk.sizes) for i, v in enumerate(ins)]
    if any(v.index for v in ins) or any(
        each is None or each.axes != (axis,) or each.looped for each in layouts
    ):
        if all(v.fixed for v in ins):
            note = "a table with a row for each place in the batch"
            return fixed(faults=frozenset([walk.fault(op, FaultKind.POSITION, note)]))
        layout = layout_of(ins)
        return walk.couple(
            op, ins, kind=FaultKind.SELECTION, note="the batch axis is extended", layout=layout
        )
    known = [each for each in layouts if each is not None]
    inners = {each.inner for each, v in zip(known, ins, strict=True) if v.rows} or {1}
    if len(inners) > 1:
        return walk.couple(
            op, ins, kind=FaultKind.UNKNOWN, note="views of the batch with different layouts"
        )
    inner = inners.pop()
    if any(op.eqn.invars[i].aval.shape[axis] % (walk.sizes.first * inner) for i in range(len(ins))):
        return walk.couple(
            op, ins, kind=FaultKind.UNKNOWN, note="views of the batch with different layouts"
        )
    outer = sum(v.aval.shape[axis] for v in op.eqn.invars) // (walk.sizes.first * inner)
    return rows(Layout((axis,), outer, inner), terms=_union(ins), origin=origin_of(ins))


def _uniform(op: Op, i: int, axis: int, sizes: Sizes) -> Layout | None:
    """The layout of a piece that is uniform along the axis: any that fits."""
    first, second = (shape[axis] for shape in op.shapes(i))
    fits = (
        first % sizes.first == 0
        and second % sizes.second == 0
        and first // sizes.first == second // sizes.second
    )
    return Layout((axis,), first // sizes.first) if fits and first else None


@rule("stack", uniform=True)
def stack(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Arrays along a new axis."""
    axis, layout = op.params["axis"], layout_of(ins)
    if layout is None:
        return dataclasses.replace(added(walk, op, ins), known=None, scalar=False, weight=None)
    if any(v.summary for v in ins) or not same_layout(ins):
        return combine(walk, op, ins)
    return rows(
        layout.at(*(a + (a >= axis) for a in layout.axes)), terms=_union(ins), origin=origin_of(ins)
    )


@rule("tile", uniform=True)
def tile(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """An array repeated along its axes: further views of all examples, or of what is the same for
    each."""
    (x,), (first, second) = ins, (op.params["reps"], op.other.params["reps"])
    changing = [a for a, (r, s) in enumerate(zip(first, second, strict=True)) if r != s]
    if x.rows and x.layout is not None:
        repeated = [a for a in x.layout.axes if first[a] != 1 or a in changing]
        if not repeated and all(op.shapes()[0][a] == 1 for a in changing):
            return moved(x, x.layout)
        if not repeated or len(x.layout.axes) != 1 or x.layout.looped or changing:
            return walk.unknown(
                op, "the batch axis is repeated in a way that the analysis cannot follow"
            )
        return moved(x, dataclasses.replace(x.layout, outer=x.layout.outer * first[repeated[0]]))
    (shape, _) = op.shapes()
    if x.scalar or all(shape[a] == 1 for a in changing):
        return reshaped(x)
    sizes = (walk.sizes.first, walk.sizes.second)
    if x.fixed and len(changing) == 1 and (first[changing[0]], second[changing[0]]) == sizes:
        return rows(Layout((changing[0],), inner=shape[changing[0]]), terms=x.terms)
    return walk.unknown(op, "a table is repeated in a way that the analysis cannot follow")


@rule("pad")
def pad(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """An array with a border of one value."""
    x, border = ins
    if not x.rows and not border.rows:
        return dataclasses.replace(added(walk, op, ins), known=None, scalar=False, weight=None)
    if x.layout is None or border.summary or x.summary or not same_layout(ins):
        return combine(walk, op, ins)
    if any(tuple(op.params["padding_config"][a]) != (0, 0, 0) for a in x.layout.axes):
        return walk.couple(
            op, ins, kind=FaultKind.SELECTION, note="the batch axis is padded", layout=x.layout
        )
    return rows(x.layout, terms=_union(ins), origin=x.origin)


@rule("iota", uniform=True)
def iota(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """0, 1, 2, … along an axis: along the batch's, the place of each example."""
    axis, (first, second) = op.params["dimension"], op.out_shapes()
    if first[axis] == second[axis]:
        return fixed()
    if (first[axis], second[axis]) == (walk.sizes.first, walk.sizes.second):
        return Value(index=Index.ROW, layout=Layout((axis,)))
    note = "the result depends on the position of an example in its microbatch"
    return fixed(faults=frozenset([walk.fault(op, FaultKind.POSITION, note)]))
