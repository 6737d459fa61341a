"""A program in order: some of its equations apart, and between them programs of all the others.

a = f x; b = g a; c = h b x; return c        with g apart
  ->  { x -> a: f },  g,  { b x -> c: h }
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax.extend.core as jex

from jaxaccum._jaxpr.compat import anonymous


def segments(
    jaxpr: jex.Jaxpr, apart: Callable[[jex.JaxprEqn], bool]
) -> Iterator[jex.Jaxpr | jex.JaxprEqn]:
    """The equations that stand apart, and between them jaxprs of those that do not.

    A jaxpr reads what it needs by its own variables, and returns what is read after it.
    """
    needed_after = _needed_after(jaxpr)
    pending: list[int] = []
    for i, eqn in enumerate(jaxpr.eqns):
        if apart(eqn):
            yield from _segment(jaxpr, pending, needed_after)
            yield eqn
            pending = []
        else:
            pending.append(i)
    yield from _segment(jaxpr, pending, needed_after)


def _segment(
    jaxpr: jex.Jaxpr, equations: list[int], needed_after: list[set[jex.Var]]
) -> Iterator[jex.Jaxpr]:
    if not equations:
        return
    eqns = [jaxpr.eqns[i] for i in equations]
    made = [v for eqn in eqns for v in eqn.outvars if not isinstance(v, jex.DropVar)]
    reads = dict.fromkeys(v for eqn in eqns for v in eqn.invars if not isinstance(v, jex.Literal))
    made_here = set(made)
    yield jaxpr.replace(
        constvars=[],
        invars=[v for v in reads if v not in made_here],
        outvars=[v for v in made if v in needed_after[equations[-1]]],
        eqns=eqns,
        debug_info=anonymous(jaxpr),
    )


def _needed_after(jaxpr: jex.Jaxpr) -> list[set[jex.Var]]:
    """For each equation, the variables that later equations or the outputs read."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    after = []
    for eqn in reversed(jaxpr.eqns):
        after.append(set(needed))
        needed |= {v for v in eqn.invars if not isinstance(v, jex.Literal)}
    return after[::-1]
