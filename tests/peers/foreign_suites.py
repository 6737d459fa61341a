"""JAX's, Flax nnx's and optax's own tests, with jaxaccum in the place of `jax.grad`.

    python -m tests.peers.foreign_suites --jax CHECKOUT --flax CHECKOUT --optax CHECKOUT
    python -m tests.peers.foreign_suites --jax CHECKOUT --suite custom_api --microbatches 2

A checkout is a clone of the library's repository at the version that is installed; nothing of it
is kept here. Each suite runs three times: with JAX's own gradients, which says which tests pass and
which take a gradient, and then those tests with 1 and with 2 microbatches (foreign_plugin.py). A
test in which jaxaccum can take no gradient is inapplicable. The exit status is 1 when a test fails
and the table `KNOWN` does not say why.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence

from tests.peers.foreign_plugin import APPLIED, Settings

ROOT = pathlib.Path(__file__).parents[2]
LIBRARIES = ("jax", "flax", "optax")


@dataclasses.dataclass(frozen=True)
class Suite:
    """One file of tests in a library's checkout."""

    name: str
    library: str
    file: str


SUITES = [
    Suite("api", "jax", "tests/api_test.py"),
    Suite("custom_api", "jax", "tests/custom_api_test.py"),
    Suite("shard_map", "jax", "tests/shard_map_test.py"),
    Suite("custom_linear_solve", "jax", "tests/custom_linear_solve_test.py"),
    Suite("custom_root", "jax", "tests/custom_root_test.py"),
    Suite("sparse_solvers", "jax", "tests/lax_scipy_sparse_test.py"),
    Suite("linalg", "jax", "tests/linalg_test.py"),
    Suite("control_flow", "jax", "tests/lax_control_flow_test.py"),
    Suite("nnx_transforms", "flax", "tests/nnx/transforms_test.py"),
    Suite("nnx_integration", "flax", "tests/nnx/integration_test.py"),
    Suite("nnx_references", "flax", "tests/nnx/mutable_array_test.py"),
    Suite("nnx_optimizer", "flax", "tests/nnx/optimizer_test.py"),
    Suite("microbatching", "optax", "optax/microbatching/_microbatching_test.py"),
]

KNOWN: list[tuple[str, str]] = [
    (
        r"CustomVJP\w*Test::test_(clip_gradient|closure_convert|custom_gradient_[23])$",
        "its backward rule is not linear: each of n microbatches hands it the cotangent 1 / n",
    ),
    (
        "test_bwd_rule_shape_mismatch_disable",
        "its backward rule returns another shape than the parameter's, with JAX's check off",
    ),
    ("test_ad_weak_types_grad", "the gradient of a Python number is not weakly typed"),
    ("test_grad_of_jit_compilation_caching2", "it counts compilations, and there are fewer"),
    (
        r"APITest::test_(grad_of_jit|jit_of_grad)$",
        "it counts traces, and the audit traces the loss once more, outside of the loop",
    ),
    (
        "test_no_cse_widget|test_platform_dependent_grad",
        "it wants a program without loops, and microbatches are a loop; XLA removes that of one",
    ),
    (
        "testSwitchResidualsMerge|test_scan_diff_of_print|test_res_forwarding_optimization",
        "it reads the program of the gradient, which lies in the body of a loop",
    ),
    (
        r"MicrobatchingTest::test_in_axes_(invariant|with_argnames)3$",
        "it concatenates what has no row for each example",
    ),
]
"""Why tests fail: a pattern of their names, and the reason."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What one test did in one run."""

    test: str
    outcome: str
    message: str
    counts: dict[str, int]
    refused: list[str]
    different: list[str]


def run(suite: Suite, checkout: pathlib.Path, settings: Settings) -> list[Record]:
    """What the tests of a suite did: they run unless their records are there already."""
    if not settings.log.exists():
        partial = dataclasses.replace(settings, log=settings.log.with_suffix(".partial"))
        partial.log.unlink(missing_ok=True)
        _run(suite, checkout, partial)
        partial.log.rename(settings.log)
    return [Record(**json.loads(line)) for line in settings.log.read_text().splitlines()]


def _run(suite: Suite, checkout: pathlib.Path, settings: Settings) -> None:
    plugins = ["-p", "foreign_plugin", "-p", "no:cacheprovider"]
    where = ["-c", os.devnull, "--rootdir", str(checkout)]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *where, suite.file]
    paths = [str(pathlib.Path(__file__).parent), str(ROOT), str(checkout / "tests")]
    devices = "--xla_force_host_platform_device_count=8"
    environment = {
        **os.environ,
        **settings.environment(),
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_FLAGS": devices,
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    passed_or_failed = (0, 1)
    if result.returncode not in passed_or_failed:  # a file that cannot load, or a crash
        raise RuntimeError(
            f"{suite.file}: pytest stopped with {result.returncode}:\n"
            f"{result.stdout}{result.stderr}"
        )


def applicable(records: Iterable[Record]) -> list[Record]:
    """The tests that pass with JAX's own gradients and take one that jaxaccum can take."""
    return [record for record in records if record.outcome == "passed" and APPLIED in record.counts]


def commonest(record: Record) -> str:
    """Why jaxaccum takes no gradient in a test."""
    return max(record.counts, key=lambda reason: record.counts[reason], default="take no gradient")


def inapplicable(baseline: Sequence[Record], records: Sequence[Record]) -> collections.Counter[str]:
    """How many tests jaxaccum takes no gradient in, by the reason."""
    reasons: collections.Counter[str] = collections.Counter()
    for record in baseline:
        if record.outcome != "passed":
            reasons[f"{record.outcome} with JAX's own gradients"] += 1
        elif APPLIED not in record.counts:
            reasons[commonest(record)] += 1
    reasons.update(commonest(record) for record in records if APPLIED not in record.counts)
    return reasons


def explanation(record: Record) -> str | None:
    """The reason of the table for a test's failure."""
    return next((reason for pattern, reason in KNOWN if re.search(pattern, record.test)), None)


def report(title: str, baseline: Sequence[Record], records: Sequence[Record], compare: bool) -> int:
    """Print what came of a run; the number of failures that nothing explains."""
    tried = [record for record in records if APPLIED in record.counts]
    failed = [x for x in tried if (x.different if compare else x.outcome != "passed")]
    others = inapplicable(baseline, records)
    print(
        f"{title}: {len(tried) - len(failed)} passed, {len(failed)} failed, "
        f"{sum(others.values())} inapplicable",
        flush=True,
    )
    for reason, count in others.most_common():
        print(f"    inapplicable {count}: {reason}")
    unexplained = 0
    for record in failed:
        reason = explanation(record)
        unexplained += reason is None
        said = record.different if compare else record.refused or [record.message]
        name = record.test.split("::", 1)[1]
        print(f"    failed {name}: {reason or 'NOT EXPLAINED'} [{said[0][:200]}]", flush=True)
    return unexplained


def examine(suite: Suite, checkout: pathlib.Path, options: argparse.Namespace) -> int:
    """Run one suite with JAX's own gradients and with each number of microbatches."""
    folder = options.records
    own = Settings(0, False, folder / f"{suite.name}-own", None)
    baseline = run(suite, checkout, own)
    only = folder / f"{suite.name}-applicable"
    only.write_text("\n".join(record.test for record in applicable(baseline)))
    unexplained = 0
    for count in options.microbatches if applicable(baseline) else []:
        variant = f"{count}{'-compared' if options.compare else ''}"
        log = folder / f"{suite.name}-{variant}"
        settings = Settings(count, options.compare, log, only)
        title = f"{suite.name}, N = {variant}"
        unexplained += report(title, baseline, run(suite, checkout, settings), options.compare)
    return unexplained


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites of the named checkouts; 1 where a failure is not explained."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, path = parser.add_argument, pathlib.Path
    for library in LIBRARIES:
        add(f"--{library}", type=path, metavar="CHECKOUT", help=f"a clone of {library}")
    add("--suite", nargs="*", choices=[suite.name for suite in SUITES], help="these alone")
    add("--microbatches", nargs="*", type=int, default=[1, 2], metavar="N")
    add("--compare", action="store_true", help="count results that differ from JAX's")
    add("--records", type=path, metavar="FOLDER", help="keep what ran, and do not repeat it")
    options = parser.parse_args(arguments)
    versions = (f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    print(*versions, sep=", ", flush=True)
    chosen = [suite for suite in SUITES if suite.name in (options.suite or [suite.name])]
    unexplained = 0
    with tempfile.TemporaryDirectory() as folder:
        options.records = (options.records or pathlib.Path(folder)).resolve()
        options.records.mkdir(parents=True, exist_ok=True)
        for suite in chosen:
            if (checkout := getattr(options, suite.library)) is not None:
                unexplained += examine(suite, checkout.resolve(), options)
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
