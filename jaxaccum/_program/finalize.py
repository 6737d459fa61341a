"""What the user sees of a run: tags resolved, and errors in place of derivatives that would be
lost."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxaccum._base.types import Array, PyTree
from jaxaccum._program import no_gradient
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.no_gradient import Refused
from jaxaccum._program.program import Program


def finalized(program: Program, arrays: Sequence[Array], parts: Sequence[Array]) -> PyTree:
    """The output of `fun` over the whole batch, from the combined parts.

    Outputs that depend on whole arguments alone are computed here. A cotangent that reaches a part
    that passes none is an error.
    """
    movers = _movers(program)
    sources = sorted(set().union(*movers.values()))
    refused: dict[int, Refused] = {}
    for i, own in movers.items():
        places = tuple(k for k, slot in enumerate(sources) if slot in own)
        refused[i] = Refused(places, functools.partial(_says, program, i))
    values = no_gradient.refusing(parts, [arrays[i] for i in sources], refused)
    return program.outputs.finalize(values, _whole_values(program, arrays))


def _whole_values(program: Program, arrays: Sequence[Array]) -> list[Array]:
    if program.whole is None:
        return []
    own = [arrays[i] for i in program.sources(0)]
    return program.whole.values(own, program.axes, checked=program.checked)


def _movers(program: Program) -> dict[int, set[int]]:
    """The slots with which the parts move that pass no gradient, by part; those that do move."""
    kinds = [part.reduction for part in program.outputs.parts]
    constant = [i for i, kind in enumerate(kinds) if not kind.differentiable]
    found: dict[int, set[int]] = {i: set() for i in constant}
    for g, one in enumerate(program.traces):
        sources = program.sources(g)
        for i, places in zip(constant, one.movers(constant), strict=True):
            found[i] |= {sources[place] for place in places}
    can_move = {i for i, slot in enumerate(program.slots) if slot.role in (Role.WHOLE, Role.ROWS)}
    return {i: slots & can_move for i, slots in found.items() if slots & can_move}


def _says(program: Program, part: int) -> str:
    allowed = [program.slots[i].role is Role.WHOLE for i in program.sources(0)]
    one = program.outputs.parts[part]
    return no_gradient.refusal(one.name, one.tag, whole=program.traces[0].is_of(part, allowed))
