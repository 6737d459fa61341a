"""A plan as a table: one row per size of microbatch and schedule, and which row is best."""

from __future__ import annotations

import dataclasses

from jaxaccum._base import markup
from jaxaccum._base.types import Memory


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate: its sizes, and what one device needs for it, compiled or predicted."""

    microbatch_size: int
    num_microbatches: int
    memory: Memory
    """The schedule of a coupled loss, as `value_and_grad` takes it; None for every other."""
    temp_bytes: int
    """Activations and sums: what is neither an argument nor a result."""
    total_bytes: int
    """Arguments, results and temporary memory, each byte once where a result reuses an argument."""
    flops: float
    """Of the whole gradient on one device, every iteration of every loop counted."""
    compiled: bool
    """Whether the bytes are those of the compiled program, or predicted from two others."""
    predicted_temp_bytes: int | None
    """What the line through earlier programs predicted; None for the first programs."""
    fits: bool
    """Whether `total_bytes` are within the limit."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The candidates, smallest microbatch first, and the limit of one device's memory."""

    rows: tuple[Row, ...]
    memory_bytes: int
    coupled: bool = False
    refused: tuple[int, ...] = ()
    """Sizes of a microbatch that `fun` does not accept: those that cut its groups of examples."""

    @property
    def best(self) -> Row:
        """The largest compiled microbatch within the limit; of several, the one with least work."""
        largest = {row.memory: row for row in self.rows if row.fits and row.compiled}
        return min(largest.values(), key=lambda row: (row.flops, -row.microbatch_size))

    def __str__(self) -> str:
        table = [self._head(), *map(self._cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in table]
        return "\n".join([*lines, *self._foot()])

    def _repr_html_(self) -> str:
        """The same table in a notebook: the best row in bold, rows over the limit pale."""
        styles = {"best": "font-weight:bold", "over": "opacity:0.5", "": ""}
        rows = list(map(self._cells, self.rows))
        body = markup.table(self._head(), rows, styles=[styles[cells[0]] for cells in rows])
        foot = [markup.element("p", line) for line in self._foot()]
        return markup.joined([body, *foot], "\n")

    def _head(self) -> list[str]:
        sizes = ["", "microbatch_size", "num_microbatches"]
        return [*sizes, *self._schedule("memory"), "temporary", "total", "flops", ""]

    def _cells(self, row: Row) -> list[str]:
        """A row of the table; its first cell says whether it is the best, or over the limit."""
        within = "best" if row is self.best else ""
        return [
            within if row.fits else "over",
            str(row.microbatch_size),
            str(row.num_microbatches),
            *self._schedule(repr(row.memory)),
            _bytes(row.temp_bytes),
            _bytes(row.total_bytes),
            f"{row.flops:.3g}",
            "compiled" if row.compiled else "predicted",
        ]

    def _foot(self) -> list[str]:
        foot = [f"limit {_bytes(self.memory_bytes)} a device"]
        if self.refused:
            foot.append(f"not accepted by fun: microbatches of {', '.join(map(str, self.refused))}")
        return foot

    def _schedule(self, cell: str) -> list[str]:
        """The column of schedules, which only a coupled loss has."""
        return [cell] if self.coupled else []


def _bytes(count: float) -> str:
    units = ["B", "KiB", "MiB", "GiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.4g} {units[0]}"
