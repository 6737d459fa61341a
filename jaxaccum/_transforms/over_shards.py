"""Parts and gradients of all devices, after the loop: one collective for all that is summed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxaccum import _loop
from jaxaccum._base.entries import entries
from jaxaccum._base.trees import safe_map
from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._loop import Result
from jaxaccum._program import reductions
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.program import Program
from jaxaccum._program.reductions import Reduction


def combined(
    program: Program,
    arrays: Sequence[Array],
    wrt: tuple[int, ...],
    own: Result,
    known: dict[int, Array],
) -> Result:
    """The parts and gradients of all devices, of one device's own.

    Rows stay with the device that holds them. The parts in `known` have been summed already.
    """
    axes = functools.partial(_gradient_axes, program)
    grads = _loop.next_values(program.slots, arrays, wrt, own.grads, axes)
    sums = [i for i in program.outputs.positions(Reduction.SUM) if i not in known]
    summed_axes = [program.mesh_axes] * len(sums)
    summed_axes += safe_map(functools.partial(_axes_of_sum, program), wrt, grads)
    summed = varying.sum_at_once([*entries(own.parts, sums), *grads], summed_axes)
    totals, grads = summed[: len(sums)], summed[len(sums) :]
    known = known | dict(zip(sums, totals, strict=True))
    parts = list(own.parts)
    for i, part in enumerate(program.outputs.parts):
        if i in known:
            parts[i] = known[i]
        else:
            parts[i] = reductions.over_mesh(part.reduction, parts[i], program.mesh_axes)
    return Result(parts, grads)


def _axes_of_sum(program: Program, slot: int, grad: Array) -> tuple[str, ...]:
    """The mesh axes over which the gradient of a slot is summed."""
    if program.slots[slot].role is not Role.WHOLE or program.slots[slot].overwritten:
        return ()
    return _gradient_axes(program, slot, grad)


def _gradient_axes(program: Program, slot: int, grad: Array) -> tuple[str, ...]:
    """The mesh axes over which the gradients of a slot that every device reads combine."""
    return varying.gradient_axes(grad, program.given_axes[slot], program.mesh_axes)
