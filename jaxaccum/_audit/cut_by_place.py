"""Parts of the batch that are cut by place: what may be done with them.

The problem. ``x.reshape(4, -1, d)`` cuts the batch in four, and each microbatch in four as well.
The first parts of all microbatches hold other examples, together, than the first part of the batch.

The idea. A loss is exact all the same where it treats the four alike, as one that adds up chunks of
the batch in a loop, to save memory::

    add = lambda total, chunk: (total + jnp.sum(loss(chunk)), None)
    total, _ = lax.scan(add, 0.0, x.reshape(4, -1, d))

So a layout knows that its first axis holds parts (`Layout.by_place`), and until they are merged
again, or summed over, only this may happen to them: functions of single entries, together with one
number or with parts of the same rows; changes of shape that keep the order; and a loop over the
parts whose steps differ in nothing but the rows. In such a loop no collective over the microbatches
is followed: it would combine the first parts of all microbatches, which are no first part of the
batch.

The weakness. Whatever else treats all parts alike is not followed: a product with a matrix outside
of a loop, or one total for each part, ``jnp.sum(lax.map(total_of, parts))``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxaccum._audit import fixes
from jaxaccum._audit.equation import Op
from jaxaccum._audit.lattice import Fault, FaultKind, Layout, Value
from jaxaccum._audit.notes import Notes
from jaxaccum._audit.registry import Rule

_BY_PLACE = (
    "a reshape divides the batch by place, and the parts of a microbatch hold other examples than "
    "those of the batch: exact only if every part is treated alike"
)
_IN_ORDER = ("reshape", "expand_dims", "squeeze", "broadcast_in_dim")
_TOTALS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or")


def told_apart(notes: Notes, op: Op) -> Fault:
    """The fault of an equation that does not treat all parts alike, as far as is known."""
    return notes.fault(op, FaultKind.POSITION, _BY_PLACE, fix=fixes.ADJACENT)


def are_parts(x: Value) -> bool:
    """Whether a value has the rows of several parts, along the first of its axes of examples."""
    return x.layout is not None and x.layout.by_place and not x.layout.looped


def treats_parts_alike(op: Op, ins: Sequence[Value], rule: Rule) -> bool:
    """Whether an equation does the same with all parts, as far as its primitive tells."""
    layouts = {x.layout for x in ins if are_parts(x)}
    if not layouts:
        return True
    if op.name in _IN_ORDER:
        return True
    if op.name in _TOTALS:
        return _takes_all_or_none(op, ins[0].layout)
    return rule.pointwise and len(layouts) == 1 and are_alike(ins)


def are_alike(values: Iterable[Value]) -> bool:
    """Whether no value tells parts apart, if there are parts among them: an array that is the same
    at every batch size may hold another number for each."""
    values = list(values)
    return not any(map(are_parts, values)) or all(map(_is_alike, values))


def _is_alike(x: Value) -> bool:
    return are_parts(x) or x.scalar or x.known is not None


def _takes_all_or_none(op: Op, layout: Layout | None) -> bool:
    """Whether a reduction is over the rows of all parts, or over other axes."""
    assert layout is not None
    taken = set(layout.axes) & set(op.params["axes"])
    return not taken or taken == set(layout.axes)
