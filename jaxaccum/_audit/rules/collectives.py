"""Collectives over the loop's axis: they make a statistic that no partition changes out of one that
each would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._audit.lattice import IRREGULAR, FaultKind, Index, Kind, Layout, Scale, Value, fixed
from jaxaccum._audit.registry import Settled, rule
from jaxaccum._audit.walk import Op, Walk
from jaxaccum._jaxpr.compat import opened
from jaxaccum._jaxpr.equations import axes_in, mentions

_EACH = Scale(Fraction(-1))
"""A batch-independent value counts once per microbatch: the batch's size over the microbatch's
times."""


def axes_of(op: Op) -> set[Any]:
    """The named axes of a collective."""
    names = op.params.get("axes", op.params.get("axis_name", ()))
    return set(names) if isinstance(names, tuple | list) else {names}


def _over_devices(walk: Walk, op: Op, x: Value) -> Value | None:
    """A collective over devices, where the batch is sharded over some; None where it is over the
    loop."""
    axes = axes_of(op)
    if op.params.get("axis_index_groups") is not None:
        return walk.unknown(op, f"{op.name} over groups has no rule")
    if walk.axis_name in axes:
        everywhere = walk.mesh_axes | walk.outer_axes <= axes
        return (
            None
            if everywhere
            else walk.unknown(op, f"{op.name} over the loop, on each device apart")
        )
    walk.note_devices(op, axes)
    if x.fixed and x.index is None:
        return x.but()
    if not axes & walk.mesh_axes and op.name.startswith("psum") and not x.summary:
        return x.but()
    if axes >= walk.mesh_axes and op.name.startswith("psum") and x.kind is Kind.TOTAL:
        return x.but(scalar=x.scalar)
    kind = FaultKind.UNKNOWN if x.fixed else FaultKind.COUPLING
    return walk.couple(op, [x], kind=kind, note=f"{op.name} between devices mixes examples")


def _declared(walk: Walk, op: Op, scale: Scale, **fields: Any) -> Value:
    """A statistic of the whole batch, the same in every microbatch."""
    fault = walk.fault(
        op,
        FaultKind.COLLECTIVE,
        f"{op.name} over {walk.axis_name!r} couples the examples, as declared",
    )
    return fixed(scale, faults=frozenset([fault]), **fields)


def _unlike(walk: Walk, op: Op, x: Value) -> Value:
    note = f"{op.name} over {walk.axis_name!r} of a value that depends on the partition"
    return walk.couple(op, [x], kind=FaultKind.SELECTION, note=note)


def _each(op: Op, ins: list[Value], one: Any) -> list[Value]:
    """A collective of several operands at once."""
    return Settled([_with(v, out) for v, out in zip(ins, map(one, ins), strict=True)])


def _with(x: Value, out: Value) -> Value:
    return dataclasses.replace(out, faults=out.faults | x.faults, params=x.params)


def _under_vmap(op: Op) -> bool:
    """Whether an axis with a name has become one of the array's own, as under `vmap`."""
    return any(isinstance(axis, int) for axis in op.params["axes"])


def _in_two_steps(walk: Walk, op: Op, ins: list[Value], reduce: Callable[..., Any]) -> list[Value]:
    """A collective over axes of the array and over axes with names: first the one, then the
    other."""
    own = tuple(axis for axis in op.params["axes"] if isinstance(axis, int))
    names = tuple(axis for axis in op.params["axes"] if not isinstance(axis, int))

    def program(eqn: Any) -> Any:
        def reduced(*operands: Any) -> Any:
            parts = [reduce(x, axis=own) for x in operands]
            return eqn.primitive.bind(*parts, **{**eqn.params, "axes": names}) if names else parts

        env = [(name, 1) for name in names]
        return jax.make_jaxpr(reduced, axis_env=env)(*(v.aval for v in eqn.invars))

    return Settled(walk.body(op, (program(op.eqn), program(op.other)), ins))


@rule("psum psum_invariant psum2", scales=True)
def psum(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A sum over microbatches: of totals, that of the batch."""
    if _under_vmap(op):
        return _in_two_steps(walk, op, ins, jnp.sum)

    def one(x: Value) -> Value:
        if (out := _over_devices(walk, op, x)) is not None:
            return out
        if x.fixed and x.index is None:
            return fixed(x.scale * _EACH, scalar=x.scalar)
        scales = {term.scale * _EACH if term.fixed else term.scale for term in x.terms}
        if x.kind is not Kind.TOTAL or any(scale.weights for scale in scales):
            return _unlike(walk, op, x)
        return _declared(walk, op, scales.pop() if len(scales) == 1 else IRREGULAR, scalar=x.scalar)

    return _each(op, ins, one)


@rule("pmax pmin")
def extremum(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The extremum over microbatches: of extrema, that of the batch."""
    if _under_vmap(op):
        return _in_two_steps(walk, op, ins, jnp.max if op.name == "pmax" else jnp.min)

    def one(x: Value) -> Value:
        if (out := _over_devices(walk, op, x)) is not None:
            return out
        if x.fixed and x.index is None:
            return fixed(x.scale if x.scale.trivial else IRREGULAR, scalar=x.scalar)
        return (
            _declared(walk, op, Scale(), scalar=x.scalar)
            if x.extremum == op.name[1:]
            else _unlike(walk, op, x)
        )

    return _each(op, ins, one)


@rule("all_gather all_gather_invariant")
def all_gather(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The rows of all microbatches: those of the batch."""

    def one(x: Value) -> Value:
        if (out := _over_devices(walk, op, x)) is not None:
            return out
        axis = op.params["all_gather_dimension"]
        if (
            x.layout is None
            or not x.rows
            or not x.layout.plain
            or not all(term.scale.trivial for term in x.terms)
        ):
            return (
                _unlike(walk, op, x)
                if not x.fixed
                else walk.unknown(op, "all_gather of what every microbatch shares")
            )
        if op.params["tiled"]:
            return (
                _declared(walk, op, Scale()) if x.layout.axes == (axis,) else _unlike(walk, op, x)
            )
        (row,) = x.layout.axes
        return _declared(
            walk, op, Scale(), index=Index.GATHERED, layout=Layout((axis, row + (row >= axis)))
        )

    return _each(op, ins, one)


@rule("ppermute pcollectivepermute all_to_all psum_scatter reduce_scatter pshuffle")
def exchange(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """An exchange between microbatches, which changes with their number: of what all have alike,
    the same."""

    def one(x: Value) -> Value:
        if (out := _over_devices(walk, op, x)) is not None:
            return out
        if op.name == "ppermute" and not _reaches_all(walk, op):
            return _unlike(walk, op, x)
        if op.name == "ppermute" and x.fixed and x.index is None:
            return x.but()
        return walk.unknown(
            op, f"{op.name} over {walk.axis_name!r}: the analysis does not follow which rows meet"
        )

    return _each(op, ins, one)


def _reaches_all(walk: Walk, op: Op) -> bool:
    """Whether a permutation sends something to every microbatch; the others have zeros."""
    pairs = zip((op.params, op.other.params), walk.axis_sizes, strict=True)
    return all(len(params["perm"]) >= size for params, size in pairs)


@rule("axis_index", uniform=True)
def axis_index(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """The place of the microbatch."""
    if walk.axis_name in axes_of(op):
        return fixed(index=Index.MICROBATCH, scalar=True)
    if walk.mesh_axes:
        return fixed(
            faults=frozenset(
                [walk.fault(op, FaultKind.POSITION, "the result depends on the device")]
            )
        )
    return fixed(scalar=True)


def whole_batch_moments(walk: Walk, op: Op, body: Any, ins: list[Value]) -> list[Value]:
    """The count, mean and squares of our BatchNorm: the whole batch's, the same in every
    microbatch."""
    jaxpr = opened(body)[0]
    named = set(axes_in(jaxpr))
    grouped = any(
        eqn.params.get("axis_index_groups") is not None
        for name in named
        for eqn in mentions(jaxpr, name)
    )
    if walk.axis_name not in named or grouped or not ins[0].rows or any(v.summary for v in ins):
        return walk.body(op, (body, op.other.params["jaxpr"]), ins)
    faults = frozenset().union(*(v.faults for v in ins))
    if apart := (walk.mesh_axes | walk.outer_axes) - named:
        devices = ", ".join(sorted(apart))
        fault = walk.fault(
            op, FaultKind.COUPLING, f"the statistics are those of one device along {devices}"
        )
    else:
        note = f"BatchNorm over {walk.axis_name!r} couples the examples, as declared"
        fault = walk.fault(op, FaultKind.COLLECTIVE, note)
    params = any(v.params for v in ins)
    return [
        fixed(faults=faults | {fault}, params=params, number=walk.fresh())
        for _ in range(op.num_outs)
    ]
