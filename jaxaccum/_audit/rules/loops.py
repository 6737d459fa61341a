"""Loops: over time as their body; over the examples, a sum is a total and a state couples."""

from __future__ import annotations

import dataclasses
import functools

import jax.extend.core as jex

from jaxaccum._audit.cut_by_place import are_alike, are_parts, told_apart
from jaxaccum._audit.lattice import (
    IRREGULAR,
    ONE_EXAMPLE,
    Addend,
    FaultKind,
    Index,
    Kind,
    Layout,
    Scale,
    Value,
    any_params,
    faults_of,
    fixed,
    rows,
    statistic,
    total,
)  # fmt: skip
from jaxaccum._audit.registry import rule
from jaxaccum._audit.rules.carried_values import Role, RoleName, Scan, roles_of
from jaxaccum._audit.rules.control import join
from jaxaccum._audit.rules.operands import (
    Addends,
    Faults,
    all_numbered,
    all_scalar,
    all_with_faults,
    any_along,
    any_place,
    common_scale,
    example_axes,
    faulty,
    numbered,
    of_an_earlier_step,
    once,
    params_at_both,
    with_faults,
    with_new_axis,
    without,
)
from jaxaccum._audit.walk import Op, Walk, varying

_ROUNDS = 12
"""More than any value can climb: kinds, terms and flags only grow."""


# -- scan ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Loop:
    """One scan under analysis."""

    walk: Walk
    op: Op
    ins: list[Value]

    def __post_init__(self) -> None:
        self.scan, self.other = Scan(self.op.eqn), Scan(self.op.other)
        consts, carried = self.scan.counts
        self.places = range(consts, consts + carried)
        """Where the carried values are among the operands."""
        self.since = self.walk.fresh()
        """Larger numbers are those of values that are computed in a step."""
        self.consts = self.ins[:consts]
        self.initial = self.ins[consts : consts + carried]
        self.given = self.ins[consts + carried :]
        lengths = (self.scan.length, self.other.length)
        self.repeats = self.walk.sizes.power(*lengths)
        self.over_examples = lengths == (self.walk.sizes.first, self.walk.sizes.second)
        self.examples = self.over_examples or any_along(self.given, 0)
        """Whether its steps are the examples, or chunks of them."""
        self.takes_parts = any(are_parts(x) and example_axes(x)[0] == 0 for x in self.given)
        """Whether its steps are parts of the batch, which were cut by place."""
        mine, others = roles_of(self.scan), roles_of(self.other)
        self.roles = self.roles_at_both(mine, others)
        self.bodies = self.body(self.scan, mine), self.body(self.other, others)

    def roles_at_both(self, mine: list[Role], others: list[Role]) -> list[RoleName]:
        """What the body does with each carried value, at both sizes; a count begins at 0."""
        roles: list[RoleName] = []
        for role, other, initial in zip(mine, others, self.initial, strict=True):
            other_start = role.name == "count" and not initial.zero
            roles.append("state" if other_start or role.name != other.name else role.name)
        return roles

    def body(self, scan: Scan, roles: list[Role]) -> jex.Jaxpr:
        """The body, which for a sum returns what it adds."""
        outvars = list(scan.body.outvars)
        for i, role in enumerate(roles):
            if self.roles[i] == "sum" and role.added is not None:
                outvars[i] = role.added
        debug = scan.body.debug_info._replace(result_paths=None)
        return scan.body.replace(outvars=outvars, debug_info=debug)

    def run(self) -> list[Value]:
        """The results: the last carried values, and the results of all steps."""
        xs = [x for x in map(self.element, self.given) if x is not None]
        if len(xs) < len(self.given):
            return self.given_up("a loop over part of the examples")
        if self.examples and any(map(_of_a_step, self.ins)):
            return self.given_up("a loop over the examples for each example")
        state, outs = self.settled(xs)
        carried = all_numbered(self.walk, map(self.final, self.roles, self.initial, state, outs))
        changes = any(map(self.changes, self.roles, state, outs))
        stacked = [self.stacked(y, changes=changes) for y in outs[len(state) :]]
        results = [*carried, *all_numbered(self.walk, stacked)]
        if self.takes_parts and not self.treats_parts_alike(state, outs):
            return all_with_faults(results, frozenset([told_apart(self.walk, self.op)]))
        return results

    def settled(self, xs: list[Value]) -> tuple[list[Value], list[Value]]:
        """The carried values as they are at every step, and the results of that step."""
        state = list(map(self.start, self.roles, self.initial))
        outs = self.step(state, xs)
        by_rows = list(map(self.as_rows, self.places, self.roles, state, outs))
        if by_rows != state:
            state, outs = by_rows, self.step(by_rows, xs)
        for _ in range(_ROUNDS):
            new = list(map(self.next, self.roles, state, outs))
            if _same_signatures(new, state):
                return state, outs
            state, outs = new, self.step(new, xs)
        note = "a loop whose state does not settle"
        return all_with_faults(state, faulty(self.walk, self.op, FaultKind.UNKNOWN, note)), outs

    def step(self, state: list[Value], xs: list[Value]) -> list[Value]:
        """The results of the body; of a sum, what is added."""
        closed_over = list(map(self.walk.constant, self.scan.closed_over, self.other.closed_over))
        parts = self.walk.over_parts(taken=self.takes_parts)
        with self.walk.inside(self.op, self.bodies[0]), parts:
            return self.walk.run(*self.bodies, closed_over, [*self.consts, *state, *xs])

    def treats_parts_alike(self, state: list[Value], outs: list[Value]) -> bool:
        """Whether its steps differ in nothing but the rows of their parts, and only add up what
        they make of them, or return rows."""
        if any(0 not in example_axes(x) for x in self.given):
            return False
        if not all(map(self.carries_alike, self.roles, state, outs)):
            return False
        return not any(y.summary for y in outs[len(state) :])

    def carries_alike(self, role: RoleName, x: Value, out: Value) -> bool:
        """Whether a carried value stays as it is, or adds up what all examples of a part make.

        A constant number of totals is a total. If the number of parts grows with the batch, theirs
        would be counted as totals of the whole batch.
        """
        if role != "sum":
            return out.number == x.number
        return out.fixed or (out.kind is Kind.TOTAL and self.repeats == 0)

    def given_up(self, note: str) -> list[Value]:
        """The results of a loop that the analysis cannot follow."""
        unknown = self.walk.unknown(self.op, note)
        return all_numbered(self.walk, [unknown] * self.op.num_outs)

    # -- as the body sees them ---------------------------------------------------------------------

    def start(self, role: RoleName, x: Value) -> Value:
        """A carried value as the body first sees it."""
        return self.counter() if role == "count" else numbered(self.walk, _unknown_number(x))

    def counter(self) -> Value:
        """The number of the step: of a loop forwards over the examples, that of the example."""
        forwards = self.over_examples and not self.scan.eqn.params["reverse"]
        faults: Faults = frozenset()
        if self.repeats != 0 and not forwards:
            note = "a counter of a loop whose length is the batch's"
            faults = faulty(self.walk, self.op, FaultKind.POSITION, note)
        index = Index.STEP if forwards else None
        return fixed(index=index, faults=faults, number=self.walk.fresh(), scalar=True)

    def element(self, x: Value) -> Value | None:
        """A scanned value as the body sees it; None where the analysis cannot say."""
        if x.layout is None:
            return numbered(self.walk, x.like(at=None))
        if any(x.columns):
            return None
        if x.layout.plain and x.layout.axes == (0,) and x.index is Index.ROW:
            return fixed(index=Index.STEP, faults=x.faults, number=self.walk.fresh(), scalar=True)
        layout = _of_an_element(x.layout)
        if layout is None or (0 in x.layout.axes and not x.rows):
            return None
        return numbered(self.walk, _shifted(x, layout))

    def as_rows(self, where: int, role: RoleName, x: Value, out: Value) -> Value:
        """A state that is the same for all examples and becomes rows is rows from the start."""
        if role != "state" or not x.fixed or x.placed:
            return x
        if not out.rows or out.layout is None or not out.layout.plain:
            return x
        if list(out.layout.axes) != list(varying(self.op.shapes(where))):
            return x
        alike = rows(out.layout, terms=x.terms, faults=x.faults, params=x.params)
        return numbered(self.walk, alike)

    def next(self, role: RoleName, x: Value, out: Value) -> Value:
        """A carried value after one more step."""
        if role in ("sum", "count"):
            return x
        joined = join(self.walk, self.op, x, out)
        faults, changed = joined.faults, out.number != x.number
        looped = out.rows and self.is_of_a_step(out)
        if looped and changed:
            note = "a loop over the examples carries one example's state to the next"
            faults |= faulty(self.walk, self.op, FaultKind.COUPLING, note)
        grows = self.repeats != 0 and changed
        if grows and role == "state" and not joined.fixed and not looped:
            note = "the number of steps depends on the batch size"
            faults |= faulty(self.walk, self.op, FaultKind.BATCH_SIZE, note)
        if changed:
            faults |= of_an_earlier_step(self.walk, self.op, joined, since=self.since)
        if grows and x.fixed and out.fixed:
            return _irregular(joined).like(faults=faults, number=x.number)
        return _carried(joined, x).like(faults=faults)

    # -- after the loop ----------------------------------------------------------------------------

    def final(self, role: RoleName, initial: Value, x: Value, out: Value) -> Value:
        """A carried value after the loop."""
        if role == "count":
            return fixed(Scale(self.repeats), scalar=True)
        if role == "sum":
            return self.summed(initial, out)
        if role == "write" and self.is_of_a_step(x):
            return statistic(self.walk.site(self.op), faults=x.faults)
        return x

    def is_of_a_step(self, x: Value) -> bool:
        """Whether a value is of one example, or one chunk, of those that this loop is over."""
        return self.examples and x.layout is not None and x.layout.looped

    def changes(self, role: RoleName, x: Value, out: Value) -> bool:
        """Whether a state that all examples share is another one at each step."""
        return role == "state" and x.fixed and out.number != x.number

    def summed(self, start: Value, each: Value) -> Value:
        """``start + Σ each``."""
        faults = faults_of([start, each])
        if any_place([start, each]):
            note = "positions of examples are summed"
            faults |= faulty(self.walk, self.op, FaultKind.POSITION, note)
        value = self.sum_of(start, each)
        params = any_params([start, each])
        known = {"scalar": value.scalar, "by_order": start.by_order or each.by_order}
        return value.but(faults=value.faults | faults, params=params, **known)

    def sum_of(self, start: Value, each: Value) -> Value:
        """``start + Σ each``, without what is wrong with the addends."""
        site, times = self.walk.site(self.op), Scale(self.repeats)
        if start.fixed and each.rows and each.layout == ONE_EXAMPLE and self.over_examples:
            return total(site, each.terms | once(start))
        if start.fixed and each.fixed:
            added = each if each.zero else each.scaled(times)
            return fixed(common_scale([start, added]), scalar=all_scalar([start, each]))
        if self.repeats == 0:
            return each if start.zero else join(self.walk, self.op, start, each)
        if start.fixed and each.kind is Kind.TOTAL:
            return total(site, each.scaled(times).terms | once(start))
        note = "a loop adds up parts of the examples"
        return self.walk.couple(self.op, [start, each], note=note)

    def stacked(self, y: Value, *, changes: bool) -> Value:
        """A result of every step, along a new first axis."""
        faults: Faults = frozenset()
        if y.placed or (self.repeats != 0 and changes and not y.rows):
            note = "the result depends on the position of an example"
            faults = faulty(self.walk, self.op, FaultKind.POSITION, note)
        if y.rows and y.layout is not None:
            return with_faults(self.stacked_rows(y, y.layout), y.faults | faults)
        if y.summary and self.repeats != 0:
            coupled = self.walk.couple(self.op, [y], note="a statistic for each example")
            return with_faults(coupled, y.faults)
        return y.but(faults=y.faults | faults, layout=None)

    def stacked_rows(self, y: Value, layout: Layout) -> Value:
        """Rows of every step: examples, chunks of them, or views of all."""
        if layout == ONE_EXAMPLE and self.over_examples:
            return _shifted(y, Layout((0,)))
        if not self.is_of_a_step(y):
            return _shifted(y, with_new_axis(layout, 0))
        if layout.axes == (0,) and (layout.outer, layout.inner) == (1, 1):
            return _shifted(y, Layout((0, 1), by_place=layout.by_place))
        return statistic(self.walk.site(self.op), faults=y.faults)


def _of_an_element(layout: Layout) -> Layout | None:
    """The layout of one element along the first axis; None where the analysis cannot say."""
    if 0 not in layout.axes:
        return without(layout, {0})
    if layout.plain:
        return ONE_EXAMPLE
    first, *others = layout.axes
    if first == 0 and len(others) == 1:  # chunks of examples
        return Layout((others[0] - 1,), looped=True, by_place=layout.by_place)
    return None


def _of_a_step(x: Value) -> bool:
    """Whether a value belongs to one step of a loop over the examples."""
    return x.index is Index.STEP or (x.layout is not None and x.layout.looped)


def _unknown_number(x: Value) -> Value:
    """A value that holds one number at first, and another one later."""
    return x.like(known=None, at=None)


def _carried(joined: Value, x: Value) -> Value:
    """What a carried value is at every step: what it was known to be once is forgotten, but for
    the places that it holds."""
    return joined.but(
        scalar=joined.scalar, number=x.number, index=joined.index, columns=joined.columns
    )


def _irregular(x: Value) -> Value:
    """A value that is independent of the batch, up to a factor that follows no law."""
    return x.but(terms=fixed(IRREGULAR).terms, scalar=x.scalar)


def _shifted(x: Value, layout: Layout) -> Value:
    """The value on other axes."""
    return x.but(layout=layout, index=x.index)


def _same_signatures(xs: list[Value], ys: list[Value]) -> bool:
    """Whether values are alike in all that a further step of a loop depends on."""
    return list(map(_signature, xs)) == list(map(_signature, ys))


def _signature(x: Value) -> tuple[Kind, Layout | None, Addends, bool, Faults, bool]:
    return x.kind, x.layout, x.terms, x.params, x.faults, x.scalar


@rule("scan", complete=True)
def scan(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A loop with a fixed number of steps."""
    return _Loop(walk, op, ins).run()


# -- while -----------------------------------------------------------------------------------------


@rule("while", complete=True)
def while_loop(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A loop that ends by a condition: of the batch's, unless each example ends by its own."""
    n, k = op.params["cond_nconsts"], op.params["body_nconsts"]
    since = walk.fresh()
    of_test, of_body, initial = ins[:n], ins[n : n + k], ins[n + k :]

    def next_state(state: list[Value]) -> list[Value]:
        outs = walk.body(op, params_at_both(op, "body_jaxpr"), [*of_body, *state])
        (holds,) = walk.body(op, params_at_both(op, "cond_jaxpr"), [*of_test, *state])
        return list(map(functools.partial(_after, walk, op, holds, since), state, outs))

    # What starts at 0 and is added to is a sum; of what starts at any number, one is left over.
    state = list(map(_unknown_number, next_state(all_numbered(walk, initial))))
    for _ in range(_ROUNDS):
        new = next_state(state)
        if _same_signatures(new, state):
            return all_numbered(walk, state)
        state = new
    unknown = walk.unknown(op, "a loop whose state does not settle")
    return all_numbered(walk, [unknown] * len(state))


def _after(walk: Walk, op: Op, holds: Value, since: int, x: Value, out: Value) -> Value:
    """A carried value after one more step, which is taken where the condition holds."""
    joined = _carried(join(walk, op, x, out), x)
    if x.number == out.number:
        return joined
    if faults := of_an_earlier_step(walk, op, joined, since=since):
        return with_faults(joined, joined.faults | faults)
    if not are_alike([holds, joined]):
        return statistic(walk.site(op), faults=joined.faults | {told_apart(walk, op)})
    if holds.rows and joined.fixed and joined.scale.trivial:
        joined = joined.like(kind=Kind.ROWS, layout=holds.layout)
    # In a vmapped loop JAX holds the rows still that are finished.
    own = holds.rows and joined.rows and joined.layout == holds.layout
    if not holds.fixed and not own:
        note = "the number of steps depends on the data of the batch"
        faults = holds.faults | faulty(walk, op, FaultKind.UNKNOWN, note)
        return with_faults(joined, faults)
    if not holds.fixed or holds.scale.trivial:
        return with_faults(joined, holds.faults, params=holds.params)
    if joined.fixed:
        return with_faults(joined, holds.faults).like(terms=frozenset([Addend(IRREGULAR)]))
    note = "the number of steps depends on the batch size"
    return with_faults(joined, faulty(walk, op, FaultKind.BATCH_SIZE, note))
