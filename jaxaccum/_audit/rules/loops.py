"""Loops: over time they are as their body is; over the examples, what is summed is a total and what
is kept couples."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxaccum._audit.lattice import (
    IRREGULAR,
    ONE_EXAMPLE,
    Fault,
    FaultKind,
    Index,
    Kind,
    Layout,
    Scale,
    Term,
    Value,
    fixed,
    rows,
    statistic,
    total,
)  # fmt: skip
from jaxaccum._audit.registry import rule
from jaxaccum._audit.rules.carried_values import Scan, roles_of
from jaxaccum._audit.rules.control import join, numbered
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
        self.consts, self.carried = self.scan.counts
        roles, others = roles_of(self.scan), roles_of(self.other)
        self.roles = {
            i: role for i, role in roles.items() if i in others and others[i].name == role.name
        }
        lengths = (self.scan.length, self.other.length)
        self.repeats = self.walk.sizes.power(*lengths)
        self.over_examples = lengths == (self.walk.sizes.first, self.walk.sizes.second)
        given = self.ins[self.consts + self.carried :]
        self.examples = self.over_examples or any(
            x.layout is not None and 0 in x.layout.axes for x in given
        )
        """Whether its steps are the examples, or chunks of them."""
        initial = self.ins[self.consts : self.consts + self.carried]
        for i, role in list(self.roles.items()):
            if role.name == "count" and not initial[i].zero:
                del self.roles[i]
        self.initial = initial

    def carry(self, i: int, x: Value) -> Value:
        """A carried value as the body sees it."""
        role = self.roles.get(i)
        if role is None:
            return x
        if role.name == "count":
            return self.counter()
        return dataclasses.replace(x, known=None, at=None)

    def counter(self) -> Value:
        """The number of the step: of a loop forwards over the examples, that of the example."""
        forwards = self.over_examples and not self.scan.eqn.params["reverse"]
        faults: frozenset[Fault] = frozenset()
        if self.repeats != 0 and not forwards:
            note = "a counter of a loop whose length is the batch's"
            faults = frozenset([self.walk.fault(self.op, FaultKind.POSITION, note)])
        index = Index.STEP if forwards else None
        return fixed(index=index, faults=faults, number=self.walk.fresh(), scalar=True)

    def element(self, x: Value) -> Value | None:
        """A scanned value as the body sees it; None where the analysis cannot say."""
        if x.layout is None:
            return numbered(self.walk, dataclasses.replace(x, at=None))
        if 0 not in x.layout.axes:
            return numbered(self.walk, _shifted(x, x.layout.at(*(a - 1 for a in x.layout.axes))))
        if x.layout.plain and x.index is Index.ROW:
            return fixed(index=Index.STEP, faults=x.faults, number=self.walk.fresh(), scalar=True)
        if x.rows and x.layout.plain:
            return numbered(self.walk, _shifted(x, ONE_EXAMPLE))
        if x.rows and len(x.layout.axes) == 2 and x.layout.axes[0] == 0:  # chunks of examples
            return numbered(self.walk, _shifted(x, Layout((x.layout.axes[1] - 1,), looped=True)))
        return None

    def run(self) -> list[Value]:
        xs = [self.element(x) for x in self.ins[self.consts + self.carried :]]
        if any(x is None for x in xs):
            return self.given_up("a loop over part of the examples")
        if self.examples and any(map(_of_a_step, self.ins)):
            return self.given_up("a loop over the examples for each example")
        state = [
            numbered(
                self.walk,
                self.carry(
                    i, x if i in self.roles else dataclasses.replace(x, known=None, at=None)
                ),
            )
            for i, x in enumerate(self.initial)
        ]
        for i, role in self.roles.items():
            if role.name == "count":
                state[i] = self.carry(i, self.initial[i])
        scanned = [x for x in xs if x is not None]
        outs = self.step(state, scanned)
        by_rows = [self.as_rows(i, x, outs[i]) for i, x in enumerate(state)]
        if any(x is not y for x, y in zip(by_rows, state, strict=True)):
            state, outs = by_rows, self.step(by_rows, scanned)
        for _ in range(_ROUNDS):
            new = [
                x if i in self.roles and self.roles[i].name != "write" else self.next(x, outs[i], i)
                for i, x in enumerate(state)
            ]
            if [_signature(x) for x in new] == [_signature(x) for x in state]:
                break
            state, outs = new, self.step(new, scanned)
        else:
            fault = self.walk.fault(
                self.op, FaultKind.UNKNOWN, "a loop whose state does not settle"
            )
            state = [dataclasses.replace(x, faults=x.faults | {fault}) for x in state]
        carry = [numbered(self.walk, self.final(i, x, outs[i])) for i, x in enumerate(state)]
        changes = any(
            i not in self.roles and x.fixed and outs[i].number != x.number
            for i, x in enumerate(state)
        )
        return [
            *carry,
            *(numbered(self.walk, self.stacked(y, changes=changes)) for y in outs[self.carried :]),
        ]

    def as_rows(self, i: int, x: Value, out: Value) -> Value:
        """A state that is the same for all examples and becomes rows is rows from the start."""
        where = self.consts + i
        if (
            i in self.roles
            or not x.fixed
            or not out.rows
            or out.layout is None
            or not out.layout.plain
        ):
            return x
        if list(out.layout.axes) != list(varying(self.op.shapes(where))):
            return x
        return numbered(
            self.walk, rows(out.layout, terms=x.terms, faults=x.faults, params=x.params)
        )

    def given_up(self, note: str) -> list[Value]:
        return [numbered(self.walk, self.walk.unknown(self.op, note)) for _ in self.op.eqn.outvars]

    def step(self, state: list[Value], xs: list[Value]) -> list[Value]:
        """The results of the body; of a sum, what is added."""
        bodies = []
        for scan, roles in ((self.scan, roles_of(self.scan)), (self.other, roles_of(self.other))):
            outvars = list(scan.body.outvars)
            for i, role in self.roles.items():
                if role.name == "sum":
                    outvars[i] = roles[i].what
            bodies.append(
                scan.body.replace(
                    outvars=outvars, debug_info=scan.body.debug_info._replace(result_paths=None)
                )
            )
        closed = [
            getattr(scan.eqn.params["jaxpr"], "consts", ()) for scan in (self.scan, self.other)
        ]
        consts = [self.walk.constant(a, b) for a, b in zip(*closed, strict=True)]
        with self.walk.inside(self.op, bodies[0]):
            return self.walk.run(
                bodies[0], bodies[1], consts, [*self.ins[: self.consts], *state, *xs]
            )

    def next(self, x: Value, out: Value, i: int) -> Value:
        """State `i` after one more step."""
        joined = join(self.walk, self.op, x, out)
        looped = out.rows and out.layout is not None and out.layout.looped
        faults = joined.faults
        if looped and out.number != x.number:
            faults |= {
                self.walk.fault(
                    self.op,
                    FaultKind.COUPLING,
                    "a loop over the examples carries one example's state to the next",
                )
            }
        if (
            self.repeats != 0
            and out.number != x.number
            and not joined.fixed
            and not looped
            and i not in self.roles
        ):
            note = "the number of steps depends on the batch size"
            faults |= {self.walk.fault(self.op, FaultKind.BATCH_SIZE, note)}
        if self.repeats != 0 and out.number != x.number and x.fixed and out.fixed:
            joined = fixed(
                IRREGULAR,
                **{f: getattr(joined, f) for f in ("faults", "params", "origin", "scalar")},
            )
        kept = dataclasses.replace(joined.but(scalar=joined.scalar), faults=faults, number=x.number)
        return kept

    def final(self, i: int, x: Value, out: Value) -> Value:
        """A carried value after the loop."""
        role = self.roles.get(i)
        if role is None or role.name == "write":
            return (
                x
                if role is None or not x.layout or not x.layout.looped
                else statistic(self.walk.site(self.op), faults=x.faults)
            )
        if role.name == "count":
            return fixed(Scale(self.repeats), scalar=True)
        return self.summed(self.initial[i], out)

    def summed(self, start: Value, each: Value) -> Value:
        """``start + Σ each``."""
        site, faults = self.walk.site(self.op), start.faults | each.faults
        params = start.params or each.params
        if each.index is not None:
            faults |= {
                self.walk.fault(self.op, FaultKind.POSITION, "positions of examples are summed")
            }
        times = Scale(self.repeats)
        if start.fixed and each.rows and each.layout == ONE_EXAMPLE and self.over_examples:
            value = total(site, each.terms | _once(start))
        elif start.fixed and each.fixed:
            scales = {v.scale * s for v, s in ((start, Scale()), (each, times)) if not v.zero} or {
                Scale()
            }
            value = fixed(
                scales.pop() if len(scales) == 1 else IRREGULAR, scalar=start.scalar and each.scalar
            )
        elif self.repeats == 0:
            value = join(self.walk, self.op, start, each) if not start.zero else each
        elif start.fixed and each.kind is Kind.TOTAL:
            value = total(site, frozenset(t.times(times) for t in each.terms) | _once(start))
        else:
            value = self.walk.couple(
                self.op, [start, each], note="a loop adds up parts of the examples"
            )
        return dataclasses.replace(
            value.but(scalar=value.scalar), faults=value.faults | faults, params=params
        )

    def stacked(self, y: Value, *, changes: bool) -> Value:
        """A result of every step, along a new first axis."""
        if y.rows and y.layout is not None:
            if y.layout == ONE_EXAMPLE and self.over_examples:
                return dataclasses.replace(_shifted(y, Layout((0,))))
            if y.layout.looped:
                axes = tuple(a + 1 for a in y.layout.axes)
                return (
                    _shifted(y, Layout((0, *axes)))
                    if len(axes) == 1 and axes == (1,)
                    else statistic(self.walk.site(self.op), faults=y.faults)
                )
            return _shifted(y, y.layout.at(*(a + 1 for a in y.layout.axes)))
        faults: frozenset[Fault] = frozenset()
        if self.repeats != 0 and (changes or y.index is not None):
            faults = frozenset(
                [
                    self.walk.fault(
                        self.op,
                        FaultKind.POSITION,
                        "the result depends on the position of an example",
                    )
                ]
            )
        if y.summary and self.repeats != 0:
            coupled = self.walk.couple(self.op, [y], note="a statistic for each example")
            return dataclasses.replace(coupled, faults=coupled.faults | y.faults)
        return dataclasses.replace(y.but(), faults=y.faults | faults, layout=None)


def _of_a_step(x: Value | None) -> bool:
    """Whether a value belongs to one step of a loop over the examples."""
    return x is not None and (x.index is Index.STEP or (x.layout is not None and x.layout.looped))


def _once(start: Value) -> frozenset[Term]:
    return frozenset() if start.zero else frozenset(Term(t.scale, fixed=True) for t in start.terms)


def _shifted(x: Value, layout: Layout) -> Value:
    return dataclasses.replace(x.but(), layout=layout, index=x.index)


def _signature(x: Value) -> Any:
    return (x.kind, x.layout, x.terms, x.params, x.faults, x.scalar)


@rule("scan", complete=True)
def scan(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A loop with a fixed number of steps."""
    return _Loop(walk, op, ins).run()


# -- while -----------------------------------------------------------------------------------------


@rule("while", complete=True)
def while_loop(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A loop that ends by a condition: of the batch's, unless each example ends by its own."""
    n, k = op.params["cond_nconsts"], op.params["body_nconsts"]
    state = [numbered(walk, dataclasses.replace(x, known=None, at=None)) for x in ins[n + k :]]
    body = (op.params["body_jaxpr"], op.other.params["body_jaxpr"])
    test = (op.params["cond_jaxpr"], op.other.params["cond_jaxpr"])
    changed = [False] * len(state)
    for _ in range(_ROUNDS):
        outs = walk.body(op, body, [*ins[n : n + k], *state])
        changed = [
            was or x.number != out.number for was, x, out in zip(changed, state, outs, strict=True)
        ]
        (holds,) = walk.body(op, test, [*ins[:n], *state])
        new = [_after(walk, op, x, out, holds=holds) for x, out in zip(state, outs, strict=True)]
        if [_signature(x) for x in new] == [_signature(x) for x in state]:
            break
        state = new
    else:
        state = [
            numbered(walk, walk.unknown(op, "a loop whose state does not settle")) for _ in state
        ]
    return [numbered(walk, x) for x in state]


def _after(walk: Walk, op: Op, x: Value, out: Value, *, holds: Value) -> Value:
    joined = join(walk, op, x, out)
    joined = dataclasses.replace(joined.but(scalar=joined.scalar), number=x.number)
    if x.number == out.number:
        return joined
    if holds.rows and holds.layout is not None and joined.fixed and joined.scale.trivial:
        joined = dataclasses.replace(joined, kind=Kind.ROWS, layout=holds.layout)
    own = (
        holds.rows and joined.rows and joined.layout == holds.layout
    )  # a vmapped loop: JAX holds finished rows still
    if not holds.fixed and not own:
        note = "the number of steps depends on the data of the batch"
        return dataclasses.replace(
            joined, faults=joined.faults | holds.faults | {walk.fault(op, FaultKind.UNKNOWN, note)}
        )
    if holds.fixed and not holds.scale.trivial:
        if joined.fixed:
            return dataclasses.replace(
                joined, terms=frozenset([Term(IRREGULAR)]), faults=joined.faults | holds.faults
            )
        note = "the number of steps depends on the batch size"
        return dataclasses.replace(
            joined, faults=joined.faults | {walk.fault(op, FaultKind.BATCH_SIZE, note)}
        )
    return dataclasses.replace(
        joined, faults=joined.faults | holds.faults, params=joined.params or holds.params
    )
