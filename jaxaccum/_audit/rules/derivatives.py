"""Functions with a derivative of the user's own: the function, and its backward pass.

A backward pass is traced alone, for one equation, and walked like a program. It keeps the examples
apart if the cotangent of rows is rows, the cotangent of a parameter a sum over the examples, and
the cotangent of a statistic independent of them.

Cotangents have a scale too. An exact loss gives every row of a microbatch the cotangent that the
full batch gives it. What has been divided by the microbatch's size n before the rule gets n times
as much: the cotangent of a value of scale s has the scale 1 / s. A rule that is linear in its
cotangent hands the scale on. Another rule, one that clips the cotangent for example, loses it, and
its microbatches do not add up to the full batch.
"""

from __future__ import annotations

import dataclasses
from itertools import compress
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._audit import fixes
from jaxaccum._audit.cut_by_place import are_alike
from jaxaccum._audit.lattice import (
    HARMLESS,
    PLAIN,
    UNIT,
    Addend,
    Fault,
    FaultKind,
    Kind,
    Layout,
    Scale,
    Value,
    any_params,
    faults_of,
    fixed,
    rows,
    total,
)
from jaxaccum._audit.registry import rule
from jaxaccum._audit.rules.control import body_of, unfollowed
from jaxaccum._audit.rules.operands import (
    Addends,
    Faults,
    all_fixed,
    all_numbered,
    all_with_faults,
    avals_of,
    both,
    common,
    faulty,
    is_weighted,
    kinds_of,
    params_at_both,
)
from jaxaccum._audit.sources import Site, is_jax
from jaxaccum._audit.walk import Op, ProgramsDifferError, Walk
from jaxaccum._base.source_lines import Frame
from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import ClosedJaxpr, opened
from jaxaccum._jaxpr.variables import is_variable

WITH_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
"""Primitives of functions with a derivative rule."""


@rule(" ".join(WITH_RULES), complete=True)
def custom(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The function itself, and whether its derivative keeps the examples apart."""
    key = body_of(op.eqn)
    if key is None:
        return all_numbered(walk, unfollowed(walk, op, ins))
    outs = walk.body(op, params_at_both(op, key), ins)
    moves = any_params(ins) or not all_fixed(ins)
    moved = moves and any(map(_is_inexact, op.eqn.invars))
    wrong = all(map(_is_wrong, outs))  # whatever its derivative
    if not walk.checks_derivatives or not moved or wrong or is_jaxs_own(op.eqn):
        return outs
    faults = _faults(walk, op, ins, outs)
    return all_with_faults([_by_a_rule(walk, op, x) for x in outs], faults)


def _by_a_rule(walk: Walk, op: Op, x: Value) -> Value:
    """A result whose gradient is what the rule says: it cancels with nothing, as ``f(t) / t``
    does where f returns t."""
    if not x.params:
        return x
    if is_weighted(x):
        return walk.couple(op, [x], note=_SCALED, layout=x.layout)
    return x.like(number=walk.fresh(), root=None, weight=None)


_SCALED = "a ratio over one microbatch has a derivative of the user's own"


def _is_wrong(x: Value) -> bool:
    """Whether a value makes the loss inexact already."""
    return not kinds_of(x.faults) <= set(HARMLESS)


_WRAPPERS = ("custom_derivatives.py", "solves.py", "/ode.py")
"""Files of JAX whose rules are the user's own, given to `defjvps`, `custom_gradient` or
`custom_root`, or take steps whose size is chosen by the cotangent, as that of `odeint` does."""


def is_jaxs_own(eqn: jex.JaxprEqn) -> bool:
    """Whether JAX wrote the derivative rule; of a function of JAX's the rule may be the user's."""
    rule = _rule(eqn)
    return rule is not None and is_jax(rule.file) and not rule.file.endswith(_WRAPPERS)


def may_change(eqn: jex.JaxprEqn) -> bool:
    """Whether a derivative rule may read what is no part of the program: not one of JAX's, nor one
    that JAX gives to `defjvps` for a function of its own, such as `relu`."""
    key = body_of(eqn)
    file = "" if key is None else opened(eqn.params[key])[0].debug_info.func_filename or ""
    own = is_jax(file) and not file.endswith(_WRAPPERS)
    return not (own or is_jaxs_own(eqn))


def _faults(walk: Walk, op: Op, ins: list[Value], outs: list[Value]) -> Faults:
    """What is wrong with the backward pass."""
    primals: dict[jex.Var, Value] = {}
    for v, x in zip(op.eqn.invars, ins, strict=True):
        if is_variable(v):
            primals[v] = x.like(faults=frozenset())
    floating = list(map(_is_inexact, op.eqn.outvars))
    values = list(compress(outs, floating))
    backward = _Backward(walk, op, primals, floating, values)
    walk.checks_derivatives = False
    try:
        found = backward.faults(values)
        return frozenset([backward.not_linear()]) if found and backward.is_not_linear() else found
    except Exception as error:  # the user's rule may fail here in any way; the answer is the same
        reason = type(error).__name__
        if isinstance(error, ProgramsDifferError):
            reason = "it differs between the two batch sizes"
        note = f"the backward pass of a custom derivative rule could not be followed ({reason})"
        return faulty(walk, op, FaultKind.UNKNOWN, note)
    finally:
        walk.checks_derivatives = True


_NOT_LINEAR = (
    "the backward pass of a custom derivative rule is not linear in the cotangent, and here the "
    "cotangent depends on the microbatch"
)


@dataclasses.dataclass(frozen=True)
class _Backward:
    """The backward pass of one equation, which can be walked with any cotangents."""

    walk: Walk
    op: Op
    primals: dict[jex.Var, Value]
    floating: list[bool]
    """Which results have cotangents."""
    values: list[Value]
    """These results."""

    @property
    def origin(self) -> Site:
        """The first line of the user's rule."""
        rule = _rule(self.op.eqn)
        own = rule if rule is not None and not is_jax(rule.file) else None
        return Site(self.op.eqn, self.walk.calls, defined=own)

    def faults(self, of: list[Value], *, unit: bool = False) -> Faults:
        """What is wrong with the results for the cotangents of these values; `unit`: no scales."""
        cotangents = [_dual(self.walk, self.op, x) for x in of]
        walk, op, count = self.walk, self.op, len(self.primals)
        bodies = walk.derivatives.get(id(op.eqn)) or _traced(walk, op, self.floating)
        results = walk.body(op, bodies, [*self.primals.values(), *cotangents])
        # Under differentiation the forward rule runs instead of the function.
        values = results[count:]
        if list(map(_dependence, self.values)) != list(map(_dependence, values)):
            note = (
                "a custom derivative rule's forward pass depends on the batch in another way than "
                "the function itself"
            )
            return faulty(walk, op, FaultKind.UNKNOWN, note)
        found = faults_of(values)
        for (v, x), result in zip(self.primals.items(), results[:count], strict=True):
            if _is_inexact(v) and x.params and not x.overwritten:  # any other cotangent is dropped
                found |= self._mismatch(x, result, scale=UNIT if unit else _scale(x).inverse())
        return found

    def is_not_linear(self) -> bool:
        """Whether what fails is right for cotangents that do not depend on the microbatch."""
        if all_fixed(self.values):
            return True  # a linear function of a sum over the examples would be one too
        if all(_scale(x).trivial for x in self.values):
            return False
        plain = [x.but(terms=PLAIN) for x in self.values]
        return not self.faults(plain, unit=True)

    def not_linear(self) -> Fault:
        """That fault, with what to write instead."""
        fix = fixes.AFTERWARDS if all_fixed(self.values) else ""
        kind, origin = FaultKind.DERIVATIVE, self.origin
        return self.walk.fault(self.op, kind, _NOT_LINEAR, origin=origin, fix=fix)

    def _mismatch(self, x: Value, result: Value, *, scale: Scale) -> Faults:
        """What is wrong with the cotangent that a backward pass returns for x."""
        rows_alike = result.rows and result.layout == x.layout
        shared = result.fixed and not result.placed and are_alike([x, result])
        alike = rows_alike or shared if x.rows else result.kind is _DUAL[x.kind]
        apart = (alike and result.terms == {Addend(scale)}) or (result.fixed and result.zero)
        kinds = kinds_of(result.faults) - {FaultKind.ASSUMPTION}
        kinds = kinds or (set() if apart else {FaultKind.COUPLING})
        return frozenset(map(self._mixes, kinds))

    def _mixes(self, kind: FaultKind) -> Fault:
        note = f"the backward pass of a custom derivative rule mixes the examples ({kind})"
        return self.walk.fault(self.op, kind, note, origin=self.origin)


_DUAL = {Kind.FIXED: Kind.TOTAL, Kind.TOTAL: Kind.FIXED, Kind.STATISTIC: Kind.FIXED}
"""The cotangent of what all examples share is a sum over them; that of a statistic is a
constant."""


def _is_inexact(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _dependence(x: Value) -> tuple[Kind, Layout | None, Addends]:
    """How a value depends on the batch."""
    return x.kind, x.layout, x.terms


def _dual(walk: Walk, op: Op, out: Value) -> Value:
    """The cotangent of a value, where the loss is exact: with the inverse of its scale."""
    scale = _scale(out).inverse()
    terms = frozenset([Addend(scale)])
    known: dict[str, Any] = {"number": walk.fresh(), "by_order": out.by_order}
    if out.rows and out.layout is not None:
        return rows(out.layout, terms=terms, params=True, **known)
    if out.fixed:
        return total(walk.site(op), terms, params=True, **known)
    return fixed(scale, params=True, **known)


def _scale(x: Value) -> Scale:
    """The scale of a value's own addends: those of a total that depend on the batch."""
    scales = {term.scale for term in x.terms if not term.fixed}
    return common(scales)


def _rule(eqn: jex.JaxprEqn) -> Frame | None:
    """The first line of the user's derivative rule, as JAX noted it."""
    rule = eqn.params.get("bwd", eqn.params.get("jvp_jaxpr_fun"))
    debug = getattr(rule, "debug_info", None)
    file, line = getattr(debug, "func_filename", None), getattr(debug, "func_lineno", None)
    return Frame(file, line, debug.func_name) if debug is not None and file and line else None


def _traced(walk: Walk, op: Op, floating: list[bool]) -> tuple[ClosedJaxpr, ClosedJaxpr]:
    """The backward pass of one equation, at both sizes; kept, since faults are per equation."""
    pair = both(op, lambda eqn: _backward(eqn, floating))
    walk.derivatives[id(op.eqn)] = pair
    return pair


def _backward(eqn: jex.JaxprEqn, floating: list[bool]) -> ClosedJaxpr:
    """A program of the operands and of the cotangents: the operands' cotangents, and the results.

    An operand that has no cotangent is returned as it came.
    """
    given = list(dict.fromkeys(filter(is_variable, eqn.invars)))
    moved = list(filter(_is_inexact, given))
    outvars = list(compress(eqn.outvars, floating))
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

    return jax.make_jaxpr(pull)(*avals_of([*given, *outvars]))


def _debug_info() -> jex.DebugInfo:
    return jax.make_jaxpr(lambda: 0)().jaxpr.debug_info._replace(arg_names=None, result_paths=None)
