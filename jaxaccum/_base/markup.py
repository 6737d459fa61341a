"""HTML for notebooks: tables and source lines, in which all text of the user's is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is HTML already; any other text is escaped."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """The text as HTML that shows it, whatever signs are in it."""
    return text if isinstance(text, Markup) else Markup(html.escape(text))


def element(name: str, content: str, style: str = "") -> Markup:
    """One element around its content."""
    attribute = f' style="{style}"' if style else ""
    return Markup(f"<{name}{attribute}>{escaped(content)}</{name}>")


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """The parts, one after the other."""
    return Markup(between.join(escaped(part) for part in parts))


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    styles: Sequence[str] = (),
    cells: str = "",
) -> Markup:
    """A table; `styles` has the style of each row, `cells` that of every cell."""
    lines = [_row("th", head, "", cells)]
    for i, row in enumerate(rows):
        lines.append(_row("td", row, styles[i] if styles else "", cells))
    return element("table", joined(lines, "\n"))


def source(lines: Iterable[str]) -> Markup:
    """Lines of source as the audit prints them; those that it marks with ``>`` are highlighted."""
    shown = joined(map(_line, lines), "\n")
    return element("pre", shown, "text-align:left; margin:0") if shown else shown


def _row(name: str, row: Iterable[str], style: str, cells: str) -> Markup:
    return element("tr", joined(element(name, cell, cells) for cell in row), style)


def _line(line: str) -> Markup:
    return element("mark", line) if line.lstrip().startswith(">") else escaped(line)
