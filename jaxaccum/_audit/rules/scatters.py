"""Scatters: rows that are written at their own positions stay rows, and a histogram is a total."""

from __future__ import annotations

from collections.abc import Callable

from jaxaccum._audit.equation import lengths
from jaxaccum._audit.lattice import (
    ONE_EXAMPLE,
    Index,
    Layout,
    Value,
    faults_of,
    origin_of,
    rows,
    total,
)
from jaxaccum._audit.registry import RULES, Settled, rule
from jaxaccum._audit.rules.arithmetic import added
from jaxaccum._audit.rules.elementwise import combine
from jaxaccum._audit.rules.indexing import reads_place
from jaxaccum._audit.rules.operands import (
    all_fixed,
    all_unscaled,
    any_rows,
    any_summary,
    array_of,
    axes_except,
    example_axes,
    layout_of,
    once,
    same_layout,
    terms_of,
    with_faults,
)
from jaxaccum._audit.walk import Op, Walk, beyond, varying
from jaxaccum._audit.windows import written_axes


@rule(
    """
        scatter scatter-add scatter_add scatter-sub scatter-mul scatter_mul scatter-min scatter_min
        scatter-max scatter_max
    """
)
def scatter(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Updates written at given indices of an operand; added there, a sum over the examples."""
    x, indices, updates = ins
    adds = op.name in ("scatter-add", "scatter_add", "scatter-sub")
    linear = adds or op.name == "scatter"
    if x.placed or updates.placed:
        return RULES["*"].apply(walk, op, ins)
    if any_summary(ins):
        if linear and indices.fixed and not any_rows(ins):
            return array_of(added(walk, op, [x, updates]))
        return RULES["*"].apply(walk, op, ins)
    if all_fixed(ins):
        return _into_fixed(walk, op, ins)
    if updates.layout == ONE_EXAMPLE and indices.index is Index.STEP and op.name == "scatter":
        return _written_at_a_step(walk, op, ins)
    if (layout := _scattered(op, ins)) is not None:
        if not linear:
            moved = [v.like(layout=layout) if v.rows else v for v in ins]
            combined = combine(walk, op, moved)
            unscaled = all_unscaled([x, updates])
            return Settled([with_faults(combined, faults_of(ins))]) if unscaled else combined
        terms, faults = terms_of([x, updates]), faults_of(ins)
        return Settled([rows(layout, terms=terms, faults=faults, origin=origin_of(ins))])
    alike = same_layout(ins) and not indices.placed
    if adds and x.fixed and alike and not varying(op.shapes()):
        return _histogram(walk, op, ins)
    return RULES["*"].apply(walk, op, ins)


def _into_fixed(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """A scatter of what is independent of the batch: settled where each place is written alike."""
    x, indices, updates = ins
    value = added(walk, op, [x, updates]).like(known=None, scalar=False)
    return Settled([value.like(faults=faults_of(ins))]) if _evenly(op, indices) else value


def _evenly(op: Op, indices: Value) -> bool:
    """Whether each place along an axis of the batch's size is written alike."""
    reached = set(varying(op.shapes())) - _inside(op)
    if not reached or indices.layout is None:
        return not (reached or indices.placed or varying(op.shapes(1)))
    return all(_at_each_place(op, a, indices) for a in reached)


def _at_each_place(op: Op, axis: int, indices: Value) -> bool:
    """Whether every entry of an axis is written at its own place, and none is left out."""
    assert indices.layout is not None
    written = lengths(op.shapes(1), indices.layout.axes)
    whole = lengths(op.shapes(), [axis]) == written
    return whole and _by_place(op, axis, indices, indices.layout.at(axis))


def _written_at_a_step(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """In a loop over the examples, each writes its own row."""
    x, _, updates = ins
    numbers = op.params["dimension_numbers"]
    axes = tuple(numbers.scatter_dims_to_operand_dims)
    layout = Layout(axes)
    by_row = len(axes) == 1 and axes == tuple(numbers.inserted_window_dims)
    if not by_row or beyond(op.shapes(), rows(layout)) or x.layout not in (None, layout):
        return RULES["*"].apply(walk, op, ins)
    terms, faults = terms_of([x, updates]), faults_of(ins)
    return Settled([rows(layout, terms=terms, faults=faults, origin=updates.origin)])


def _histogram(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Each example adds to entries of a table: a total, which the table itself enters once."""
    x, _, updates = ins
    layout = layout_of(ins)
    repeats = max(len(varying(op.shapes(1))), len(varying(op.shapes(2)))) > 1
    if layout is None or layout.looped or len(layout.axes) != 1 or repeats:
        return RULES["*"].apply(walk, op, ins)
    if _window_holds(op, updates):
        return RULES["*"].apply(walk, op, ins)
    return Settled([total(walk.site(op), updates.terms | once(x), faults=faults_of(ins))])


def _window_holds(op: Op, updates: Value) -> bool:
    """Whether the axis of the examples lies inside the windows that are written."""
    windows = set(op.params["dimension_numbers"].update_window_dims)
    return updates.rows and bool(windows & set(example_axes(updates)))


def _scattered(op: Op, ins: list[Value]) -> Layout | None:
    """Where rows lie in the result, if each example writes to its own part of the operand."""
    x, indices, updates = ins
    found = {x.layout} if x.rows else set()
    if updates.rows:
        found.add(_written(op, updates, indices, _of_updates))
    if indices.rows:
        found.add(_written(op, indices, indices, _of_indices))
    layout = found.pop() if len(found) == 1 else None
    if layout is None or beyond(op.shapes(), rows(layout)):
        return None
    if len(varying(op.shapes(2))) > len(layout.axes):
        return None
    return layout if _owned(op, layout, indices) else None


def _written(
    op: Op, x: Value, indices: Value, axis_of: Callable[[Op, int, Value], int | None]
) -> Layout | None:
    """Where rows of the updates or of the indices lie in the result, if it can be said."""
    if x.layout is None or not x.layout.axes:
        return x.layout
    if len(x.layout.axes) != 1:
        return None
    axis = axis_of(op, x.layout.axes[0], indices)
    return None if axis is None else x.layout.at(axis)


def _owned(op: Op, layout: Layout, indices: Value) -> bool:
    """Whether writing never reaches from one example's part into another's."""
    apart = _inside(op) | set(op.params["dimension_numbers"].operand_batching_dims)
    return all(a in apart or _by_place(op, a, indices, layout) for a in layout.axes)


def _inside(op: Op) -> set[int]:
    """The axes of the operand that are written whole, where no index reaches."""
    reached = set(op.params["dimension_numbers"].scatter_dims_to_operand_dims)
    windows = [axis for axis in written_axes(op) if axis not in reached]
    return {axis for axis in windows if _is_written_whole(op, axis)}


def _is_written_whole(op: Op, axis: int) -> bool:
    """Whether a window extends along all of an axis."""
    window = op.params["dimension_numbers"].update_window_dims[written_axes(op).index(axis)]
    return lengths(op.shapes(2), [window]) == lengths(op.shapes(), [axis])


def _by_place(op: Op, axis: int, indices: Value, layout: Layout) -> bool:
    """Whether each example writes at its own place along an axis of the operand."""
    dims = op.params["dimension_numbers"].scatter_dims_to_operand_dims
    return reads_place(dims, axis, indices, layout) and _wide(op, axis) == 1


def _wide(op: Op, axis: int) -> int:
    """How many entries of an axis of the operand one update writes."""
    numbers, kept = op.params["dimension_numbers"], written_axes(op)
    return op.shapes(2)[0][numbers.update_window_dims[kept.index(axis)]] if axis in kept else 1


def _of_updates(op: Op, axis: int, indices: Value) -> int | None:
    """The axis of the operand that an axis of the updates is written to."""
    windows = list(op.params["dimension_numbers"].update_window_dims)
    if axis in windows:
        return written_axes(op)[windows.index(axis)]
    outer = axes_except(range(len(op.shapes(2)[0])), windows)
    return _of_indices(op, outer.index(axis), indices)


def _first_place(indices: Value) -> int:
    """The first column of the indices that holds places."""
    return next(i for i, place in enumerate(indices.columns) if place)


def _of_indices(op: Op, axis: int, indices: Value) -> int | None:
    """The axis of the operand that is paired with an axis of the indices."""
    numbers = op.params["dimension_numbers"]
    beside = list(numbers.scatter_indices_batching_dims)
    if axis in beside:
        return numbers.operand_batching_dims[beside.index(axis)]
    if indices.layout is not None and indices.layout.axes == (axis,) and any(indices.columns):
        return numbers.scatter_dims_to_operand_dims[_first_place(indices)]
    return None
