"""Functions with a derivative rule of the user's own: `custom_jvp`, `custom_vjp`."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.core
import jax.extend.core as jex

from jaxaccum._base.source_lines import Frame, is_jax
from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import ClosedJaxpr, is_of_trace, opened
from jaxaccum._jaxpr.equations import body_of, equations_inside
from jaxaccum._jaxpr.variables import Var, differentiable, not_among, types_of, variables

WITH_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
"""Primitives of functions with a derivative rule."""

_WRAPPERS = ("custom_derivatives.py", "solves.py", "/ode.py")
"""Files of JAX whose rules are the user's own, given to `defjvps`, `custom_gradient` or
`custom_root`, or take steps whose size is chosen by the cotangent, as that of `odeint` does."""


def is_jaxs_own(eqn: jex.JaxprEqn) -> bool:
    """Whether JAX wrote the derivative rule; of a function of JAX's the rule may be the user's."""
    rule = rule_of(eqn)
    return rule is not None and is_jax(rule.file) and not rule.file.endswith(_WRAPPERS)


def of_users(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """The equations, at any depth, whose rules may read what is not part of the program."""
    for eqn in equations_inside(jaxpr):
        if eqn.primitive.name in WITH_RULES and _is_of_users(eqn):
            yield eqn


def _is_of_users(eqn: jex.JaxprEqn) -> bool:
    """Whether a rule is not one of JAX's, nor one that JAX gives to `defjvps` for a function of its
    own, such as `relu`."""
    rule, key = rule_of(eqn), body_of(eqn)
    if rule is None or key is None or not is_jax(rule.file):
        return True
    file = opened(eqn.params[key])[0].debug_info.func_filename or ""
    return rule.file.endswith(_WRAPPERS) and (not is_jax(file) or file.endswith(_WRAPPERS))


def rule_of(eqn: jex.JaxprEqn) -> Frame | None:
    """The first line of the user's derivative rule, as JAX noted it."""
    rule = eqn.params.get("bwd", eqn.params.get("jvp_jaxpr_fun"))
    debug = getattr(rule, "debug_info", None)
    file, line = getattr(debug, "func_filename", None), getattr(debug, "func_lineno", None)
    return Frame(file, line, debug.func_name) if debug is not None and file and line else None


def backward(eqn: jex.JaxprEqn) -> ClosedJaxpr:
    """A program of the operands and of the cotangents of the real results: the operands' own
    cotangents, and the results.

    An operand that has no cotangent is returned as it came: integers, and what the function closes
    over, with respect to which JAX derives no function that has a rule.
    """
    given = list(dict.fromkeys(variables(eqn.invars)))
    moved = differentiable(not_among(given, _closed_over(eqn)))
    outvars = differentiable(eqn.outvars)
    alone = jex.Jaxpr((), given, outvars, [eqn], eqn.effects, _debug_info())

    def pull(*arrays: Array) -> list[Array]:
        primals = dict(zip(given, arrays, strict=False))
        cotangents = list(arrays[len(given) :])

        def function(*moving: Array) -> list[Array]:
            operands = primals | dict(zip(moved, moving, strict=True))
            # The equations keep the frames of the rule.
            return jax.core.eval_jaxpr(alone, [], *operands.values(), propagate_source_info=False)

        values, backward = jax.vjp(function, *map(primals.__getitem__, moved))
        pulled = dict(zip(moved, backward(cotangents), strict=True))
        return [*(primals | pulled).values(), *values]

    return jax.make_jaxpr(pull)(*types_of([*given, *outvars]))


def _closed_over(eqn: jex.JaxprEqn) -> list[Var]:
    """The operands that the function closes over, and is not given as arguments."""
    count = eqn.params.get("num_consts", 0)
    return not_among(variables(eqn.invars[:count]), variables(eqn.invars[count:]))


def close_over(jaxpr: jex.Jaxpr, trace: object) -> bool:
    """Whether rules of the user's own in it close over what `trace` computes, which made it."""
    return any(_closes_over(eqn, trace) for eqn in of_users(jaxpr))


def _closes_over(eqn: jex.JaxprEqn, trace: object) -> bool:
    try:
        _, consts = opened(backward(eqn))
    except Exception:  # the user's rule may fail here in any way, as it will where it is run
        return False
    return any(is_of_trace(x, trace) for x in consts)


def _debug_info() -> jex.DebugInfo:
    return jax.make_jaxpr(lambda: 0)().jaxpr.debug_info._replace(arg_names=None, result_paths=None)
