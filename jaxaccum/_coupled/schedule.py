"""Choose which boundaries to store: the fastest schedule whose boundaries fit the memory."""

from __future__ import annotations

from jaxaccum._coupled.cut import Cuts
from jaxaccum._types import Memory


def stored(cuts: Cuts, memory: Memory) -> frozenset[int]:
    """The cuts whose boundary is kept for the full batch."""
    if memory == "min":
        return frozenset()
    return frozenset(range(1, cuts.last + 1))
