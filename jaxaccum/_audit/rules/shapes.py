"""Changes of shape: where the examples lie afterwards."""

from __future__ import annotations

import dataclasses
import math

from jaxaccum._audit.lattice import FaultKind, Index, Kind, Layout, Sizes, Value, fixed, rows
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.walk import Op, Shape, Walk, beyond, varying


def placed(x: Value) -> bool:
    """Whether the value says where examples lie: rows, or indices of them."""
    return x.layout is not None


def moved(x: Value, layout: Layout, *, columns: tuple[bool, ...] = ()) -> Value:
    """The same rows or indices, on other axes."""
    return dataclasses.replace(
        x.but(scalar=x.scalar),
        layout=layout,
        index=x.index,
        columns=columns,
        known=x.known,
        extremum=x.extremum,
    )


def reshaped(x: Value) -> Value:
    """A value without rows, in another shape: one number stays itself, weight and all."""
    return x if x.scalar else dataclasses.replace(x.but(), known=x.known, extremum=x.extremum)


@rule("broadcast_in_dim", uniform=True)
def broadcast(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """New axes, and axes of size 1 repeated."""
    x, dims = ins[0], op.params["broadcast_dimensions"]
    if not placed(x) or x.layout is None:
        return reshaped(x)
    (shape, _), (out, _) = op.shapes(), op.out_shapes()
    axes = tuple(int(dims[a]) for a in x.layout.axes)
    if any(shape[a] != out[b] for a, b in zip(x.layout.axes, axes, strict=True)):
        return walk.unknown(op, "the batch axis is broadcast")
    return moved(dataclasses.replace(x, scalar=False), x.layout.at(*axes), columns=_columns(x, out))


def _columns(x: Value, out: Shape) -> tuple[bool, ...]:
    return (True,) if x.index is Index.ROW and out[-1:] == (1,) else ()


_MERGED = "a reshape merges an axis of the batch's size that holds no examples"


@rule("reshape expand_dims", uniform=True)
def reshape(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """The same entries in the same order: the batch axis may merge with others, or split in two."""
    x, shapes, outs = ins[0], op.shapes(), op.out_shapes()
    if x.fixed and not placed(x):
        return _reshaped_fixed(walk, op, x)
    if x.layout is None:
        kept = x.kind is Kind.STATISTIC or x.scalar or _kept_apart(shapes, outs, varying(shapes))
        return reshaped(x) if kept else walk.unknown(op, _MERGED)
    if x.index is Index.GATHERED:
        return _gathered(walk, op, x)
    layout = relaid(x.layout, shapes, outs, walk.sizes)
    if x.rows and not _kept_apart(shapes, outs, beyond(shapes, x)):
        return walk.unknown(op, _MERGED)
    if layout is None:
        return walk.unknown(
            op, "a reshape divides the batch axis in a way that the analysis cannot follow"
        )
    out = moved(
        x,
        layout,
        columns=_columns(x, outs[0]) or (x.columns if shapes[0][-1:] == outs[0][-1:] else ()),
    )
    splits = len(layout.axes) == 2 and x.layout != layout
    if splits:
        walk.groups.add(outs[0][layout.axes[1]])
    return dataclasses.replace(out, origin=walk.site(op)) if splits else out


def _gathered(walk: Walk, op: Op, x: Value) -> Value | list[Value]:
    """All microbatches' rows, one microbatch after the other: those of the batch."""
    assert x.layout is not None
    merged = walk.sizes.first * walk.axis_sizes[0]
    (places, rows_), outs = x.layout.axes, op.out_shapes()
    joined = rows_ == places + 1 and not varying(outs) and merged in outs[0]
    return Settled([fixed(faults=x.faults)]) if joined else reshaped(x)


def _kept_apart(shapes: tuple[Shape, Shape], outs: tuple[Shape, Shape], axes: list[int]) -> bool:
    """Whether a reshape leaves these axes alone, each whole and by itself, so that what is uniform
    there stays so."""
    pairs = list(zip(shapes, outs, strict=True))
    places = [{_whole(shape, out, a) for shape, out in pairs} for a in axes]
    return all(len(place) == 1 and None not in place for place in places)


def _whole(shape: Shape, out: Shape, axis: int) -> int | None:
    """The axis of the result that an axis of the operand is."""
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    return next(
        (
            b
            for b in range(len(out))
            if (math.prod(out[:b]), math.prod(out[b + 1 :])) == (before, after)
        ),
        None,
    )


def _reshaped_fixed(walk: Walk, op: Op, x: Value) -> Value:
    """Where an axis that varies merges with one along which the value is not uniform, it has
    rows."""
    axes = varying(op.shapes())
    if x.scalar or not axes:
        return reshaped(x)
    layouts = [
        relaid(
            Layout((a,), *_around(op.shapes(), a, walk.sizes)),
            op.shapes(),
            op.out_shapes(),
            walk.sizes,
        )
        for a in axes
    ]
    if all(layout is not None and layout.plain for layout in layouts):
        return reshaped(x)
    if len(layouts) == 1 and layouts[0] is not None:
        return rows(layouts[0], terms=x.terms)
    note = "a table over the places of the batch is reshaped"
    return dataclasses.replace(
        reshaped(x), faults=frozenset([walk.fault(op, FaultKind.POSITION, note)])
    )


def _around(shapes: tuple[Shape, Shape], axis: int, sizes: Sizes) -> tuple[int, int]:
    """(outer, inner) of an axis along which the value is uniform."""
    return max(shapes[0][axis] // sizes.first, 1), 1


def relaid(
    layout: Layout, shapes: tuple[Shape, Shape], outs: tuple[Shape, Shape], sizes: Sizes
) -> Layout | None:
    """The layout after a reshape, the same at both sizes; None where there is none."""
    if not layout.axes:
        return layout
    pairs = zip(shapes, outs, (sizes.first, sizes.second), strict=True)
    first, second = (
        _relaid(layout, shape, out, shape[layout.axes[0]] if layout.looped else n)
        for shape, out, n in pairs
    )
    return first if first == second else None


def _relaid(layout: Layout, shape: Shape, out: Shape, size: int) -> Layout | None:
    last = layout.axes[-1]
    if len(layout.axes) == 2 and layout.axes != (last - 1, last):
        return None
    stride = layout.inner * math.prod(shape[last + 1 :])
    for axis in range(len(out)):
        after = math.prod(out[axis + 1 :])
        if (
            after
            and stride % after == 0
            and out[axis] % (size * (stride // after)) == 0
            and out[axis]
        ):
            inner = stride // after
            return dataclasses.replace(
                layout.at(axis), outer=out[axis] // (size * inner), inner=inner
            )
        splits = (
            axis + 1 < len(out)
            and out[axis] * out[axis + 1] == size
            and math.prod(out[axis + 2 :]) == stride
        )
        if splits and not layout.looped:
            return Layout((axis, axis + 1))
    return None


@rule("squeeze", uniform=True)
def squeeze(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Axes of size 1 dropped."""
    x, dropped = ins[0], {d % len(op.shapes()[0]) for d in op.params["dimensions"]}
    if x.layout is None:
        return reshaped(x)
    if dropped & set(x.layout.axes):
        return walk.unknown(op, "the batch axis is squeezed")
    return moved(x, without(x.layout, dropped))


def without(layout: Layout, dropped: set[int]) -> Layout:
    """The layout once other axes are gone."""
    return layout.at(*(a - sum(d < a for d in dropped) for a in layout.axes))


@rule("transpose", uniform=True)
def transpose(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Axes permuted."""
    (x,) = ins
    if x.layout is None:
        return reshaped(x)
    permutation = [int(a) for a in op.params["permutation"]]
    return moved(x, x.layout.at(*(permutation.index(a) for a in x.layout.axes)))


@rule("rev")
def rev(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Axes reversed."""
    (x,) = ins
    if x.layout is not None and set(x.layout.axes) & set(op.params["dimensions"]):
        return walk.couple(
            op, ins, kind=FaultKind.SELECTION, note="the batch axis is reversed", layout=x.layout
        )
    return x.but(scalar=x.scalar)
