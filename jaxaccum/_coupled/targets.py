"""What a cotangent can arrive for, in a segment of stages, and the cotangent itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxaccum._base.trees import cast
from jaxaccum._base.types import Array
from jaxaccum._jaxpr.variables import Var
from jaxaccum._program.program import Program
from jaxaccum._program.reductions import Reduction


@dataclasses.dataclass(frozen=True)
class Part:
    """An output of the program."""

    output: int


@dataclasses.dataclass(frozen=True)
class Emitted:
    """A value that a cut takes."""

    level: int
    v: Var


@dataclasses.dataclass(frozen=True)
class End:
    """A value of the boundary at the end of the segment."""

    v: Var


class Target(NamedTuple):
    """A result of the segment that a cotangent has arrived for."""

    name: Part | Emitted | End
    cotangent: Array
    stacked: bool
    """Whether the cotangent has an entry per microbatch, or is the same for all."""


def of_output(program: Program, output: int, seed: Array) -> Target:
    """An output of the program, and its cotangent: cut as the rows are where it has rows."""
    reduction = program.outputs.parts[output].reduction
    if reduction is Reduction.CONCAT:
        (seed,) = program.partition.split_rows(seed, 0)
    return Target(Part(output), seed, reduction.stacked)


def stacked(targets: Sequence[Target]) -> dict[int, Array]:
    """The cotangents that have an entry per microbatch, by target."""
    return {i: target.cotangent for i, target in enumerate(targets) if target.stacked}


def at_one_microbatch(
    targets: Sequence[Target], outs: Sequence[Array], own: Mapping[int, Array]
) -> list[Array]:
    """The cotangents of the targets, whose values are `outs`; `own` are the microbatch's entries of
    the stacked ones."""
    cotangents: list[Array] = []
    for i, (target, out) in enumerate(zip(targets, outs, strict=True)):
        cotangents.append(cast(own.get(i, target.cotangent), out.dtype))
    return cotangents
