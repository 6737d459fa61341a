"""Which derivatives a program has: in reverse or only forward, linear in the cotangent or perhaps
not, of what."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax.extend.core as jex

from jaxaccum._base.trees import is_inexact
from jaxaccum._jaxpr.compat import opened

_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "scan")
"""Equations whose operands are, in order, the arguments of the jaxpr inside."""


def equations_inside(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """All equations, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from equations_inside(inner)


def has_backward_rule(jaxpr: jex.Jaxpr) -> bool:
    """Whether it holds a ``jax.custom_vjp``: its backward rule may do to a cotangent what is not
    linear, as clip it."""
    return any(eqn.primitive.name.startswith("custom_vjp_call") for eqn in equations_inside(jaxpr))


def has_checks(jaxpr: jex.Jaxpr) -> bool:
    """Whether it holds a check of ``checkify``."""
    return any(eqn.primitive.name == "check" for eqn in equations_inside(jaxpr))


def is_reversible(jaxpr: jex.Jaxpr, moved: Sequence[bool]) -> bool:
    """Whether JAX has a reverse derivative with respect to the arguments that are `moved`.

    It has none through a ``while_loop``, and none through a ``custom_linear_solve`` without a
    transposed solve.
    """
    known = {v for v, moves in zip(jaxpr.invars, moved, strict=True) if moves}
    for eqn in jaxpr.eqns:
        operands = [not isinstance(v, jex.Literal) and v in known for v in eqn.invars]
        if not any(operands) or eqn.primitive.name == "stop_gradient":
            continue
        if not _eqn_is_reversible(eqn, operands):
            return False
        known.update(v for v in eqn.outvars if is_inexact(v.aval))
    return True


Movers = int
"""The arguments that a variable has a derivative with respect to: bit i is that of argument i."""


def movers(jaxpr: jex.Jaxpr, given: Sequence[Movers]) -> dict[Any, Movers]:
    """What each variable moves with; `given` is what the arguments move with. In doubt it moves."""
    found = dict(zip(jaxpr.invars, given, strict=True))
    for eqn in jaxpr.eqns:
        operands = [0 if isinstance(v, jex.Literal) else found.get(v, 0) for v in eqn.invars]
        if any(operands) and eqn.primitive.name != "stop_gradient":
            found.update(zip(eqn.outvars, _movers_of_results(eqn, operands), strict=True))
    return found


def _movers_of_results(eqn: jex.JaxprEqn, operands: Sequence[Movers]) -> list[Movers]:
    if eqn.primitive.name in _CALLS and eqn.primitive.name != "scan":
        inner, _ = opened(eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"])
        found = movers(inner, operands)
        return [0 if isinstance(v, jex.Literal) else found.get(v, 0) for v in inner.outvars]
    together = functools.reduce(operator.or_, operands)
    return [together if is_inexact(v.aval) else 0 for v in eqn.outvars]


def _eqn_is_reversible(eqn: jex.JaxprEqn, moved: list[bool]) -> bool:
    name = eqn.primitive.name
    if name == "while":
        return False
    if name == "custom_linear_solve":
        return eqn.params["jaxprs"].transpose_solve is not None
    if name == "cond":
        return all(is_reversible(opened(branch)[0], moved[1:]) for branch in eqn.params["branches"])
    if name not in _CALLS:
        return True
    inner, _ = opened(eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"])
    # What a scan carries moves as soon as anything does.
    moved = [is_inexact(v.aval) for v in inner.invars] if name == "scan" else moved
    return is_reversible(inner, moved)
