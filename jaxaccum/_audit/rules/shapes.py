"""Changes of shape: where the examples lie afterwards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.extend.core as jex
from jax import lax

from jaxaccum._audit.gathered_order import all_rows
from jaxaccum._audit.lattice import FaultKind, Index, Kind, Layout, Sizes, Value, fixed, rows
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.rules.operands import (
    avals_of,
    both,
    example_axes,
    faulty,
    lengths,
    lengths_along,
    relocated,
    without,
)
from jaxaccum._audit.walk import Op, Shape, Walk, beyond, varying
from jaxaccum._jaxpr.compat import ClosedJaxpr

Shapes = tuple[Shape, Shape]
"""Those of one array, at each size."""
Columns = tuple[Index | None, ...]
"""Which columns of an array of indices are places."""


def moved(x: Value, layout: Layout, *, columns: Columns = ()) -> Value:
    """The same rows or indices, on other axes."""
    return x.but(
        scalar=x.scalar, layout=layout, index=x.index, columns=columns, known=x.known,
        extremum=x.extremum,
    )  # fmt: skip


def reshaped(x: Value) -> Value:
    """A value without rows, in another shape: one number stays itself, weight and all."""
    return x if x.scalar else x.but(known=x.known, extremum=x.extremum)


@rule("broadcast_in_dim", uniform=True)
def broadcast(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """New axes, and axes of size 1 repeated."""
    x, dims = ins[0], op.params["broadcast_dimensions"]
    if x.layout is None:
        return reshaped(x)
    (shape, _), (out, _) = op.shapes(), op.out_shapes()
    layout = relocated(x.layout, lambda axis: int(dims[axis]))
    if lengths_along(shape, x.layout.axes) != lengths_along(out, layout.axes):
        return walk.unknown(op, "the batch axis is broadcast")
    return moved(x.like(scalar=False), layout, columns=_columns(x, out))


def _columns(x: Value, out: Shape) -> Columns:
    """Places in a last axis of length 1 are a table of indices, of one column."""
    return (x.index,) if x.index in (Index.ROW, Index.ENTRY) and out[-1:] == (1,) else ()


_MERGED = "a reshape merges an axis of the batch's size that holds no examples"
_DIVIDED = "a reshape divides the batch axis in a way that the analysis cannot follow"


@rule("reshape expand_dims", uniform=True)
def reshape(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """The same entries in the same order: the batch axis may merge with others, or split in two."""
    if op.params.get("dimensions") is not None:
        return _transposed_first(walk, op, ins)
    x, shapes, outs = ins[0], op.shapes(), op.out_shapes()
    if x.fixed and x.layout is None:
        return _reshaped_fixed(walk, op, x)
    if x.layout is None:
        kept = x.kind is Kind.STATISTIC or x.scalar or _stays_uniform(x, shapes, outs)
        return reshaped(x) if kept else walk.unknown(op, _MERGED)
    if x.index is Index.GATHERED:
        return _gathered(walk, op, x)
    layout = relaid(x.layout, shapes, outs, walk.sizes)
    if x.rows and not _stays_uniform(x, shapes, outs):
        return walk.unknown(op, _MERGED)
    entries = Index.ENTRY in (x.index, *x.columns)
    if layout is None or (entries and layout.inner != x.layout.inner):
        return walk.unknown(op, _DIVIDED)
    kept = x.columns if shapes[0][-1:] == outs[0][-1:] else ()
    out = moved(x, layout, columns=_columns(x, outs[0]) or kept)
    if len(layout.axes) != 2 or (x.layout == layout and _same_lengths(shapes, outs, layout.axes)):
        return out
    walk.groups.add(group := outs[0][layout.axes[1]])
    together = layout.axes[0] in varying(outs) and walk.keeps_groups(group)
    by_place = dataclasses.replace(layout, by_place=not together)
    return out.like(origin=walk.site(op), layout=by_place)


def _transposed_first(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A reshape in another order of the axes, as of ``ravel(order="F")``."""

    def program(eqn: jex.JaxprEqn) -> ClosedJaxpr:
        order, sizes = eqn.params["dimensions"], eqn.params["new_sizes"]
        in_order = lambda x: lax.reshape(lax.transpose(x, order), sizes)
        return jax.make_jaxpr(in_order)(*avals_of(eqn.invars))

    return Settled(walk.body(op, both(op, program), ins))


def _same_lengths(shapes: Shapes, outs: Shapes, axes: Sequence[int]) -> bool:
    """Whether axes have the lengths after a reshape that they had before."""
    return all(map(lambda a, b: lengths_along(a, axes) == lengths_along(b, axes), shapes, outs))


def _gathered(walk: Walk, op: Op, x: Value) -> Value | list[Value]:
    """All microbatches' rows, one microbatch after the other: those of the batch."""
    assert x.layout is not None
    merged = walk.sizes.first * walk.axis_sizes[0]
    (places, rows_), outs = x.layout.axes, op.out_shapes()
    joined = rows_ == places + 1 and not varying(outs) and merged in outs[0]
    if not joined:
        return reshaped(x)
    return Settled([all_rows(walk, op, fixed(faults=x.faults))])


def _stays_uniform(x: Value, shapes: Shapes, outs: Shapes) -> bool:
    """Whether a reshape leaves a value uniform along each axis of the batch's size that holds no
    examples.

    Such axes may merge with each other and split, but not merge with an axis of other entries:
    ``[[a, a, a], [b, b, b]]``, uniform along its rows, becomes ``[a, a, a, b, b, b]``.
    """
    uniform, own, grown = set(beyond(shapes, x)), set(example_axes(x)), set(varying(outs))
    for group, result in _groups(shapes[0], outs[0]):
        long = {axis for axis in group if lengths(shapes, axis) != (1, 1)}
        matters = long & uniform or (grown & set(result) and not long & own)
        if matters and not long <= uniform:
            return False
        after = math.prod(lengths_along(outs[1], result))
        if after != math.prod(lengths_along(shapes[1], group)):
            return False
    return True


def _groups(shape: Shape, out: Shape) -> list[tuple[list[int], list[int]]]:
    """The axes that a reshape turns into one another, from left to right: as few as hold equally
    many entries.

    Example:
        (2, 3, 4) to (6, 2, 2): axes 0 and 1 become axis 0, and axis 2 becomes axes 1 and 2.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = before = after = 0
    while i < len(shape) or j < len(out):
        if before == after:
            groups.append(([], []))
            before = after = 1
        if j == len(out) or (i < len(shape) and before <= after):
            groups[-1][0].append(i)
            before, i = before * shape[i], i + 1
        else:
            groups[-1][1].append(j)
            after, j = after * out[j], j + 1
    return groups


def _reshaped_fixed(walk: Walk, op: Op, x: Value) -> Value:
    """A varying axis that merges with one along which the value is not uniform has rows."""
    axes = varying(op.shapes())
    if x.scalar or _stays_uniform(x, op.shapes(), op.out_shapes()):
        return reshaped(x)
    layout = _relaid_uniform(walk, op, axes[0]) if len(axes) == 1 else None
    if layout is not None:
        return rows(layout, terms=x.terms)
    note = "a table over the places of the batch is reshaped"
    return reshaped(x).like(faults=faulty(walk, op, FaultKind.POSITION, note))


def _relaid_uniform(walk: Walk, op: Op, axis: int) -> Layout | None:
    """Where an axis along which a value is uniform lies after a reshape; None where it holds less
    than the batch."""
    sizes, (first, second) = walk.sizes, lengths(op.shapes(), axis)
    outer = first // sizes.first
    if outer == 0 and sizes.first % first == 0:
        walk.groups.add(sizes.first // first)
    if outer == 0 or (first, second) != (outer * sizes.first, outer * sizes.second):
        return None
    return relaid(Layout((axis,), outer), op.shapes(), op.out_shapes(), sizes)


def relaid(layout: Layout, shapes: Shapes, outs: Shapes, sizes: Sizes) -> Layout | None:
    """The layout after a reshape, the same at both sizes; None where there is none."""
    if not layout.axes:
        return layout
    counts = lengths(shapes, layout.axes[0]) if layout.looped else (sizes.first, sizes.second)
    ones = {axis for axis, (a, b) in enumerate(zip(*outs, strict=True)) if a == b == 1}
    first = _relaid(layout, shapes[0], outs[0], counts[0], ones)
    second = _relaid(layout, shapes[1], outs[1], counts[1], ones)
    return first if first == second else None


def _relaid(layout: Layout, shape: Shape, out: Shape, size: int, ones: set[int]) -> Layout | None:
    """The layout after a reshape, by how many entries lie between two of `size` examples.

    An axis of the result in `ones` has one entry for any batch size, so the examples do not split.
    """
    last = layout.axes[-1]
    if len(layout.axes) == 2 and layout.axes != (last - 1, last):
        return None
    stride = layout.inner * math.prod(shape[last + 1 :])
    for axis, length in enumerate(out):
        if (inner := _inner(out, axis, stride)) and length and length % (size * inner) == 0:
            outer = length // (size * inner)
            by_place = layout.by_place and layout.looped  # parts that are merged are none
            return Layout((axis,), outer, inner, layout.looped, by_place)
        if not layout.looped and axis not in ones and _splits(out, axis, size, stride):
            return Layout((axis, axis + 1))
    return None


def _inner(out: Shape, axis: int, stride: int) -> int:
    """How many steps of an axis lie between two examples; 0 where a step leads across one."""
    after = math.prod(out[axis + 1 :])
    return stride // after if after and stride % after == 0 else 0


def _splits(out: Shape, axis: int, size: int, stride: int) -> bool:
    """Whether the examples lie along an axis and the next one, together."""
    return math.prod(out[axis : axis + 2]) == size and math.prod(out[axis + 2 :]) == stride


@rule("squeeze", uniform=True)
def squeeze(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Axes of size 1 dropped."""
    x, dropped = ins[0], {d % len(op.shapes()[0]) for d in op.params["dimensions"]}
    if x.layout is None:
        return reshaped(x)
    if dropped & set(x.layout.axes):
        return walk.unknown(op, "the batch axis is squeezed")
    return moved(x, without(x.layout, dropped))


@rule("transpose", uniform=True)
def transpose(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Axes permuted."""
    (x,) = ins
    if x.layout is None:
        return reshaped(x)
    permutation = list(map(int, op.params["permutation"]))
    return moved(x, relocated(x.layout, permutation.index))


@rule("rev")
def rev(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Axes reversed."""
    (x,) = ins
    if x.layout is not None and set(x.layout.axes) & set(op.params["dimensions"]):
        note = "the batch axis is reversed"
        return walk.couple(op, ins, kind=FaultKind.SELECTION, note=note, layout=x.layout)
    return x.but(scalar=x.scalar)
