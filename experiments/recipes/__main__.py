"""The command line, `python -m experiments.recipes [NAME …]`: prints the documentation's table."""

import argparse
import ast
import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax

from experiments.recipes import _check

FOLDER = pathlib.Path(__file__).parent
HEAD = """| recipe | what it shows | lines that differ | error of the usual loop | error of ours |
|---|---|---|---|---|"""


def names() -> list[str]:
    """Every recipe: a module of this package without a leading underscore."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def installed(name: str) -> bool:
    """Whether all that a recipe imports is there; else it is left out, by this rule alone."""
    tops = {imported.split(".")[0] for imported in _imports(name)}
    return all(importlib.util.find_spec(top) for top in tops)


def _imports(name: str) -> Iterator[str]:
    """What a recipe imports, with the imports of those modules of this package that it uses."""
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        for imported in _imported(node):
            yield imported
            package, _, other = imported.rpartition(".")
            if package == "experiments.recipes":
                yield from _imports(other)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.module == "experiments.recipes":
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [node.module or ""]


def row(name: str, found: _check.Errors) -> str:
    """A recipe's line of the table."""
    recipe = importlib.import_module(f"experiments.recipes.{name}")
    lines = _check.changed_lines(recipe.plain, recipe.accumulated)
    head = (recipe.__doc__ or "").splitlines()[0]
    link = f"[`{name}`](../../experiments/recipes/{name}.py)"
    return f"| {link} | {head} | {lines} | {found.usual:.1e} | {found.ours:.1e} |"


def main(argv: Sequence[str]) -> None:
    """Print the table of the named recipes, or of all."""
    chosen = parser().parse_args(argv).names or filter(installed, names())
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 8)
    print(HEAD)
    for name in chosen:
        recipe = importlib.import_module(f"experiments.recipes.{name}")
        print(row(name, recipe.check()), flush=True)


def parser() -> argparse.ArgumentParser:
    """The names, each of a recipe that there is."""
    made = argparse.ArgumentParser(prog="python -m experiments.recipes", description=__doc__)
    made.add_argument("names", nargs="*", type=_recipe, metavar="NAME", help="none: all recipes")
    return made


def _recipe(name: str) -> str:
    if name not in names():
        known = ", ".join(names())
        raise argparse.ArgumentTypeError(f"unknown recipe {name}; choose from {known}")
    return name


if __name__ == "__main__":
    main(sys.argv[1:])
