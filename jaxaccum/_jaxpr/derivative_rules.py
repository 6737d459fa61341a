"""Functions with a derivative rule, `custom_jvp` and `custom_vjp`: whose rule it is, its backward
pass, and whether it derives the loss as it derives a program of the loss.

The problem. A rule is a Python function, which JAX runs where it derives, and not where it traces.
One that is defined inside the loss may close over the batch, and in a traced program the batch of
the trace is gone. Or it reads a Python variable or a setting, which the loss has changed since.

The idea. The gradient is traced twice: of the loss, and of its program. Where the two programs are
not the same, the derivative calls the loss again, instead of its program.

    def loss(w, x):
        double = jax.custom_jvp(lambda z: 2 * z)
        double.defjvp(lambda p, t: (2 * p[0], t[0] * x))     # closes over x, a tracer of the trace

    def loss(w, x):
        for slope in (0.5, 2.0):                             # `slope` is 2.0 after the loop
            x = leaky(x @ w, lambda t: slope * t)

The cost. Where a loss has a rule of the user's own, its gradient is traced more often: of its
program twice, since a rule may read what it has changed itself. The weakness: the loss is called
without the value of the loop's index, and with its own closures. So it must not read
``axis_index``, nor close over what is differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import cast

import jax
import jax.core
import jax.extend.core as jex
import numpy as np

from jaxaccum._base.entries import entries, with_entries
from jaxaccum._base.source_lines import Frame, is_jax
from jaxaccum._base.trees import is_inexact
from jaxaccum._base.types import Array
from jaxaccum._jaxpr import derived_once
from jaxaccum._jaxpr.compat import ClosedJaxpr, anonymous, bound_axis, opened
from jaxaccum._jaxpr.equations import body_of, constants_first, equations_inside, without_unused
from jaxaccum._jaxpr.same_program import Program, are_equal
from jaxaccum._jaxpr.variables import (
    Type,
    among,
    differentiable,
    types_of,
    variables,
)

Fun = Callable[..., list[Array]]
"""A function of arrays."""

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
    """Whether a rule is not one of JAX's, nor one that JAX gives to `defjvps` for a function of its
    own, such as `relu`."""
    if is_jaxs_own(eqn):
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


@dataclasses.dataclass(frozen=True, eq=False)
class Original:
    """A function that was traced, its trace, and what it closed over."""

    fun: Fun
    jaxpr: jex.Jaxpr
    """A program of ``(index, *consts, *args)``; no index is read."""
    consts: Sequence[Array]
    axis: tuple[str, int]
    _known: dict[tuple[int, ...], bool] = dataclasses.field(default_factory=dict)

    def __call__(self, *args: Array) -> list[Array]:
        """Call the function again, under its axis, whose size may be read in Python."""
        with bound_axis(*self.axis):
            return self.fun(*args)

    def is_as_traced(self, moved: Sequence[int]) -> bool:
        """Whether the trace has the function's derivative with respect to those of ``(*consts,
        *args)`` at `moved`.

        It is taken to have it where constants are differentiated: called again, the function has
        no derivative with respect to these.
        """
        places = tuple(place - len(self.consts) for place in moved)
        if not self._has_rules or not places or min(places) < 0:
            return True
        if places not in self._known:
            self._known[places] = self._derives_alike(places)
        return self._known[places]

    @functools.cached_property
    def _has_rules(self) -> bool:
        return next(with_rules_of_users(self.jaxpr), None) is not None

    def _derives_alike(self, moved: Sequence[int]) -> bool:
        """Whether both have one derivative with respect to the arguments at `moved`, or none.

        A rule of the trace may read values of the trace, or of a ``jax.vmap`` inside the loss, that
        are gone: then the trace alone has none. Or it reads its values one after the other, and
        finds no more of them when it runs again.
        """
        types = types_of(self.jaxpr.invars[1 + len(self.consts) :])
        with bound_axis(*self.axis):
            ours = _derivative(self._evaluated, types, moved)
            theirs = _derivative(self.fun, types, moved)
            again = _derivative(self._evaluated, types, moved)
        if ours is None or theirs is None or again is None:
            return ours is theirs
        return are_equal(ours, theirs, again)

    def _evaluated(self, *args: Array) -> list[Array]:
        unread = cast(Array, np.int32(0))
        return derived_once.evaluate(self.jaxpr, [unread, *self.consts, *args])


def _derivative(fun: Fun, types: Sequence[Type], moved: Sequence[int]) -> Program | None:
    """The program of a function's results and gradients, and its constants; None where JAX or a
    rule raises an error, which comes again where the loss is derived."""

    def pull(*arrays: Array) -> list[Array]:
        def function(*moving: Array) -> tuple[list[Array], list[Array]]:
            outs = fun(*with_entries(arrays, moved, moving))
            return list(filter(is_inexact, outs)), outs

        # Each value is its own cotangent: any of the right type will do.
        values, backward, outs = jax.vjp(function, *entries(arrays, moved), has_aux=True)
        return [*outs, *backward(values)]

    try:
        jaxpr, consts = constants_first(jax.make_jaxpr(pull)(*types))
    except Exception:
        return None
    return without_unused(jaxpr), consts


@functools.cache
def _no_names() -> jex.DebugInfo:
    """The debug information of a jaxpr that has no names."""
    return anonymous(opened(jax.make_jaxpr(lambda: 0)())[0])
