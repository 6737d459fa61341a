"""One deliberate fault: a text inside a named function of the library, and what takes its place.

The function is found by its name, wherever its file is. So a fault survives that a file is renamed
or moved, and that the same text is written elsewhere.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Fault:
    """One substitution in one definition of the library, and the test that fails for it.

    `place` is a function (``function``, ``Class.method``, ``outer.inner``), a table (its variable),
    or a file (for its imports). The module's name comes before it where others have the same:
    ``module:function``. `old` occurs in it exactly once.
    """

    name: str
    place: str
    old: str
    new: str
    test: str

    def found(self, package: pathlib.Path) -> Definition:
        """The definition that holds the old text once; an error where that is none, or several."""
        named = definitions(package).get(self.place, ())
        times = [definition.text.count(self.old) for definition in named]
        if sum(times) != 1:
            raise ValueError(
                f"{self.name}: {self.old!r} occurs {sum(times)} times in {self.place}, of which "
                f"there are {len(named)}; it must occur once."
            )
        return named[times.index(1)]

    def applied(self, package: pathlib.Path) -> str:
        """The source of the file with the fault in it."""
        definition = self.found(package)
        source = definition.file.read_text()
        start, end = definition.start, definition.start + len(definition.text)
        return source[:start] + definition.text.replace(self.old, self.new) + source[end:]

    def put_into(self, package: pathlib.Path) -> None:
        """Write the fault into a copy of the package."""
        self.found(package).file.write_text(self.applied(package))


@dataclasses.dataclass(frozen=True)
class Definition:
    """A piece of a file that has a name."""

    file: pathlib.Path
    start: int
    text: str


@functools.lru_cache(maxsize=4)
def definitions(package: pathlib.Path) -> dict[str, list[Definition]]:
    """Every definition of a package by its name; several files may define the same name."""
    found: dict[str, list[Definition]] = {}
    for file in sorted(package.rglob("*.py")):
        source = file.read_text()
        found.setdefault(str(file.relative_to(package)), []).append(Definition(file, 0, source))
        starts = _starts(source)
        for name, first, last in _named(ast.parse(source)):
            text = source[starts[first - 1] : starts[last]]
            definition = Definition(file, starts[first - 1], text)
            found.setdefault(name, []).append(definition)
            found.setdefault(f"{file.stem}:{name}", []).append(definition)
    return found


def _starts(source: str) -> list[int]:
    """Where each line begins, and where the last one ends."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _named(tree: ast.AST, above: str = "") -> Iterator[tuple[str, int, int]]:
    """The names of definitions, each with its first line and its last."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{above}{node.name}"
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield name, first, node.end_lineno or first
            yield from _named(node, f"{name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(tree, ast.Module):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                yield ast.unparse(target), node.lineno, node.end_lineno or node.lineno
        else:
            yield from _named(node, above)
