"""What may travel while a compiled program differentiates: the sums over devices of its schedule.

XLA prints the operations of a compiled program in the order in which they start. On GPU an
``all-reduce-start`` and an ``all-reduce-done`` are two operations, and what is between them may run
at the same time. On TPU the start is a fusion called ``async-collective-start``, and the end one
called ``async-collective-done``. A plain ``all-reduce`` makes everything wait, and so does a start
that is marked ``"is_sync":true``.

    %while.1 = …                                    the loop over microbatches
    %all-reduce-start.2 = f32[1024,1024] …          the last layer's sum is complete: 4 MiB leave
    %gemm_fusion.7 = …                              the layer below is differentiated meanwhile
    %all-reduce-done.2 = f32[1024,1024] …           4 of 4 MiB may travel behind a product

Between a start and its end there may be a matrix product, which differentiates, or other fusions
alone, which are the optimizer's, or nothing that computes.

Known weakness: it says what may run at the same time, and not how long either takes.
"""

import dataclasses
import enum
import re
from collections.abc import Sequence

from jaxaccum.testing import hlo
from jaxaccum.testing.hlo import Instruction, Program

SMALL = 1024
"""Bytes. Below this a collective is a loss or a weight, and no gradient."""
_PRODUCTS = ("dot", "convolution")
_LIBRARY = re.compile(r'custom_call_target="__(?:cublas|cudnn)')


class Behind(enum.Enum):
    """What is computed between the start of a sum and its end."""

    PRODUCT = "a product"
    OTHER = "other operations"
    NOTHING = "nothing"


@dataclasses.dataclass(frozen=True)
class Sent:
    """One sum over devices: its bytes, and what it may travel behind."""

    bytes: int
    behind: Behind


def sums_sent(text: str) -> list[Sent]:
    """The sums over devices in the entry computation of a compiled program, in order."""
    program = hlo.read(text)
    schedule = program.computations[program.entry]
    found = [_sent(program, schedule, at) for at in range(len(schedule))]
    return [one for one in found if one is not None and one.bytes >= SMALL]


def _sent(program: Program, schedule: Sequence[Instruction], at: int) -> Sent | None:
    """The sum that ends with this operation, if one does."""
    end = schedule[at]
    if end.opcode == "all-reduce":
        return Sent(int(sum(end.sizes)), Behind.NOTHING)
    if end.opcode != "all-reduce-done" and not end.name.startswith("async-collective-done"):
        return None
    start = _start(schedule, at)
    if '"is_sync":true' in schedule[start].rest:
        return Sent(int(sum(end.sizes)), Behind.NOTHING)
    return Sent(int(sum(end.sizes)), _between(program, schedule[start + 1 : at]))


def _start(schedule: Sequence[Instruction], at: int) -> int:
    """Where the sum that ends here starts: at its operand, or else at the start of its name."""
    end = schedule[at]
    operand = re.findall(r"[\w.\-]*-start[\w.\-]*", end.rest.partition(")")[0])
    name = operand[0] if operand else end.name.replace("-done", "-start")
    for i in range(at - 1, -1, -1):
        if schedule[i].name == name:
            return i
    raise ValueError(f"the schedule holds no start of {end.name}")


def _between(program: Program, operations: Sequence[Instruction]) -> Behind:
    """What these operations compute."""
    if any(_multiplies(program, one) for one in operations):
        return Behind.PRODUCT
    arrays = [one for one in operations if one.opcode == "fusion" and sum(one.sizes) >= SMALL]
    return Behind.OTHER if arrays else Behind.NOTHING


def _multiplies(program: Program, one: Instruction) -> bool:
    """Whether an operation is a product of matrices, or holds one."""
    if one.opcode in _PRODUCTS or _LIBRARY.search(one.rest):
        return True
    called = [*one.called, *([one.body] if one.body else [])]
    inner = [program.computations.get(name, ()) for name in called]
    return any(_multiplies(program, each) for body in inner for each in body)
