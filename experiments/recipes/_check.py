"""What the recipes share: errors against the full batch, and how many lines differ."""

import ast
import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum.testing.bounds import normwise

EXACT = 1e-12
"""Normwise, in float64: room for thousands of roundings, and for nothing else."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far a step is from the full batch's: `ours` is below `bound`, `usual` above it."""

    ours: float
    usual: float
    bound: float = EXACT


def errors(
    *, full: Any, ours: Any, usual: Any, start: Any, plain: Any = None, bound: float = EXACT
) -> Errors:
    """How far two results are from the full batch's, each as its change from `start`.

    Where `full` is not the plain step's result, `plain` is, and has to be as exact as ours.
    """
    change = moved(full, start)
    if plain is not None:
        assert normwise(moved(plain, start), change) < bound, "the plain step is wrong"
    return Errors(
        normwise(moved(ours, start), change), normwise(moved(usual, start), change), bound
    )


def moved(new: Any, old: Any) -> Any:
    """What a step added to every leaf."""
    return jax.tree.map(lambda a, b: a - b, new, old)


def normal(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Parameters of these shapes, of the default dtype."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    pairs = zip(shapes, keys, strict=True)
    return {name: jax.random.normal(key, shapes[name]) / 4 for name, key in pairs}


def parts(batch: Any, count: int) -> list[Any]:
    """The batch in `count` microbatches of equal size."""

    def part(i: int) -> Any:
        return jax.tree.map(lambda x: x[i * len(x) // count : (i + 1) * len(x) // count], batch)

    return [part(i) for i in range(count)]


def zeros(tree: Any) -> Any:
    """Where a result starts that is not a change of something."""
    return jax.tree.map(jnp.zeros_like, tree)


def mean(trees: Sequence[Any]) -> Any:
    """What the usual loop makes of its gradients."""
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def wide(tree: Any) -> Any:
    """In float64, so that only a wrong rule is seen; integers and keys as they are."""

    def widened(x: Any) -> Any:
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widened, tree)


def changed_lines(before: Callable[..., Any], after: Callable[..., Any]) -> int:
    """How many lines of `before` one edits, adds or removes to have `after`.

    Names of the functions, indentation, comments and docstrings do not count.
    """
    old, new = _lines(before), _lines(after)
    steps = difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in steps if kind != "equal")


def _lines(fun: Callable[..., Any]) -> list[str]:
    """The lines of code as they are written."""
    source = textwrap.dedent(inspect.getsource(fun)).replace(f"def {fun.__name__}(", "def step(", 1)
    top = ast.parse(source).body[0]
    assert isinstance(top, ast.FunctionDef)
    first = top.body[0]
    said = range(first.lineno - 1, first.end_lineno or 0) if ast.get_docstring(top) else range(0)
    code = [line.strip() for i, line in enumerate(source.splitlines()) if i not in said]
    return [line for line in code if line and not line.startswith("#")]


def main(check: Callable[[], Errors]) -> None:
    """Run one recipe by itself, in float64 and on eight devices of the CPU."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 8)
    found = check()
    print(f"error against the full batch: ours {found.ours:.1e}, the usual loop {found.usual:.1e}")
    assert found.ours < found.bound < found.usual
