"""Entries of a list, or of a dict, by their places: read, replaced, and found."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")


def entries(values: Sequence[T] | Mapping[int, T], places: Iterable[int]) -> list[T]:
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


def part_of(values: Mapping[K, T], keys: Iterable[K]) -> dict[K, T]:
    """Some of the entries of a dict, in the order of the keys."""
    return {key: values[key] for key in keys}
