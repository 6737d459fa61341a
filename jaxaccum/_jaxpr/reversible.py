"""Which derivatives a program has: in reverse or only forward, linear in the cotangent or perhaps
not, with respect to which arguments."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence

import jax.extend.core as jex

from jaxaccum._base.trees import is_inexact
from jaxaccum._jaxpr.compat import opened
from jaxaccum._jaxpr.equations import called, equations_inside
from jaxaccum._jaxpr.variables import Atom, Var, bound, differentiable


def has_backward_rule(jaxpr: jex.Jaxpr) -> bool:
    """Whether it holds a ``jax.custom_vjp``: its backward rule may do to a cotangent what is not
    linear, such as clip it."""
    return any(eqn.primitive.name.startswith("custom_vjp_call") for eqn in equations_inside(jaxpr))


def holds(jaxpr: jex.Jaxpr, primitive: str) -> bool:
    """Whether it holds an equation of this name, at any depth."""
    return any(eqn.primitive.name == primitive for eqn in equations_inside(jaxpr))


def has_checks(jaxpr: jex.Jaxpr) -> bool:
    """Whether it holds a check of ``checkify``."""
    return holds(jaxpr, "check")


# -- in reverse ------------------------------------------------------------------------------------


def is_reversible(jaxpr: jex.Jaxpr, moved: Sequence[bool]) -> bool:
    """Whether JAX has a reverse derivative with respect to the arguments that are `moved`.

    It has none through a ``while_loop``, and none through a ``custom_linear_solve`` without a
    transposed solve.
    """
    known = set(itertools.compress(jaxpr.invars, moved))
    for eqn in jaxpr.eqns:
        operands = [not isinstance(v, jex.Literal) and v in known for v in eqn.invars]
        if not any(operands) or eqn.primitive.name == "stop_gradient":
            continue
        if not _eqn_is_reversible(eqn, operands):
            return False
        known.update(differentiable(eqn.outvars))
    return True


def _eqn_is_reversible(eqn: jex.JaxprEqn, moved: list[bool]) -> bool:
    name = eqn.primitive.name
    if name == "while":
        return False
    if name == "custom_linear_solve":
        return eqn.params["jaxprs"].transpose_solve is not None
    if name == "cond":
        return all(is_reversible(opened(branch)[0], moved[1:]) for branch in eqn.params["branches"])
    if name == "scan":
        inner, _ = opened(eqn.params["jaxpr"])
        # What a scan carries moves as soon as anything does.
        return is_reversible(inner, [is_inexact(v.aval) for v in inner.invars])
    program = called(eqn)
    return program is None or is_reversible(opened(program)[0], moved)


# -- of what ---------------------------------------------------------------------------------------

Movers = int
"""The arguments that a variable has a derivative with respect to: bit i is that of argument i."""


def movers(jaxpr: jex.Jaxpr, given: Sequence[Movers]) -> dict[Var, Movers]:
    """What each variable moves with; `given` is what the arguments move with. In doubt it moves."""
    found = bound(jaxpr.invars, given)
    for eqn in jaxpr.eqns:
        operands = movers_of(eqn.invars, found)
        if any(operands) and eqn.primitive.name != "stop_gradient":
            found |= bound(eqn.outvars, _movers_of_results(eqn, operands))
    return found


def movers_of(atoms: Iterable[Atom], found: Mapping[Var, Movers]) -> list[Movers]:
    """What each operand moves with; a literal, and what is not found, moves with nothing."""
    return [0 if isinstance(v, jex.Literal) else found.get(v, 0) for v in atoms]


def _movers_of_results(eqn: jex.JaxprEqn, operands: Sequence[Movers]) -> list[Movers]:
    program = called(eqn)
    if program is not None:
        inner, _ = opened(program)
        return movers_of(inner.outvars, movers(inner, operands))
    together = functools.reduce(operator.or_, operands)
    return [together if is_inexact(v.aval) else 0 for v in eqn.outvars]
