"""The command line, `python -m experiments [NAME …] [--full]`: runs experiments, and fails if a
check does."""

import argparse
import importlib
import pkgutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import experiments
from experiments import _report
from experiments._compiled_devices import NoSuchDevice

DEFAULT = ("toy", "bert", "memory")
COMPILED = ("gpu", "tpu")  # for devices that may only be described
PICTURES = Path(__file__).parent / "pictures"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named experiments; 0 if every check held, 1 if one did not."""
    options = parser().parse_args(argv)
    unknown = sorted(set(options.names) - set(names()))
    if unknown:
        parser().error(f"unknown experiment {', '.join(unknown)}; choose from {', '.join(names())}")
    chosen = options.names or DEFAULT
    for name in (
        chosen
    ):  # before any runs: `public` asks for several host devices, and JAX must not have begun
        importlib.import_module(f"experiments.{name}")
    if options.on and set(chosen) - set(COMPILED):
        parser().error(f"--on is an option of {' and '.join(COMPILED)}")
    try:
        passed = [run(name, options) for name in chosen]
    except NoSuchDevice as error:
        parser().error(str(error))
    return 0 if all(passed) else 1


def run(name: str, options: argparse.Namespace) -> bool:
    """One experiment, shown and saved; whether its checks held."""
    start = time.perf_counter()
    places = {"topologies": tuple(options.on)} if options.on else {}
    record = importlib.import_module(f"experiments.{name}").run(
        full=options.full, track=_report.bar, **places
    )
    _report.show(record)
    _report.save(record, options.out)
    if options.save_docs:
        _report.save_picture(record, PICTURES)
    print(
        f"{name}: {time.perf_counter() - start:.0f} s, {options.out / name}.json, "
        f"{options.out / name}.png"
    )
    return record.passed


def names() -> list[str]:
    """Every experiment: a module of this package without a leading underscore."""
    modules = pkgutil.iter_modules(experiments.__path__)
    return [
        module.name for module in modules if not module.ispkg and not module.name.startswith("_")
    ]


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    made.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(names())}; none: {', '.join(DEFAULT)}"
    )
    made.add_argument(
        "--full", action="store_true", help="the long form of an experiment, where it has one"
    )
    made.add_argument(
        "--on",
        action="append",
        metavar="CHIP:SHAPE",
        help=f"what {' and '.join(COMPILED)} compile for, as h100:1x1x8 or v5e:2x2; repeatable",
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where JSON and pictures go",
    )
    made.add_argument(
        "--save-docs", action="store_true", help="also renew the pictures that the README shows"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
