"""The command line: ``python -m jaxaccum audit module:function`` says if a loss accumulates.

`function` takes no arguments and returns what `jaxaccum.audit` takes: a tuple of the loss and its
arguments, arrays or ``jax.ShapeDtypeStruct``, or a dict that holds these as ``"fun"`` and
``"args"``, and the options by name. It may return an `AuditReport` too. The exit status is 0 for
exact, 1 for inexact, 2 for a wrong call, 3 for unknown.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxaccum._audit import AuditReport, Verdict
from jaxaccum._tools.audit import audit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxaccum", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("audit", help="say whether a loss can be accumulated exactly")
    command.add_argument(
        "target", metavar="module:function", help="a function that returns (loss, *arguments)"
    )
    command.add_argument("--num-microbatches", type=int, help="how many there will be")
    command.add_argument(
        "--probe", action="store_true", help="compare gradients numerically as well"
    )
    options = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    chosen: dict[str, Any] = {"probe": True} if options.probe else {}
    if options.num_microbatches is not None:
        chosen["num_microbatches"] = options.num_microbatches
    try:
        given = _load(options.target)()
        report = _report(given, chosen)
    except Exception as error:  # of the user's code, or of a call that does not fit it
        parser.error(f"{options.target}: {type(error).__name__}: {error}")
    if report is None:
        parser.error(
            f"{options.target} returned {type(given).__name__}; return (loss, *arguments), or a "
            "dict of options."
        )
    report.show()
    if report.exact:
        return 0
    return 3 if report.verdict is Verdict.UNKNOWN else 1


def _load(target: str) -> Callable[[], object]:
    module, _, name = target.partition(":")
    if not name:
        raise ValueError("name a function, as in train:loss_and_arguments")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _report(given: Any, chosen: dict[str, Any]) -> AuditReport | None:
    """The report on what the user's function returned; None where that is not a loss."""
    if isinstance(given, AuditReport):
        if chosen:
            raise ValueError(f"it returned a report; pass {', '.join(chosen)} to audit there.")
        return given
    if isinstance(given, dict):
        options = dict(given)
        if missing := {"fun", "args"} - set(options):
            raise ValueError(f"the dict lacks {', '.join(map(repr, sorted(missing)))}.")
        return audit(options.pop("fun"), *options.pop("args"), **(options | chosen))
    if isinstance(given, tuple | list) and given and callable(given[0]):
        return audit(*given, **chosen)
    return None


if __name__ == "__main__":
    sys.exit(main())
