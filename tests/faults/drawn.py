"""Which rules does no test hold? Faults drawn systematically from a module's source, one at a time.

    python -m tests.faults.drawn jaxaccum/_program/microbatches.py           # run its `TESTS`
    python -m tests.faults.drawn jaxaccum/_program/microbatches.py --list    # the faults alone

Every comparison is negated and moved by one; every guard, operand of `and` and selection is
dropped; every axis, reduction, sign and whole number is changed. A fault that no test notices is
printed as file:line with the change: write the test, or remove the code that the fault changes. The
faults are made in a temporary copy of the tree; nothing here is changed. The exit status is 1 when
one survives.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

from tests.faults.listed import ROOT, copy_tree

TESTS = {
    "_program/microbatches.py": [
        "plain/test_small_rules.py",
        "plain/test_partition.py",
        "plain/test_tags.py",
    ],
    "_devices/varying.py": [
        "plain/test_small_rules.py",
        "meshes/test_mesh.py",
        "meshes/test_data_parallel.py",
    ],
    "_host_loop/multisteps.py": [
        "host_loop/test_multisteps.py",
        "host_loop/test_multisteps_errors.py",
    ],
    "_program/reductions.py": ["plain/test_small_rules.py", "plain/test_tags.py"],
    "_base/trees.py": ["plain/test_small_rules.py", "plain/test_tags.py"],
}
"""The tests of each file, the fastest first."""
SAME = {
    "if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:": [
        "jnp.finfo(dtype).bits < 32 -> (jnp.finfo(dtype).bits <= 32)",  # float32 stays float32
        "32 -> 33",
    ],
    "return jnp.finfo(dtype).max if infinity > 0 else jnp.finfo(dtype).min": [
        "infinity > 0 -> (infinity >= 0)",  # one of two infinities
        "0 -> 1",
    ],
}
"""Changes that are no faults, by the line of source: the program computes the same."""

NEGATED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
MOVED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
SIGNS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
REDUCTIONS = {
    "sum": "max",
    "mean": "sum",
    "prod": "sum",
    "max": "min",
    "min": "max",
    "any": "all",
    "all": "any",
    "maximum": "minimum",
    "minimum": "maximum",
    "psum": "pmax",
    "pmax": "pmin",
    "pmin": "pmax",
    "pmean": "psum",
}
AXES = {"axis", "dim"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A piece of source, by its place in bytes, and what stands there instead."""

    line: int
    start: int
    end: int
    old: str
    new: str

    def applied(self, source: str) -> str:
        """The source with the fault in it."""
        text = source.encode()
        return (text[: self.start] + self.new.encode() + text[self.end :]).decode()

    @property
    def change(self) -> str:
        """The old text and the new one, in one line."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{old} -> {new}"

    def __str__(self) -> str:
        return f"{self.line}: {self.change}"


def faults(source: str) -> list[Fault]:
    """Every fault of a module, by line; none in annotations, errors or docstrings."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def fault(node: ast.expr | ast.pattern, new: str) -> Fault:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        return Fault(node.lineno, start, end, source.encode()[start:end].decode(), new)

    found = set()
    for node in _code(ast.parse(source)):
        found |= {fault(place, new) for place, new in _changes(node)}
    lines = source.splitlines()
    same = {x for x in found if x.change in SAME.get(lines[x.line - 1].strip(), ())}
    different = (x for x in found - same if x.old != x.new)
    return sorted(different, key=lambda x: (x.line, x.start, x.end, x.new))


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute something."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                yield from _code(child)


def _changes(node: ast.AST) -> Iterator[tuple[ast.expr | ast.pattern, str]]:
    """The places at one node that can be changed, each with its new text."""
    match node:
        case ast.Compare(ops=[operator]):
            for table in (NEGATED, MOVED):
                if type(operator) in table:
                    yield node, _text(node, ops=[table[type(operator)]()])
        case ast.If(test=test):
            yield test, "False"
        case ast.IfExp(body=body, orelse=other):
            yield node, _text(body)
            yield node, _text(other)
        case ast.comprehension(ifs=tests):
            for test in tests:
                yield test, "True"
        case ast.match_case(guard=None, pattern=pattern) if not _catches_all(pattern):
            yield pattern, "_ if False"
        case ast.BoolOp(values=operands):
            for operand in operands:
                yield (
                    node,
                    _text(node, values=[other for other in operands if other is not operand]),
                )
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, _text(operand)
        case ast.BinOp(op=sign) if type(sign) in SIGNS:
            yield node, _text(node, op=SIGNS[type(sign)]())
        case ast.Call():
            yield from _changes_of_call(node)
        case ast.Name(id=name, ctx=ast.Load()) if name in AXES:
            yield node, "0"
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            yield node, str(number + 1)


def _changes_of_call(node: ast.Call) -> Iterator[tuple[ast.expr, str]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in REDUCTIONS:
        yield node.func, ast.unparse(node.func).removesuffix(name) + REDUCTIONS[name]
    if name in ("where", "select") and len(node.args) == 3:
        yield node, _text(node.args[1])
        yield node, _text(node.args[2])
    for keyword in node.keywords:
        if keyword.arg in AXES:
            yield (
                node,
                _text(node, keywords=[other for other in node.keywords if other is not keyword]),
            )


def _catches_all(pattern: ast.pattern) -> bool:
    return isinstance(pattern, ast.MatchAs) and pattern.pattern is None


def _text(node: ast.expr, **changed: object) -> str:
    """The source of an expression, with other fields, in brackets: it may stand inside another."""
    other = copy.copy(node)
    for name, value in changed.items():
        setattr(other, name, value)
    if isinstance(other, ast.BoolOp) and len(other.values) == 1:
        other = other.values[0]
    text = ast.unparse(other)
    return (
        text
        if isinstance(other, ast.Name | ast.Call | ast.Constant | ast.Attribute)
        else f"({text})"
    )


def survivors(
    tree: pathlib.Path,
    file: str,
    tests: Sequence[str],
    *,
    timeout: float,
    say: Callable[[str], None] = print,
) -> list[Fault]:
    """The faults of a file in `tree` that none of the tests notices; the file is put back."""
    path = tree / file
    source = path.read_text()
    if not passes(tree, path, tests, timeout):
        raise RuntimeError(f"{tests} fail without any fault, or take more than {timeout} s")
    survived = []
    try:
        for fault in faults(source):
            path.write_text(fault.applied(source))
            if passes(tree, path, tests, timeout):
                survived.append(fault)
                say(f"{file}:{fault} SURVIVED")
    finally:
        path.write_text(source)
    return survived


def passes(tree: pathlib.Path, path: pathlib.Path, tests: Sequence[str], timeout: float) -> bool:
    """Whether the tests pass; they do not where they take more than `timeout` seconds."""
    # Python takes a file of the same second and length for the one that it compiled before.
    pathlib.Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    environment = {"HYPOTHESIS_PROFILE": "dev", **os.environ, "PYTHONPATH": str(tree)}
    try:
        result = subprocess.run(
            command, cwd=tree, capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return False
    if result.returncode == 5:  # pytest found no test
        raise RuntimeError(
            f"pytest stopped with {result.returncode}:\n{result.stdout}{result.stderr}"
        )
    return result.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the faults of the files that the command line names; 1 if one survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="modules of jaxaccum, as jaxaccum/_program/microbatches.py",
    )
    parser.add_argument("--list", action="store_true", help="print the faults, and run nothing")
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="for one fault"
    )
    options = parser.parse_args(arguments)
    count = survived = 0
    for file in options.files:
        every = faults((ROOT / file).read_text())
        count += len(every)
        if options.list:
            print(*(f"{file}:{fault}" for fault in every), sep="\n")
            continue
        tests = [f"tests/{test}" for test in TESTS[file.removeprefix("jaxaccum/")]]
        with tempfile.TemporaryDirectory() as folder:
            copy_tree(pathlib.Path(folder))
            survived += len(survivors(pathlib.Path(folder), file, tests, timeout=options.timeout))
    print(f"{count} faults" if options.list else f"{count - survived} of {count} faults caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
