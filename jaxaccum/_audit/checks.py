"""What the walk checks of every result, whatever rule gave it.

A rule says what its primitive does to well-behaved operands. What can go wrong with any primitive
is looked for here, so that a careless rule errs on the safe side:

- a value that is wrong makes what is computed from it wrong;
- what was uniform along an axis of the batch's length must stay so (``x[0]`` of a table is not);
- a part of an array must be the same part at every batch size (``table[n - 1]`` is not);
- a factor such as 1 / batch_size must not get lost;
- parts of the batch that a reshape cuts by place must be treated alike;
- a sum over the examples must not overflow where a microbatch's does not;
- rows must be as many as there are examples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp

from jaxaccum._audit import fixes
from jaxaccum._audit.cut_by_place import told_apart, treats_parts_alike
from jaxaccum._audit.equation import Op, Shape, beyond, both_shapes, lengths, varying
from jaxaccum._audit.gathered_order import GatheredOrder, out_of_order
from jaxaccum._audit.lattice import (
    CONSEQUENCES,
    Fault,
    FaultKind,
    Kind,
    Layout,
    Sizes,
    Value,
    any_params,
    faults_of,
    is_wrong,
)
from jaxaccum._audit.notes import Notes
from jaxaccum._audit.registry import Rule
from jaxaccum._audit.windows import changes_with_the_batch

_NONE: frozenset[Fault] = frozenset()
_PLACE = "the result depends on the position of an example in its microbatch"
_PART = "which part of an array is read or written changes with the batch size"
_REPEATED = "the row of one example is repeated to the length of another array"


@dataclasses.dataclass(frozen=True)
class Result:
    """One result of an equation, as its rule gave it."""

    op: Op
    ins: Sequence[Value]
    i: int
    """Which result of the equation it is."""
    out: Value
    rule: Rule
    settled: bool
    """Whether its faults are complete: the rule has considered those of the operands."""

    @functools.cached_property
    def shapes(self) -> tuple[Shape, Shape]:
        """Its shape at both sizes."""
        return both_shapes(self.op.eqn.outvars[self.i], self.op.other.outvars[self.i])


def checked(notes: Notes, result: Result) -> Value:
    """The result with its faults, its number, and all else that it has from its operands."""
    out, ins = result.out, result.ins
    faults = out.faults if result.settled else _faults(notes, result)
    if not is_wrong(faults) and changes_with_the_batch(result.op, ins):
        faults |= {notes.fault(result.op, FaultKind.BATCH_SIZE, _PART)}
    if out.rows and not is_wrong(faults) and not _fits(result.shapes, out.layout, notes.sizes):
        faults |= {notes.fault(result.op, FaultKind.UNKNOWN, _REPEATED)}
    if not is_wrong(faults) and not treats_parts_alike(result.op, ins, result.rule):
        faults |= {told_apart(notes, result.op)}
    if not is_wrong(faults):
        faults |= overflow(notes, result.op, result.i, ins, out)
    order = GatheredOrder.of(notes, result.op, ins)
    if order is not None and not is_wrong(faults) and order.matters(result.rule):
        faults |= {out_of_order(notes, result.op)}
    by_order = out.by_order if order is None else order.is_kept(result.i)
    own_place = out.own_place if order is None else order.is_own_place()
    number = out.number if out.number >= 0 else _number(notes, result)
    return out.like(
        faults=faults, number=number, params=out.params or any_params(ins), by_order=by_order,
        own_place=own_place, closure=out.closure or closure_of(ins),
        scalar=out.scalar or _has_one_entry(result),
    )  # fmt: skip


def overflow(notes: Notes, op: Op, i: int, ins: Sequence[Value], out: Value) -> frozenset[Fault]:
    """The fault of a sum that its dtype may not hold: of less than 32 bits (of booleans it is
    whether any is true), or the difference of two without a sign.

    It is reported where the sum is first taken.
    """
    dtype = getattr(op.eqn.outvars[i].aval, "dtype", None)
    if not _counts(out) or dtype is None or jnp.issubdtype(dtype, jnp.inexact):
        return _NONE
    narrow = dtype == jnp.bool_ or jnp.iinfo(dtype).bits < 32
    first = not any(map(_counts, ins))
    wraps = op.name in ("sub", "neg") and jnp.issubdtype(dtype, jnp.unsignedinteger)
    if not (narrow and first) and not wraps:
        return _NONE
    note = f"a sum over the examples is computed in {dtype}, which may not hold it"
    return frozenset([notes.fault(op, FaultKind.UNKNOWN, note, fix=fixes.WIDE)])


def _counts(x: Value) -> bool:
    """Whether it grows with the examples: a total, or a number of them."""
    return x.kind is Kind.TOTAL or (x.fixed and bool(x.scale.power))


def _has_one_entry(result: Result) -> bool:
    return math.prod(result.shapes[0]) == 1 and not varying(result.shapes)


def closure_of(ins: Sequence[Value]) -> str:
    """The name of the key of a closure that one of the operands is made of."""
    return next((v.closure for v in ins if v.closure), "")


def _faults(notes: Notes, result: Result) -> frozenset[Fault]:
    """The operands' faults, and those that are new here. What only follows from a wrong operand is
    not reported again."""
    before = faults_of(result.ins)
    faults = before | result.out.faults | _of_position(notes, result)
    if not result.rule.scales and faults == before:
        faults |= _of_lost_scale(notes, result)
    if is_wrong(before):
        faults = before | {f for f in faults if f.kind not in CONSEQUENCES}
    return faults


def _of_position(notes: Notes, result: Result) -> frozenset[Fault]:
    """What is independent of the batch stays uniform along its axes, or depends on an example's
    place."""
    if not _spends_an_index(result) and not _is_uneven(result):
        return _NONE
    return frozenset([notes.fault(result.op, FaultKind.POSITION, _PLACE)])


def _spends_an_index(result: Result) -> bool:
    """Whether the place of an example goes in, and the result is a number like any other."""
    return not result.out.placed and any(v.placed for v in result.ins)


def _is_uneven(result: Result) -> bool:
    """Whether the rule does not promise that what is uniform stays so, and it matters."""
    if result.out.kind is Kind.STATISTIC or result.rule.uniform:
        return False
    return _crosses(result)


def _crosses(result: Result) -> bool:
    """Whether an axis has the batch's size and holds no examples: along it a value is known to be
    uniform.

    An operand that is independent of the batch may have as many such axes as the result has axes
    of rows: it is combined with the rows.
    """
    op, out = result.op, result.out
    if beyond(result.shapes, out):
        return True
    row_axes = len(out.layout.axes) if out.rows and out.layout is not None else 0
    for v, w, x in zip(op.eqn.invars, op.other.invars, result.ins, strict=True):
        allowed = row_axes if x.fixed else 0
        if len(beyond(both_shapes(v, w), x)) > allowed:
            return True
    return False


def _of_lost_scale(notes: Notes, result: Result) -> frozenset[Fault]:
    """A scaled operand gives a scaled result, or a rule has dropped a factor."""
    if result.out.kind is Kind.STATISTIC or not result.out.plain:
        return _NONE
    if not any(map(_has_a_scale, result.ins)):
        return _NONE
    note = "a value scaled by the batch size enters"
    return frozenset([notes.fault(result.op, FaultKind.BATCH_SIZE, note)])


def _has_a_scale(x: Value) -> bool:
    if x.zero or x.kind is Kind.STATISTIC:
        return False
    return not x.plain and not all(term.scale.trivial for term in x.terms)


def _fits(shapes: tuple[Shape, Shape], layout: Layout | None, sizes: Sizes) -> bool:
    """Whether rows are as many as examples: JAX repeats the one row of a microbatch of one
    example."""
    if layout is None or layout.looped or not layout.axes:
        return True
    copies = layout.outer * layout.inner
    return lengths(shapes, layout.axes) == (copies * sizes.first, copies * sizes.second)


def _number(notes: Notes, result: Result) -> int:
    """The same number for the same function of the same values."""
    op, numbers = result.op, tuple(v.number for v in result.ins)
    if not numbers or -1 in numbers:
        return notes.fresh()
    try:
        first, second = frozenset(op.eqn.params.items()), frozenset(op.other.params.items())
        return notes.number_of((op.name, result.i, first, second, numbers))
    except TypeError:  # a parameter without a hash
        return notes.fresh()
