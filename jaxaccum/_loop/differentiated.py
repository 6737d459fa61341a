"""The differentiated slots of a call, by how their gradients combine over microbatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxaccum._base.entries import places_of
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.program import Program


class Differentiated(NamedTuple):
    """Positions of slots."""

    summed: list[int]
    """Every microbatch reads them whole, and their gradients are summed."""
    overwritten: list[int]
    """Every microbatch reads them whole, and their "gradients" are maxima over the examples."""
    rows: list[int]
    """Their gradients are rows, each of one microbatch."""

    @property
    def whole(self) -> list[int]:
        """Those that every microbatch reads whole."""
        return [*self.summed, *self.overwritten]


def differentiated(program: Program, wrt: Sequence[int]) -> Differentiated:
    """The slots `wrt`, by how their gradients combine. Slots of other roles have no gradient."""
    found = Differentiated([], [], [])
    for i in wrt:
        slot = program.slots[i]
        if slot.role is Role.ROWS:
            found.rows.append(i)
        elif slot.role is Role.WHOLE and slot.overwritten:
            found.overwritten.append(i)
        elif slot.role is Role.WHOLE:
            found.summed.append(i)
    return found


def moved_arguments(program: Program, g: int, wrt: Sequence[int]) -> list[int]:
    """The places of the differentiated arguments of trace `g`, those of its constants first."""
    slots = differentiated(program, wrt)
    chosen = {*slots.whole, *slots.rows}
    return places_of(slot in chosen for slot in program.sources(g))
