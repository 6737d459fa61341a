"""A program in order: some of its equations apart, and between them programs of all the others.

a = f x; b = g a; c = h b x; return c        with g apart
  ->  { x -> a: f },  g,  { b x -> c: h }
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax.extend.core as jex

from jaxaccum._jaxpr.compat import anonymous
from jaxaccum._jaxpr.variables import Var, among, results_of, taken_by, variables


def segments(
    jaxpr: jex.Jaxpr, apart: Callable[[jex.JaxprEqn], bool]
) -> Iterator[jex.Jaxpr | jex.JaxprEqn]:
    """The equations for which `apart` is true, and between them jaxprs of all the others.

    A jaxpr reads what it needs by its own variables, and returns what is read after it.
    """
    needed_after = _needed_after(jaxpr)
    pending: list[jex.JaxprEqn] = []
    for i, eqn in enumerate(jaxpr.eqns):
        if not apart(eqn):
            pending.append(eqn)
            continue
        if pending:
            yield _segment(jaxpr, pending, needed_after[i - 1])
        yield eqn
        pending = []
    if pending:
        yield _segment(jaxpr, pending, needed_after[-1])


def _segment(jaxpr: jex.Jaxpr, eqns: Sequence[jex.JaxprEqn], needed_after: set[Var]) -> jex.Jaxpr:
    return jaxpr.replace(
        constvars=[],
        invars=taken_by(eqns),
        outvars=[*among(results_of(eqns), needed_after)],
        eqns=list(eqns),
        debug_info=anonymous(jaxpr),
    )


def _needed_after(jaxpr: jex.Jaxpr) -> list[set[Var]]:
    """For each equation, the variables that later equations or the outputs read."""
    needed = set(variables(jaxpr.outvars))
    after: list[set[Var]] = []
    for eqn in reversed(jaxpr.eqns):
        after.append(set(needed))
        needed.update(variables(eqn.invars))
    return after[::-1]
