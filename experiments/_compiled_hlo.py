"""How often the loops of a compiled program make a whole array, where a sum in place makes none.

A sum that is added to in place is an array that passes through a loop: a parameter of its body, an
entry of its state, the operand and the result of a `dynamic-update-slice` or `scatter` into a part.
Any other operation whose result has the shape of the whole sum makes a second array:
zeros to begin with, a gradient of every layer, the addition of two, a copy.

    %add.7 = f32[12,1024,1024]{2,1,0} add(%sum, %gradient)                      counts
    %update.3 = f32[12,1024,1024]{2,1,0} fusion(%sum, %slice), calls=%update    counts by its root
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

PASSED_ON = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "opt-barrier",
    "call",  # its instructions count
    "dynamic-update-slice",
    "scatter",
    "copy-done",  # its copy-start counts
}
"""Operations whose result is an array that was there before, or a part of it that is replaced."""

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_APPLIED = re.compile(r"\bto_apply=%?([\w.\-]+)")
_CALLED = re.compile(r"\bcalls=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: its name, the type of its result, what it does, and the rest."""

    name: str
    type: str
    opcode: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """The names of its operands, and after them those of what it calls."""
        return _NAME.findall(self.rest)

    @property
    def is_number(self) -> bool:
        """Whether it is one integer that the program holds."""
        return self.opcode == "constant" and self.type.startswith("s32[]")


Computation = list[Instruction]


def whole_results(text: str, shape: Sequence[int]) -> dict[str, int]:
    """The operations inside loops whose result has this shape and is a new array, by their kind:
    how often they run in one run of the program.

    Args:
        text: the program's HLO, as ``compiled.as_text()`` gives it.
        shape: of the array.
    """
    computations, entry = _computations(text)
    found: dict[str, int] = {}
    for instruction, times in _in_loops(computations, entry, times=1, loops=0):
        for opcode in _makers(instruction, computations, _dimensions(shape)):
            found[opcode] = found.get(opcode, 0) + times
    return found


def _computations(text: str) -> tuple[dict[str, Computation], str]:
    """The instructions of each computation, and the name of the one that runs first."""
    found: dict[str, Computation] = {}
    entry, current = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif one := _INSTRUCTION.match(line):
            current.append(Instruction(one[2], one[3], one[4], one[5], one[1] is not None))
    return found, entry


def _in_loops(
    computations: Mapping[str, Computation], name: str, *, times: int, loops: int
) -> Iterator[tuple[Instruction, int]]:
    """The instructions that some loop surrounds, and how often each runs."""
    for instruction in computations[name]:
        if loops:
            yield instruction, times
        if body := _BODY.search(instruction.rest):
            trips = _trips(computations, instruction)
            yield from _in_loops(computations, body[1], times=times * trips, loops=loops + 1)
        elif instruction.opcode == "call":
            (called,) = _APPLIED.findall(instruction.rest)
            yield from _in_loops(computations, called, times=times, loops=loops)


def _trips(computations: Mapping[str, Computation], loop: Instruction) -> int:
    """How often a loop runs: as the compiler notes it, or the one number in its condition."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    (condition,) = _CONDITION.findall(loop.rest)
    numbers = [one.rest for one in computations[condition] if one.is_number]
    return int(numbers[0].partition(")")[0]) if len(numbers) == 1 else 1


def _dimensions(shape: Sequence[int]) -> re.Pattern[str]:
    """An array type of this shape, whatever its dtype and layout."""
    return re.compile(rf"\b[a-z]\w*\[{','.join(map(str, shape))}\]")


def _makers(
    instruction: Instruction, computations: Mapping[str, Computation], wanted: re.Pattern[str]
) -> list[str]:
    """The opcodes that make whole arrays of the wanted shape in one instruction; a fusion is what
    its root is, and a root that is a tuple what its entries are."""
    if not wanted.search(instruction.type):
        return []
    called = _CALLED.search(instruction.rest)
    if instruction.opcode != "fusion" or not called:
        return [] if instruction.opcode in PASSED_ON else [instruction.opcode]
    inner = {one.name: one for one in computations[called[1]]}
    (root,) = (one for one in inner.values() if one.root)
    made = [root] if root.opcode != "tuple" else [inner[name] for name in root.operands]
    found = [_makers(_behind_bitcasts(one, inner), computations, wanted) for one in made]
    return [opcode for opcodes in found for opcode in opcodes]


def _behind_bitcasts(instruction: Instruction, inner: Mapping[str, Instruction]) -> Instruction:
    """What a bitcast shows in another shape."""
    while instruction.opcode == "bitcast":
        instruction = inner[instruction.operands[0]]
    return instruction
