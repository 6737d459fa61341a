"""Jaxprs with other arguments, results or equations, and which axes an equation names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex

from jaxaccum._jaxpr.compat import ClosedJaxpr, anonymous


def with_invars(jaxpr: jex.Jaxpr, invars: list[Any]) -> jex.Jaxpr:
    """The jaxpr with these arguments, of which there are no constants."""
    return jaxpr.replace(constvars=[], invars=invars, debug_info=anonymous(jaxpr))


def with_outvars(jaxpr: jex.Jaxpr, outvars: list[Any]) -> jex.Jaxpr:
    """The jaxpr with these results."""
    return jaxpr.replace(outvars=outvars, debug_info=anonymous(jaxpr))


Change = Callable[[jex.JaxprEqn], jex.JaxprEqn]


def changed(jaxpr: jex.Jaxpr, change: Change) -> jex.Jaxpr:
    """The jaxpr with every equation changed, at any depth; itself where none is."""
    eqns = [_changed_eqn(eqn, change) for eqn in jaxpr.eqns]
    same = all(new is old for new, old in zip(eqns, jaxpr.eqns, strict=True))
    return jaxpr if same else jaxpr.replace(eqns=eqns)


def _changed_eqn(eqn: jex.JaxprEqn, change: Change) -> jex.JaxprEqn:
    if (new := change(eqn)) is not eqn:
        return new
    params = {name: changed_param(value, change) for name, value in eqn.params.items()}
    same = all(params[name] is value for name, value in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def changed_param(value: Any, change: Change) -> Any:
    if isinstance(value, ClosedJaxpr):
        jaxpr = changed(value.jaxpr, change)
        return value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr)
    if isinstance(value, jex.Jaxpr):
        return changed(value, change)
    if isinstance(value, tuple) and any(isinstance(x, ClosedJaxpr) for x in value):
        new = [changed_param(x, change) for x in value]
        same = all(x is y for x, y in zip(new, value, strict=True))
        return (
            value if same else jax.tree.unflatten(jax.tree.structure(value, is_leaf=_is_part), new)
        )
    return value


def _is_part(x: Any) -> bool:
    """Whether `x` is an entry of a parameter that is a tuple, or a named tuple, of jaxprs."""
    return not isinstance(x, tuple)


def axes_of(eqn: jex.JaxprEqn) -> tuple[Any, ...]:
    """The named axes that the equation itself mentions."""
    names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return tuple(names) if isinstance(names, tuple | list) else (names,)


def mentions(jaxpr: jex.Jaxpr, axis_name: str) -> Iterator[jex.JaxprEqn]:
    """The equations, at any depth, that name the axis."""
    for eqn in jaxpr.eqns:
        if axis_name in axes_of(eqn):
            yield eqn
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from mentions(sub, axis_name)


def axes_in(jaxpr: jex.Jaxpr) -> Iterator[str]:
    """Every axis that is mentioned, at any depth."""
    for eqn in jaxpr.eqns:
        yield from (name for name in axes_of(eqn) if isinstance(name, str))
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from axes_in(sub)


def mentioned(eqn: jex.JaxprEqn, axis_name: str, names: Callable[[str], bool]) -> bool:
    """Whether the jaxprs inside of the equation mention the axis in an equation of one of the
    names."""
    subs = jex.jaxprs_in_params(eqn.params)
    return any(names(inner.primitive.name) for sub in subs for inner in mentions(sub, axis_name))


def unchanged(eqn: jex.JaxprEqn, values: Sequence[Any], whole: jex.Jaxpr) -> list[Any]:
    """Evaluate one equation of `whole` as JAX does, by way of a jaxpr that holds it alone."""
    given = {
        v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, jex.Literal)
    }
    outvars = [v for v in eqn.outvars if not isinstance(v, jex.DropVar)]
    single = whole.replace(
        constvars=[], invars=list(given), outvars=outvars, eqns=[eqn], debug_info=anonymous(whole)
    )
    results = iter(jax.core.eval_jaxpr(single, [], *given.values()))
    return [None if isinstance(v, jex.DropVar) else next(results) for v in eqn.outvars]
