"""Gathers, scatters and slices at computed places: an example may read itself, and no other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxaccum._audit.lattice import (
    ONE_EXAMPLE,
    FaultKind,
    Index,
    Kind,
    Layout,
    Value,
    faults_of,
    fixed,
    origin_of,
    rows,
)
from jaxaccum._audit.registry import RULES, Settled, rule
from jaxaccum._audit.rules.arithmetic import added
from jaxaccum._audit.rules.elementwise import combine
from jaxaccum._audit.rules.operands import (
    all_fixed,
    any_place,
    any_rows,
    any_summary,
    array_of,
    axes_except,
    layout_of,
    lengths,
    params_at_both,
    relocated,
    same_layout,
    summaries_among,
    terms_of,
)
from jaxaccum._audit.walk import Op, Walk, beyond, varying

_READS = "an example is picked by an index, so it reads others"


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
        (out, _) = self.op.out_shapes()
        return axes_except(range(len(out)), self.numbers.offset_dims)

    def of_indices(self, layout: Layout) -> Layout | None:
        """Where rows of the indices lie in the result."""
        places = self.places
        if max(layout.axes, default=-1) >= len(places):
            return None
        return relocated(layout, places.__getitem__)

    def batched(self, axis: int) -> int | None:
        """The axis of the indices that is paired with an axis of the operand."""
        dims = list(self.numbers.operand_batching_dims)
        return self.numbers.start_indices_batching_dims[dims.index(axis)] if axis in dims else None

    def window(self, axis: int) -> int | None:
        """The axis of the result that holds all of an axis of the operand."""
        gone = {*self.numbers.collapsed_slice_dims, *self.numbers.operand_batching_dims}
        kept = axes_except(range(len(self.op.shapes()[0])), gone)
        if axis not in kept or _cut(self.op, axis):
            return None
        return self.numbers.offset_dims[kept.index(axis)]

    def windows(self, layout: Layout) -> Layout | None:
        """Where rows of the operand lie in the result, if all of their axes are read whole."""
        found = []
        for axis in layout.axes:
            if (window := self.window(axis)) is None:
                return None
            found.append(window)
        return layout.at(*found)

    def indexed_by_place(self, layout: Layout, indices: Value) -> bool:
        """Whether the one axis of the operand's rows is read at the place of each."""
        (axis,) = layout.axes
        one = lengths(params_at_both(self.op, "slice_sizes"), axis) == (1, 1)
        return one and reads_place(self.numbers.start_index_map, axis, indices, layout)

    def leaves(self, x: Value, indices: Value) -> bool:
        """Whether an index may leave an axis of the batch's size, and read the filling there."""
        if self.op.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
            return False
        axes = set(self.numbers.start_index_map) & set(varying(self.op.shapes()))
        if x.layout is None or len(axes) != 1 or axes != set(x.layout.axes):
            return bool(axes)
        return not self.indexed_by_place(x.layout, indices)


@rule("gather", uniform=True)
def gather(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """The parts of an operand at given indices."""
    x, indices, *_ = ins
    g = _Gather(op)
    if x.placed:
        return walk.unknown(op, "places of examples are picked by an index")
    own = g.of_indices(indices.layout) if indices.rows and indices.layout is not None else None
    if g.leaves(x, indices):
        return walk.unknown(op, "an index may fall outside of an axis of the batch's size")
    if x.kind is Kind.TOTAL and indices.fixed:
        return x.but()
    if summaries := summaries_among([x, indices]):
        layout = own or (x.layout if indices.summary else None)
        return walk.couple(op, summaries, layout=layout)
    if x.fixed:
        return _from_table(walk, op, ins, own)
    return _from_rows(walk, op, ins, own)


def _from_table(walk: Walk, op: Op, ins: list[Value], own: Layout | None) -> Value:
    """Entries of a table that all examples share, at indices of each."""
    x, indices, *_ = ins
    if indices.rows and own is None:
        return walk.unknown(op, "a gather that the analysis cannot follow")
    return rows(own, terms=x.terms) if own is not None else fixed(x.scale)


def _from_rows(walk: Walk, op: Op, ins: list[Value], own: Layout | None) -> Value | list[Value]:
    """Parts of each example: read whole, at indices of its own, or at its own place."""
    x, indices, *_ = ins
    g, layout = _Gather(op), x.layout
    assert layout is not None
    if len(layout.axes) == 1:
        (axis,) = layout.axes
        beside = g.batched(axis)
        if beside is not None and (indices.fixed or indices.layout == layout.at(beside)):
            return rows(layout.at(g.places[beside]), terms=x.terms, origin=x.origin)
    if not indices.rows and (whole := g.windows(layout)) is not None:
        return rows(whole, terms=x.terms, origin=x.origin)
    if len(layout.axes) == 1 and indices.layout is not None:
        faults, read = x.faults | indices.faults, g.of_indices(indices.layout)
        if read is not None and g.indexed_by_place(layout, indices):
            return Settled([rows(read, terms=x.terms, faults=faults, origin=x.origin)])
    if not layout.axes and (indices.fixed or indices.layout == layout):
        return rows(layout, terms=x.terms, origin=x.origin)
    kind = FaultKind.PAIRWISE if indices.rows else FaultKind.SELECTION
    return walk.couple(op, [x], kind=kind, note=_READS, layout=own)


# -- slices ----------------------------------------------------------------------------------------


def _window_lengths(op: Op, axis: int) -> tuple[int, int]:
    """How long the window that is read or written is along an axis, at each size."""
    read = "slice_sizes" in op.params
    return lengths(params_at_both(op, "slice_sizes") if read else op.shapes(1), axis)


def _cut(op: Op, axis: int) -> bool:
    """Whether a window holds less than all of an axis."""
    return _window_lengths(op, axis) != lengths(op.shapes(), axis)


def _cuts(op: Op, layout: Layout) -> bool:
    """Whether a window holds less than all examples."""
    return any(_cut(op, a) for a in layout.axes)


@rule("dynamic_slice")
def dynamic_slice(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A window at computed places: at the step of a loop over the examples, one example."""
    x, *starts = ins
    if any_summary(ins):
        linear = x.kind is Kind.TOTAL and all_fixed(starts)
        return x.but() if linear else combine(walk, op, ins)
    if any_rows(starts):
        if same_layout(ins) and layout_of(ins) == ONE_EXAMPLE:
            return rows(ONE_EXAMPLE, terms=x.terms)
        return walk.couple(op, ins, kind=FaultKind.PAIRWISE, note=_READS)
    if x.layout is None or not x.rows:
        return fixed(x.scale)
    if not _cuts(op, x.layout):
        return rows(x.layout, terms=x.terms, origin=x.origin)
    if _one_at_a_step(op, x.layout, starts) and not x.placed:
        faults = faults_of(ins)
        return Settled([rows(ONE_EXAMPLE, terms=x.terms, faults=faults, origin=x.origin)])
    return walk.couple(op, [x], kind=FaultKind.SELECTION, note=_READS)


def _one_at_a_step(op: Op, layout: Layout, starts: list[Value]) -> bool:
    """Whether a window is one example, at the step of the loop that runs over all of them."""
    axis = _axis_of_steps(starts)
    if axis is None or layout != Layout((axis,)):
        return False
    return _window_lengths(op, axis) == (1, 1)


def _axis_of_steps(starts: list[Value]) -> int | None:
    """The one axis along which a window begins at a place, if that is the step of a loop."""
    places = [i for i, v in enumerate(starts) if v.index is not None]
    if len(places) != 1 or starts[places[0]].index is not Index.STEP:
        return None
    return places[0]


@rule("dynamic_update_slice")
def dynamic_update_slice(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A window written at computed places: in a loop over the examples, each writes its row."""
    x, update, *starts = ins
    given = [x, update]
    if not all_fixed(starts):
        return RULES["*"].apply(walk, op, ins)
    if not any_rows(given):
        return array_of(added(walk, op, given))
    if (layout := _written_at_a_step(op, x, update, starts)) is not None:
        faults, terms = faults_of(given), terms_of(given)
        return Settled([rows(layout, terms=terms, faults=faults, origin=update.origin)])
    layout = layout_of(given)
    if layout is None or any_summary(given) or not same_layout(given):
        return RULES["*"].apply(walk, op, ins)
    if _cuts(op, layout):
        return RULES["*"].apply(walk, op, ins)
    return rows(layout, terms=terms_of(given), origin=origin_of(ins))


def _written_at_a_step(op: Op, x: Value, update: Value, starts: list[Value]) -> Layout | None:
    """Where the rows lie that a loop over the examples writes, one at each step."""
    axis = _axis_of_steps(starts)
    if update.layout != ONE_EXAMPLE or x.summary or axis is None or any_place([x, update]):
        return None
    layout = Layout((axis,))
    own = x.layout in (None, layout) and not beyond(op.shapes(), rows(layout))
    return layout if own and _one_at_a_step(op, layout, starts) else None


def reads_place(dims: Sequence[int], axis: int, indices: Value, layout: Layout) -> bool:
    """Whether indices along `dims` are the own place of each row, which lie along an axis."""
    if axis not in dims or indices.layout is None or len(indices.layout.axes) != 1:
        return False
    column, place = list(dims).index(axis), Index.ROW if layout.plain else Index.ENTRY
    alike = indices.layout.at(axis) == layout
    return alike and column < len(indices.columns) and _only_place(indices, column, place)


def _only_place(indices: Value, column: int, place: Index) -> bool:
    """Whether this column of the indices, and no other one, is a place, and of this kind."""
    places = {i: index for i, index in enumerate(indices.columns) if index}
    return places == {column: place}
