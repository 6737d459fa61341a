"""A program in order: some of its equations apart, and between them programs of all the others.

a = f x; b = g a; c = h b x; return c        with g apart
  ->  { x -> a: f },  g,  { b x -> c: h }
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import jax.extend.core as jex

from jaxaccum._jaxpr.compat import anonymous
from jaxaccum._jaxpr.variables import Var, among, operands_of, results_of, taken_by, variables


def segments(
    jaxpr: jex.Jaxpr, apart: Callable[[jex.JaxprEqn], bool]
) -> Iterator[jex.Jaxpr | jex.JaxprEqn]:
    """The equations for which `apart` is true, and between them jaxprs of all the others."""
    groups: list[list[jex.JaxprEqn]] = []
    alone: list[bool] = []
    for eqn in jaxpr.eqns:
        is_apart = apart(eqn)
        if is_apart or not alone or alone[-1]:
            groups.append([])
            alone.append(is_apart)
        groups[-1].append(eqn)
    for program, is_apart in zip(in_groups(jaxpr, groups), alone, strict=True):
        yield program.eqns[0] if is_apart else program


def in_groups(jaxpr: jex.Jaxpr, groups: Sequence[Sequence[jex.JaxprEqn]]) -> list[jex.Jaxpr]:
    """The equations of a jaxpr, divided into groups in their order: a jaxpr for each.

    It reads what it needs by its own variables, and returns what is read after it.
    """
    needed = set(variables(jaxpr.outvars))
    programs: list[jex.Jaxpr] = []
    for eqns in reversed(groups):
        programs.append(_program(jaxpr, eqns, needed))
        needed.update(operands_of(eqns))
    return programs[::-1]


def _program(jaxpr: jex.Jaxpr, eqns: Sequence[jex.JaxprEqn], needed: Collection[Var]) -> jex.Jaxpr:
    return jaxpr.replace(
        constvars=[],
        invars=taken_by(eqns),
        outvars=[*among(results_of(eqns), needed)],
        eqns=list(eqns),
        debug_info=anonymous(jaxpr),
    )
