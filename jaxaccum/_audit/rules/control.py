"""Calls, branches and whatever has no rule of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.extend.core as jex

from jaxaccum._audit.lattice import (
    IRREGULAR,
    PLAIN,
    UNIT,
    Fault,
    FaultKind,
    Kind,
    Term,
    Value,
    fixed,
    statistic,
)
from jaxaccum._audit.registry import rule
from jaxaccum._audit.rules.collectives import whole_batch_moments
from jaxaccum._audit.rules.elementwise import text_of
from jaxaccum._audit.walk import Op, Walk
from jaxaccum._flax import batch_norm
from jaxaccum._jaxpr.compat import ClosedJaxpr, opened
from jaxaccum._program import example_keys


def body_of(op: Op) -> str | None:
    """The parameter that holds the one body of a call."""
    return next(
        (
            k
            for k in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
            if isinstance(op.params.get(k), jex.Jaxpr | ClosedJaxpr)
        ),
        None,
    )


@rule(
    """
        jit pjit closed_call core_call core_closed_call remat remat2 checkpoint custom_lin
        run_state_inlined composite custom_vmap_call
    """,
    complete=True,
)
def call(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A function applied: its body, in place."""
    key = body_of(op)
    if key is None:
        return [numbered(walk, v) for v in unfollowed(walk, op, ins)]
    if _is_whole_batch_moments(op.params[key]):
        return whole_batch_moments(walk, op, op.params[key], ins)
    if _is_of_example_keys(op.params[key]):
        return [fixed(faults=frozenset().union(*(v.faults for v in ins)), number=walk.fresh())]
    cached = op.name in ("jit", "pjit")
    return walk.body(op, (op.params[key], op.other.params[key]), ins, cached=cached)


def _is_whole_batch_moments(body: Any) -> bool:
    """Whether a call is that of our BatchNorm, whose algebra no rule could follow."""
    debug = opened(body)[0].debug_info
    return debug.func_name == "whole_batch_moments" and debug.func_filename == batch_norm.__file__


def _is_of_example_keys(body: Any) -> bool:
    """Whether a call makes a key that holds those of the examples, or reads the key of the stream
    in one."""
    debug = opened(body)[0].debug_info
    return (
        debug.func_name in ("joined", "stream_data")
        and debug.func_filename == example_keys.__file__
    )


@rule("call_hi_primitive", complete=True)
def composed(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """What jax 0.12 defines by simpler primitives: these, in place. One of the user's own derives
    itself: no rule."""
    prims = [eqn.params["_prim"] for eqn in (op.eqn, op.other)]
    if not all(type(prim).__module__.startswith("jax.") for prim in prims):
        return [numbered(walk, v) for v in unfollowed(walk, op, ins)]
    whole, part = (jax.make_jaxpr(prim.expand)(*prim.in_avals) for prim in prims)
    return walk.body(op, (whole, part), ins, cached=False)


@rule("*")
def no_rule(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A primitive that the table does not know: unknown, unless nothing that enters depends on the
    batch."""
    return unfollowed(walk, op, ins)


def unfollowed(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The results of an equation whose meaning is not known."""
    if all(v.fixed for v in ins) and "callback" not in op.name and not op.eqn.effects:
        same = all(v.scale.trivial for v in ins) and _same_params(op)
        return [fixed(UNIT if same else IRREGULAR) for _ in range(op.num_outs)]
    if not any(v.rows or v.fixed for v in ins) and all(
        v.kind is Kind.STATISTIC and v.faults for v in ins
    ):
        return [statistic(ins[0].origin) for _ in range(op.num_outs)]
    return [walk.unknown(op, f"{_described(op)} has no rule") for _ in range(op.num_outs)]


def _described(op: Op) -> str:
    name = (
        op.params.get("name") or op.params.get("target_name") or op.params.get("call_target_name")
    )
    return f"{op.name} ({name})" if isinstance(name, str) else op.name


def _same_params(op: Op) -> bool:
    is_body = lambda v: isinstance(v, jex.Jaxpr | ClosedJaxpr)
    plain = lambda eqn: {k: text_of(v) if is_body(v) else v for k, v in eqn.params.items()}
    try:
        return bool(plain(op.eqn) == plain(op.other))
    except ValueError:  # arrays among them
        return False


def numbered(walk: Walk, x: Value) -> Value:
    """The value under a number of its own."""
    return dataclasses.replace(x, number=walk.fresh())


# -- branches --------------------------------------------------------------------------------------


def join(walk: Walk, op: Op, x: Value, y: Value) -> Value:
    """What is true of a value that may be either."""
    if x == y:
        return x
    faults, params, origin = x.faults | y.faults, x.params or y.params, x.origin or y.origin
    common: dict[str, Any] = {
        "faults": faults, "params": params, "origin": origin, "scalar": x.scalar and y.scalar,
        "number": x.number if x.number == y.number else walk.fresh(),
        "known": x.known if x.known == y.known else None,
    }  # fmt: skip
    if x.fixed and y.fixed:
        scales = {v.scale for v in (x, y) if not v.zero} or {UNIT}
        if (x.index, x.layout, x.columns) == (y.index, y.layout, y.columns):
            common.update(index=x.index, layout=x.layout, columns=x.columns)
        elif x.index or y.index:
            common["faults"] = faults | {
                walk.fault(op, FaultKind.POSITION, "a position of an example enters")
            }
        return fixed(scales.pop() if len(scales) == 1 else IRREGULAR, **common)
    kinds = {v.kind for v in (x, y)}
    layouts = {v.layout for v in (x, y) if v.rows}
    if kinds <= {Kind.FIXED, Kind.ROWS} and len(layouts) == 1 and not (x.index or y.index):
        return Value(
            Kind.ROWS,
            layouts.pop(),
            terms=frozenset().union(*(v.terms for v in (x, y) if not v.zero)) or PLAIN,
            **common,
        )
    if kinds <= {Kind.FIXED, Kind.TOTAL} and not (x.index or y.index):
        own = (
            frozenset(Term(t.scale, v.fixed or t.fixed) for t in v.terms)
            for v in (x, y)
            if not v.zero
        )
        return Value(Kind.TOTAL, terms=frozenset().union(*own), **common)
    note = "values that depend on the batch in different ways meet"
    common.update(faults=faults | {walk.fault(op, FaultKind.UNKNOWN, note)}, scalar=False)
    return Value(Kind.STATISTIC, **common)


@rule("cond", complete=True)
def cond(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """One of several bodies."""
    which, *operands = ins
    pairs = list(zip(op.params["branches"], op.other.params["branches"], strict=True))
    if which.known is not None:
        return walk.body(op, pairs[min(max(int(which.known), 0), len(pairs) - 1)], operands)
    results = [walk.body(op, pair, operands) for pair in pairs]
    outs = [_joined(walk, op, list(values)) for values in zip(*results, strict=True)]
    faults = which.faults
    if not which.fixed:
        kind = FaultKind.UNKNOWN if which.rows else FaultKind.COUPLING
        faults |= walk.couple(
            op, [which], kind=kind, note="a branch is chosen by the data of the batch"
        ).faults
    if which.index is not None:
        faults |= {
            walk.fault(op, FaultKind.POSITION, "a branch is chosen by the position of an example")
        }
    if not which.scale.trivial and which.fixed:
        faults |= {walk.fault(op, FaultKind.BATCH_SIZE, "a branch is chosen by the batch size")}
    changed = [
        dataclasses.replace(v, faults=v.faults | faults, params=v.params or which.params)
        for v in outs
    ]
    return [numbered(walk, v) for v in changed]


def _joined(walk: Walk, op: Op, values: list[Value]) -> Value:
    first, *rest = values
    for other in rest:
        first = join(walk, op, first, other)
    return first


@rule("custom_linear_solve", complete=True)
def linear_solve(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The solution of a linear system, by the solver that it comes with.

    Its gradient is by the others: the system itself, its transpose, and the solver of that.
    """
    lengths, solution = op.params["const_lengths"], []
    faults: frozenset[Fault] = frozenset()
    for name in ("solve", "matvec", "vecmat", "transpose_solve"):
        bodies = tuple(getattr(eqn.params["jaxprs"], name) for eqn in (op.eqn, op.other))
        if bodies[0] is None:
            continue
        before = sum(lengths[: lengths._fields.index(name)])
        consts = ins[before : before + getattr(lengths, name)]
        outs = walk.body(op, bodies, [*consts, *(solution or ins[sum(lengths) :])])
        solution = solution or outs
        faults = faults.union(*(v.faults for v in outs))
        if any(
            (x.kind, x.layout) != (y.kind, y.layout) for x, y in zip(outs, solution, strict=True)
        ):
            faults |= {
                walk.fault(
                    op, FaultKind.UNKNOWN, f"the {name} of a custom_linear_solve mixes examples"
                )
            }
    return [dataclasses.replace(v, faults=v.faults | faults) for v in solution]
