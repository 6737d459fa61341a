"""The table of rules: for each primitive, from what its operands are to what its results are.

A rule returns one `Value`, which then holds for all results, or a list with one for each. The walk
adds the faults of the operands to them, unless the rule returns `Settled`. A primitive without a
rule takes that of ``"*"``. A parameter that holds a size, or an axis's size, must be listed in
`twins`: else the programs of the two batch sizes differ before any rule is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from jaxaccum._audit.lattice import Value

Apply = Callable[..., Any]
"""``(walk, op, operands) -> Value | list[Value]``."""
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
    pointwise: bool = False
    """An entry of its result depends on the same entry of each operand alone."""
    scales: bool = False
    """It may turn scaled operands into a result without a scale."""


RULES: dict[str, Rule] = {}
IDENTITIES = (
    "copy", "copy_p", "device_put", "name", "sharding_constraint", "mesh_cast", "pvary",
    "optimization_barrier", "reshard",
)  # fmt: skip
"""Primitives that hand on their operands."""


def rule(names: str, **flags: bool) -> Callable[[_Function], _Function]:
    """Register a function for the primitives of these names, separated by spaces."""

    def register(apply: _Function) -> _Function:
        for name in names.split():
            assert name not in RULES, f"{name} has two rules"
            RULES[name] = Rule(apply, **flags)
        return apply

    return register


class Settled(list[Value]):
    """Results whose faults are complete: those of the operands were considered and are not to be
    added."""
