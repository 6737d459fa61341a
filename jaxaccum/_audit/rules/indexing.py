"""Gathers, scatters and slices at computed places: an example may read itself, and no other."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxaccum._audit.lattice import (
    ONE_EXAMPLE,
    PLAIN,
    FaultKind,
    Index,
    Kind,
    Layout,
    Value,
    fixed,
    rows,
)
from jaxaccum._audit.registry import RULES, Settled, rule
from jaxaccum._audit.rules.arithmetic import added
from jaxaccum._audit.rules.elementwise import combine, layout_of, origin_of, same_layout
from jaxaccum._audit.walk import Op, Walk, beyond, varying

_READS = "an example is picked by an index, so it reads others"


def terms_of(ins: list[Value]) -> frozenset:
    return frozenset().union(*(v.terms for v in ins if not v.zero)) or PLAIN


@dataclasses.dataclass(frozen=True)
class _Gather:
    """The dimension numbers of a gather, read by its rules."""

    op: Op

    @property
    def numbers(self) -> Any:
        return self.op.params["dimension_numbers"]

    @property
    def places(self) -> list[int]:
        """The axes of the result that the axes of the indices become."""
        return [i for i in range(len(self.op.out_shapes()[0])) if i not in self.numbers.offset_dims]

    def of_indices(self, layout: Layout) -> Layout | None:
        """Where rows of the indices lie in the result."""
        places = self.places
        return (
            layout.at(*(places[a] for a in layout.axes))
            if all(a < len(places) for a in layout.axes)
            else None
        )

    def batched(self, axis: int) -> int | None:
        """The axis of the indices that runs beside an axis of the operand."""
        dims = list(self.numbers.operand_batching_dims)
        return self.numbers.start_indices_batching_dims[dims.index(axis)] if axis in dims else None

    def window(self, axis: int) -> int | None:
        """The axis of the result that holds all of an axis of the operand."""
        gone = {*self.numbers.collapsed_slice_dims, *self.numbers.operand_batching_dims}
        kept = [i for i in range(len(self.op.shapes()[0])) if i not in gone]
        whole = all(
            e.params["slice_sizes"][axis] == e.invars[0].aval.shape[axis]
            for e in (self.op.eqn, self.op.other)
        )
        return self.numbers.offset_dims[kept.index(axis)] if axis in kept and whole else None

    def indexed_by_place(self, axis: int, indices: Value) -> bool:
        """Whether an axis of the operand is read at the example's own place."""
        dims = list(self.numbers.start_index_map)
        column = dims.index(axis) if axis in dims else len(indices.columns)
        return (
            column < len(indices.columns)
            and only_place(indices, column)
            and bool(indices.layout and indices.layout.plain)
            and self.op.params["slice_sizes"][axis]
            == self.op.other.params["slice_sizes"][axis]
            == 1
        )

    def leaves(self, x: Value, indices: Value) -> bool:
        """Whether an index may fall outside of an axis whose length is the batch's, and reads the
        filling there."""
        axes = [a for a in self.numbers.start_index_map if a in varying(self.op.shapes())]
        own = x.layout.axes if x.layout is not None else ()
        inside = all(a in own and self.indexed_by_place(a, indices) for a in axes)
        return self.op.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP and not inside


@rule("gather", uniform=True)
def gather(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """The parts of an operand at given indices."""
    x, indices, *_ = ins
    g = _Gather(op)
    own = g.of_indices(indices.layout) if indices.rows and indices.layout is not None else None
    if g.leaves(x, indices):
        return walk.unknown(op, "an index may fall outside of an axis of the batch's size")
    if x.kind is Kind.TOTAL and indices.fixed:
        return x.but()
    if x.summary or indices.summary:
        return walk.couple(
            op,
            [v for v in (x, indices) if v.summary],
            layout=own or (x.layout if indices.summary else None),
        )
    if x.fixed:
        return _from_table(walk, op, ins, own)
    return _from_rows(walk, op, ins, own)


def _from_table(walk: Walk, op: Op, ins: list[Value], own: Layout | None) -> Value:
    x, indices, *_ = ins
    if x.index is not None or (indices.rows and own is None):
        return walk.unknown(op, "a gather that the analysis cannot follow")
    return rows(own, terms=x.terms) if own is not None else fixed(x.scale)


def _from_rows(walk: Walk, op: Op, ins: list[Value], own: Layout | None) -> Value | list[Value]:
    x, indices, *_ = ins
    g, layout = _Gather(op), x.layout
    assert layout is not None
    if len(layout.axes) == 1:
        (axis,) = layout.axes
        beside, window = g.batched(axis), g.window(axis)
        if beside is not None and (indices.fixed or indices.layout == layout.at(beside)):
            return rows(layout.at(g.places[beside]), terms=x.terms, origin=x.origin)
        if window is not None and not indices.rows:
            return rows(layout.at(window), terms=x.terms, origin=x.origin)
        if layout.plain and g.indexed_by_place(axis, indices) and indices.layout is not None:
            faults = x.faults | indices.faults
            return Settled(
                [
                    rows(
                        indices.layout.at(g.places[indices.layout.axes[0]]),
                        terms=x.terms,
                        faults=faults,
                        origin=x.origin,
                    )
                ]
            )
    windows = [g.window(a) for a in layout.axes]
    if not indices.rows and None not in windows:
        return rows(
            layout.at(*(w for w in windows if w is not None)), terms=x.terms, origin=x.origin
        )
    if not layout.axes and (indices.fixed or indices.layout == layout):
        return rows(layout, terms=x.terms, origin=x.origin)
    kind = FaultKind.PAIRWISE if indices.rows else FaultKind.SELECTION
    return walk.couple(op, [x], kind=kind, note=_READS, layout=own)


# -- slices ----------------------------------------------------------------------------------------


def _cut(op: Op, axis: int, operand: int = 0) -> bool:
    """Whether a slice takes less than all of an axis."""
    sizes = [
        e.params["slice_sizes"][axis] if operand == 0 else e.invars[operand].aval.shape[axis]
        for e in (op.eqn, op.other)
    ]
    return any(
        size != e.invars[0].aval.shape[axis]
        for size, e in zip(sizes, (op.eqn, op.other), strict=True)
    )


@rule("dynamic_slice")
def dynamic_slice(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A window at computed places: at the step of a loop over the examples, one example."""
    x, *starts = ins
    if x.summary or any(v.summary for v in starts):
        linear = x.kind is Kind.TOTAL and all(v.fixed for v in starts)
        return x.but() if linear else combine(walk, op, ins)
    if any(v.rows for v in starts):
        alike = same_layout(ins) and layout_of(ins) == ONE_EXAMPLE
        return (
            rows(ONE_EXAMPLE, terms=x.terms)
            if alike
            else walk.couple(op, ins, kind=FaultKind.PAIRWISE, note=_READS)
        )
    if x.layout is None or not x.rows:
        return fixed(x.scale)
    cut = [a for a in x.layout.axes if _cut(op, a)]
    if not cut:
        return rows(x.layout, terms=x.terms, origin=x.origin)
    if _one_at_a_step(op, x.layout, starts):
        faults = x.faults.union(*(v.faults for v in starts))
        return Settled([rows(ONE_EXAMPLE, terms=x.terms, faults=faults, origin=x.origin)])
    return walk.couple(op, [x], kind=FaultKind.SELECTION, note=_READS)


def _one_at_a_step(op: Op, layout: Layout, starts: list[Value], operand: int = 0) -> bool:
    """Whether one example is taken, at the step of the loop that runs over all of them."""
    if not layout.plain:
        return False
    (axis,) = layout.axes
    sizes = [
        e.params["slice_sizes"][axis] if operand == 0 else e.invars[operand].aval.shape[axis]
        for e in (op.eqn, op.other)
    ]
    return (
        sizes == [1, 1]
        and [i for i, v in enumerate(starts) if v.index is not None] == [axis]
        and starts[axis].index is Index.STEP
    )


@rule("dynamic_update_slice")
def dynamic_update_slice(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A window written at computed places: at the step of a loop over the examples, each writes its
    own row."""
    x, update, *starts = ins
    if any(not v.fixed for v in starts):
        return RULES["*"].apply(walk, op, ins)
    if not x.rows and not update.rows:
        return dataclasses.replace(
            added(walk, op, [x, update]), known=None, scalar=False, weight=None
        )
    if update.layout == ONE_EXAMPLE and not x.summary:
        steps = [a for a, v in enumerate(starts) if v.index is Index.STEP]
        layout = Layout((steps[0],)) if len(steps) == 1 else None
        own = (
            layout is not None
            and x.layout in (None, layout)
            and not beyond(op.shapes(), rows(layout))
        )
        if layout is not None and own and _one_at_a_step(op, layout, starts, operand=1):
            faults = x.faults | update.faults
            return Settled(
                [rows(layout, terms=terms_of([x, update]), faults=faults, origin=update.origin)]
            )
    layout = layout_of([x, update])
    if (
        x.summary
        or update.summary
        or layout is None
        or not same_layout([x, update])
        or any(_cut(op, a, 1) for a in layout.axes)
    ):
        return RULES["*"].apply(walk, op, ins)
    return rows(layout, terms=terms_of([x, update]), origin=origin_of(ins))


def only_place(indices: Value, column: int) -> bool:
    """Whether a column of the indices is the example's place, which no other column reads along
    another axis."""
    return [i for i, is_place in enumerate(indices.columns) if is_place] == [column]
