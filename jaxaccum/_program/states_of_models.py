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
that changes, if the loss does not run at another size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.extend.core as jex

from jaxaccum._jaxpr.equations import inside
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._jaxpr.variables import Var, variables
from jaxaccum._program.argument_slots import Role, Slot, positions
from jaxaccum._program.other_sizes import Traced, compute_alike
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


def read_before(slots: Sequence[Slot]) -> list[Slot]:
    """The slots of a coupled loss, where every microbatch reads the states before the first one.

    Keys are not such a state, since each microbatch draws numbers of its own.
    """
    changed = list(slots)
    for i in positions(slots, Role.CARRY):
        changed[i] = dataclasses.replace(slots[i], updated_once=slots[i].key is None)
    return changed


def beside_loop(
    slots: Sequence[Slot],
    outputs: Outputs,
    groups: Sequence[Group],
    at_another_size: Callable[[], Traced | None],
) -> Beside:
    """The states that do not depend on the batch."""
    traces = [group.trace for group in groups]
    parts = dict(zip(positions(slots, Role.CARRY), outputs.positions(Reduction.CARRY), strict=True))
    states = _States(slots, parts, traces)
    changing = states.changing()
    given = states.without_batch(set(parts) - states.drawn_from(changing))
    if changing & given:
        other, one = at_another_size(), (traces[0], groups[0].observed.consts)
        alike = lambda i: other is not None and compute_alike([parts[i]], one, other)
        given = states.without_batch(given - {i for i in changing & given if not alike(i)})
    whole = list(slots)
    for i in given:
        whole[i] = dataclasses.replace(slots[i], role=Role.WHOLE, updated_once=True)
    return Beside(whole, sorted(parts[i] for i in given))


@dataclasses.dataclass(frozen=True)
class _States:
    """The states that run from microbatch to microbatch, by their slots."""

    slots: Sequence[Slot]
    parts: Mapping[int, int]
    """Of each, the part of the outputs that is the new one."""
    traces: Sequence[Trace]

    def _arguments(self, g: int) -> dict[int, Var]:
        """The variable of each slot in a trace."""
        read = sources(self.slots, self.traces, g)
        return dict(zip(read, self.traces[g].arguments, strict=True))

    def changing(self) -> set[int]:
        """Those that some microbatch does not return as they are."""
        found: set[int] = set()
        for g, one in enumerate(self.traces):
            old = self._arguments(g)
            found |= {i for i, j in self.parts.items() if one.jaxpr.outvars[j] is not old[i]}
        return found

    def drawn_from(self, changing: set[int]) -> set[int]:
        """Those of the changing ones that are keys, or that random numbers depend on."""
        found = {i for i in changing if self.slots[i].key is not None}
        for g, one in enumerate(self.traces):
            old, drawn_from = self._arguments(g), _drawn_from(one.jaxpr)
            found |= {i for i in changing if old[i] in drawn_from}
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
        for g, one in enumerate(self.traces):
            read = sources(self.slots, self.traces, g)
            allowed = [self.slots[i].role is Role.WHOLE or i in states for i in read]
            if not one.is_of(self.parts[state], allowed):
                return False
        return True


def _drawn_from(jaxpr: jex.Jaxpr) -> set[Var]:
    """The variables that random numbers depend on."""
    found: set[Var] = set()
    for eqn in reversed(jaxpr.eqns):
        draws = any(map(_is_random, (eqn, *inside(eqn))))
        if draws or not found.isdisjoint(eqn.outvars):
            found.update(variables(eqn.invars))
    return found


def _is_random(eqn: jex.JaxprEqn) -> bool:
    name = eqn.primitive.name
    return name.startswith(("random_", "rng_", "prng_")) or name == "threefry2x32"
