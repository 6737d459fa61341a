"""What travels while a compiled program computes: the collectives of its schedule, start and end.

XLA prints the operations of a compiled program in the order in which they run. On GPU an
``all-reduce-start`` and an ``all-reduce-done`` are two operations, and what is between them runs at
the same time. On TPU the start is a fusion called ``async-collective-start``, the matrix products
that send while they compute are fusions, and the end is ``async-collective-done``. A plain
``all-reduce`` makes everything wait.

    %while.1 = …                                    the loop over microbatches
    %all-reduce-start.2 = f32[1024,1024] …          the last layer's sum is complete: 4 MiB leave
    %loop_fusion.7 = …                              the layer below is differentiated meanwhile
    %all-reduce-done.2 = f32[1024,1024] …           4 of 4 MiB travelled while it computed

Known weakness: it says what may run at the same time, and not how long either takes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

SMALL = 1024
"""Bytes. Below this a collective is a loss or a weight, and no gradient."""
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b[a-z]+(\d+)\[([\d,]*)\]")
_COMPUTES = ("fusion", "custom-call", "convolution", "dot", "while", "call")


@dataclasses.dataclass(frozen=True)
class Operation:
    """A line of the schedule."""

    name: str
    type: str
    opcode: str
    operands: str


@dataclasses.dataclass(frozen=True)
class Sent:
    """One sum over devices: its bytes, and whether something is computed while it travels."""

    bytes: int
    hidden: bool


def sums_sent(text: str) -> list[Sent]:
    """The sums over devices in the entry computation of a compiled program, in order."""
    operations = list(_entry(text))
    sent = [one for at in range(len(operations)) if (one := _sent(operations, at))]
    return [one for one in sent if one.bytes >= SMALL]


def _entry(text: str) -> Iterator[Operation]:
    """The operations of the entry computation."""
    for line in text[text.index("\nENTRY ") :].splitlines()[2:]:
        if line.startswith("}"):
            return
        if found := _LINE.match(line):
            yield Operation(*found.groups())


def _sent(operations: list[Operation], at: int) -> Sent | None:
    """The sum that ends with this operation, if one does."""
    end = operations[at]
    if end.opcode == "all-reduce":
        return Sent(_bytes(end.type), hidden=False)
    if end.opcode == "all-reduce-done" or end.name.startswith("async-collective-done"):
        return Sent(_bytes(end.type), hidden=_computes_before(operations, at))
    return None


def _computes_before(operations: list[Operation], at: int) -> bool:
    """Whether an operation computes between this end and its start."""
    start = operations[at].name.replace("-done", "-start")
    for one in reversed(operations[:at]):
        if one.name == start or one.name in re.findall(
            r"[\w.\-]*-start[\w.\-]*", operations[at].operands
        ):
            return False
        if one.opcode in _COMPUTES and not one.name.startswith("async-collective"):
            return True
    raise ValueError(f"the schedule holds no start of {operations[at].name}")


def _bytes(type_text: str) -> int:
    """The bytes of the arrays of a type."""
    total = 0
    for bits, dims in _ARRAY.findall(type_text):
        total += math.prod(int(dim) for dim in dims.split(",") if dim) * int(bits) // 8
    return total
