"""The house: modules import from lower layers only, files stay short, and their first line says what they are."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [
    ["_types", "_source", "_jaxprs"],
    ["_tree", "_mesh", "_batch", "_flops"],
    ["_derived_once"],
    ["_running_sums", "_reversible", "_example_keys"],
    [
        "_check", "_closure", "_in_axes", "_no_gradient", "_tags", "_reduce", "_trace", "_moments", "_assignments",
        "_streams",
    ],
    ["_accumulators", "_arguments", "_outputs", "_returned", "_batch_norm", "_graph", "_unchecked"],
    ["_call", "_whole"],
    ["_program"],
    ["_prepare", "_compensated", "_skip_nonfinite", "_noise_scale"],
    ["_loop", "_partition", "_explicit", "_audit", "_finalize"],
    ["_coupled"],
    ["_direct"],
    ["_custom"],
    ["_microbatch", "_value_and_grad"],
    ["_step_if", "_traced_check", "_probe"],
    ["_lowering", "_audit_function"],
    ["_plan", "_multisteps"],
    ["_loss_scale"],
    ["accumulators", "linen", "nnx", "checkpoints"],
    ["__main__"],
    ["testing"],
]
LAYER_OF = {name: i for i, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(p for folder in ("jaxaccum", "torch_ref", "experiments", "tests") for p in (ROOT / folder).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ([f"{node.module}.{alias.name}" for alias in node.names] if node.module else [])


def rooms(path):
    """The modules of the package that a file imports, by their first name."""
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == "jaxaccum" and len(parts) > 1}


def room_of(path):
    return path.relative_to(ROOT / "jaxaccum").parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [p for p in FILES if "jaxaccum" in p.parts and p != ROOT / "jaxaccum/__init__.py"], ids=str
)
def test_modules_import_from_lower_layers(path):
    room = room_of(path)
    assert room in LAYER_OF, f"{room} has no layer"
    if room != "testing":
        assert all(LAYER_OF[other] < LAYER_OF[room] for other in rooms(path) & set(LAYER_OF) - {room})


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "torch_ref")], ids=str)
def test_the_oracle_knows_neither_jax_nor_us(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & {"jax", "flax", "optax", "jaxaccum", "experiments"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_short_and_say_what_they_are(path):
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)), "the first line of a file says its one idea"
    assert source.count("\n") <= 500


def test_one_vocabulary():
    """Other fields' words for the same things would make readers ask what the difference is."""
    foreign = ["mini" + "batch", "mini" + "-step", "accum" + "_steps", "micro" + "_batch"]
    for path in FILES:
        found = [word for word in foreign if word in path.read_text().lower()]
        assert not found, f"{path}: {found}"


def test_importing_the_package_imports_neither_torch_nor_hypothesis():
    code = (
        "import sys, jaxaccum; assert not {'torch', 'hypothesis', 'flax', 'optax'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def declared():
    """The distributions that pyproject.toml names, with and without extras, as metadata spells them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {normal(re.match(r"[\w.-]+", requirement)[0]) for names in lists for requirement in names}


def normal(distribution):
    return re.sub(r"[-_.]+", "-", distribution).lower()


def undeclared(names, distributions, declared):
    """The imported packages that no declared distribution brings. `names` have no modules of Python's or ours."""
    return {name for name in names if not {normal(x) for x in distributions.get(name, ())} & declared}


def test_every_import_is_declared():
    """Of packages that are installed here; all are where torch is."""
    ours = {"jaxaccum", "torch_ref", "experiments", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    names = {name.split(".")[0] for path in FILES for name in imports(path)} - sys.stdlib_module_names - ours
    missing = {name for name in names if importlib.util.find_spec(name) is None}
    assert not missing or importlib.util.find_spec("torch") is None, f"not installed: {missing}"
    distributions = importlib.metadata.packages_distributions()
    found = undeclared(names - missing, distributions, declared())
    assert not found, f"pyproject.toml does not declare what brings {found}"
    assert undeclared(names - missing, distributions, declared() - {"orbax-checkpoint"}) == {"orbax"}


def test_without_orbax_an_import_says_what_to_install():
    code = "import sys; sys.modules['orbax'] = None; from jaxaccum import checkpoints"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "pip install 'jaxaccum[checkpoints]'" in result.stderr


def test_lint_and_types_are_clean():
    typed = ["jaxaccum", "torch_ref", "experiments"] if importlib.util.find_spec("torch") else ["jaxaccum"]
    for command in (["ruff", "check", "."], ["pyright", "--pythonpath", sys.executable, *typed]):
        result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
