"""The house: modules import from lower layers only, files stay short, and their first line says
what they are."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FLOORS = [
    ["_base"],
    ["_jaxpr"],
    ["_devices"],
    ["_program"],
    ["accumulators", "_flax", "_host_loop"],
    ["_loop", "_audit"],
    ["_coupled"],
    ["_transforms"],
    ["_tools"],
    ["__main__", "linen", "nnx", "checkpoints", "testing"],
]
"""The rooms of the library: each imports from the floors below it, and from itself."""
FLOOR_OF = {name: i for i, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(
    p
    for folder in ("jaxaccum", "torch_ref", "experiments", "tests")
    for p in (ROOT / folder).rglob("*.py")
)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
            )


def rooms(path):
    """The modules of the package that a file imports, by their first name."""
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == "jaxaccum" and len(parts) > 1}


def room_of(path):
    return path.relative_to(ROOT / "jaxaccum").parts[0].removesuffix(".py")


LIBRARY = [
    p for p in FILES if p.is_relative_to(ROOT / "jaxaccum") and p != ROOT / "jaxaccum/__init__.py"
]


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_rooms_import_from_the_floors_below(path):
    room = room_of(path)
    assert room in FLOOR_OF, f"{room} has no floor"
    upward = {
        other for other in rooms(path) & set(FLOOR_OF) - {room} if FLOOR_OF[other] >= FLOOR_OF[room]
    }
    assert not upward, f"{room} imports {upward}, which is not below it"


def modules_of(room):
    return {p.stem: p for p in LIBRARY if room_of(p) == room and p.stem != "__init__"}


@pytest.mark.parametrize(
    "room", [name for floor in FLOORS for name in floor if (ROOT / "jaxaccum" / name).is_dir()]
)
def test_no_module_of_a_room_imports_itself_by_a_detour(room):
    modules, reached = modules_of(room), {}
    for name, path in modules.items():
        imported = ours(path, room)
        others = [stem for stem in modules if stem != name]
        reached[name] = {stem for stem in others if any(f".{stem}" in x for x in imported)}
    for _ in modules:
        reached = {
            name: found.union(*(reached[other] for other in found))
            for name, found in reached.items()
        }
    assert not [name for name, found in reached.items() if name in found]


def ours(path, room):
    """What a file imports from its own room: ``jaxaccum.room.module.name``, each followed by a
    dot."""
    return [f"{name}." for name in imports(path) if name.startswith(f"jaxaccum.{room}.")]


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_what_is_private_or_experimental_in_jax_is_in_one_file(path):
    """So that a new version of JAX is one file's work. What ``jax.extend.core`` exports are public
    names."""
    found = [
        name
        for name in imports(path)
        if re.match(r"jax\._src|jax\.experimental|jax\.extend\.(?!core)", name)
    ]
    assert not found or path == ROOT / "jaxaccum/_jaxpr/compat.py"


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.is_relative_to(ROOT / "torch_ref")], ids=str
)
def test_the_oracle_knows_neither_jax_nor_us(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"jax", "flax", "optax", "jaxaccum", "experiments"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short_and_say_what_they_are(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "the first line of a file says its one idea"
    assert source.count("\n") <= (400 if path in LIBRARY else 500)


def test_one_vocabulary():
    """Other fields' words for the same things would make readers ask what the difference is."""
    foreign = ["mini" + "batch", "mini" + "-step", "accum" + "_steps", "micro" + "_batch"]
    for path in FILES:
        found = [word for word in foreign if word in path.read_text().lower()]
        assert not found, f"{path}: {found}"


def test_importing_the_package_imports_neither_torch_nor_hypothesis():
    code = (
        "import sys, jaxaccum; assert not {'torch', 'hypothesis', 'flax', 'optax'} & "
        "set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def declared():
    """The distributions that pyproject.toml names, with and without extras, as metadata spells
    them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {
        normal(re.match(r"[\w.-]+", requirement)[0]) for names in lists for requirement in names
    }


def normal(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def undeclared(names, distributions, declared):
    """The imported packages that no declared distribution brings. `names` have no modules of
    Python's or ours."""
    return {
        name for name in names if not {normal(x) for x in distributions.get(name, ())} & declared
    }


def test_every_import_is_declared():
    """Of packages that are installed here; all are where torch is."""
    ours = {"jaxaccum", "torch_ref", "experiments", "tests"}
    names = (
        {name.split(".")[0] for path in FILES for name in imports(path)}
        - sys.stdlib_module_names
        - ours
    )
    missing = {name for name in names if importlib.util.find_spec(name) is None}
    assert not missing or importlib.util.find_spec("torch") is None, f"not installed: {missing}"
    distributions = importlib.metadata.packages_distributions()
    found = undeclared(names - missing, distributions, declared())
    assert not found, f"pyproject.toml does not declare what brings {found}"
    assert undeclared(names - missing, distributions, declared() - {"orbax-checkpoint"}) == {
        "orbax"
    }


def test_without_orbax_an_import_says_what_to_install():
    code = "import sys; sys.modules['orbax'] = None; from jaxaccum import checkpoints"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "pip install 'jaxaccum[checkpoints]'" in result.stderr


def test_lint_and_types_are_clean():
    typed = (
        ["jaxaccum", "torch_ref", "experiments"]
        if importlib.util.find_spec("torch")
        else ["jaxaccum"]
    )
    for command in (["ruff", "check", "."], ["pyright", "--pythonpath", sys.executable, *typed]):
        result = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout
