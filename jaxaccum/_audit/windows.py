"""Which part of an array an equation reads or writes, and whether it is the same part at both
batch sizes.

``table[:n]`` and ``table[n - 1]``, where n is the length of the batch, are other entries of a table
for a microbatch than for the whole batch. This is so whatever the table holds, so it is asked of
every primitive that reads, writes or joins parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxaccum._audit.equation import Op, Shape, lengths
from jaxaccum._audit.lattice import Value

Lengths = tuple[int, int]
"""How long something is, at each size."""

_FIRST_INDEX = {"gather": 1, "scatter": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}
"""Which operand is the first index; those after it are indices too, or updates."""


def changes_with_the_batch(op: Op, ins: Sequence[Value]) -> bool:
    """Whether it is another part of an array at another batch size."""
    return _window_grows(op) or _index_is_scaled(op, ins)


def _index_is_scaled(op: Op, ins: Sequence[Value]) -> bool:
    """Whether an index is another number at another batch size, and not an example's place."""
    name = _family(op)
    if name not in _FIRST_INDEX:
        return False
    first = _FIRST_INDEX[name]
    indices = ins[first : first + 1] if name in ("gather", "scatter") else ins[first:]
    return any(not (x.placed or x.scale.trivial) for x in indices)


def _window_grows(op: Op) -> bool:
    """Whether a window grows with the batch, along an axis of the array that does not."""
    return any(_grow(window) and not _grow(whole) for window, whole in _windows(op))


def _grow(length: Lengths) -> bool:
    return length[0] != length[1]


def _family(op: Op) -> str:
    """The primitive's name, one for all scatters."""
    return "scatter" if op.name.startswith("scatter") else op.name


def _windows(op: Op) -> Iterator[tuple[Lengths, Lengths]]:
    """How long the window is along each axis, and how long the array is."""
    name = _family(op)
    if name in ("gather", "dynamic_slice"):
        sizes = op.params["slice_sizes"], op.other.params["slice_sizes"]
        yield from _side_by_side(sizes, op.shapes())
    elif name in ("slice", "split"):
        for i in range(op.num_outs):
            yield from _side_by_side(op.out_shapes(i), op.shapes())
    elif name == "dynamic_update_slice":
        yield from _side_by_side(op.shapes(1), op.shapes())
    elif name == "scatter":
        yield from _written(op)
    elif name == "concatenate":
        axis = op.params["dimension"]
        for i in range(len(op.eqn.invars)):
            yield lengths(op.shapes(i), [axis]), lengths(op.out_shapes(), [axis])


def _side_by_side(
    windows: tuple[Shape, Shape], arrays: tuple[Shape, Shape]
) -> Iterator[tuple[Lengths, Lengths]]:
    for axis in range(len(arrays[0])):
        yield lengths(windows, [axis]), lengths(arrays, [axis])


def _written(op: Op) -> Iterator[tuple[Lengths, Lengths]]:
    """The windows of a scatter: axes of the updates, and those of the array that they lie along."""
    numbers = op.params["dimension_numbers"]
    for window, axis in zip(numbers.update_window_dims, written_axes(op), strict=True):
        yield lengths(op.shapes(2), [window]), lengths(op.shapes(), [axis])


def written_axes(op: Op) -> list[int]:
    """The axes of a scatter's operand along which its windows extend, in the order of the
    windows'."""
    numbers = op.params["dimension_numbers"]
    gone = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    return [axis for axis in range(len(op.shapes()[0])) if axis not in gone]
