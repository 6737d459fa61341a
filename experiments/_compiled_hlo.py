"""How often the loops of a compiled program make a whole array, where a sum in place makes none.

A sum that is added to in place is an array that passes through a loop: a parameter of its body, an
entry of its state, the operand and the result of a `dynamic-update-slice` or `scatter` into a part.
Any other operation whose result has the shape of the whole sum makes a second array:
zeros to begin with, a gradient of every layer, the addition of two, a copy.

    %add.7 = f32[12,1024,1024]{2,1,0} add(%sum, %gradient)                      counts
    %update.3 = f32[12,1024,1024]{2,1,0} fusion(%sum, %slice), calls=%update    counts by its root
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from jaxaccum.testing import hlo
from jaxaccum.testing.hlo import Instruction, Program

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


def whole_results(text: str, shape: Sequence[int]) -> dict[str, int]:
    """The operations inside loops whose result has this shape and is a new array, by their kind:
    how often they run in one run of the program.

    Args:
        text: the program's HLO, as ``compiled.as_text()`` gives it.
        shape: of the array.
    """
    program = hlo.read(text)
    found: dict[str, int] = {}
    for instruction, times in _in_loops(program, program.entry, times=1, loops=0):
        for opcode in _makers(instruction, program, _dimensions(shape)):
            found[opcode] = found.get(opcode, 0) + times
    return found


def _in_loops(
    program: Program, name: str, *, times: int, loops: int
) -> Iterator[tuple[Instruction, int]]:
    """The instructions that some loop surrounds, and how often each runs."""
    for instruction in program.computations[name]:
        if loops:
            yield instruction, times
        if instruction.body is not None:
            trips = times * program.trips(instruction)
            yield from _in_loops(program, instruction.body, times=trips, loops=loops + 1)
        elif instruction.opcode == "call":
            (called,) = instruction.called
            yield from _in_loops(program, called, times=times, loops=loops)


def _dimensions(shape: Sequence[int]) -> re.Pattern[str]:
    """An array type of this shape, whatever its dtype and layout."""
    return re.compile(rf"\b[a-z]\w*\[{','.join(map(str, shape))}\]")


def _makers(instruction: Instruction, program: Program, wanted: re.Pattern[str]) -> list[str]:
    """The opcodes that make whole arrays of the wanted shape in one instruction; a fusion is what
    its root is, and a root that is a tuple what its entries are."""
    if not wanted.search(instruction.type):
        return []
    if instruction.opcode != "fusion":
        return [] if instruction.opcode in PASSED_ON else [instruction.opcode]
    inner = {one.name: one for one in program.computations[instruction.called[0]]}
    (root,) = (one for one in inner.values() if one.root)
    made = [root] if root.opcode != "tuple" else [inner[name] for name in root.operands]
    found = [_makers(_behind_bitcasts(one, inner), program, wanted) for one in made]
    return [opcode for opcodes in found for opcode in opcodes]


def _behind_bitcasts(instruction: Instruction, inner: Mapping[str, Instruction]) -> Instruction:
    """What a bitcast shows in another shape."""
    while instruction.opcode == "bitcast":
        instruction = inner[instruction.operands[0]]
    return instruction
