"""The public CI: its matrix is what pyproject.toml supports, and its commands are the README's."""

import copy
import pathlib
import re
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
TESTED = ["jax", "flax", "optax", "orbax-checkpoint"]


def rows(workflow):
    return workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]


def supported():
    """The versions of Python that the classifiers name."""
    named = re.findall(
        r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), flags=re.MULTILINE
    )
    assert named == sorted(named, key=Version)
    return named


def oldest():
    """Of each tested dependency, the bound that pyproject.toml gives."""
    extras = PROJECT["optional-dependencies"]
    requirements = map(Requirement, [*PROJECT["dependencies"], *extras["checkpoints"]])
    bounds = {r.name: str(r.specifier).removeprefix(">=") for r in requirements}
    return {name: bounds[name] for name in TESTED}


def disagreements(workflow):
    """What the matrix and the metadata say differently."""
    found = []
    pythons = [row["python"] for row in rows(workflow)]
    if list(dict.fromkeys(pythons)) != supported():
        found.append(f"Python: {pythons}, and the metadata {supported()}")
    if workflow["env"]["OLDEST"].split() != [
        f"{name}=={bound}" for name, bound in oldest().items()
    ]:
        found.append(f"oldest: {workflow['env']['OLDEST']}, and the metadata {oldest()}")
    tested = {(row["python"], row["jax"]) for row in rows(workflow)}
    wanted = {(python, jax) for python in supported() for jax in ("oldest", "latest")}
    missing = wanted - tested - {("3.11", "latest")}  # jax 0.10.2 is the last for Python 3.11
    return found + [f"not tested: {pair}" for pair in sorted(missing)]


def without_a_row(workflow):
    rows(workflow).pop()


def with_another_python(workflow):
    rows(workflow)[0]["python"] = "3.10"


def with_another_jax(workflow):
    workflow["env"]["OLDEST"] = workflow["env"]["OLDEST"].replace("jax==0.10.2", "jax==0.11.0")


def test_the_matrix_is_what_the_metadata_supports():
    assert disagreements(WORKFLOW) == []
    assert PROJECT["requires-python"] == f">={supported()[0]}"


@pytest.mark.parametrize("change", [without_a_row, with_another_python, with_another_jax])
def test_a_matrix_that_lacks_something_disagrees(change):
    changed = copy.deepcopy(WORKFLOW)
    change(changed)
    assert disagreements(changed)


def test_the_first_jax_beyond_the_matrix_of_python_3_11():
    """Why one pair of the matrix is left out: jax itself says which Pythons it takes."""
    from importlib.metadata import metadata

    jax = metadata("jax")
    takes = SpecifierSet(jax["Requires-Python"]).contains("3.11")
    assert takes == (Version(jax["Version"]) < Version("0.11"))


def plain(command):
    """A command without its environment's name, the version of Python, and line breaks."""
    return " ".join(
        re.sub(r"\.venv[-\w]*", ".venv", re.sub(r"python3\.\d+", "python3", command)).split()
    )


def commands(workflow):
    """Every command by which the workflow installs and runs, for each row of the matrix."""
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            if "-m venv" in (run := step.get("run", "")):
                for row in job.get("strategy", {}).get("matrix", {}).get("include", [{}]):
                    filled = run.replace("${{ matrix.extra }}", row.get("extra", ""))
                    yield row.get("python"), row.get("jax"), plain(filled)


def test_it_runs_the_commands_of_the_readme_and_of_contributing():
    papers = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    command = r"python3[.\d]* -m venv .*? -m (?:pytest -n 2(?: -m gpu)?|experiments)"
    found = re.findall(command, papers)
    of = {re.search(r"\[(.*)\]", command)[1]: plain(command) for command in found}
    ran = set(commands(WORKFLOW))
    assert {command for _, _, command in ran} == set(of.values())
    assert {
        ("3.11", "oldest", of["test"]),
        ("3.13", "latest", of["test-core"]),
        (None, None, of["experiments"]),
        (None, None, of["test,gpu"]),
    } <= ran


def test_it_cannot_write_and_its_actions_are_fixed():
    text = (ROOT / ".github/workflows/tests.yml").read_text()
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert all(
        re.fullmatch(r"\S+@[0-9a-f]{40} # v[\d.]+", use) for use in re.findall(r"uses: (.*)", text)
    )
