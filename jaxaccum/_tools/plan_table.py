"""A plan as it is read: one row per size of microbatch and schedule, the best of them, as text and
as HTML."""

from __future__ import annotations

import dataclasses

from jaxaccum._base import markup
from jaxaccum._base.types import Memory


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate: its sizes, and what one device needs for it; bytes are compiled, or predicted
    where not."""

    microbatch_size: int
    num_microbatches: int
    memory: Memory
    """The schedule of a coupled loss, as `value_and_grad` takes it; None for every other."""
    temp_bytes: int
    """Beside arguments and results: activations and sums."""
    total_bytes: int
    """Arguments, results and temporary memory, each byte once where a result reuses an argument."""
    flops: float
    """Of the whole gradient on one device, every iteration of every loop counted."""
    compiled: bool
    """Whether the bytes are those of the compiled program, or predicted from two others."""
    predicted_temp_bytes: int | None
    """What the line through the programs compiled before said, kept beside the compiled figure;
    None for the first."""
    fits: bool
    """Whether `total_bytes` are within the limit."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The candidates, smallest microbatch first, and the limit; of a coupled loss, those of every
    schedule."""

    rows: tuple[Row, ...]
    memory_bytes: int
    coupled: bool = False
    refused: tuple[int, ...] = ()
    """Sizes of a microbatch that `fun` does not accept: those that cut its groups of examples."""

    @property
    def best(self) -> Row:
        """The largest microbatch within the limit; of several schedules' the one of fewest
        operations. Compiled."""
        largest = {row.memory: row for row in self.rows if row.fits and row.compiled}
        return min(largest.values(), key=lambda row: (row.flops, -row.microbatch_size))

    def __str__(self) -> str:
        table = [self._head(), *map(self._cells, self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for row in table:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([*lines, *self._foot()])

    def _repr_html_(self) -> str:
        """The same table in a notebook: the best row in bold, rows over the limit pale."""
        styles = {"best": "font-weight:bold", "over": "opacity:0.5", "": ""}
        rows = [self._cells(row) for row in self.rows]
        body = markup.table(self._head(), rows, styles=[styles[cells[0]] for cells in rows])
        return markup.joined([body, *(markup.element("p", line) for line in self._foot())], "\n")

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
