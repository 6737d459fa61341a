"""The package: what wheel and sdist hold, and a user's program with its dependencies alone."""

import ast
import email
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import jaxaccum
import jaxaccum.testing

ROOT = pathlib.Path(__file__).parents[2]
TESTS = pathlib.Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = ["flax", "optax", "orbax", "torch", "sklearn", "matplotlib", "rich", "hypothesis"]


def run(*command, cwd, check=True, **variables):
    """A process without the variables by which this one finds its modules."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))
    }
    clean.update(variables, XLA_FLAGS="")
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# -- wheel and sdist -------------------------------------------------------------------------------


def built(folder, *options):
    """What `python -m build` makes, offline."""
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        *options,
        "--outdir",
        folder,
        ROOT,
        cwd=folder,
    )
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    return built(tmp_path_factory.mktemp("dist"))


def library_files():
    files = [path for path in (ROOT / "jaxaccum").rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_library_and_its_licence(distributions):
    with zipfile.ZipFile(distributions[".whl"]) as wheel:
        names = set(wheel.namelist())
        (licence,) = [name for name in names if name.endswith("/licenses/LICENSE")]
        assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "jaxaccum/py.typed" in names
    assert {name for name in names if ".dist-info/" not in name} == library_files()


def test_the_sdist_is_what_a_rebuild_needs(distributions, tmp_path):
    """And the wheel made from it is that of the repository, byte for byte."""
    with tarfile.open(distributions[".gz"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    papers = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
    assert names - {"PKG-INFO", ".gitignore"} == {*library_files(), *papers, "pyproject.toml"}
    direct = built(tmp_path, "--wheel")[".whl"]
    assert direct.read_bytes() == distributions[".whl"].read_bytes()


def test_one_version_and_one_licence_everywhere(distributions):
    with zipfile.ZipFile(distributions[".whl"]) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
        metadata = email.message_from_bytes(wheel.read(name))
    citation = dict(
        re.findall(r"^(\w+): (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    )
    changelog = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    code = re.search(
        r'^__version__ = "(.*)"$', (ROOT / "jaxaccum/__init__.py").read_text(), flags=re.MULTILINE
    )
    assert {
        PROJECT["version"],
        metadata["Version"],
        citation["version"],
        changelog[0],
        code[1],
    } == {"0.1.0"}
    assert {PROJECT["license"], metadata["License-Expression"], citation["license"]} == {
        "Apache-2.0"
    }


# -- a user's environment --------------------------------------------------------------------------


def needed(requirements):
    """The distributions that these requirements bring, with the extras that they name."""
    found, todo = {}, [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in found:
            continue
        found[key] = importlib.metadata.distribution(requirement.name)
        for text in found[key].requires or []:
            other = Requirement(text)
            if applies(other.marker, {"", *requirement.extras}):
                todo.append(other)
    return found.values()


def applies(marker, extras):
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)


def link(distribution, folder):
    """The top-level files and packages of an installed distribution, in another folder."""
    tops = {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}
    for top in tops:
        place = folder / top
        if not place.exists():
            place.symlink_to(pathlib.Path(str(distribution.locate_file(top))).resolve())


class User:
    """A virtual environment with the wheel, and links to the dependencies that it names."""

    def __init__(self, folder, wheel, requirements):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.folder, self.python = folder, folder / "bin/python"
        (self.packages,) = folder.glob("lib/python*/site-packages")
        for distribution in needed(requirements):
            link(distribution, self.packages)
        self.pip("install", "--no-deps", "--no-index", "--quiet", wheel)
        for name in ("user_program.py", "user_mistakes.py"):
            shutil.copy(TESTS / name, folder)

    def pip(self, *command, check=True):
        return run(
            sys.executable,
            "-m",
            "pip",
            "--python",
            self.python,
            *command,
            cwd=self.folder,
            check=check,
        )

    def runs(self, *command, check=True):
        return run(self.python, *command, cwd=self.folder, check=check)


@pytest.fixture(scope="module")
def user(distributions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user") / "venv"
    return User(folder, distributions[".whl"], PROJECT["dependencies"])


def test_the_dependencies_that_are_named_are_enough(user):
    assert "No broken requirements" in user.pip("check").stdout
    (record,) = user.packages.glob("optax-*.dist-info")
    target = record.readlink()
    record.unlink()
    lacking = user.pip("check", check=False).stdout
    record.symlink_to(target)
    assert "jaxaccum 0.1.0 requires optax, which is not installed" in lacking


def test_a_program_is_exact_with_the_base_dependencies_alone(user):
    said = user.runs("user_program.py").stdout
    assert f"is exact, from {user.folder.resolve()}" in said
    absent = user.runs("-c", "import torch", check=False)
    assert "No module named 'torch'" in absent.stderr


def test_without_hypothesis_a_strategy_says_what_to_install(user):
    said = user.runs("-c", "from jaxaccum.testing import batches", check=False).stderr
    assert "pip install 'jaxaccum[testing]'" in said


def test_its_types_are_those_that_a_user_sees(user):
    """Pyright reads the installed wheel; each marked mistake is an error, and nothing else is."""
    settings = {"typeCheckingMode": "basic", "include": ["user_program.py", "user_mistakes.py"]}
    (user.folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", user.python, "--outputjson"]
    report = json.loads(run(*command, cwd=user.folder, check=False).stdout)
    found = {
        (pathlib.Path(error["file"]).name, error["range"]["start"]["line"], error["rule"])
        for error in report["generalDiagnostics"]
        if error["severity"] == "error"
    }
    lines = (TESTS / "user_mistakes.py").read_text().splitlines()
    marked = [(i, line.partition("# error: ")[2]) for i, line in enumerate(lines)]
    assert found == {("user_mistakes.py", i, rule) for i, rule in marked if rule}
    assert report["summary"]["filesAnalyzed"] == 2


WITHOUT_TYPE = {"jaxaccum.MultiSteps", "jaxaccum.checkpoints.error"}
"""optax, which has the first one's base, has no types; an ``except`` clause binds the second."""


def test_every_public_name_has_a_type(user):
    """But for those of the strategies, which a user without hypothesis cannot import."""
    command = [
        sys.executable,
        "-m",
        "pyright",
        "--verifytypes",
        "jaxaccum",
        "--ignoreexternal",
        "--outputjson",
    ]
    # With this option pyright asks the first Python on the PATH.
    path = f"{user.python.parent}{os.pathsep}{os.environ['PATH']}"
    found = json.loads(run(*command, cwd=user.folder, check=False, PATH=path).stdout)[
        "typeCompleteness"
    ]
    unknown = {
        symbol["name"]
        for symbol in found["symbols"]
        if symbol["isExported"] and not symbol["isTypeKnown"]
    }
    assert {
        name for name in unknown if not name.startswith("jaxaccum.testing.strategies")
    } <= WITHOUT_TYPE
    assert found["packageRootDirectory"] == str(user.packages.resolve() / "jaxaccum")
    assert found["exportedSymbolCounts"]["withKnownType"] > 150


# -- what an import brings -------------------------------------------------------------------------


def imported(*steps, without=()):
    """The top-level packages that a fresh interpreter holds after each step; all are installed."""
    show = "print(*{name.split('.')[0] for name, module in sys.modules.items() if module})"
    absent = [f"sys.modules[{name!r}] = None" for name in without]
    lines = ["import sys", *absent]
    for step in steps:
        lines += [step, show]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_importing_it_brings_jax_and_nothing_more_and_a_name_what_it_needs():
    jax = "import jax.numpy, jax.extend.core, jax.interpreters.partial_eval"
    names = [f"jaxaccum.{name}" for name in ("MultiSteps", "dynamic_loss_scale", "linen", "nnx")]
    before, after, *uses = imported(jax, "import jaxaccum", *names)
    assert after - before - sys.stdlib_module_names == {"jaxaccum"}
    assert not after & set(OPTIONAL)
    assert ["optax" in held for held in uses] == [True] * 4
    assert ["flax" in held for held in uses] == [False, False, True, True]
    assert not uses[-1] & {"torch", "sklearn", "matplotlib", "hypothesis"}


CORE = """
import jax, jax.numpy as jnp, jaxaccum, jaxaccum.testing
loss = lambda w, x: jaxaccum.Mean(jnp.sum((x @ w) ** 2), x.shape[0])
w, x = jnp.ones(2), jnp.arange(12.0).reshape(6, 2)
value, grads = jaxaccum.value_and_grad(loss, microbatch_size=4)(w, x)
assert jnp.array_equal(grads, jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w))
assert jaxaccum.audit(loss, w, x).exact
jaxaccum.testing.assert_exact(loss, w, x)
assert jaxaccum.plan(loss, w, x, memory_bytes=10**6, microbatch_size=4).best.fits
assert len(jaxaccum.partition(w, x, num_microbatches=3)) == 3
"""


def test_the_core_runs_where_flax_and_optax_are_absent():
    without = ["flax", "optax", "orbax", "hypothesis"]
    (held,) = imported(CORE, without=without)
    assert not held & set(without)


def exported(module):
    """The public names that its ``__init__.py`` imports, for users and for type checkers."""
    nodes = ast.walk(ast.parse(pathlib.Path(module.__file__).read_text()))
    aliases = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return sorted(alias.asname for alias in aliases if alias.asname)


@pytest.mark.parametrize("module", [jaxaccum, jaxaccum.testing])
def test_every_name_that_a_type_checker_sees_is_there(module):
    names = exported(module)
    assert len(names) > 10
    assert set(names) <= set(dir(module))
    assert [name for name in names if getattr(module, name, None) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'mean'"):
        getattr(module, "mean")  # noqa: B009
