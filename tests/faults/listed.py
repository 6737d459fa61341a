"""Would the tests notice? Deliberate faults in the library, one at a time, each with the test that
must catch it.

    python -m tests.faults.listed --all          # every fault, and that the tests pass without any
    python -m tests.faults.listed NAME…          # these alone
    python -m tests.faults.listed                # their names

A fault is a substitution in a temporary copy of the tree; nothing here is changed. The exit status
is 1 when a fault survives.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from tests.faults import (
    in_accumulators,
    in_arguments,
    in_audits,
    in_audits_of_order,
    in_audits_of_parts,
    in_audits_of_rules,
    in_audits_of_sums,
    in_coupled,
    in_derivative_rules,
    in_gradients,
    in_host_loop,
    in_keys,
    in_meshes,
    in_outputs,
    in_partitions,
    in_shared,
)
from tests.faults.fault import Fault

ROOT = pathlib.Path(__file__).parents[2]
PAPERS = ["README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"]
COPIED = ["jaxaccum", "torch_ref", "tests", "pyproject.toml", *PAPERS]


TABLES = [
    in_accumulators, in_arguments, in_audits, in_audits_of_order, in_audits_of_parts,
    in_audits_of_rules, in_audits_of_sums, in_coupled, in_derivative_rules, in_gradients,
    in_host_loop, in_keys, in_meshes, in_outputs, in_partitions, in_shared,
]  # fmt: skip
FAULTS: list[Fault] = [fault for table in TABLES for fault in table.FAULTS]


def run(tests: Sequence[str], fault: Fault | None = None) -> bool:
    """Whether the tests pass in a copy of the tree that has the fault."""
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        copy_tree(tree)
        if fault:
            fault.put_into(tree / "jaxaccum")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        nodes = [f"tests/{test}" for test in tests]
        result = subprocess.run(
            [*command, *nodes], cwd=tree, capture_output=True, text=True, timeout=600
        )
    if result.returncode not in (
        0,
        1,
    ):  # neither passed nor failed: a test that is not there, a file that cannot load
        raise RuntimeError(
            f"pytest stopped with {result.returncode}:\n{result.stdout}{result.stderr}"
        )
    return result.returncode == 0


def copy_tree(tree: pathlib.Path) -> None:
    """Copy what the tests need."""
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignored)
        else:
            shutil.copy(source, tree / name)


def rows(faults: Sequence[Fault]) -> Iterator[tuple[Fault, bool, float]]:
    """Each fault, whether its test caught it, and the seconds that took."""
    for fault in faults:
        start = time.perf_counter()
        caught = not run([fault.test], fault)
        yield fault, caught, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the faults that the command line names; 1 if one survives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="the faults to run")
    parser.add_argument("--all", action="store_true", help="run every fault")
    options = parser.parse_args(arguments)
    known = {fault.name: fault for fault in FAULTS}
    if unknown := set(options.names) - set(known):
        parser.error(f"no fault is called {sorted(unknown)}; they are {sorted(known)}")
    if not options.names and not options.all:
        print(*known, sep="\n")
        return 0
    chosen = FAULTS if options.all else [known[name] for name in options.names]
    if not run(sorted({fault.test for fault in chosen})):
        print("the tests fail without any fault")
        return 1
    survivors = 0
    for fault, caught, seconds in rows(chosen):
        survivors += not caught
        print(
            f"| {fault.name} | {fault.test if caught else 'SURVIVED'} | {seconds:.0f} s |",
            flush=True,
        )
    print(f"{len(chosen) - survivors} of {len(chosen)} faults caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
