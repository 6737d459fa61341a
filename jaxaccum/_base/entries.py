"""Entries of a list by their places: read, replaced, and found."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def entries(values: Sequence[T], places: Iterable[int]) -> list[T]:
    """The entries at the given places, in the order of the places."""
    return [values[place] for place in places]


def with_entries(values: Iterable[T], places: Iterable[int], new: Iterable[T]) -> list[T]:
    """The list, with the entries at the given places replaced."""
    result = list(values)
    for place, value in zip(places, new, strict=True):
        result[place] = value
    return result


def places_of(flags: Iterable[bool]) -> list[int]:
    """Where the flags are true."""
    return list(itertools.compress(itertools.count(), flags))
