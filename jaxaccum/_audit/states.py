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

Known weakness. Several additions to one state, updates by other functions (a maximum, a scatter, a
call) and states that read one another, as those of Welford's variance do, are not followed, and
nothing is said of them. Nor is anything where the call says that streams of random numbers are not
divided, and asks for the host loop's states so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax.extend.core as jex

from jaxaccum._audit.rules.carried_values import role_of
from jaxaccum._audit.sources import Site
from jaxaccum._audit.traces import Subject, Traced
from jaxaccum._jaxpr.equations import mentions, without_unused
from jaxaccum._jaxpr.microbatch_index import is_index
from jaxaccum._jaxpr.variables import Atom, Var, is_variable, results_of, variables
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.assignments import handed_on
from jaxaccum._program.tags import Carry

_LINEAR = {
    "add", "add_any", "sub", "mul", "div", "neg", "convert_element_type", "broadcast_in_dim",
    "reshape", "squeeze", "stop_gradient", "copy",
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
        if update is not None and _read_by(jaxpr, new).isdisjoint(before - {old}):
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
    between = _between(jaxpr, before, after)
    if not between:
        return Update("replaces", after, site)
    linear = all(eqn.primitive.name in _LINEAR for eqn in between)
    if not linear or _adds_in_turn(before, between):
        return None
    return Update("changes", after, site)


def _adds_in_turn(before: Var, between: Sequence[jex.JaxprEqn]) -> bool:
    """Whether equations only add to a state, one after the other."""
    reached = {before, *results_of(between)}
    for eqn in between:
        met = [v for v in variables(eqn.invars) if v in reached]
        if eqn.primitive.name not in _ADDITIONS or len(met) != 1:
            return False
    return True


def _read_by(jaxpr: jex.Jaxpr, after: Atom) -> set[Var]:
    """The variables that a result depends on."""
    needed = set(variables([after]))
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed.update(variables(eqn.invars))
    return needed


def _between(jaxpr: jex.Jaxpr, before: Var, after: Var) -> list[jex.JaxprEqn]:
    """The equations on the way from one variable to another."""
    reached = {before}
    forward: list[jex.JaxprEqn] = []
    for eqn in jaxpr.eqns:
        if not reached.isdisjoint(variables(eqn.invars)):
            reached.update(eqn.outvars)
            forward.append(eqn)
    needed = _read_by(jaxpr, after)
    return [eqn for eqn in forward if not needed.isdisjoint(eqn.outvars)]
