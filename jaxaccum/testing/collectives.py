"""The collectives of a compiled program: which, how many bytes, how often, inside how many loops.

It is read from the HLO text, for which JAX has no public reader.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from jaxaccum.testing import hlo
from jaxaccum.testing.hlo import Instruction, Program

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"(?:ragged-)?({'|'.join(KINDS)})(-start)?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of one device's program."""

    kind: str
    bytes: int
    """Of its result."""
    times: int
    """How often it runs in one run of the program."""
    loops: int
    """How many loops surround it."""


def collectives(compiled: Any) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
        compiled: the result of ``jax.jit(f).lower(…).compile()``, or its HLO text.

    Returns:
        One entry per operation, in the program's order; one inside a loop is listed once, with
        its `times`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxaccum.testing import collectives
        >>> collectives(jax.jit(jnp.sin).lower(1.0).compile())
        []
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    program = hlo.read(text)
    return list(_walk(program, program.entry, times=1, loops=0))


def _walk(program: Program, name: str, *, times: int, loops: int) -> Iterator[Collective]:
    for one in program.computations.get(name, ()):
        if found := _COLLECTIVE.fullmatch(one.opcode):
            yield Collective(found[1], _bytes(one, started=found[2] is not None), times, loops)
        elif one.body is not None:
            trips = times * program.trips(one)
            yield from _walk(program, one.body, times=trips, loops=loops + 1)
        elif not _is_later_part(one):
            for called in one.called:
                yield from _walk(program, called, times=times, loops=loops)


def _is_later_part(one: Instruction) -> bool:
    """On TPU an asynchronous collective is written three times: where it starts, where it goes on
    while a product is computed, and where it ends. Whether this is one of the last two."""
    ends = one.name.startswith("async-collective-done")
    return ends or any(name.startswith("async_collective_fusion") for name in one.called)


def _bytes(one: Instruction, *, started: bool) -> int:
    """The bytes of a result; an asynchronous start holds operands too: the larger of the two."""
    if started and one.type.startswith("(") and len(one.sizes) in (2, 4):
        return math.ceil(max(one.sizes))
    return math.ceil(sum(one.sizes))
