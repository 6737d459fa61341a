"""Functions with a derivative of the user's own: the function, and the backward pass that stands for it.

A backward pass is traced alone, of one equation, and walked like a program. It keeps the examples apart if the
cotangent of rows is rows, that of a parameter a sum over the examples, and that of a statistic independent of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._audit.lattice import PLAIN, Fault, FaultKind, Kind, Value, fixed, rows, total
from jaxaccum._audit.rules.control import body_of, unfollowed
from jaxaccum._audit.rules.registry import rule
from jaxaccum._audit.sources import Site, is_jax
from jaxaccum._audit.walk import Op, ShapeOfProgramDiffersError, Walk
from jaxaccum._source import Frame


@rule("custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr", complete=True)
def custom(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The function itself, and whether its derivative keeps the examples apart."""
    key = body_of(op)
    if key is None:
        return [dataclasses.replace(v, number=walk.fresh()) for v in unfollowed(walk, op, ins)]
    bodies = op.params[key], op.other.params[key]
    outs = walk.body(op, bodies, ins)
    moved = any(v.params or v.rows for v in ins) and any(
        jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in op.eqn.invars
    )
    if not walk.checks_derivatives or not moved or _is_jaxs_own(op):
        return outs
    faults = _faults(walk, op, ins, outs)
    return [dataclasses.replace(v, faults=v.faults | faults) for v in outs]


_WRAPPERS = ("custom_derivatives.py", "solves.py")
"""Files of JAX whose rules are the user's own, given to `defjvps`, `custom_gradient` or `custom_root`."""


def _is_jaxs_own(op: Op) -> bool:
    """Whether JAX wrote the derivative rule; of a function of JAX's the rule may be the user's."""
    rule = _rule(op.eqn)
    return rule is not None and is_jax(rule.file) and not rule.file.endswith(_WRAPPERS)


def _faults(walk: Walk, op: Op, ins: list[Value], outs: list[Value]) -> frozenset[Fault]:
    """Of the backward pass."""
    given = _variables(op.eqn)
    by_variable = {v: x for v, x in zip(op.eqn.invars, ins, strict=True) if not isinstance(v, jex.Literal)}
    primals = [dataclasses.replace(by_variable[v], faults=frozenset()) for v in given]
    floating = [i for i, v in enumerate(op.eqn.outvars) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
    cotangents = [_dual(walk, op, outs[i]) for i in floating]
    walk.checks_derivatives = False
    try:
        first, second = walk.derivatives.setdefault(id(op.eqn), None) or _traced(walk, op, floating)
        results = walk.body(op, (first, second), [*primals, *cotangents])
    except Exception as error:  # the user's rule may fail here in any way; the answer is the same
        reason = "differs between the sizes" if isinstance(error, ShapeOfProgramDiffersError) else type(error).__name__
        return frozenset([walk.fault(op, FaultKind.UNKNOWN, f"its backward pass could not be followed ({reason})")])
    finally:
        walk.checks_derivatives = True
    same = all(_alike(outs[i], y) for i, y in zip(floating, results[len(given) :], strict=True))
    if not same:
        return frozenset([walk.fault(op, FaultKind.UNKNOWN, "its forward rule is another function of the batch")])
    moved = [
        (x, result)
        for v, x, result in zip(given, primals, results[: len(given)], strict=True)
        if jnp.issubdtype(v.aval.dtype, jnp.inexact)
    ]
    forward = frozenset().union(*(y.faults for y in results[len(given) :]))  # under differentiation, it runs instead
    return forward.union(*(_mismatch(walk, op, x, result) for x, result in moved))


def _alike(x: Value, y: Value) -> bool:
    return (x.kind, x.layout, x.terms) == (y.kind, y.layout, y.terms)


def _variables(eqn: Any) -> list[Any]:
    return list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jex.Literal)))


def _dual(walk: Walk, op: Op, out: Value) -> Value:
    """What the cotangent of a value is: of rows rows, of a parameter's function a total, of a statistic a constant."""
    if out.rows and out.layout is not None:
        return rows(out.layout, params=True, number=walk.fresh())
    if out.fixed:
        return total(walk.site(op), PLAIN, params=True, number=walk.fresh())
    return fixed(params=True, number=walk.fresh())


def _mismatch(walk: Walk, op: Op, x: Value, result: Value) -> frozenset[Fault]:
    """What is wrong with the cotangent that a backward pass returns for x: told of the rule's first line."""
    apart = (
        (x.rows and result.rows and result.layout == x.layout and result.terms == PLAIN)
        or (x.fixed and result.kind is Kind.TOTAL and result.terms == PLAIN)
        or (x.summary and result.fixed and result.scale.trivial)
        or (result.fixed and result.zero)
    )
    kinds = {f.kind for f in result.faults} or (set() if apart else {FaultKind.COUPLING})
    origin = Site(op.eqn, walk.calls, defined=_rule(op.eqn))
    notes = {kind: f"its backward pass mixes the examples ({kind})" for kind in kinds}
    return frozenset(walk.fault(op, kind, note, origin=origin) for kind, note in notes.items())


def _rule(eqn: Any) -> Frame | None:
    """The first line of the user's derivative rule, as JAX noted it."""
    rule = next((eqn.params[k] for k in ("bwd", "jvp_jaxpr_fun") if k in eqn.params), None)
    debug = getattr(rule, "debug_info", None)
    file, line = getattr(debug, "func_filename", None), getattr(debug, "func_lineno", None)
    return Frame(file, line, debug.func_name) if debug is not None and file and line else None


def _traced(walk: Walk, op: Op, floating: list[int]) -> tuple[Any, Any]:
    """The backward pass of one equation, at both sizes; kept, so that its equations keep their identities."""
    pair = (_backward(op.eqn, floating), _backward(op.other, floating))
    walk.derivatives[id(op.eqn)] = pair
    return pair


def _backward(eqn: Any, floating: list[int]) -> Any:
    given = _variables(eqn)
    debug = _debug_info()
    outvars = [eqn.outvars[i] for i in floating]
    alone = jex.Jaxpr((), given, outvars, [eqn], eqn.effects, debug)
    moved = [i for i, v in enumerate(given) if jnp.issubdtype(v.aval.dtype, jnp.inexact)]

    def pull(*arrays: Any) -> list[Any]:
        primals, cotangents = list(arrays[: len(given)]), list(arrays[len(given) :])

        def function(*values: Any) -> list[Any]:
            full = list(primals)
            for i, value in zip(moved, values, strict=True):
                full[i] = value
            return jax.core.eval_jaxpr(alone, [], *full, propagate_source_info=False)  # keeps the frames of the rule

        values, backward = jax.vjp(function, *(primals[i] for i in moved))
        by_place = dict(zip(moved, backward(cotangents), strict=True))
        return [*(by_place.get(i, primals[i]) for i in range(len(given))), *values]

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in (*given, *outvars)]
    return jax.make_jaxpr(pull)(*shapes)


def _debug_info() -> Any:
    return jax.make_jaxpr(lambda: 0)().jaxpr.debug_info._replace(arg_names=None, result_paths=None)
