"""Collectives over the loop's axis: what differed between microbatches becomes the batch's."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._audit.cut_by_place import are_parts
from jaxaccum._audit.gathered_order import all_rows
from jaxaccum._audit.lattice import (
    IRREGULAR,
    UNIT,
    Addend,
    FaultKind,
    Index,
    Kind,
    Layout,
    Scale,
    Value,
    any_params,
    faults_of,
    fixed,
)
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.rules.operands import (
    all_numbered,
    any_summary,
    avals_of,
    both,
    common,
    faulty,
    is_weighted,
    params_at_both,
    with_faults,
    with_new_axis,
)
from jaxaccum._audit.walk import Op, Walk
from jaxaccum._base.types import Array, Fun
from jaxaccum._jaxpr.compat import ClosedJaxpr, opened
from jaxaccum._jaxpr.equations import axes_in, mentions

_EACH = Scale(Fraction(-1))
"""A batch-independent value counts once per microbatch: the batch's size over the microbatch's
times."""


def axes_of(op: Op) -> set[str | int]:
    """The named axes of a collective."""
    names = op.params.get("axes", op.params.get("axis_name", ()))
    return set(names) if isinstance(names, tuple | list) else {names}


def _over_devices(walk: Walk, op: Op, x: Value) -> Value | None:
    """A collective over devices that share the batch; None where it is over the loop."""
    axes = axes_of(op)
    if op.params.get("axis_index_groups") is not None:
        return walk.unknown(op, f"{op.name} over groups has no rule")
    walk.note_axes(op, axes)
    if walk.axis_name in axes:
        if walk.in_parts and not x.fixed:
            return walk.unknown(
                op, f"{op.name} over the microbatches' parts, which are cut by place"
            )
        if walk.mesh_axes | walk.outer_axes <= axes:
            return None
        return walk.unknown(op, f"{op.name} over the loop, on each device apart")
    if x.fixed and not x.placed:
        return _of_shared(walk, op, x)
    if not axes & walk.mesh_axes and op.name.startswith("psum") and not (x.summary or x.placed):
        return x.but()
    if axes >= walk.mesh_axes and op.name.startswith("psum") and x.kind is Kind.TOTAL:
        return x.but(scalar=x.scalar)
    kind = FaultKind.UNKNOWN if x.fixed else FaultKind.COUPLING
    return walk.couple(op, [x], kind=kind, note=f"{op.name} between devices mixes examples")


def _of_shared(walk: Walk, op: Op, x: Value) -> Value:
    """A collective over devices of what is the same in every microbatch.

    Where JAX tracks no types, a parameter that a loss gathers looks like one that all devices have.
    """
    if op.name != "all_gather" or not x.params or not axes_of(op) & walk.untyped_axes:
        return x.but()
    fault = walk.fault(op, FaultKind.GATHERED, _GATHERED)
    return x.but(faults=x.faults | {fault})


_GATHERED = (
    "a parameter is gathered where JAX does not track what differs between devices, so its "
    "gradient is summed over them, as if each had the whole parameter"
)


def _declared(walk: Walk, op: Op, scale: Scale = UNIT, **fields: Any) -> Value:
    """A statistic of the whole batch, the same in every microbatch."""
    note = f"{op.name} over {walk.axis_name!r} couples the examples, as declared"
    return fixed(scale, faults=faulty(walk, op, FaultKind.COLLECTIVE, note), **fields)


def _unlike(walk: Walk, op: Op, x: Value) -> Value:
    note = f"{op.name} over {walk.axis_name!r} of a value that depends on the partition"
    return walk.couple(op, [x], kind=FaultKind.SELECTION, note=note)


def _each(ins: list[Value], one: Callable[[Value], Value]) -> list[Value]:
    """A collective of several operands at once."""
    return Settled([with_faults(one(x), x.faults, params=x.params) for x in ins])


def _under_vmap(op: Op) -> bool:
    """Whether an axis with a name has become one of the array's own, as under `vmap`."""
    return any(isinstance(axis, int) for axis in op.params["axes"])


def _in_two_steps(walk: Walk, op: Op, ins: list[Value], reduce: Fun) -> list[Value]:
    """A collective over axes of the array and over named ones: one after the other."""
    own: list[int] = []
    names: list[str] = []
    for axis in op.params["axes"]:
        if isinstance(axis, int):
            own.append(axis)
        else:
            names.append(axis)

    def program(eqn: jex.JaxprEqn) -> ClosedJaxpr:
        def reduced(*operands: Array) -> list[Array]:
            parts = [reduce(x, axis=tuple(own)) for x in operands]
            if not names:
                return parts
            return eqn.primitive.bind(*parts, **{**eqn.params, "axes": tuple(names)})

        env = [(name, 1) for name in names]
        return jax.make_jaxpr(reduced, axis_env=env)(*avals_of(eqn.invars))

    return Settled(walk.body(op, both(op, program), ins))


@rule("psum psum_invariant psum2", scales=True)
def psum(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A sum over microbatches: of totals, that of the batch."""
    if _under_vmap(op):
        return _in_two_steps(walk, op, ins, jnp.sum)

    def one(x: Value) -> Value:
        if (out := _over_devices(walk, op, x)) is not None:
            return out
        if x.fixed and not x.placed:
            return fixed(x.scale * _EACH, scalar=x.scalar)
        if x.kind is not Kind.TOTAL or is_weighted(x):
            return _unlike(walk, op, x)
        return _declared(walk, op, common(map(_over_microbatches, x.terms)), scalar=x.scalar)

    return _each(ins, one)


def _over_microbatches(term: Addend) -> Scale:
    """The scale of an addend, summed over microbatches: what enters once enters in each."""
    return term.scale * _EACH if term.fixed else term.scale


@rule("pmax pmin")
def extremum(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The extremum over microbatches: of extrema, that of the batch."""
    if _under_vmap(op):
        return _in_two_steps(walk, op, ins, jnp.max if op.name == "pmax" else jnp.min)

    def one(x: Value) -> Value:
        if (out := _over_devices(walk, op, x)) is not None:
            return out
        if x.fixed and not x.placed:
            return fixed(x.scale if x.scale.trivial else IRREGULAR, scalar=x.scalar)
        if x.extremum != op.name[1:]:
            return _unlike(walk, op, x)
        return _declared(walk, op, scalar=x.scalar)

    return _each(ins, one)


@rule("all_gather all_gather_invariant")
def all_gather(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The rows of all microbatches: those of the batch."""

    def one(x: Value) -> Value:
        if (out := _over_devices(walk, op, x)) is not None:
            return out
        if x.fixed:
            return walk.unknown(op, "all_gather of what every microbatch shares")
        scaled = any(not term.scale.trivial for term in x.terms)
        if not x.rows or x.layout is None or not x.layout.plain or scaled:
            return _unlike(walk, op, x)
        axis, (row,) = op.params["all_gather_dimension"], x.layout.axes
        if not op.params["tiled"]:
            gathered = Layout((axis, *with_new_axis(x.layout, axis).axes))
            return _declared(walk, op, index=Index.GATHERED, layout=gathered)
        if row != axis:
            return _unlike(walk, op, x)
        return all_rows(walk, op, _declared(walk, op))

    return _each(ins, one)


@rule("ppermute pcollectivepermute all_to_all psum_scatter reduce_scatter pshuffle")
def exchange(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """An exchange between microbatches: what all have alike stays; else their number counts."""

    def one(x: Value) -> Value:
        if (out := _over_devices(walk, op, x)) is not None:
            return out
        if op.name == "ppermute" and not _reaches_all(walk, op):
            return _unlike(walk, op, x)
        if op.name == "ppermute" and x.fixed and not x.placed:
            return x.but()
        note = f"{op.name} over {walk.axis_name!r}: the analysis does not follow which rows meet"
        return walk.unknown(op, note)

    return _each(ins, one)


def _reaches_all(walk: Walk, op: Op) -> bool:
    """Whether a permutation sends something to every microbatch; the others have zeros."""
    sent, sent_at_other = both(op, lambda eqn: len(eqn.params["perm"]))
    first, second = walk.axis_sizes
    return sent >= first and sent_at_other >= second


@rule("axis_index", uniform=True)
def axis_index(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """The place of the microbatch."""
    if walk.axis_name in axes_of(op):
        return fixed(index=Index.MICROBATCH, scalar=True)
    if walk.mesh_axes:
        note = "the result depends on the device"
        return fixed(faults=faulty(walk, op, FaultKind.POSITION, note))
    return fixed(scalar=True)


def whole_batch_moments(walk: Walk, op: Op, body: jex.Jaxpr, ins: list[Value]) -> list[Value]:
    """The count, mean and squares of our BatchNorm: the batch's, the same in every microbatch."""
    jaxpr = opened(body)[0]
    named = set(axes_in(jaxpr))
    followed = walk.axis_name in named and not _is_grouped(jaxpr, named)
    parts = walk.in_parts or any(map(are_parts, ins))
    of_rows = bool(ins) and ins[0].rows  # `nn.scan` divides it, and what has no operand is apart
    if not followed or parts or not of_rows or any_summary(ins):
        return walk.body(op, params_at_both(op, "jaxpr"), ins)
    if apart := (walk.mesh_axes | walk.outer_axes) - named:
        kind = FaultKind.COUPLING
        note = f"the statistics are those of one device along {', '.join(sorted(apart))}"
    else:
        kind = FaultKind.COLLECTIVE
        note = f"BatchNorm over {walk.axis_name!r} couples the examples, as declared"
    faults = faults_of(ins) | faulty(walk, op, kind, note)
    moments = fixed(faults=faults, params=any_params(ins))
    return all_numbered(walk, [moments] * op.num_outs)


def _is_grouped(jaxpr: jex.Jaxpr, axes: set[str]) -> bool:
    """Whether a collective of a program runs over groups of microbatches or of devices."""
    for name in axes:
        for eqn in mentions(jaxpr, name):
            if eqn.params.get("axis_index_groups") is not None:
                return True
    return False
