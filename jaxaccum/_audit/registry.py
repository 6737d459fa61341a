"""The table of rules: for each primitive, a function from what its operands are to what its results
are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from jaxaccum._audit.lattice import Value

Apply = Callable[..., Any]
"""``(walk, op, operands) -> Value | list[Value]``; one value is that of all results."""
_Function = TypeVar("_Function", bound=Apply)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one family of primitives acts on values, and which of the walk's general checks it takes
    upon itself."""

    apply: Apply
    complete: bool = False
    """It walks a body: faults, numbers and all else are already those of its results."""
    uniform: bool = False
    """Applied to what is uniform along an axis, it gives what is uniform along that axis."""
    scales: bool = False
    """It may turn scaled operands into a result without a scale."""


RULES: dict[str, Rule] = {}


def rule(names: str, **flags: bool) -> Callable[[_Function], _Function]:
    """Register a function for the primitives of these names, separated by spaces."""

    def register(apply: _Function) -> _Function:
        for name in names.split():
            RULES[name] = Rule(apply, **flags)
        return apply

    return register


class Settled(list[Value]):
    """Results whose faults are complete: those of the operands were considered and are not to be
    added."""
