"""The one scan over microbatches: each brings its parts of the output, which the scan combines.

State and sums go from microbatch to microbatch in the batch's order. What each reduction carries,
and what it writes out, is said in `reductions`. Microbatches of two sizes, such as 4 + 4 + 2
examples, are two scans, one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.trees import cast, promote
from jaxaccum._base.types import Array, Unroll
from jaxaccum._devices import varying
from jaxaccum._jaxpr.convolutions import fast_on_cpu, has_convolutions
from jaxaccum._program import reductions
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.microbatches import Group
from jaxaccum._program.program import Program
from jaxaccum._program.reductions import Reduction

Visit = Callable[..., tuple[list[Array], Any, Any]]
"""``visit(g, sums, rows, carry, index, extra) -> (parts, sums, written)``, once per microbatch."""


Body = Callable[[Any, Any], tuple[Any, Any]]


class Scanned(NamedTuple):
    parts: list[Array]
    sums: Any
    written: list[Any]
    """What each microbatch wrote, stacked, one entry per group."""


def scan(
    program: Program,
    arrays: Sequence[Array],
    visit: Visit,
    *,
    sums: Any = (),
    idle: Callable[[int], Any] = lambda g: (),
    extra: Any = None,
    checkpoint: bool = False,
    keep: Callable[[Any], Array] | None = None,
) -> Scanned:
    """The one loop: state and sums go from microbatch to microbatch, in the batch's order, one scan
    per size.

    `keep` reads off what a microbatch wrote whether it counts; one that does not leaves the state
    as it was.
    """
    partition, written, stacked = program.partition, [], []
    state = _Carried.first(program, arrays)
    for g, group in enumerate(partition.groups):
        state = state.entering(program, g)

        def step(carried: Any, x: Any, g: int = g, group: Group = group) -> tuple[Any, Any]:
            index, rows, cut = x

            def active(carried: Any) -> tuple[Any, Any]:
                state, sums = carried
                parts, sums, out = visit(g, sums, rows, state.carry(program, arrays), index, cut)
                new, entries = state.updated(program, parts)
                state = (
                    new
                    if keep is None
                    else jax.tree.map(functools.partial(lax.select, keep(out)), new, state)
                )
                return varying.vary(((state, sums), (entries, out)), program.axes)

            if program.limit is None:
                return active(carried)
            skipped = varying.vary((_empty_entries(program, g), idle(g)), program.axes)
            padding = _is_padding(partition.first_example(group, index), arrays[program.limit])
            return lax.cond(padding, lambda carried: (carried, skipped), active, carried)

        indices = jnp.arange(group.first, group.first + group.count, dtype=jnp.int32)
        rows = [
            partition.split_rows(arrays[i], program.slots[i].axis)[g]
            for i in program.positions(Role.ROWS)
        ]
        init = varying.vary((state, sums), program.axes)
        body = fast_on_cpu(step) if has_convolutions(program.traces[g].jaxpr) else step
        body = jax.checkpoint(body) if checkpoint else body
        xs = (indices, rows, extra[g] if extra else None)
        adds_up = bool(jax.tree.leaves(sums))
        is_last = adds_up and g == len(partition.groups) - 1
        loop = _over_all_but_the_last if program.unroll == "last" and is_last else _over_all
        (state, sums), (entries, out) = loop(body, init, xs, program.unroll)
        written.append(out)
        stacked.append(entries)
    return Scanned(state.parts(program, stacked), sums, written)


def _over_all(body: Body, init: Any, xs: Any, unroll: Unroll) -> tuple[Any, Any]:
    """``lax.scan``, with so many microbatches written out per iteration."""
    return lax.scan(body, init, xs, unroll=1 if unroll == "last" else unroll)


def _over_all_but_the_last(body: Body, init: Any, xs: Any, unroll: Unroll) -> tuple[Any, Any]:
    """The same, with the last microbatch behind the loop.

    There XLA sees which sums are complete while it differentiates the rest, and can begin to send
    them. Inside of a loop no sum is complete before the loop ends. The loop reads the rows where
    they lie: a scan over all but the last would copy them.
    """
    del unroll
    count = len(jax.tree.leaves(xs)[0])
    read = lambda i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), xs)
    others = jnp.arange(count - 1, dtype=jnp.int32)
    carried, written = lax.scan(lambda carried, i: body(carried, read(i)), init, others)
    carried, entry = body(carried, read(count - 1))
    return carried, jax.tree.map(lambda ys, y: jnp.concatenate([ys, y[None]]), written, entry)


def _is_padding(first: Array, num_examples: Array) -> Array:
    """Whether a microbatch that begins at example `first` holds padding alone; the number has any
    integer dtype."""
    dtype = promote(first, num_examples)
    return cast(first, dtype) >= cast(num_examples, dtype)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class _Carried:
    """The state of the parts that are no rows: sums, extrema, last values and the carried state."""

    values: list[Array]

    def tree_flatten(self) -> tuple[tuple[list[Array]], None]:
        return (self.values,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[list[Array]]) -> _Carried:
        return cls(*children)

    @classmethod
    def first(cls, program: Program, arrays: Sequence[Array]) -> _Carried:
        states = iter(arrays[i] for i in program.positions(Role.CARRY))
        return cls(
            [
                varying.vary(
                    lax.stop_gradient(lax.convert_element_type(next(states), aval.dtype)),
                    varying.varying_axes(aval),
                )
                if reduction is Reduction.CARRY
                else reductions.initial(reduction, aval)
                for reduction, aval in _reductions(program, 0, stacked=False)
            ]
        )

    def entering(self, program: Program, g: int) -> _Carried:
        """The last value may have the shape of its microbatch; where it has, it starts anew at each
        size."""
        pairs = zip(self.values, _reductions(program, g, stacked=False), strict=True)
        return _Carried(
            [x if x.shape == aval.shape else reductions.initial(r, aval) for x, (r, aval) in pairs]
        )

    def carry(self, program: Program, arrays: Sequence[Array]) -> list[Array]:
        """The carried state; the initial one in a program that does not compute it, because nothing
        there reads it."""
        pairs = zip(self.values, _reductions(program, 0, stacked=False), strict=True)
        values = [x for x, (r, _) in pairs if r is Reduction.CARRY]
        return values or [arrays[i] for i in program.positions(Role.CARRY)]

    def updated(self, program: Program, parts: Sequence[Array]) -> tuple[_Carried, list[Array]]:
        """The state after a microbatch, and what it writes out."""
        kinds = [part.reduction for part in program.outputs.parts]
        news = [(r, x) for r, x in zip(kinds, parts, strict=True) if not r.stacked]
        values = [
            reductions.update(r, old, x) for old, (r, x) in zip(self.values, news, strict=True)
        ]
        return _Carried(values), [x for r, x in zip(kinds, parts, strict=True) if r.stacked]

    def parts(self, program: Program, stacked: list[list[Array]]) -> list[Array]:
        """All parts of the whole batch, in their order."""
        values, entries = iter(self.values), iter(zip(*stacked, strict=True))
        return [
            _merged(program, part.reduction, list(next(entries)))
            if part.reduction.stacked
            else next(values)
            for part in program.outputs.parts
        ]


def _merged(program: Program, reduction: Reduction, groups: list[Array]) -> Array:
    if reduction is Reduction.CONCAT:
        return program.partition.merge_rows(groups)
    return groups[0] if len(groups) == 1 else jnp.concatenate(groups)


def _reductions(program: Program, g: int, *, stacked: bool) -> list[tuple[Reduction, Any]]:
    avals = [v.aval for v in program.traces[g].jaxpr.outvars]
    pairs = zip(program.outputs.parts, avals, strict=True)
    return [(part.reduction, aval) for part, aval in pairs if part.reduction.stacked is stacked]


def _empty_entries(program: Program, g: int) -> list[Array]:
    return [varying.zeros(aval) for _, aval in _reductions(program, g, stacked=True)]


# -- forward alone ---------------------------------------------------------------------------------


def run(program: Program, arrays: Sequence[Array], *, checkpoint: bool = False) -> list[Array]:
    """The combined parts of the whole batch, at one microbatch's memory; `checkpoint` keeps it
    under JAX's own AD."""
    return scan(program, arrays, _forward(program, arrays), checkpoint=checkpoint).parts


def _forward(program: Program, arrays: Sequence[Array]) -> Visit:
    def visit(
        g: int, sums: Any, rows: Any, carry: Any, index: Array, extra: Any
    ) -> tuple[list[Array], Any, Any]:
        del extra
        return program.parts(g, arrays, rows=rows, carry=carry, index=index), sums, ()

    return visit


def whole_shape(program: Program, reduction: Reduction, aval: Any) -> Any:
    """The shape of a part, of the given type in one microbatch, over the whole batch."""
    shape = aval.shape
    if reduction is Reduction.CONCAT:
        shape = (program.partition.batch_size, *shape[1:])
    elif reduction is Reduction.STACK:
        shape = (program.partition.num_microbatches, *shape)
    return aval.update(shape=shape)
