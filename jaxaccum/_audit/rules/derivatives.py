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
from jaxaccum._audit.rules.control import unfollowed
from jaxaccum._audit.rules.operands import (
    Addends,
    Faults,
    all_fixed,
    all_numbered,
    all_with_faults,
    both,
    common,
    faulty,
    is_weighted,
    kinds_of,
    params_at_both,
)
from jaxaccum._audit.sources import Site
from jaxaccum._audit.walk import Op, ProgramsDifferError, Walk
from jaxaccum._base.source_lines import is_jax
from jaxaccum._jaxpr.compat import ClosedJaxpr
from jaxaccum._jaxpr.derivative_rules import WITH_RULES, backward, is_jaxs_own, rule_of
from jaxaccum._jaxpr.equations import body_of
from jaxaccum._jaxpr.variables import is_variable


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


def _faults(walk: Walk, op: Op, ins: list[Value], outs: list[Value]) -> Faults:
    """What is wrong with the backward pass."""
    primals: dict[jex.Var, Value] = {}
    for v, x in zip(op.eqn.invars, ins, strict=True):
        if is_variable(v):
            primals[v] = x.like(faults=frozenset())
    values = list(compress(outs, map(_is_inexact, op.eqn.outvars)))
    backward = _Backward(walk, op, primals, values)
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
    values: list[Value]
    """The results that have cotangents."""

    @property
    def origin(self) -> Site:
        """The first line of the user's rule."""
        rule = rule_of(self.op.eqn)
        own = rule if rule is not None and not is_jax(rule.file) else None
        return Site(self.op.eqn, self.walk.calls, defined=own)

    def faults(self, of: list[Value], *, unit: bool = False) -> Faults:
        """What is wrong with the results for the cotangents of these values; `unit`: no scales."""
        cotangents = [_dual(self.walk, self.op, x) for x in of]
        walk, op, count = self.walk, self.op, len(self.primals)
        moves = tuple(is_variable(v) and self.primals[v].params for v in op.eqn.invars)
        bodies = walk.derivatives.get((id(op.eqn), moves)) or _traced(walk, op, moves)
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


def _traced(walk: Walk, op: Op, moves: tuple[bool, ...]) -> tuple[ClosedJaxpr, ClosedJaxpr]:
    """The backward pass of one equation, at both sizes; kept, since faults are per equation."""
    pair = both(op, lambda eqn: backward(eqn, moves))
    walk.derivatives[id(op.eqn), moves] = pair
    return pair
