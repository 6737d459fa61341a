"""Which arguments each result of a microbatch's program depends on, found in one pass.

JAX can say it of one result at a time, by leaving out what that result does not need. A model with
a hundred states would be gone through a hundred times. So every argument has a mark, which flows to
the results (`flow`). One pass tells all, but where marks went through a loop or a branch: there the
result may depend on less, and JAX is asked (`is_vague`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.extend.core as jex

from jaxaccum._base.entries import places_of
from jaxaccum._jaxpr.compat import is_reference
from jaxaccum._jaxpr.equations import axes_of, inside, is_index
from jaxaccum._jaxpr.flow import Marks, marks

_VAGUE, _OUTSIDE, _FIRST = 1, 2, 2
"""The marks of a result that went through a loop or a branch, and of one that is coupled or depends
on the outside; the place of the mark of the first argument."""
_EVERYTHING = -1
"""The marks of what was written to a reference, or read from one."""


@dataclasses.dataclass(frozen=True)
class Dependencies:
    """What the results of a program depend on."""

    of_results: list[Marks]

    @classmethod
    def of(cls, jaxpr: jex.Jaxpr, axis_name: str) -> Dependencies:
        """Those of a program under a loop's axis."""

        def rule(eqn: jex.JaxprEqn, operands: Marks) -> Marks:
            if any(is_reference(v.aval) for v in (*eqn.invars, *eqn.outvars)):
                return _EVERYTHING
            every = [eqn, *inside(eqn)]
            if any(_is_outside(one, axis_name) for one in every):
                operands |= _OUTSIDE
            # JAX leaves nothing out of a custom rule.
            whole = len(every) == 1 or eqn.primitive.name.startswith("custom_")
            return operands | (0 if whole else _VAGUE)

        given = [1 << _FIRST + i for i in range(len(jaxpr.invars))]
        for i, v in enumerate(jaxpr.invars):
            if is_reference(v.aval):
                given[i] = _EVERYTHING
        return cls(marks(jaxpr, given, rule))

    def is_vague(self, result: int) -> bool:
        """Whether a result may depend on less than is said here."""
        return bool(self.of_results[result] & _VAGUE)

    def among(self, result: int, arguments: Sequence[bool]) -> bool:
        """Whether a result depends on these arguments at most, and on nothing outside."""
        return not self.of_results[result] & ~(_marked(arguments) | _VAGUE)

    def any(self, result: int, arguments: Sequence[bool]) -> bool:
        """Whether a result depends on any of these arguments."""
        return bool(self.of_results[result] & _marked(arguments))


def _is_outside(eqn: jex.JaxprEqn, axis_name: str) -> bool:
    """Whether it asks the host, or is a collective over the axis."""
    couples = axis_name in axes_of(eqn) and not is_index(eqn)
    return couples or eqn.primitive.name == "io_callback"


def _marked(arguments: Sequence[bool]) -> Marks:
    """The marks of some of the arguments."""
    return sum(1 << _FIRST + i for i in places_of(arguments))
