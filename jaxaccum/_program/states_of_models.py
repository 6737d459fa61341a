"""The states of a model that do not depend on the batch: computed once, beside the loop.

The problem. A state runs from microbatch to microbatch. A counter of steps, the power iteration of
a spectral normalization and the average of a teacher's weights would change once per microbatch,
and later microbatches would compute with another one than the whole batch does.

The idea. If a new state follows from parameters and from states of this kind alone, then every
microbatch makes the same one of the state before the first. So each reads that state, as it reads a
parameter, and the new one is an output that depends on whole arguments alone.

    count = count + 1          beside the loop
    mean                       beside the loop, as it is
    total = total + sum(x)     from microbatch to microbatch

Left in the loop: a state that changes and that random numbers are drawn from, which must not be the
same in every microbatch; one that depends on how many examples a microbatch has, as ``count +
len(x)`` does; and every state that changes, if the loss does not run at another size, so that this
cannot be told.
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
from jaxaccum._program.reductions import Reduction


class Beside(NamedTuple):
    """What is computed beside the loop."""

    slots: list[Slot]
    """All slots, in which its states are whole."""
    parts: list[int]
    """The parts of the outputs that it is."""

    def order(self, outputs: Outputs) -> list[int]:
        """The outputs, by their places before, as ``Outputs.beside_loop`` has left them."""
        count = len(outputs.parts) + len(outputs.whole)
        return [*(i for i in range(count) if i not in self.parts), *self.parts]


def updated_once(slots: Sequence[Slot]) -> list[Slot]:
    """The slots, in which every state is updated once, as a coupled program does; keys are not,
    since each microbatch draws numbers of its own."""
    changed = list(slots)
    for i in positions(slots, Role.CARRY):
        changed[i] = dataclasses.replace(slots[i], updated_once=slots[i].key is None)
    return changed


def beside_loop(
    slots: Sequence[Slot],
    outputs: Outputs,
    one: Traced,
    sources: Sequence[int],
    at_another_size: Callable[[], Traced | None],
) -> Beside:
    """The states that do not depend on the batch; `sources` are the slots that the trace reads."""
    trace = one[0]
    parts = dict(zip(positions(slots, Role.CARRY), outputs.positions(Reduction.CARRY), strict=True))
    argument = dict(zip(sources, trace.arguments, strict=True))
    drawn_from = _drawn_from(trace.jaxpr)
    changing = {i for i in parts if trace.jaxpr.outvars[parts[i]] is not argument[i]}
    running = {i for i in changing if slots[i].key is not None or argument[i] in drawn_from}
    given = _without_batch(set(parts) - running, parts, slots, trace, sources)
    if changing & given:
        other = at_another_size()
        alike = lambda i: other is not None and compute_alike([parts[i]], one, other)
        running = {i for i in changing & given if not alike(i)}
        given = _without_batch(given - running, parts, slots, trace, sources)
    whole = list(slots)
    for i in given:
        whole[i] = dataclasses.replace(slots[i], role=Role.WHOLE, updated_once=True)
    return Beside(whole, sorted(parts[i] for i in given))


def _without_batch(
    states: set[int],
    parts: Mapping[int, int],
    slots: Sequence[Slot],
    trace: Trace,
    sources: Sequence[int],
) -> set[int]:
    """Those of the states that follow from parameters and from one another alone."""
    while True:
        allowed = [slots[i].role is Role.WHOLE or i in states for i in sources]
        kept = {i for i in states if trace.is_of(parts[i], allowed)}
        if kept == states:
            return states
        states = kept


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
    return name.startswith(("random_", "rng_")) or name == "threefry2x32"
