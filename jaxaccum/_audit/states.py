"""The state of a model of nnx: whether it ends as on the whole batch.

The problem. The variables of a model run from microbatch to microbatch, and each microbatch updates
them. A moving average, ``N = 0.9 N + 0.1 Σ counts``, decays four times in four microbatches, and
once in the whole batch. The gradient is right all the same, but the next step starts from another
state.

The idea. An update that only adds ends where it should, if what it adds is a sum over the examples.
Of two microbatches::

    N₁ = N + Σ₁     N₂ = N₁ + Σ₂ = N + (Σ₁ + Σ₂)

So what is added is judged, as if it were an output with the tag `Sum`. An update by other linear
arithmetic is inexact, and so is a state that is replaced by what a microbatch computes. A program
with collectives over the microbatches updates each state once, and there is nothing to say.

What a compiled function does is followed as if it stood there, and of a choice (``where``, for a
warm-up) both sides are.

Known weakness. Several additions to one state, updates by other functions (a maximum, a scatter)
and states that read one another, as those of Welford's variance do, are not followed, and
nothing is said of them. Nor is anything where the call says that streams of random numbers are not
divided, and asks for the host loop's states so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax.extend.core as jex

from jaxaccum._audit.rules.carried_values import role_of
from jaxaccum._audit.sources import Site
from jaxaccum._audit.traces import Subject, Traced
from jaxaccum._base.entries import entries
from jaxaccum._jaxpr.compat import opened
from jaxaccum._jaxpr.equations import called, mentions, without_unused
from jaxaccum._jaxpr.microbatch_index import is_index
from jaxaccum._jaxpr.variables import Atom, Var, is_variable, variables
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.assignments import handed_on
from jaxaccum._program.tags import Carry

_LINEAR = {
    "add", "add_any", "sub", "mul", "div", "neg", "convert_element_type", "broadcast_in_dim",
    "reshape", "squeeze", "stop_gradient", "copy", "select_n",
}  # fmt: skip
_ADDITIONS = {"add", "add_any", "sub", "convert_element_type"}
Kind = Literal["adds", "changes", "replaces"]


@dataclasses.dataclass(frozen=True)
class Update:
    """What one microbatch does to a state."""

    kind: Kind
    judged: Atom
    """What decides: of a sum what is added, else the new state."""
    site: Site | None
    """The equation that makes the new state; None of an argument."""


def updates_of(subject: Subject, traced: Traced, axis_name: str) -> dict[int, Update]:
    """The updates of a model's states that are followed, by their place among the results."""
    if subject.draws_declared:  # the user's own CARRY, which runs as a loop does
        return {}
    jaxpr = without_unused(traced.closed.jaxpr)
    if not all(map(is_index, mentions(jaxpr, axis_name))):
        return {}
    changing = list(states(subject.slots, traced))
    before = {old for _, old, _ in changing}
    found: dict[int, Update] = {}
    for place, old, new in changing:
        update = _update_of(jaxpr, old, new)
        if update is not None and _read_by(jaxpr, [new]).isdisjoint(before - {old}):
            found[place] = update
    return found


def states(slots: Sequence[Slot], traced: Traced) -> Iterator[tuple[int, Var, Atom]]:
    """The states that each microbatch changes: the place of the new one among the results, the old
    one and the new one."""
    pairs = zip(traced.arguments, slots, strict=True)
    old = [(v, slot) for v, slot in pairs if slot.role is Role.CARRY or slot.updated_once]
    new = list(_new_states(traced))
    if len(new) != len(old):
        return
    arguments, came_from = traced.closed.jaxpr.invars, handed_on(traced.closed.jaxpr)
    for (before, slot), (place, after) in zip(old, new, strict=True):
        origin = came_from[place]
        stays = origin is not None and arguments[origin] is before
        if not stays and not slot.updated_once:
            yield place, before, after


def _new_states(traced: Traced) -> Iterator[tuple[int, Atom]]:
    """The results that a loss returned in a `Carry`, with their places."""
    results = iter(enumerate(traced.closed.jaxpr.outvars))
    for output in traced.outputs:
        arrays = [next(results) for _ in range(output.count)]
        if output.tag is Carry:
            yield from arrays


def with_judged(jaxpr: jex.Jaxpr, updates: dict[int, Update]) -> jex.Jaxpr:
    """The program that returns, in the place of each new state, what decides about it."""
    if not updates:
        return jaxpr
    outvars = list(jaxpr.outvars)
    for place, update in updates.items():
        outvars[place] = update.judged
    return jaxpr.replace(outvars=outvars, debug_info=jaxpr.debug_info._replace(result_paths=None))


def _update_of(jaxpr: jex.Jaxpr, before: Var, after: Atom) -> Update | None:
    """What a program does to a state; None where that is not followed."""
    if not is_variable(after):
        return None
    site = next((Site(eqn) for eqn in jaxpr.eqns if after in eqn.outvars), None)
    role = role_of(jaxpr, before, after)
    if role.name == "sum" and role.added is not None:
        return Update("adds", role.added, site)
    between = list(_between(jaxpr, {before}, [after]))
    if not between:
        return Update("replaces", after, site)
    linear = all(step.name in _LINEAR for step in between)
    if not linear or all(step.adds for step in between):
        return None
    return Update("changes", after, site)


class _Step(NamedTuple):
    """One equation on the way from an old state to the new one."""

    name: str
    met: int
    """How many of its operands depend on the old state."""

    @property
    def adds(self) -> bool:
        """Whether it only adds to the state, or chooses between what has been added or not."""
        return self.name == "select_n" or (self.name in _ADDITIONS and self.met == 1)


def _between(jaxpr: jex.Jaxpr, before: set[Var], after: Sequence[Atom]) -> Iterator[_Step]:
    """The equations on the way from some variables to others, and in functions that it calls."""
    reached, needed = set(before), _read_by(jaxpr, after)
    for eqn in jaxpr.eqns:
        wanted = [i for i, v in enumerate(eqn.outvars) if v in needed]
        read = _read_for(eqn, wanted)
        met = [i for i, v in enumerate(eqn.invars) if is_variable(v) and v in reached and v in read]
        if not met or not wanted:
            continue
        reached.update(entries(eqn.outvars, wanted))
        if (program := called(eqn)) is None:
            yield _Step(eqn.primitive.name, len(met))
        else:
            body = opened(program)[0]
            inside = set(entries(body.invars, met))
            yield from _between(body, inside, entries(body.outvars, wanted))


def _read_by(jaxpr: jex.Jaxpr, after: Sequence[Atom]) -> set[Var]:
    """The variables that some results depend on, but for what only chooses between others."""
    needed = set(variables(after))
    for eqn in reversed(jaxpr.eqns):
        needed |= _read_for(eqn, [i for i, v in enumerate(eqn.outvars) if v in needed])
    return needed


def _read_for(eqn: jex.JaxprEqn, wanted: Sequence[int]) -> set[Var]:
    """The operands that some results of an equation depend on, in the same sense."""
    if not wanted:
        return set()
    if (program := called(eqn)) is None:
        chooses = eqn.primitive.name == "select_n"
        return set(variables(eqn.invars[1:] if chooses else eqn.invars))
    body = opened(program)[0]
    needed = _read_by(body, entries(body.outvars, wanted))
    pairs = zip(eqn.invars, body.invars, strict=True)
    return {v for v, inner in pairs if inner in needed and is_variable(v)}
