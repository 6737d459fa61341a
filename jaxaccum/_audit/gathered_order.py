"""Rows gathered in the order of the microbatches, where that is not the batch's: what may be done
with them.

The problem. ``all_gather(z, "microbatch", tiled=True)`` has the rows of microbatch 0 first. Of a
contiguous split this is the batch. Of a strided one it is the batch in another order: of 8 examples
in two microbatches 0, 2, 4, 6, 1, 3, 5, 7. So is a batch that lies in blocks on several devices.

The idea. A contrastive loss does not ask for the order: it sums over the gathered rows, and picks
among them its own by ``axis_index("microbatch") * len(z) + arange(len(z))``, which is their place
in this order, and no other: half a batch further on lies another example in each order. So such a
value is marked (`Value.by_order`), and until its axis is summed over, or it has picked a gathered
row, only this may happen to it: functions of single entries, products, changes of shape that keep
the axis, and a choice by such places (`Value.own_place`).

The weakness. Whatever else does not ask for the order is not followed: a sort, a one-hot vector of
the places, a loop over the gathered rows, a row and a column that are picked at once. Rows are told
by their number: nothing is followed where another axis is as long as the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from jaxaccum._audit import fixes
from jaxaccum._audit.equation import Op, Shape, both_shapes
from jaxaccum._audit.lattice import Fault, FaultKind, Value
from jaxaccum._audit.notes import Notes
from jaxaccum._audit.registry import IDENTITIES, Rule

_BY_ORDER = (
    "a number for each place meets rows that are gathered in the order of the microbatches, which "
    "here is not that of the batch"
)
_AS_LONG = (
    "rows are gathered in the order of the microbatches, which here is not that of the batch, and "
    "another axis is as long as the batch: the analysis cannot tell them apart"
)
_RESHAPES = ("broadcast_in_dim", "reshape", "expand_dims", "squeeze", "transpose")
_KEEP_PLACES = (*_RESHAPES, *IDENTITIES, "concatenate", "convert_element_type")
_SLICES = ("slice", "dynamic_slice")
_OVER_ROWS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "dot_general")
_TABLES_OF_PLACES = ("concatenate",)
_OF_STEPS = ("scan", "while", "cond")


def out_of_order(notes: Notes, op: Op) -> Fault:
    """The fault of an equation that asks for the order of gathered rows."""
    return notes.fault(op, FaultKind.POSITION, _BY_ORDER, fix=fixes.IN_ORDER)


def all_rows(notes: Notes, op: Op, x: Value) -> Value:
    """The rows of all microbatches, one microbatch after the other, as an equation gathers them."""
    if notes.in_order:
        return x
    if len(_axes_as_long(_length_of_batch(notes), op.out_shapes())) > 1:
        fault = notes.fault(op, FaultKind.UNKNOWN, _AS_LONG)
        return x.like(faults=x.faults | {fault})
    return x.like(by_order=True)


def _length_of_batch(notes: Notes) -> int:
    """How many examples the batch has, on all devices."""
    return notes.sizes.first * notes.axis_sizes[0] * notes.group


def _axes_as_long(batch: int, shapes: tuple[Shape, Shape]) -> list[int]:
    """The axes that have the batch's length at both sizes."""
    pairs = enumerate(zip(*shapes, strict=True))
    return [axis for axis, lengths in pairs if lengths == (batch, batch)]


@dataclasses.dataclass(frozen=True)
class GatheredOrder:
    """One equation, some of whose operands are in the order of the microbatches, or are places in
    it."""

    op: Op
    ins: Sequence[Value]
    batch: int
    """How many examples the batch has."""

    @classmethod
    def of(cls, notes: Notes, op: Op, ins: Sequence[Value]) -> GatheredOrder | None:
        """None where no operand is."""
        return cls(op, ins, _length_of_batch(notes)) if any(x.by_order for x in ins) else None

    def is_kept(self, i: int) -> bool:
        """Whether result `i` is marked too."""
        picked = self.op.name == "gather" and self.ins[0].by_order
        return bool(self.axes(self.op.out_shapes(i))) or not (picked or self.all_have_axes())

    def is_own_place(self) -> bool:
        """Whether the results are still the examples' own places."""
        if self.op.name == "select_n" and self.ins[0].known is not None:
            return self.ins[1 + int(self.ins[0].known)].own_place
        kept = self.op.name in _KEEP_PLACES and self.holds_places()
        return kept and all(x.own_place for x in self.ins)

    def holds_places(self) -> bool:
        """Whether a number of the results can be any place in the batch."""
        dtype = self.op.eqn.outvars[0].aval.dtype
        return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).max >= self.batch - 1

    def matters(self, rule: Rule) -> bool:
        """Whether the results are others for rows in another order, as far as is known."""
        if self.op.name == "gather":
            return not self.picks()
        if self.all_have_axes():
            return not (self.keeps_rows(rule) and self.meets_no_table())
        alike = all(x.by_order or x.scalar or x.known is not None for x in self.ins)
        keeps = self.op.name in (*_RESHAPES, *_TABLES_OF_PLACES) or (rule.pointwise and alike)
        return not keeps or bool(self.axes(self.op.out_shapes()))

    def is_of_steps(self) -> bool:
        """Whether it is a loop or a choice of branches; other bodies are looked at."""
        return self.op.name in _OF_STEPS

    def axes(self, shapes: tuple[Shape, Shape]) -> list[int]:
        """The axes that hold the whole batch in every microbatch."""
        return _axes_as_long(self.batch, shapes)

    def axes_of(self, i: int) -> list[int]:
        """Those of operand `i`."""
        return self.axes(both_shapes(self.op.eqn.invars[i], self.op.other.invars[i]))

    def strides(self, shapes: tuple[Shape, Shape]) -> list[list[int]]:
        """How many entries lie before each axis of rows, at each size: a reshape that keeps these
        keeps the rows whole."""
        axes = self.axes(shapes)
        return [[math.prod(shape[:axis]) for axis in axes] for shape in shapes]

    def all_have_axes(self) -> bool:
        """Whether all marked operands are rows, and none is a place."""
        return all(self.axes_of(i) for i, x in enumerate(self.ins) if x.by_order)

    def meets_no_table(self) -> bool:
        """Whether no operand has a number of its own for each place in the batch."""
        others = (i for i, x in enumerate(self.ins) if not (x.by_order or x.scalar))
        return not any(map(self.axes_of, others))

    def keeps_rows(self, rule: Rule) -> bool:
        """Whether an equation takes each axis of rows whole, in whichever order."""
        if self.op.name == "reshape":
            return self.strides(self.op.shapes()) == self.strides(self.op.out_shapes())
        if self.op.name in (*_SLICES, *_RESHAPES):
            return len(self.axes(self.op.out_shapes())) == len(self.axes_of(0))
        return rule.pointwise or self.op.name in _OVER_ROWS

    def picks(self) -> bool:
        """Whether a gather picks rows by places in their order, or takes all of them."""
        rows, indices = self.ins[:2]
        numbers, sizes = self.op.params["dimension_numbers"], self.op.params["slice_sizes"]
        picked = [axis for axis in self.axes_of(0) if sizes[axis] != self.batch]
        kept = len(self.axes_of(0)) - len(picked)
        if not rows.by_order or len(self.axes(self.op.out_shapes())) != kept:
            return False
        if not picked:
            return not indices.by_order
        return indices.own_place and set(numbers.start_index_map) == set(picked)
