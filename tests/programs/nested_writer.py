"""What a nested program is made of: steps, the scope that they read from, and the writer of both.

Everything is drawn by one function `choose`, which picks one of the options that it is given: of
hypothesis, so that a failure shrinks, or of `random`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tests.programs.nested_words import COLLECTIVES, COMPUTED, LEAVES

Choose = Callable[[Sequence[Any]], Any]

WHAT_IS_NEXT = (
    ("nest", "nest", "leaf", "let"),
    ("nest", "leaf", "leaf", "let"),
    ("nest", "leaf", "leaf", "leaf"),
    ("leaf",),
)
"""What a step is, by its depth. A `nest` has steps inside, a `leaf` has none, and a `let` gives a
computed value a name that later steps read."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: its kind, the operands it reads, its lines of Python, and the steps inside it."""

    kind: str
    operands: tuple[str, ...]
    lines: tuple[str, ...]
    inner: tuple[Step, ...] = ()

    def walk(self, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Step]]:
        """This step and all inside it, each with the kinds of the steps around it."""
        yield above, self
        for step in self.inner:
            yield from step.walk((*above, self.kind))


@dataclasses.dataclass(frozen=True)
class Operand:
    """An expression and its kind, a letter of `nested_words`."""

    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class Scope:
    """What a block may read: expressions by kind. What is listed twice is read more often."""

    names: Mapping[str, tuple[str, ...]]
    path: tuple[str, ...] = ()
    """The kinds of the first steps, from here inwards; after them anything is drawn."""
    depth: int = 0
    collectives: bool = False

    def having(self, kind: str, *texts: str) -> Scope:
        """The same scope with more to read."""
        known = self.names.get(kind, ())
        return dataclasses.replace(self, names={**self.names, kind: (*known, *texts)})

    def without(self, *kinds: str) -> Scope:
        """The same scope with nothing of these kinds."""
        return dataclasses.replace(self, names={**self.names, **dict.fromkeys(kinds, ())})

    def inside(self, *, closed: bool = False, collectives: bool = False) -> Scope:
        """The scope of a block one deeper; a closed one sees nothing of what is outside."""
        return Scope(
            names={} if closed else self.names,
            path=self.path[1:],
            depth=self.depth + 1,
            collectives=self.collectives and collectives,
        )

    def fits(self, template: str) -> bool:
        """Whether there is something to read for every hole."""
        return all(self.names.get(kind) for kind in HOLE.findall(template))

    def has_computed(self, kind: str) -> bool:
        """Whether a value of this kind can be computed from what is there."""
        return any(map(self.fits, COMPUTED.get(kind, ())))

    def has(self, kind: str) -> bool:
        """Whether there is a value of this kind, as it is or computed."""
        return bool(self.names.get(kind)) or self.has_computed(kind)


HOLE = re.compile(r"\{(\w)\}")


class Writer:
    """Draws the operands, the leaves and the names of one program."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self._count = 0

    def fresh(self, prefix: str) -> str:
        """A name that no other part of the program has."""
        self._count += 1
        return f"{prefix}{self._count}"

    def operand(self, kind: str, scope: Scope) -> Operand:
        """Something that the scope holds, as it is or computed from that."""
        raw = scope.names.get(kind, ())
        as_it_is = not scope.has_computed(kind) or self.choose((True, True, False))
        if raw and as_it_is:
            return Operand(kind, self.choose(raw))
        return Operand(kind, self.computed(kind, scope)[0])

    def computed(self, kind: str, scope: Scope) -> tuple[str, list[str]]:
        """A value computed from what the scope holds, and what that is."""
        template = self.choose(list(filter(scope.fits, COMPUTED[kind])))
        return self.fill(template, lambda hole: self.choose(scope.names[hole]))

    def fill(self, template: str, draw: Callable[[str], str]) -> tuple[str, list[str]]:
        """A template with its holes filled, and what fills them.

        Every second time, a hole is filled as the one before of its kind: `hypot(w, w)`.
        """
        operands: list[str] = []
        last: dict[str, str] = {}

        def operand(hole: re.Match[str]) -> str:
            kind = hole[1]
            if kind not in last or self.choose((False, True)):
                last[kind] = draw(kind)
            operands.append(last[kind])
            return _in_parentheses(last[kind])

        return HOLE.sub(operand, template), operands

    def fill_freely(self, template: str, scope: Scope) -> tuple[str, list[str]]:
        """The same, with operands that are as they are, or computed."""
        return self.fill(template, lambda kind: self.operand(kind, scope).text)

    def operands(self, scope: Scope, kinds: str, *, most: int) -> list[Operand]:
        """A few; after the first, every second one is one of those before, once more."""
        drawn: list[Operand] = []
        for _ in range(self.choose(range(1, most + 1))):
            if drawn and self.choose((False, True)):
                drawn.append(self.choose(drawn))
            else:
                kind = self.choose(list(filter(scope.has, kinds)))
                drawn.append(self.operand(kind, scope))
        return drawn

    def leaf(self, scope: Scope) -> Step:
        """A step of the tables."""
        collective = scope.collectives and self.choose((False, False, True))
        return self.word(COLLECTIVES if collective else LEAVES, scope)

    def word(self, table: Mapping[str, str], scope: Scope) -> Step:
        """A step of one table."""
        name = self.choose([name for name, template in table.items() if scope.fits(template)])
        text, operands = self.fill_freely(table[name], scope)
        return Step(name, tuple(operands), tuple(text.split("\n")))

    def let(self, scope: Scope) -> tuple[Step, Scope]:
        """A value computed once, and the scope in which it is read as parameters are."""
        kind = self.choose(list(filter(scope.has_computed, "mmsv")))
        name = self.fresh("w")
        text, operands = self.computed(kind, scope)
        return Step("let", tuple(operands), (f"{name} = {text}",)), scope.having(kind, name, name)


def _in_parentheses(text: str) -> str:
    """So that `0.5 * a` can be indexed: whatever is no name, no call and not indexed already."""
    node = ast.parse(text, mode="eval").body
    alone = isinstance(node, ast.Name | ast.Call | ast.Subscript | ast.Attribute)
    return text if alone else f"({text})"


def joined(steps: Sequence[Step]) -> list[str]:
    """The lines of several steps."""
    return [line for step in steps for line in step.lines]


def function(name: str, arguments: Sequence[str], lines: Sequence[str]) -> list[str]:
    """The lines of a function."""
    return [f"def {name}({', '.join(arguments)}):", *(f"    {line}" for line in lines)]


def tupled(parts: Sequence[str]) -> str:
    """One expression of several: itself where there is one."""
    return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"
