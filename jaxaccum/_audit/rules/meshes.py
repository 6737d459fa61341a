"""`shard_map` inside a loss: the program of one device, at the sizes of its share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

from jaxaccum._audit.lattice import Kind, Sizes, Value, fixed, rows
from jaxaccum._audit.registry import RULES, Settled, rule
from jaxaccum._audit.rules.operands import (
    all_fixed,
    any_place,
    any_summary,
    example_axes,
    params_at_both,
    rows_among,
)
from jaxaccum._audit.walk import Op, Walk
from jaxaccum._program.validate import axis_names

Spec = tuple[tuple[str, ...], ...]
"""The mesh axes over which each dimension of an array is sharded."""


@rule("shard_map", scales=True)
def shard_map(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Each device runs the body on its share: of the examples, or of anything else."""
    if all_fixed(ins):
        return RULES["*"].apply(walk, op, ins)
    axes: set[tuple[str, ...]] = set()
    dividing: set[str] = set()
    for x, spec in zip(ins, map(_dims, op.params["in_specs"]), strict=True):
        if x.rows:
            axes.add(_mesh_axes(spec, x))
        else:
            dividing.update(*spec)
    apart = all(x.layout is not None and x.layout.plain for x in rows_among(ins))
    if len(axes) != 1 or not apart or any_summary(ins) or any_place(ins):
        return walk.unknown(op, "a shard_map that the analysis cannot follow")
    (names,) = axes
    if dividing & set(names):
        return walk.unknown(op, _DIVIDES_WHAT_IS_FIXED)
    sizes = walk.sizes.divided(math.prod(op.params["mesh"].shape[name] for name in names))
    if sizes is None:
        return walk.unknown(op, "the devices do not divide the batch")
    with _on_one_device(walk, sizes, names):
        outs = walk.body(op, params_at_both(op, "jaxpr"), ins)
    joined = lambda x, spec: _joined(walk, op, x, _dims(spec), names)
    return Settled(map(joined, outs, op.params["out_specs"]))


_DIVIDES_WHAT_IS_FIXED = (
    "a shard_map that divides what is independent of the batch over the batch's devices"
)


@contextlib.contextmanager
def _on_one_device(walk: Walk, sizes: Sizes, names: tuple[str, ...]) -> Iterator[None]:
    """Walk the program of one device, which has its share of the batch."""
    before = walk.sizes, walk.mesh_axes
    walk.sizes, walk.mesh_axes = sizes, frozenset(names)
    try:
        yield
    finally:
        walk.sizes, walk.mesh_axes = before


def _joined(walk: Walk, op: Op, x: Value, spec: Spec, names: tuple[str, ...]) -> Value:
    """A result of one device as one of all: rows side by side, or a total over all devices."""
    if x.rows and x.layout is not None and x.layout.plain and _mesh_axes(spec, x) == names:
        return rows(x.layout, terms=x.terms, faults=x.faults, origin=x.origin)
    if x.kind is Kind.STATISTIC:
        return x
    if op.params.get("check_vma") and x.kind is Kind.TOTAL and not any(spec):
        return x.like(number=-1)
    if x.fixed and not any(spec):
        return fixed(x.scale, faults=x.faults)
    return walk.unknown(op, "a result of shard_map that the analysis cannot follow")


def _dims(spec: Iterable[str | tuple[str, ...] | None]) -> Spec:
    """The mesh axes of each dimension of a partition spec."""
    return tuple(map(axis_names, spec))


def _mesh_axes(spec: Spec, x: Value) -> tuple[str, ...]:
    """The mesh axes that shard the batch axis of rows."""
    axes = example_axes(x)
    return spec[axes[0]] if len(axes) == 1 and axes[0] < len(spec) else ()
