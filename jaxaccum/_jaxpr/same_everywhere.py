"""Which results of a microbatch's program are the same for every microbatch.

The problem. The statistics that a BatchNorm returns follow from the batch, and yet every microbatch
returns the same ones, since a collective made them.

The idea. What differs has a mark, which flows from the arguments that differ (`flow`). A collective
over all microbatches takes it off.

    m = pmean x        x differs, m does not
    r = 0.9 s + m      r does not, if s does not
    y = x - m          y differs
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.extend.core as jex

from jaxaccum._jaxpr.compat import is_axis_effect
from jaxaccum._jaxpr.equations import axes_of, inside
from jaxaccum._jaxpr.flow import Marks, marks

COLLECTIVES = ("psum", "pmax", "pmin", "all_gather")
"""Those whose result is the same for every microbatch."""
_CASTS = ("pvary", "pcast")
"""They change what JAX says about a value, and not the value."""
_DIFFERS = 1


def differing(jaxpr: jex.Jaxpr, differ: Sequence[bool], axis: str) -> list[bool]:
    """Which results differ along the axis, if these arguments `differ`."""

    def rule(eqn: jex.JaxprEqn, operands: Marks) -> Marks:
        if _is_same(eqn) and axis in axes_of(eqn):
            return 0
        return operands | (_DIFFERS if _differs_by_itself(eqn, axis) else 0)

    return list(map(bool, marks(jaxpr, list(map(int, differ)), rule)))


def _is_same(eqn: jex.JaxprEqn) -> bool:
    """Whether it is a collective whose result is the same along its axes."""
    return eqn.primitive.name in COLLECTIVES and eqn.params.get("axis_index_groups") is None


def _differs_by_itself(eqn: jex.JaxprEqn, axis: str) -> bool:
    """Whether it asks for the place of the microbatch, for what another has, or for something
    outside of the program."""
    if not all(map(is_axis_effect, eqn.effects)):
        return True
    naming = [one for one in (eqn, *inside(eqn)) if axis in axes_of(one)]
    return not all(_is_same(one) or one.primitive.name in _CASTS for one in naming)
