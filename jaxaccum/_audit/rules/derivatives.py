"""Functions with a derivative of the user's own: the function, and the backward pass that stands
for it.

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
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._audit import fixes
from jaxaccum._audit.lattice import (
    HARMLESS,
    IRREGULAR,
    PLAIN,
    UNIT,
    Fault,
    FaultKind,
    Kind,
    Scale,
    Term,
    Value,
    fixed,
    rows,
    total,
)
from jaxaccum._audit.registry import rule
from jaxaccum._audit.rules.control import body_of, unfollowed
from jaxaccum._audit.sources import Site, is_jax
from jaxaccum._audit.walk import Op, ProgramsDifferError, Walk
from jaxaccum._base.source_lines import Frame


@rule("custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr", complete=True)
def custom(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The function itself, and whether its derivative keeps the examples apart."""
    key = body_of(op)
    if key is None:
        return [dataclasses.replace(v, number=walk.fresh()) for v in unfollowed(walk, op, ins)]
    bodies = op.params[key], op.other.params[key]
    outs = walk.body(op, bodies, ins)
    moved = any(v.params or not v.fixed for v in ins) and any(map(_is_inexact, op.eqn.invars))
    wrong = all(
        any(f.kind not in HARMLESS for f in v.faults) for v in outs
    )  # whatever its derivative
    if not walk.checks_derivatives or not moved or wrong or _is_jaxs_own(op):
        return outs
    faults = _faults(walk, op, ins, outs)
    return [dataclasses.replace(v, faults=v.faults | faults) for v in outs]


_WRAPPERS = ("custom_derivatives.py", "solves.py")
"""Files of JAX whose rules are the user's own, given to `defjvps`, `custom_gradient` or
`custom_root`."""


def _is_jaxs_own(op: Op) -> bool:
    """Whether JAX wrote the derivative rule; of a function of JAX's the rule may be the user's."""
    rule = _rule(op.eqn)
    return rule is not None and is_jax(rule.file) and not rule.file.endswith(_WRAPPERS)


def _faults(walk: Walk, op: Op, ins: list[Value], outs: list[Value]) -> frozenset[Fault]:
    """What is wrong with the backward pass."""
    given = _variables(op.eqn)
    by_variable = {
        v: x for v, x in zip(op.eqn.invars, ins, strict=True) if not isinstance(v, jex.Literal)
    }
    primals = [dataclasses.replace(by_variable[v], faults=frozenset()) for v in given]
    floating = [i for i, v in enumerate(op.eqn.outvars) if _is_inexact(v)]
    values = [outs[i] for i in floating]
    backward = _Backward(walk, op, primals, floating, values)
    walk.checks_derivatives = False
    try:
        found = backward.faults([_dual(walk, op, x) for x in values])
        return frozenset([backward.not_linear()]) if found and backward.is_not_linear() else found
    except Exception as error:  # the user's rule may fail here in any way; the answer is the same
        reason = (
            "differs between the sizes"
            if isinstance(error, ProgramsDifferError)
            else type(error).__name__
        )
        return frozenset(
            [
                walk.fault(
                    op, FaultKind.UNKNOWN, f"its backward pass could not be followed ({reason})"
                )
            ]
        )
    finally:
        walk.checks_derivatives = True


_NOT_LINEAR = (
    "its backward pass is not linear in the cotangent, which here depends on the microbatch"
)


@dataclasses.dataclass(frozen=True)
class _Backward:
    """The backward pass of one equation, which can be walked with any cotangents."""

    walk: Walk
    op: Op
    primals: list[Value]
    floating: list[int]
    values: list[Value]
    """The equation's results that have cotangents."""

    @property
    def origin(self) -> Site:
        """The first line of the user's rule."""
        rule = _rule(self.op.eqn)
        own = rule if rule is not None and not is_jax(rule.file) else None
        return Site(self.op.eqn, self.walk.calls, defined=own)

    def faults(self, cotangents: list[Value], *, unit: bool = False) -> frozenset[Fault]:
        """What is wrong with the results; `unit` says that the cotangents came without a scale."""
        walk, op, count = self.walk, self.op, len(self.primals)
        bodies = walk.derivatives.setdefault(id(op.eqn), None) or _traced(walk, op, self.floating)
        results = walk.body(op, bodies, [*self.primals, *cotangents])
        if not all(map(_alike, self.values, results[count:])):
            note = "its forward rule is another function of the batch"
            return frozenset([walk.fault(op, FaultKind.UNKNOWN, note)])
        # Under differentiation the forward rule runs instead of the function.
        found = frozenset().union(*(y.faults for y in results[count:]))
        for v, x, result in zip(_variables(op.eqn), self.primals, results[:count], strict=True):
            if _is_inexact(v) and x.params and not x.overwritten:  # any other cotangent is dropped
                found |= self._mismatch(x, result, scale=UNIT if unit else _scale(x).inverse())
        return found

    def is_not_linear(self) -> bool:
        """Whether what fails is right for cotangents that do not depend on the microbatch."""
        if all(x.fixed for x in self.values):
            return True  # a linear function of a sum over the examples would be one too
        if all(_scale(x).trivial for x in self.values):
            return False
        plain = [_dual(self.walk, self.op, x.but(terms=PLAIN)) for x in self.values]
        return not self.faults(plain, unit=True)

    def not_linear(self) -> Fault:
        """That fault, with what to write instead."""
        fix = fixes.AFTERWARDS if all(x.fixed for x in self.values) else ""
        kind, origin = FaultKind.DERIVATIVE, self.origin
        return self.walk.fault(self.op, kind, _NOT_LINEAR, origin=origin, fix=fix)

    def _mismatch(self, x: Value, result: Value, *, scale: Scale) -> frozenset[Fault]:
        """What is wrong with the cotangent that a backward pass returns for x."""
        rows_alike = result.rows and result.layout == x.layout
        alike = rows_alike or result.fixed if x.rows else result.kind is _DUAL[x.kind]
        apart = (alike and result.terms == {Term(scale)}) or (result.fixed and result.zero)
        kinds = {f.kind for f in result.faults} - {FaultKind.ASSUMPTION}
        kinds = kinds or (set() if apart else {FaultKind.COUPLING})
        notes = {kind: f"its backward pass mixes the examples ({kind})" for kind in kinds}
        fault = lambda kind: self.walk.fault(self.op, kind, notes[kind], origin=self.origin)
        return frozenset(map(fault, notes))


_DUAL = {Kind.FIXED: Kind.TOTAL, Kind.TOTAL: Kind.FIXED, Kind.STATISTIC: Kind.FIXED}
"""The cotangent of what all examples share is a sum over them; that of a statistic is a
constant."""


def _is_inexact(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.inexact)


def _alike(x: Value, y: Value) -> bool:
    return (x.kind, x.layout, x.terms) == (y.kind, y.layout, y.terms)


def _variables(eqn: Any) -> list[Any]:
    return list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal)))


def _dual(walk: Walk, op: Op, out: Value) -> Value:
    """The cotangent of a value, where the loss is exact: with the inverse of its scale."""
    scale = _scale(out).inverse()
    terms = frozenset([Term(scale)])
    if out.rows and out.layout is not None:
        return rows(out.layout, terms=terms, params=True, number=walk.fresh())
    if out.fixed:
        return total(walk.site(op), terms, params=True, number=walk.fresh())
    return fixed(scale, params=True, number=walk.fresh())


def _scale(x: Value) -> Scale:
    """The scale of a value's own addends: those of a total that depend on the batch."""
    scales = {term.scale for term in x.terms if not term.fixed}
    return scales.pop() if len(scales) == 1 else IRREGULAR


def _rule(eqn: Any) -> Frame | None:
    """The first line of the user's derivative rule, as JAX noted it."""
    rule = next((eqn.params[k] for k in ("bwd", "jvp_jaxpr_fun") if k in eqn.params), None)
    debug = getattr(rule, "debug_info", None)
    file, line = getattr(debug, "func_filename", None), getattr(debug, "func_lineno", None)
    return Frame(file, line, debug.func_name) if debug is not None and file and line else None


def _traced(walk: Walk, op: Op, floating: list[int]) -> tuple[Any, Any]:
    """The backward pass of one equation, at both sizes; kept, so that its equations keep their
    identities."""
    pair = (_backward(op.eqn, floating), _backward(op.other, floating))
    walk.derivatives[id(op.eqn)] = pair
    return pair


def _backward(eqn: Any, floating: list[int]) -> Any:
    given = _variables(eqn)
    debug = _debug_info()
    outvars = [eqn.outvars[i] for i in floating]
    alone = jex.Jaxpr((), given, outvars, [eqn], eqn.effects, debug)
    moved = [i for i, v in enumerate(given) if _is_inexact(v)]

    def pull(*arrays: Any) -> list[Any]:
        primals, cotangents = list(arrays[: len(given)]), list(arrays[len(given) :])

        def function(*values: Any) -> list[Any]:
            full = list(primals)
            for i, value in zip(moved, values, strict=True):
                full[i] = value
            return jax.core.eval_jaxpr(
                alone, [], *full, propagate_source_info=False
            )  # keeps the frames of the rule

        values, backward = jax.vjp(function, *(primals[i] for i in moved))
        by_place = dict(zip(moved, backward(cotangents), strict=True))
        return [*(by_place.get(i, primals[i]) for i in range(len(given))), *values]

    types = [v.aval for v in (*given, *outvars)]  # shapes alone would lose how a mesh divides them
    return jax.make_jaxpr(pull)(*types)


def _debug_info() -> Any:
    return jax.make_jaxpr(lambda: 0)().jaxpr.debug_info._replace(arg_names=None, result_paths=None)
