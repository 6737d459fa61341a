"""Functions with a derivative rule, `custom_jvp` and `custom_vjp`: whose rule it is, and its
backward pass."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from itertools import compress

import jax
import jax.core
import jax.extend.core as jex

from jaxaccum._base.source_lines import Frame, is_jax, is_of_package
from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import ClosedJaxpr, anonymous, opened
from jaxaccum._jaxpr.equations import body_of, equations_inside
from jaxaccum._jaxpr.variables import among, differentiable, types_of, variables

WITH_RULES = ("custom_jvp_call", "custom_vjp_call")
"""Primitives of functions with a derivative rule."""

_WRAPPERS = ("custom_derivatives.py", "solves.py", "/ode.py")
"""Files of JAX whose rules are the user's own, given to `defjvps`, `custom_gradient` or
`custom_root`, or take steps whose size is chosen by the cotangent, as that of `odeint` does."""


def is_jaxs_own(eqn: jex.JaxprEqn) -> bool:
    """Whether JAX wrote the derivative rule; of a function of JAX's the rule may be the user's."""
    rule = rule_of(eqn)
    return rule is not None and is_jax(rule.file) and not rule.file.endswith(_WRAPPERS)


def with_rules_of_users(jaxpr: jex.Jaxpr) -> Iterator[jex.JaxprEqn]:
    """The equations, at any depth, whose rules may read what is not part of the program."""
    for eqn in equations_inside(jaxpr):
        if eqn.primitive.name in WITH_RULES and _has_rule_of_user(eqn):
            yield eqn


def _has_rule_of_user(eqn: jex.JaxprEqn) -> bool:
    """Whether a rule is not one of JAX's or of this package, nor one that JAX gives to `defjvps`
    for a function of its own, such as `relu`."""
    rule = rule_of(eqn)
    if is_jaxs_own(eqn) or (rule is not None and is_of_package(rule.file)):
        return False
    key = body_of(eqn)
    function = None if key is None else opened(eqn.params[key])[0].debug_info
    return function is None or not _has_rule_of_jax(function.func_filename, function.func_name)


@functools.cache
def _has_rule_of_jax(file: str | None, name: str) -> bool:
    """Whether a module of JAX's has a function of this name that comes with a rule."""
    if file is None or not is_jax(file):
        return False
    modules = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == file]
    kinds = (jax.custom_jvp, jax.custom_vjp)
    return any(isinstance(getattr(module, name, None), kinds) for module in modules)


def rule_of(eqn: jex.JaxprEqn) -> Frame | None:
    """The first line of the user's derivative rule, as JAX noted it."""
    rule = eqn.params.get("bwd", eqn.params.get("jvp_jaxpr_fun"))
    debug = getattr(rule, "debug_info", None)
    file, line = getattr(debug, "func_filename", None), getattr(debug, "func_lineno", None)
    return Frame(file, line, debug.func_name) if debug is not None and file and line else None


def backward(eqn: jex.JaxprEqn, moves: Sequence[bool]) -> ClosedJaxpr:
    """A program of the operands and of the cotangents of the real results: the operands' own
    cotangents, and the results.

    An operand that has no cotangent is returned as it came: one that does not move, as `moves`
    says, and integers.
    """
    given = list(dict.fromkeys(variables(eqn.invars)))
    moved = differentiable(among(given, variables(compress(eqn.invars, moves))))
    outvars = differentiable(eqn.outvars)
    program = jex.Jaxpr((), given, outvars, [eqn], eqn.effects, _no_names())

    def pull(*arrays: Array) -> list[Array]:
        primals = dict(zip(given, arrays, strict=False))
        cotangents = list(arrays[len(given) :])

        def function(*moving: Array) -> list[Array]:
            operands = primals | dict(zip(moved, moving, strict=True))
            # The equations keep the frames of the rule.
            return jax.core.eval_jaxpr(program, [], *operands.values(), propagate_source_info=False)

        values, backward = jax.vjp(function, *map(primals.__getitem__, moved))
        pulled = dict(zip(moved, backward(cotangents), strict=True))
        return [*(primals | pulled).values(), *values]

    return jax.make_jaxpr(pull)(*types_of([*given, *outvars]))


@functools.cache
def _no_names() -> jex.DebugInfo:
    """The debug information of a jaxpr that has no names."""
    return anonymous(opened(jax.make_jaxpr(lambda: 0)())[0])
