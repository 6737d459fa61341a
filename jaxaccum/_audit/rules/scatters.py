"""Scatters: rows that are written at their own positions stay rows, and a histogram is a total."""

from __future__ import annotations

import dataclasses

from jaxaccum._audit.lattice import ONE_EXAMPLE, Index, Layout, Value, rows, total
from jaxaccum._audit.registry import RULES, Settled, rule
from jaxaccum._audit.rules.arithmetic import added
from jaxaccum._audit.rules.elementwise import combine, layout_of, origin_of, same_layout
from jaxaccum._audit.rules.indexing import only_place, terms_of
from jaxaccum._audit.walk import Op, Walk, beyond, varying


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
    if any(v.summary for v in ins):
        linear = indices.fixed and not any(v.rows for v in ins) and (adds or op.name == "scatter")
        return (
            dataclasses.replace(added(walk, op, [x, updates]), weight=None)
            if linear
            else RULES["*"].apply(walk, op, ins)
        )
    if all(v.fixed for v in ins):
        value = dataclasses.replace(added(walk, op, [x, updates]), known=None, scalar=False)
        evenly = (
            all(_inside(op, a) for a in varying(op.shapes()))
            and indices.index is None
            and not any(indices.columns)
        )
        faults = frozenset().union(*(v.faults for v in ins))
        return (
            Settled([dataclasses.replace(value, faults=faults)])
            if evenly and not varying(op.shapes(1))
            else value
        )
    if updates.layout == ONE_EXAMPLE and indices.index is Index.STEP and op.name == "scatter":
        return _written_at_a_step(walk, op, ins)
    if (layout := _scattered(op, ins)) is not None:
        if not adds and op.name != "scatter":
            value = combine(
                walk, op, [dataclasses.replace(v, layout=layout) if v.rows else v for v in ins]
            )
            return value
        faults = frozenset().union(*(v.faults for v in ins))
        return Settled(
            [rows(layout, terms=terms_of([x, updates]), faults=faults, origin=origin_of(ins))]
        )
    if (
        adds
        and x.fixed
        and not varying(op.shapes())
        and same_layout(ins)
        and indices.index is None
        and not any(indices.columns)
    ):
        return _histogram(walk, op, ins)
    return RULES["*"].apply(walk, op, ins)


def _written_at_a_step(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """In a loop over the examples, each writes its own row."""
    x, indices, updates = ins
    numbers = op.params["dimension_numbers"]
    axes = tuple(numbers.scatter_dims_to_operand_dims)
    layout = Layout(axes)
    if (
        beyond(op.shapes(), rows(layout))
        or len(axes) != 1
        or axes != tuple(numbers.inserted_window_dims)
        or x.layout not in (None, layout)
    ):
        return RULES["*"].apply(walk, op, ins)
    faults = x.faults | updates.faults | indices.faults
    return Settled(
        [rows(layout, terms=terms_of([x, updates]), faults=faults, origin=updates.origin)]
    )


def _histogram(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Each example adds to entries of a table: a total, which the table itself enters once."""
    x, _, updates = ins
    layout = layout_of(ins)
    repeats = max(len(varying(op.shapes(i))) for i in (1, 2)) > 1
    if (
        layout is None
        or layout.looped
        or len(layout.axes) != 1
        or repeats
        or _window_holds(op, ins)
    ):
        return RULES["*"].apply(walk, op, ins)
    own = (
        frozenset()
        if x.zero
        else frozenset(dataclasses.replace(term, fixed=True) for term in x.terms)
    )
    return Settled(
        [
            total(
                walk.site(op),
                updates.terms | own,
                faults=frozenset().union(*(v.faults for v in ins)),
            )
        ]
    )


def _window_holds(op: Op, ins: list[Value]) -> bool:
    """Whether the axis of the examples lies inside the windows that are written."""
    updates = ins[2]
    return (
        updates.rows
        and updates.layout is not None
        and bool(set(updates.layout.axes) & set(op.params["dimension_numbers"].update_window_dims))
    )


def _scattered(op: Op, ins: list[Value]) -> Layout | None:
    """Where rows lie in the result, if each example writes to its own part of the operand."""
    x, indices, updates = ins
    found = {v.layout for v in (x,) if v.rows}
    for v, axis_of in ((updates, _of_updates), (indices, _of_indices)):
        if v.rows:
            if v.layout is None or (v.layout.axes and len(v.layout.axes) != 1):
                return None
            axis = axis_of(op, v.layout.axes[0], indices) if v.layout.axes else None
            if axis is None and v.layout.axes:
                return None
            found.add(v.layout if axis is None else v.layout.at(axis))
    layout = found.pop() if len(found) == 1 else None
    if (
        layout is None
        or beyond(op.shapes(), rows(layout))
        or len(varying(op.shapes(2))) > len(layout.axes)
    ):
        return None
    return layout if _owned(op, layout, indices) else None


def _owned(op: Op, layout: Layout, indices: Value) -> bool:
    """Whether writing never reaches from one example's part into another's."""
    beside = op.params["dimension_numbers"].operand_batching_dims
    return all(a in beside or _inside(op, a) or _by_place(op, a, indices) for a in layout.axes)


def _inside(op: Op, axis: int) -> bool:
    """Whether an axis of the operand lies inside the windows that are written, and no index reaches
    along it."""
    numbers = op.params["dimension_numbers"]
    gone = {
        *numbers.inserted_window_dims,
        *numbers.operand_batching_dims,
        *numbers.scatter_dims_to_operand_dims,
    }
    return axis not in gone


def _by_place(op: Op, axis: int, indices: Value) -> bool:
    numbers = op.params["dimension_numbers"]
    dims = list(numbers.scatter_dims_to_operand_dims)
    return (
        axis in dims
        and _wide(op, axis) == 1
        and dims.index(axis) < len(indices.columns)
        and only_place(indices, dims.index(axis))
        and bool(indices.layout and indices.layout.plain)
    )


def _wide(op: Op, axis: int) -> int:
    """How many entries of an axis of the operand one update writes."""
    numbers = op.params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [i for i in range(len(op.shapes()[0])) if i not in gone]
    return op.shapes(2)[0][numbers.update_window_dims[kept.index(axis)]] if axis in kept else 1


def _of_updates(op: Op, axis: int, indices: Value) -> int | None:
    """The axis of the operand that an axis of the updates is written to."""
    numbers = op.params["dimension_numbers"]
    if axis in numbers.update_window_dims:
        gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
        kept = [i for i in range(len(op.shapes()[0])) if i not in gone]
        return kept[list(numbers.update_window_dims).index(axis)]
    outer = [i for i in range(len(op.shapes(2)[0])) if i not in numbers.update_window_dims]
    return _of_indices(op, outer.index(axis), indices)


def _of_indices(op: Op, axis: int, indices: Value) -> int | None:
    """The axis of the operand that an axis of the indices runs beside."""
    numbers = op.params["dimension_numbers"]
    beside = list(numbers.scatter_indices_batching_dims)
    if axis in beside:
        return numbers.operand_batching_dims[beside.index(axis)]
    if indices.layout is not None and indices.layout.axes == (axis,) and any(indices.columns):
        return numbers.scatter_dims_to_operand_dims[indices.columns.index(True)]
    return None
