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

    Each value is in one row at least. A shorter axis starts anew one place further on each time, so
    that its values do not always meet the same ones.

    Example:
        >>> covering("abcd", [1, 2])
        [('a', 1), ('b', 2), ('c', 2), ('d', 1)]
    """
    if hypothesis.settings.default.max_examples >= EVERY if every is None else every:
        return list(itertools.product(*axes))
    longest = max(map(len, axes))
    return [tuple(_value(axis, i) for axis in axes) for i in range(longest)]


def _value(axis: Sequence[Any], i: int) -> Any:
    rounds, place = divmod(i, len(axis))
    return axis[(place + rounds) % len(axis)]
