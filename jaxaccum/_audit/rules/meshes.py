"""`shard_map` inside a loss: the program of one device, walked at the sizes of one device's share
of the batch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxaccum._audit.lattice import Kind, Value, fixed, rows
from jaxaccum._audit.registry import RULES, Settled, rule
from jaxaccum._audit.walk import Op, Walk


@rule("shard_map", scales=True)
def shard_map(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Each device runs the body on its share: of the examples, or of anything else."""
    params = op.params
    specs = [_dims(spec) for spec in params["in_specs"]]
    axes = {_mesh_axes(spec, v) for spec, v in zip(specs, ins, strict=True) if v.rows}
    if all(v.fixed for v in ins):
        return RULES["*"].apply(walk, op, ins)
    if (
        len(axes) != 1
        or any(v.summary or v.index for v in ins)
        or not all(v.layout.plain for v in ins if v.rows and v.layout)
    ):
        return walk.unknown(op, "a shard_map that the analysis cannot follow")
    (names,) = axes
    if any(
        v.fixed and set(names) & {name for dim in spec for name in dim}
        for spec, v in zip(specs, ins, strict=True)
    ):
        return walk.unknown(
            op, "a shard_map that divides what is independent of the batch over the batch's devices"
        )
    sizes = walk.sizes.divided(math.prod(params["mesh"].shape[name] for name in names))
    if sizes is None:
        return walk.unknown(op, "the devices do not divide the batch")
    before = walk.sizes, walk.mesh_axes
    walk.sizes, walk.mesh_axes = sizes, frozenset(names)
    try:
        outs = walk.body(op, (params["jaxpr"], op.other.params["jaxpr"]), ins)
    finally:
        walk.sizes, walk.mesh_axes = before
    out_specs = [_dims(spec) for spec in params["out_specs"]]
    return Settled(
        [_joined(walk, op, v, spec, names) for v, spec in zip(outs, out_specs, strict=True)]
    )


def _joined(
    walk: Walk, op: Op, x: Value, spec: tuple[tuple[str, ...], ...], names: tuple[str, ...]
) -> Value:
    """A result of one device as one of all: rows side by side, or a total that the body has summed
    over devices."""
    if x.rows and x.layout is not None and x.layout.plain and _mesh_axes(spec, x) == names:
        return rows(x.layout, terms=x.terms, faults=x.faults, origin=x.origin)
    if x.kind is Kind.STATISTIC:
        return x
    if op.params.get("check_vma") and x.kind is Kind.TOTAL and not any(spec):
        return dataclasses.replace(x, number=-1)
    if x.fixed and not any(spec):
        return fixed(x.scale, faults=x.faults)
    return dataclasses.replace(
        walk.unknown(op, "a result of shard_map that the analysis cannot follow"), number=-1
    )


def _dims(spec: Any) -> tuple[tuple[str, ...], ...]:
    """The mesh axes of each dimension of a partition spec."""
    return tuple(
        () if name is None else (name,) if isinstance(name, str) else tuple(name) for name in spec
    )


def _mesh_axes(spec: tuple[tuple[str, ...], ...], x: Value) -> tuple[str, ...]:
    """The mesh axes that shard the batch axis of rows."""
    axes = x.layout.axes if x.layout is not None else ()
    return spec[axes[0]] if len(axes) == 1 and axes[0] < len(spec) else ()
