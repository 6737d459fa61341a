"""The text of a compiled program: its computations, their instructions, and how often loops run.

ENTRY %main.9 (p.1: f32[]) -> f32[] {                                   a computation
  %dot.2 = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}          an instruction
  ROOT %while.1 = f32[4]{0} while(%dot.2), condition=%c.1, body=%b.1    the root, which loops
}
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+?\d+(?:e\dm\d\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    """Of its result, as it is written."""
    opcode: str
    rest: str
    """Its operands and attributes."""
    root: bool = False

    @property
    def operands(self) -> list[str]:
        """The names of its operands, and after them those of what it calls."""
        return re.findall(r"%([\w.\-]+)", self.rest)

    @property
    def called(self) -> list[str]:
        """The computations that it runs once each: a fusion, a call, the branches of a choice."""
        branches = ",".join(_BRANCHES.findall(self.rest)).split(",")
        names = [name.strip().lstrip("%") for name in branches if name]
        return [*_CALLED.findall(self.rest), *names]

    @property
    def body(self) -> str | None:
        """The computation that it repeats, if it is a loop."""
        found = _BODY.search(self.rest)
        return found[1] if found and self.opcode == "while" else None

    @property
    def sizes(self) -> list[float]:
        """The bytes of each array of its result."""
        return [_bytes(*array) for array in _ARRAY.findall(self.type)]


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program by name, and the name of the first to run."""

    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: by the compiler's note, or its condition's number, or once."""
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        found = _CONDITION.search(loop.rest)
        condition = self.computations.get(found[1], ()) if found else ()
        numbers = {_number(one) for one in condition if _is_number(one)}
        return numbers.pop() if len(numbers) == 1 else 1


def read(text: str) -> Program:
    """The program that ``compiled.as_text()`` prints."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif one := _INSTRUCTION.match(line):
            current.append(Instruction(one[2], one[3], one[4], one[5], one[1] is not None))
    return Program(computations, entry)


def _is_number(one: Instruction) -> bool:
    return one.opcode == "constant" and one.type.startswith("s32[]")


def _number(one: Instruction) -> int:
    return int(one.rest.partition(")")[0])


def _bytes(kind: str, dims: str) -> float:
    """The bytes of an array of that dtype (pred, s32, bf16, f8e4m3fn, …) and shape."""
    width = 1 if kind == "pred" else int(re.findall(r"\d+", kind)[0]) / 8
    return width * math.prod(int(dim) for dim in dims.split(",") if dim)
