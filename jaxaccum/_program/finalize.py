"""What the user sees of a run: tags resolved, and errors in place of derivatives that would be
lost."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from jaxaccum._base.entries import entries
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
        places = tuple(map(sources.index, sorted(own)))
        tangent = 0.0 if program.outputs.parts[i].has_tag else math.nan
        refused[i] = Refused(places, functools.partial(_says, program, i), tangent)
    values = no_gradient.refusing(parts, entries(arrays, sources), refused)
    return program.outputs.finalize(values, _whole_values(program, arrays))


def _whole_values(program: Program, arrays: Sequence[Array]) -> list[Array]:
    if program.whole is None:
        return []
    own = entries(arrays, program.sources(0))
    return program.whole.values(own, program.axes, checked=program.checked)


def _movers(program: Program) -> dict[int, set[int]]:
    """The slots with which the parts move that pass no gradient, by part; those that do move."""
    parts = program.outputs.parts
    constant = [i for i, part in enumerate(parts) if not part.reduction.differentiable]
    found: dict[int, set[int]] = {}
    for g, one in enumerate(program.traces):
        sources = program.sources(g)
        for i, places in zip(constant, one.movers(constant), strict=True):
            moving = [j for j in entries(sources, places) if program.slots[j].differentiable]
            if moving:
                found.setdefault(i, set()).update(moving)
    return found


def _says(program: Program, part: int) -> str:
    allowed = [program.slots[i].role is Role.WHOLE for i in program.sources(0)]
    one = program.outputs.parts[part]
    return no_gradient.refusal(one.name, one.tag, whole=program.traces[0].is_of(part, allowed))
