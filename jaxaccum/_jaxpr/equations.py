"""Jaxprs with other arguments, results or equations, and which axes an equation names."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax.interpreters import partial_eval

from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import ClosedJaxpr, anonymous, opened
from jaxaccum._jaxpr.variables import Atom, Var, is_variable

# -- other arguments and results -------------------------------------------------------------------


def with_invars(jaxpr: jex.Jaxpr, invars: list[Var]) -> jex.Jaxpr:
    """The jaxpr with these arguments and without constants."""
    return jaxpr.replace(constvars=[], invars=invars, debug_info=anonymous(jaxpr))


def with_outvars(jaxpr: jex.Jaxpr, outvars: list[Atom]) -> jex.Jaxpr:
    """The jaxpr with these results."""
    return jaxpr.replace(outvars=outvars, debug_info=anonymous(jaxpr))


def constants_first(jaxpr: jex.Jaxpr | ClosedJaxpr) -> tuple[jex.Jaxpr, list[Array]]:
    """The jaxpr whose first arguments are its constants, and the constants."""
    inner, consts = opened(jaxpr)
    return with_invars(inner, [*inner.constvars, *inner.invars]), consts


def retraced(fun: Callable[..., Any], types: Sequence[object], axis: tuple[str, int]) -> jex.Jaxpr:
    """The program of `fun` of arguments of these types, under a named axis.

    A compiled function inside of it has constants of its own. Where `fun` opens one, they become
    constants of the whole; they stand as literals where they are read.
    """
    jaxpr, consts = opened(jax.make_jaxpr(fun, axis_env=[axis])(*types))
    if not consts:
        return jaxpr
    literals = [jex.Literal(x, v.aval) for v, x in zip(jaxpr.constvars, consts, strict=True)]
    of = dict(zip(jaxpr.constvars, literals, strict=True))

    def here(atoms: Iterable[Atom]) -> list[Atom]:
        return [of.get(a, a) if is_variable(a) else a for a in atoms]

    eqns = [eqn.replace(invars=here(eqn.invars)) for eqn in jaxpr.eqns]
    return with_outvars(with_invars(jaxpr.replace(eqns=eqns), jaxpr.invars), here(jaxpr.outvars))


def without_unused(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """The jaxpr of the same arguments, without the equations that no output needs."""
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return with_invars(used, list(used.invars))


# -- other equations -------------------------------------------------------------------------------

Change = Callable[[jex.JaxprEqn], jex.JaxprEqn]


def changed(jaxpr: jex.Jaxpr, change: Change) -> jex.Jaxpr:
    """The jaxpr with every equation changed, at any depth; itself where none is."""
    eqns = [_changed_eqn(eqn, change) for eqn in jaxpr.eqns]
    return jaxpr if _same(eqns, jaxpr.eqns) else jaxpr.replace(eqns=eqns)


def _changed_eqn(eqn: jex.JaxprEqn, change: Change) -> jex.JaxprEqn:
    if (new := change(eqn)) is not eqn:
        return new
    params = changed_params(eqn, change)
    return eqn if _same(params.values(), eqn.params.values()) else eqn.replace(params=params)


def changed_params(eqn: jex.JaxprEqn, change: Change) -> dict[str, Any]:
    """The parameters of an equation, with the programs among them changed."""
    return {name: _changed_param(value, change) for name, value in eqn.params.items()}


def _changed_param(value: Any, change: Change) -> Any:
    if isinstance(value, ClosedJaxpr):
        jaxpr = changed(value.jaxpr, change)
        return value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr)
    if isinstance(value, jex.Jaxpr):
        return changed(value, change)
    if isinstance(value, tuple) and any(map(_is_closed, value)):
        new = [_changed_param(x, change) for x in value]
        structure = jax.tree.structure(value, is_leaf=_is_part)
        return value if _same(new, value) else jax.tree.unflatten(structure, new)
    return value


def _same(news: Iterable[object], olds: Iterable[object]) -> bool:
    """Whether nothing was changed."""
    return all(map(operator.is_, news, olds))


def _is_closed(x: object) -> bool:
    return isinstance(x, ClosedJaxpr)


def _is_part(x: object) -> bool:
    """Whether `x` is an entry of a parameter that is a tuple, or a named tuple, of jaxprs."""
    return not isinstance(x, tuple)


# -- what is inside --------------------------------------------------------------------------------


def equations_inside(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """All equations of a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        yield from inside(eqn)


def inside(eqn: jex.JaxprEqn) -> Iterator[jex.JaxprEqn]:
    """All equations of the jaxprs inside of an equation, at any depth."""
    for inner in jex.jaxprs_in_params(eqn.params):
        yield from equations_inside(inner)


def body_of(eqn: jex.JaxprEqn) -> str | None:
    """The parameter that holds the one body of a call."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if is_body(eqn.params.get(name)):
            return name
    return None


def is_body(param: object) -> bool:
    """Whether a parameter of an equation is a jaxpr, closed or not."""
    return isinstance(param, jex.Jaxpr | ClosedJaxpr)


def called(eqn: jex.JaxprEqn) -> jex.Jaxpr | ClosedJaxpr | None:
    """The program that an equation does nothing with but call it; None of any other equation."""
    if eqn.primitive.name not in _CALLS:
        return None
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]


_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "checkpoint", "remat", "remat2",
}  # fmt: skip
"""Jax 0.12 calls `closed_call` `eval_jaxpr`."""


# -- which axes are named --------------------------------------------------------------------------


def axes_of(eqn: jex.JaxprEqn) -> tuple[Any, ...]:
    """The named axes that the equation itself mentions."""
    names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return tuple(names) if isinstance(names, tuple | list) else (names,)


def mentions(jaxpr: jex.Jaxpr, axis_name: str) -> Iterator[jex.JaxprEqn]:
    """The equations, at any depth, that name the axis."""
    return _naming(axis_name, equations_inside(jaxpr))


def mentions_inside(eqn: jex.JaxprEqn, axis_name: str) -> Iterator[jex.JaxprEqn]:
    """The equations of the jaxprs inside of an equation that name the axis."""
    return _naming(axis_name, inside(eqn))


def _naming(axis_name: str, eqns: Iterable[jex.JaxprEqn]) -> Iterator[jex.JaxprEqn]:
    return (eqn for eqn in eqns if axis_name in axes_of(eqn))


def axes_in(jaxpr: jex.Jaxpr) -> set[str]:
    """Every axis that is mentioned, at any depth."""
    found: set[str] = set()
    for eqn in equations_inside(jaxpr):
        found |= {name for name in axes_of(eqn) if isinstance(name, str)}
    return found


def is_index(eqn: jex.JaxprEqn) -> bool:
    """Whether the equation asks for an index along an axis, and exchanges nothing."""
    return eqn.primitive.name == "axis_index"
