"""Every recipe is exact, its usual loop is not, and at most three lines differ."""

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

# By name, since this file is collected without torch too, with the recipes that do not need it.
recipes = importlib.import_module("experiments.recipes.__main__")
_check = importlib.import_module("experiments.recipes._check")
PAGE = pathlib.Path(__file__).parents[2] / "docs/pages/recipes.md"
NAMES = [name for name in recipes.names() if recipes.installed(name)]
pytestmark = pytest.mark.usefixtures("numerics_of_jax")


@pytest.fixture
def numerics_of_jax():
    """As a reader runs them, and not under the strict rules of these tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@functools.cache
def recipe(name):
    return importlib.import_module(f"experiments.recipes.{name}")


def rows_of_page():
    """The line of each recipe in the table: sentence, lines, both errors."""
    lines = re.findall(
        r"^\| \[`(\w+)`\]\(([^)]+)\) \| (.*) \| (\d) \| (\S+) \| (\S+) \|$", PAGE.read_text(), re.M
    )
    return {name: rest for name, *rest in lines}


@pytest.mark.parametrize("name", NAMES)
def test_ours_is_the_full_batch_and_the_usual_loop_is_not(name):
    found = recipe(name).check()
    assert found.ours < found.bound < 1e-4, "a bound of rounding"
    assert found.usual > found.bound, "the usual loop passes too: it is no control"
    link, sentence, lines, usual, ours = rows_of_page()[name]
    assert recipes.row(name, found).startswith(f"| [`{name}`]({link}) | {sentence} | {lines} | ")
    assert float(usual) == pytest.approx(found.usual, rel=0.06), "two digits"
    assert float(ours) < found.bound


@pytest.mark.parametrize("name", NAMES)
def test_at_most_three_lines_differ(name):
    lines = _check.changed_lines(recipe(name).plain, recipe(name).accumulated)
    assert 1 <= lines <= 3
    assert str(lines) == rows_of_page()[name][2]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_of_the_file_differs(name):
    """Both steps use the same functions of it: no line is moved to where it does not count."""
    used = [names_in(getattr(recipe(name), step)) for step in ("plain", "accumulated")]
    own = {key for key, value in vars(recipe(name)).items() if not inspect.ismodule(value)}
    assert used[0] & own == used[1] & own


def names_in(fun):
    return {
        node.id
        for node in ast.walk(ast.parse(inspect.getsource(fun)))
        if isinstance(node, ast.Name)
    }


def test_the_command_line_sets_float64_and_devices():
    options = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    options["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    command = [sys.executable, "-m", "experiments.recipes.pmap"]
    result = subprocess.run(
        command, cwd=PAGE.parents[2], env=options, capture_output=True, text=True
    )
    assert re.fullmatch(r"error against the full batch: ours \S+e-1\d, .*\n", result.stdout), (
        result.stderr
    )


def test_an_unknown_name_is_one_clear_line(capsys):
    with pytest.raises(SystemExit) as left:
        recipes.main(["pmap", "no_such"])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "unknown recipe no_such; choose from " in printed.err
    assert all(name in printed.err for name in recipes.names())


def test_help_tells_what_the_command_prints(capsys):
    with pytest.raises(SystemExit) as left:
        recipes.main(["--help"])
    assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "prints the documentation's table" in printed


def test_lines_are_counted():
    def one(x):
        """Before."""
        y = x + 1
        return y

    def other(x):
        """After."""
        # A comment.
        y = x + 2
        z = y
        return z

    assert _check.changed_lines(one, one) == 0
    assert _check.changed_lines(one, other) == 3


def head_of(name):
    return ast.get_docstring(ast.parse((recipes.FOLDER / f"{name}.py").read_text()))


def test_the_page_has_every_recipe_and_its_first_line():
    heads = {name: head_of(name) for name in recipes.names()}
    page = rows_of_page()
    assert list(page) == recipes.names()
    for name, (link, sentence, *_) in page.items():
        assert (PAGE.parent / link).resolve() == recipes.FOLDER / f"{name}.py"
        assert sentence == heads[name].splitlines()[0]
        assert f"\nCommand   python -m experiments.recipes.{name}" in heads[name]


def test_a_recipe_is_left_out_only_where_a_package_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name)
    )
    assert not recipes.installed("siglip")  # through the module that reads the digits
    assert recipes.installed("masked_tokens")
