"""The collectives of a compiled program: which, how many bytes, how often, inside how many loops.

It is read from the HLO text, for which JAX has no public reader.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) (ragged-)?({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+?\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")
_WHILE = re.compile(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LATER_PART = re.compile(r"%?async-collective-done[\w.\-]* = |\bcalls=%?async_collective_fusion")
"""On TPU an asynchronous collective is written three times: where it starts, where it goes on while
a product is computed, and where it ends."""
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")


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
    bodies, entry = _computations(text)
    return list(_walk(bodies, entry, times=1, loops=0))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first to run."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = bodies.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        else:
            lines.append(line)
    return bodies, entry


def _walk(
    bodies: dict[str, list[str]], name: str, *, times: int, loops: int
) -> Iterator[Collective]:
    for line in bodies.get(name, []):
        if found := _COLLECTIVE.search(line):
            yield Collective(found[3], _bytes(found[1], started=found[4] is not None), times, loops)
        elif loop := _WHILE.search(line):
            trips = _trips(line, bodies.get(loop[1], []))
            yield from _walk(bodies, loop[2], times=times * trips, loops=loops + 1)
        elif not _LATER_PART.search(line):
            for called in _called(line):
                yield from _walk(bodies, called, times=times, loops=loops)


def _called(line: str) -> list[str]:
    branches = ",".join(_BRANCHES.findall(line)).split(",")
    names = [name.strip().lstrip("%") for name in branches if name]
    return [*_CALLED.findall(line), *names]


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop runs: by the compiler's note, or the number in its condition, or once."""
    if known := _TRIPS.search(line):
        return int(known[1])
    constants = {int(n) for n in _CONSTANT.findall("\n".join(condition))}
    return constants.pop() if len(constants) == 1 else 1


def _bytes(type_text: str, *, started: bool) -> int:
    """The bytes of a result; an asynchronous start holds operands too: the larger of the two."""
    sizes = [_array_bytes(*array) for array in _ARRAY.findall(type_text)]
    if started and type_text.startswith("(") and len(sizes) in (2, 4):
        return math.ceil(max(sizes))
    return math.ceil(sum(sizes))


def _array_bytes(kind: str, dims: str) -> float:
    sizes = filter(None, dims.split(","))
    return _width(kind) * math.prod(map(int, sizes))


def _width(kind: str) -> float:
    """The bytes of one element: pred, s32, bf16, f8e4m3fn, …"""
    return 1 if kind == "pred" else int(re.findall(r"\d+", kind)[0]) / 8
