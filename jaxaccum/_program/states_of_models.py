"""The states of a model that do not depend on the batch: computed once, beside the loop.

The problem. A state runs from microbatch to microbatch. A counter of steps, the power iteration of
a spectral normalization and the average of a teacher's weights would change once per microbatch,
and later microbatches would read another value than the whole batch does.

The idea. If a new state follows from parameters and from states of this kind alone, then every
microbatch makes the same one of the state before the first. So each reads that state, as it reads a
parameter, and the new one is an output that depends on whole arguments alone.

    count = count + 1          beside the loop
    mean                       beside the loop, as it is
    total = total + sum(x)     from microbatch to microbatch

Three kinds of state stay in the loop. One that random numbers are drawn from: microbatches must not
draw the same. One that depends on the number of examples, as ``count + len(x)`` does. And every one
that changes, if the loss does not run on the whole batch at once, so that this cannot be told.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.extend.core as jex

from jaxaccum._jaxpr.compat import opened
from jaxaccum._jaxpr.equations import called, inside
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._jaxpr.variables import Var, variables
from jaxaccum._program import assignments
from jaxaccum._program.argument_slots import Role, Slot, positions
from jaxaccum._program.other_sizes import Traced, computed_alike
from jaxaccum._program.output_parts import Outputs
from jaxaccum._program.program import sources
from jaxaccum._program.reductions import Reduction
from jaxaccum._program.tracing import Group


class Beside(NamedTuple):
    """The states that are computed beside the loop."""

    slots: list[Slot]
    """All slots, in which these states are whole."""
    parts: list[int]
    """The parts of the outputs that they are."""

    def order(self, outputs: Outputs) -> list[int]:
        """The places that the outputs of ``Outputs.beside_loop`` had before."""
        count = len(outputs.parts) + len(outputs.whole)
        return [*(i for i in range(count) if i not in self.parts), *self.parts]


def read_before(
    slots: Sequence[Slot],
    outputs: Outputs,
    groups: Sequence[Group],
    at_another_size: Callable[[], Traced | None],
) -> list[Slot]:
    """The slots of a coupled loss, where every microbatch reads the states before the first one.

    What random numbers are drawn from is not such a state, since each microbatch draws its own. Nor
    is one that depends on the number of examples, which a microbatch does not know: an error says
    so.
    """
    states = _States.among(slots, outputs, groups)
    changing, given = states.changing(), states.without_batch(set(states.parts))
    for i in sorted(states.of_size(changing & given, at_another_size) or ()):
        raise ValueError(_of_size(outputs.parts[states.parts[i]].name))
    changed = list(slots)
    for i in set(states.parts) - states.drawn_from(set(states.parts)):
        changed[i] = dataclasses.replace(slots[i], updated_once=True)
    return changed


def beside_loop(
    slots: Sequence[Slot],
    outputs: Outputs,
    groups: Sequence[Group],
    at_another_size: Callable[[], Traced | None],
    *,
    as_they_are: bool,
) -> Beside:
    """The states that do not depend on the batch; or those alone that stay `as_they_are`, where the
    caller has said that the others may run from microbatch to microbatch."""
    states = _States.among(slots, outputs, groups)
    changing = states.changing()
    running = changing if as_they_are else states.drawn_from(changing)
    given = states.without_batch(set(states.parts) - running)
    of_size = states.of_size(changing & given, at_another_size)
    given = states.without_batch(given - (changing if of_size is None else of_size))
    whole = list(slots)
    for i in given:
        whole[i] = dataclasses.replace(slots[i], role=Role.WHOLE, updated_once=True)
    return Beside(whole, sorted(states.parts[i] for i in given))


@dataclasses.dataclass(frozen=True)
class _States:
    """The states that run from microbatch to microbatch, by their slots."""

    slots: Sequence[Slot]
    parts: Mapping[int, int]
    """Of each, the part of the outputs that is the new one."""
    groups: Sequence[Group]

    @classmethod
    def among(cls, slots: Sequence[Slot], outputs: Outputs, groups: Sequence[Group]) -> _States:
        """Those of a call; none where `fun` returns no state."""
        carried, new = positions(slots, Role.CARRY), outputs.positions(Reduction.CARRY)
        return cls(slots, dict(zip(carried, new, strict=True)) if new else {}, groups)

    @property
    def _traces(self) -> list[Trace]:
        return [group.trace for group in self.groups]

    def _arguments(self, g: int) -> dict[int, Var]:
        """The variable of each slot in a trace."""
        read = sources(self.slots, self._traces, g)
        return dict(zip(read, self._traces[g].arguments, strict=True))

    def changing(self) -> set[int]:
        """Those that some microbatch does not return as they are."""
        found: set[int] = set()
        for g, one in enumerate(self._traces):
            old, came_from = self._arguments(g), assignments.handed_on(one.jaxpr)
            for i, part in self.parts.items():
                place = came_from[part]
                if place is None or one.jaxpr.invars[place] is not old[i]:
                    found.add(i)
        return found

    def of_size(
        self, states: set[int], at_another_size: Callable[[], Traced | None]
    ) -> set[int] | None:
        """Those of the states that the whole batch computes in another way than a microbatch; None
        where that cannot be told."""
        if not states:
            return set()
        if (other := at_another_size()) is None:
            return None
        one = self.groups[0].trace, self.groups[0].observed.consts
        alike = computed_alike([self.parts[i] for i in states], one, other)
        return {i for i in states if self.parts[i] not in alike}

    def drawn_from(self, states: set[int]) -> set[int]:
        """Those of the states that are keys, or that random numbers depend on."""
        found = {i for i in states if self.slots[i].key is not None}
        for g, one in enumerate(self._traces):
            old, drawn_from = self._arguments(g), _drawn_from(one.jaxpr)
            found |= {i for i in states if old[i] in drawn_from}
        return found

    def without_batch(self, states: set[int]) -> set[int]:
        """Those of the states that follow from parameters and from one another alone."""
        while True:
            kept = {i for i in states if self._follows(i, states)}
            if kept == states:
                return states
            states = kept

    def _follows(self, state: int, states: set[int]) -> bool:
        """Whether the new state follows from parameters and from these states alone."""
        for g, one in enumerate(self._traces):
            read = sources(self.slots, self._traces, g)
            allowed = [self.slots[i].is_same(coupled=False) or i in states for i in read]
            part = self.parts[state]
            reads_device = one.other_axes and one.only([part]).other_axes
            if reads_device or not one.is_of(part, allowed):
                return False
        return True


def _drawn_from(jaxpr: jex.Jaxpr) -> set[Var]:
    """The variables that random numbers depend on."""
    drawn = _drawn_by(jaxpr, [False] * len(jaxpr.outvars))
    return set(itertools.compress(jaxpr.invars, drawn))


def _drawn_by(jaxpr: jex.Jaxpr, results: Sequence[bool]) -> list[bool]:
    """The arguments that random numbers depend on, or that these `results` do."""
    found = set(variables(itertools.compress(jaxpr.outvars, results)))
    for eqn in reversed(jaxpr.eqns):
        program = called(eqn)
        if program is not None:
            drawn = _drawn_by(opened(program)[0], [v in found for v in eqn.outvars])
            found.update(variables(itertools.compress(eqn.invars, drawn)))
        elif any(map(_is_random, (eqn, *inside(eqn)))) or not found.isdisjoint(eqn.outvars):
            found.update(variables(eqn.invars))
    return [v in found for v in jaxpr.invars]


def _is_random(eqn: jex.JaxprEqn) -> bool:
    name = eqn.primitive.name
    if name in ("random_wrap", "random_unwrap"):  # they draw nothing
        return False
    return name.startswith(("random_", "rng_", "prng_")) or name == "threefry2x32"


def _of_size(name: str) -> str:
    return (
        f"{name} depends on the number of examples, and a coupled loss updates a state once, with "
        'the number of a microbatch. Write lax.psum(len(x), "microbatch") for the number of the '
        "whole batch."
    )
