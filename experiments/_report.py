"""What an experiment returns, and how it is shown: progress, table, JSON file and picture."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

# Okabe and Ito's palette: told apart by colour-blind readers, and in print.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK = "#0072B2", "#D55E00", "#CC79A7"
LIBRARIES = ("jax", "flax", "optax", "numpy", "torch", "transformers")

Track = Callable[
    [Sequence[Any], str], Iterable[Any]
]  # the items, while a bar with this title advances


@dataclasses.dataclass(frozen=True)
class Check:
    """A claim that holds when `value <= bound`."""

    claim: str
    value: float
    bound: float

    @property
    def passed(self) -> bool:
        """False also where the value is not a number."""
        return self.value <= self.bound


@dataclasses.dataclass(frozen=True)
class Record:
    """An experiment's outcome: `rows` are the table, `data` what the picture shows, `text` is
    printed as it stands."""

    name: str
    question: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    checks: Sequence[Check]
    figure: Figure
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)


def bar(items: Sequence[Any], title: str) -> Iterable[Any]:
    """The items, with a progress bar on the terminal."""
    return track(items, description=f"{title:<44}", transient=True)


def quiet(items: Sequence[Any], title: str) -> Iterable[Any]:
    """The items alone: for tests."""
    del title
    return items


def show(record: Record) -> None:
    """Print text, table and checks."""
    console = Console()
    console.print(f"\n[bold]{record.name}[/bold]  {record.question}\n", highlight=False)
    if record.text:
        print(record.text + "\n")
    first, *others = record.rows[0]
    table = Table(Column(first, no_wrap=True), *others)
    for row in record.rows:
        table.add_row(*map(cell, row.values()))
    console.print(table)
    for check in record.checks:
        mark = "[green]holds[/green]" if check.passed else "[red]FAILS[/red]"
        console.print(
            f"{mark}  {check.claim}: {check.value:.3g} ≤ {check.bound:.3g}", highlight=False
        )


def save(record: Record, directory: Path) -> None:
    """Write `NAME.json` and `NAME.png`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{record.name}.json").write_text(json.dumps(as_json(record), indent=1) + "\n")
    save_picture(record, directory)


def save_picture(record: Record, directory: Path) -> None:
    """Write `NAME.png` alone."""
    record.figure.savefig(directory / f"{record.name}.png", dpi=160)


def as_json(record: Record) -> dict[str, Any]:
    """Everything but the picture, in JSON's types."""
    return {
        "name": record.name,
        "question": record.question,
        "settings": dict(record.settings),
        "rows": [dict(row) for row in record.rows],
        "checks": [
            {**dataclasses.asdict(check), "passed": check.passed} for check in record.checks
        ],
        "passed": record.passed,
        "data": dict(record.data),
        "versions": {
            name: importlib.metadata.version(name) for name in LIBRARIES if _installed(name)
        },
    }


def panels(count: int, *, rows: int = 1, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` of `count` panels side by side, wide enough that a README column keeps the
    letters legible."""
    figure = Figure(figsize=(4.8 * count, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, count, i + 1) for i in range(rows * count)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def cell(value: Any) -> str:
    """A table's entry: numbers with three significant digits."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _installed(name: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=name)))
