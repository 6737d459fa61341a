"""Which results of a microbatch's program are the same for every microbatch.

The problem. The statistics that a BatchNorm returns follow from the batch, and yet every microbatch
returns the same ones, since a collective made them.

The idea. What differs is followed forward from the arguments that differ. A collective over all
microbatches ends it.

    m = pmean x        x differs, m does not
    r = 0.9 s + m      r does not, if s does not
    y = x - m          y differs

Calls and scans are followed equation by equation. Of any other equation with a program inside (a
loop of unknown length, a branch, a custom rule) all results differ, if one operand does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.extend.core as jex

from jaxaccum._jaxpr.compat import is_axis_effect, opened, scan_arity
from jaxaccum._jaxpr.equations import axes_of, called, inside
from jaxaccum._jaxpr.variables import Atom, Var, is_variable

COLLECTIVES = ("psum", "pmax", "pmin", "all_gather")
"""Those whose result is the same for every microbatch."""
_CASTS = ("pvary", "pcast")
"""They change what JAX says about a value, and not the value."""


def differing(jaxpr: jex.Jaxpr, differ: Sequence[bool], axis: str) -> list[bool]:
    """Which results differ along the axis, if these arguments `differ`."""
    own = set(itertools.compress(jaxpr.invars, differ))
    for eqn in jaxpr.eqns:
        results = _results(eqn, _among(eqn.invars, own), axis)
        own.update(itertools.compress(eqn.outvars, results))
    return _among(jaxpr.outvars, own)


def _among(atoms: Sequence[Atom], own: set[Var]) -> list[bool]:
    """Which of the atoms differ."""
    return [is_variable(v) and v in own for v in atoms]


def _results(eqn: jex.JaxprEqn, operands: list[bool], axis: str) -> list[bool]:
    """Which results of an equation differ."""
    if _is_same(eqn) and axis in axes_of(eqn):
        return [False] * len(eqn.outvars)
    if (program := called(eqn)) is not None:
        return differing(opened(program)[0], operands, axis)
    if eqn.primitive.name == "scan":
        return _of_scan(eqn, operands, axis)
    return [any(operands) or _differs_by_itself(eqn, axis)] * len(eqn.outvars)


def _is_same(eqn: jex.JaxprEqn) -> bool:
    """Whether it is a collective whose result is the same along its axes."""
    return eqn.primitive.name in COLLECTIVES and eqn.params.get("axis_index_groups") is None


def _of_scan(eqn: jex.JaxprEqn, operands: list[bool], axis: str) -> list[bool]:
    """Which results of a scan differ: what it carries differs from the step on in which it does."""
    body, (n, k) = opened(eqn.params["jaxpr"])[0], scan_arity(eqn.params)
    consts, carry, xs = operands[:n], operands[n : n + k], operands[n + k :]
    while True:
        results = differing(body, [*consts, *carry, *xs], axis)
        further = [a or b for a, b in zip(carry, results[:k], strict=True)]
        if further == carry:
            return [*carry, *results[k:]]
        carry = further


def _differs_by_itself(eqn: jex.JaxprEqn, axis: str) -> bool:
    """Whether it asks for the place of the microbatch, for what another has, or for something
    outside of the program."""
    if not all(map(is_axis_effect, eqn.effects)):
        return True
    naming = [one for one in (eqn, *inside(eqn)) if axis in axes_of(one)]
    return not all(_is_same(one) or one.primitive.name in _CASTS for one in naming)
