"""Fewer combinations of a test's parameters: each value of each of them, and all under `deep`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis

EVERY = 1000
"""The examples of a profile that runs every combination."""


def covering(*axes: Sequence[Any], every: bool | None = None) -> list[tuple[Any, ...]]:
    """Rows with one value of each axis, as many as the longest axis is long.

    Each value is in one row at least. Whenever a shorter axis starts anew, the second does so one
    place further on, the third two, so that their values do not always meet the same ones.

    Example:
        >>> covering("abcd", [1, 2])
        [('a', 1), ('b', 2), ('c', 2), ('d', 1)]
    """
    if hypothesis.settings.default.max_examples >= EVERY if every is None else every:
        return list(itertools.product(*axes))
    longest = max(map(len, axes))
    columns = [_column(axis, step, longest) for step, axis in enumerate(axes)]
    return list(zip(*columns, strict=True))


def _column(axis: Sequence[Any], step: int, length: int) -> list[Any]:
    """The values of one axis, row by row; it starts anew `step` places further on."""
    return [axis[(i + step * (i // len(axis))) % len(axis)] for i in range(length)]
