"""The one scan over microbatches, and the one place that holds references to gradients.

`run` combines the parts of every microbatch; asked for a gradient, it also back-propagates each microbatch with given
cotangents and adds what arrives. It does so in place, into references, because a gradient tree that is added outside
costs a second copy of the parameters. JAX differentiates through references silently wrongly when the loop stands
inside another scan, and cannot batch a reference that an inner scan runs over. So the in-place loop is sealed by
`in_references`, which lets no reference out, and is the primal of a ``custom_jvp`` and of a ``custom_vmap`` and nothing
else: derivatives and batches are those of the same loop with plain sums.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import run_state

from jaxaccum import _mesh, _reduce
from jaxaccum._accumulators import BY_VALUE, Sums, port
from jaxaccum._arguments import Role
from jaxaccum._program import Program
from jaxaccum._reduce import Reduction
from jaxaccum._tree import cast
from jaxaccum._types import Array

Seeds = list[list[Array]]


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What to differentiate: slots `wrt`, and for each gradient asked for, the parts that its cotangents belong to."""

    wrt: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    sums: Sums


class Result(NamedTuple):
    """The combined parts of the output, and one list of gradients (one a slot of `wrt`) for each set of cotangents."""

    parts: list[Array]
    grads: list[list[Array]]


def run(program: Program, arrays: Sequence[Array], *, checkpoint: bool = False) -> list[Array]:
    """The combined parts of the whole batch, at one microbatch's memory; `checkpoint` keeps it under JAX's own AD."""
    return scan(program, arrays, _forward(program, arrays), checkpoint=checkpoint).parts


def run_with_gradient(program: Program, arrays: Sequence[Array], gradient: Gradient, seeds: Seeds) -> Result:
    """The combined parts, and ``Σ vjp(seeds)`` over microbatches for each set of cotangents.

    A cotangent of a summed part is the same for every microbatch; that of rows or of a stack is cut as the rows are.
    """
    summed = functools.partial(_summed, program, gradient)
    if not gradient.sums.in_place or program.under_mapped_axes:
        return summed(list(arrays), seeds)
    return sealed(functools.partial(_in_place, program, gradient), summed)(list(arrays), seeds)


def sealed(loop: Callable[..., Result], summed: Callable[..., Result]) -> Callable[..., Result]:
    """The loop that adds into references, whose derivatives and batches are those of the same loop with plain sums."""

    @jax.custom_batching.custom_vmap
    def in_place(arrays: list[Array], seeds: Seeds) -> Result:
        return loop(arrays, seeds)

    @in_place.def_vmap
    def batched(size: int, mapped: Any, arrays: list[Array], seeds: Seeds) -> tuple[Result, Any]:
        axes = jax.tree.map(lambda x: 0 if x else None, mapped)
        result = jax.vmap(summed, in_axes=tuple(axes), axis_size=size)(arrays, seeds)
        return result, jax.tree.map(lambda _: True, result)

    accumulate = jax.custom_jvp(lambda arrays, seeds: in_place(arrays, seeds))
    accumulate.defjvp(lambda primals, tangents: jax.jvp(summed, primals, tangents))
    return accumulate


def in_references(sums: Any, values: Any, fill: Callable[[Any], Any], axes: frozenset[str]) -> tuple[Any, Any]:
    """What `fill` adds to references that start at `sums`, and what it returns, of the shapes `values`.

    No reference leaves: JAX would take its creation for a constant and differentiate wrongly.
    """

    def body(refs: Any) -> None:
        sums, outs = refs
        for ref, x in zip(outs, jax.tree.leaves(fill(sums)), strict=True):
            ref[...] = x

    empty = [_mesh.vary(_mesh.zeros(x), axes) for x in jax.tree.leaves(values)]
    sums, filled = run_state(body)((sums, empty))
    return sums, jax.tree.unflatten(jax.tree.structure(values), filled)


# -- the scan ---------------------------------------------------------------------------------------------------------

Visit = Callable[..., tuple[list[Array], Any, Any]]
"""``visit(g, sums, rows, carry, index, extra) -> (parts, sums, written)``, once a microbatch."""


class Scanned(NamedTuple):
    parts: list[Array]
    sums: Any
    written: list[Any]
    """What each microbatch wrote, stacked, one entry a group."""


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
    """The one loop: state and sums go from microbatch to microbatch, in the batch's order, one scan a size.

    `keep` reads off what a microbatch wrote whether it counts; one that does not leaves the state as it was.
    """
    partition, written, stacked = program.partition, [], []
    state = _Carried.first(program, arrays)
    for g, group in enumerate(partition.groups):
        state = state.entering(program, g)

        def step(carried: Any, x: Any, g: int = g) -> tuple[Any, Any]:
            index, rows, cut = x

            def active(carried: Any) -> tuple[Any, Any]:
                state, sums = carried
                parts, sums, out = visit(g, sums, rows, state.carry(program, arrays), index, cut)
                new, entries = state.updated(program, parts)
                state = new if keep is None else jax.tree.map(functools.partial(lax.select, keep(out)), new, state)
                return _mesh.vary(((state, sums), (entries, out)), program.axes)

            if program.limit is None:
                return active(carried)
            skipped = _mesh.vary((_empty_entries(program, g), idle(g)), program.axes)
            padding = partition.first_example(partition.groups[g], index) >= arrays[program.limit]
            return lax.cond(padding, lambda carried: (carried, skipped), active, carried)

        indices = jnp.arange(group.first, group.first + group.count, dtype=jnp.int32)
        rows = [partition.split_rows(arrays[i], program.slots[i].axis)[g] for i in program.positions(Role.ROWS)]
        init = _mesh.vary((state, sums), program.axes)
        body = jax.checkpoint(step) if checkpoint else step
        (state, sums), (entries, out) = lax.scan(body, init, (indices, rows, extra[g] if extra else None))
        written.append(out)
        stacked.append(entries)
    return Scanned(state.parts(program, stacked), sums, written)


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
                _mesh.vary(
                    lax.stop_gradient(lax.convert_element_type(next(states), aval.dtype)), _mesh.varying_axes(aval)
                )
                if reduction is Reduction.CARRY
                else _reduce.initial(reduction, aval)
                for reduction, aval in _reductions(program, 0, stacked=False)
            ]
        )

    def entering(self, program: Program, g: int) -> _Carried:
        """The last value may have the shape of its microbatch; where it has, it starts anew at each size."""
        pairs = zip(self.values, _reductions(program, g, stacked=False), strict=True)
        return _Carried([x if x.shape == aval.shape else _reduce.initial(r, aval) for x, (r, aval) in pairs])

    def carry(self, program: Program, arrays: Sequence[Array]) -> list[Array]:
        """The carried state; the initial one in a program that does not compute it, because nothing there reads it."""
        pairs = zip(self.values, _reductions(program, 0, stacked=False), strict=True)
        values = [x for x, (r, _) in pairs if r is Reduction.CARRY]
        return values or [arrays[i] for i in program.positions(Role.CARRY)]

    def updated(self, program: Program, parts: Sequence[Array]) -> tuple[_Carried, list[Array]]:
        """The state after a microbatch, and what it writes out."""
        kinds = [part.reduction for part in program.outputs.parts]
        news = [(r, x) for r, x in zip(kinds, parts, strict=True) if not r.stacked]
        values = [_reduce.update(r, old, x) for old, (r, x) in zip(self.values, news, strict=True)]
        return _Carried(values), [x for r, x in zip(kinds, parts, strict=True) if r.stacked]

    def parts(self, program: Program, stacked: list[list[Array]]) -> list[Array]:
        """All parts of the whole batch, in their order."""
        values, entries = iter(self.values), iter(zip(*stacked, strict=True))
        return [
            _merged(program, part.reduction, list(next(entries))) if part.reduction.stacked else next(values)
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
    return [_mesh.zeros(aval) for _, aval in _reductions(program, g, stacked=True)]


# -- what happens at each microbatch ----------------------------------------------------------------------------------


def _forward(program: Program, arrays: Sequence[Array]) -> Visit:
    def visit(g: int, sums: Any, rows: Any, carry: Any, index: Array, extra: Any) -> tuple[list[Array], Any, Any]:
        del extra
        return program.parts(g, arrays, rows=rows, carry=carry, index=index), sums, ()

    return visit


def _summed(program: Program, gradient: Gradient, arrays: list[Array], seeds: Seeds) -> Result:
    """The gradients as values: one tree is added to another at each microbatch."""
    step = Derivative(program, gradient, arrays, seeds)

    def visit(g: int, sums: Any, rows: Any, carry: Any, index: Array, extra: Any) -> tuple[list[Array], Any, Any]:
        parts, vjp, outs = step.at(g, step.parameters, rows=rows, carry=carry, index=index)
        added, written = [], []
        for s, old in enumerate(sums):
            whole, own = vjp(step.cotangents(s, outs, extra))
            added.append([x + cast(y, x.dtype) for x, y in zip(old, whole, strict=True)])
            written.append(own)
        return parts, added, written

    zeros = [[gradient.sums.zeros(x) for x in step.parameters] for _ in gradient.sets]
    scanned = scan(program, arrays, visit, sums=zeros, idle=step.idle, extra=step.extra())
    return step.result(scanned.parts, scanned.sums, step.merged(scanned))


def _in_place(program: Program, gradient: Gradient, arrays: list[Array], seeds: Seeds) -> Result:
    """The gradients in references: the backward pass itself adds to them."""
    step = Derivative(program, gradient, arrays, seeds)
    zeros = [gradient.sums.zeros(x) for x in step.parameters]
    inputs = [zero if zero.dtype != x.dtype else x for zero, x in zip(zeros, step.parameters, strict=True)]

    def fill(sums: Any) -> Any:
        def visit(g: int, _: Any, rows: Any, carry: Any, index: Array, extra: Any) -> tuple[list[Array], Any, Any]:
            parts, vjp, starts = step.at(g, inputs, rows=rows, carry=carry, index=index)
            at_once, written = step.at_once(g), []
            for s, buffers in enumerate(sums):
                sinks = [BY_VALUE if whole else buffer for buffer, whole in zip(buffers, at_once, strict=True)]
                pull = vjp.with_refs(sinks, [BY_VALUE] * len(step.rows))
                grads, own = pull(step.cotangents(s, starts, extra))
                for buffer, grad, whole in zip(buffers, grads, at_once, strict=True):
                    if whole:
                        buffer[...] += grad
                written.append(own)
            return parts, (), written

        scanned = scan(program, arrays, visit, idle=step.idle, extra=step.extra())
        return scanned.parts, step.merged(scanned)

    sums, (parts, merged) = in_references([zeros for _ in gradient.sets], step.shapes(), fill, program.axes)
    return step.result(parts, sums, merged)


@dataclasses.dataclass(frozen=True)
class Derivative:
    """What both ways of summing share: the derivative of one microbatch, its cotangents, and where gradients go."""

    program: Program
    gradient: Gradient
    arrays: list[Array]
    seeds: Seeds

    @property
    def whole(self) -> list[int]:
        """The differentiated slots whose gradients are summed over microbatches."""
        return [i for i in self.gradient.wrt if self.program.slots[i].role is Role.WHOLE]

    @property
    def rows(self) -> list[int]:
        """The differentiated slots whose gradients are rows, each of one microbatch."""
        return [i for i in self.gradient.wrt if self.program.slots[i].role is Role.ROWS]

    @property
    def parameters(self) -> list[Array]:
        return [self.arrays[i] for i in self.whole]

    @property
    def wanted(self) -> list[int]:
        """The parts that any cotangent belongs to."""
        return sorted({part for parts in self.gradient.sets for part in parts})

    def differentiated_rows(self, rows: Sequence[Array]) -> list[Array]:
        """Of one microbatch's rows, those to differentiate."""
        order = self.program.positions(Role.ROWS)
        return [rows[order.index(i)] for i in self.rows]

    def at(
        self, g: int, inputs: list[Array], *, rows: list[Array], carry: Any, index: Array
    ) -> tuple[list[Array], Any, list[Array]]:
        """One microbatch forward: all its parts, the pullback to ``(inputs, rows)``, and the parts it starts from."""
        order = self.program.positions(Role.ROWS)

        def primal(inputs: list[Array], own: list[Array]) -> tuple[list[Array], list[Array]]:
            arrays, cut = list(self.arrays), list(rows)
            for i, x in zip(self.whole, inputs, strict=True):
                arrays[i] = x if x.dtype == arrays[i].dtype else port(x, arrays[i])
            for i, x in zip(self.rows, own, strict=True):
                cut[order.index(i)] = x
            parts = self.program.parts(g, arrays, rows=cut, carry=carry, index=index)
            return [parts[i] for i in self.wanted], parts

        outs, vjp, parts = jax.vjp(primal, inputs, self.differentiated_rows(rows), has_aux=True)
        return parts, vjp, outs

    def at_once(self, g: int) -> list[bool]:
        """Of each parameter, whether its gradient arrives whole: a reference spares no memory then, and the order in
        which XLA for CPU schedules a sum amid the backward pass costs some 5 % of the time.
        """
        known = dict(zip(self.program.sources(g), self.program.traces[g].read_at_once(), strict=True))
        return [known.get(i, True) for i in self.whole]

    def cotangents(self, s: int, outs: list[Array], extra: Any) -> list[Array]:
        """The cotangents of set `s` at one microbatch, one for each wanted part: zero for those of other sets."""
        cut = iter(extra[s])
        given = {}
        for part, seed in zip(self.gradient.sets[s], self.seeds[s], strict=True):
            given[part] = next(cut) if self.program.outputs.parts[part].reduction.stacked else seed
        pairs = zip(self.wanted, outs, strict=True)
        return [_mesh.vary(given.get(part, jnp.zeros_like(out)), _mesh.varying_axes(out)) for part, out in pairs]

    def extra(self) -> list[Any]:
        """The cotangents of rows and stacks, cut for each group as the rows are."""
        partition, kinds = self.program.partition, self.program.outputs.parts
        cut = []
        for g, group in enumerate(partition.groups):
            sets = []
            for parts, seeds in zip(self.gradient.sets, self.seeds, strict=True):
                own = []
                for part, seed in zip(parts, seeds, strict=True):
                    if kinds[part].reduction is Reduction.CONCAT:
                        own.append(partition.split_rows(seed, 0)[g])
                    elif kinds[part].reduction is Reduction.STACK:
                        own.append(seed[group.first : group.first + group.count])
                sets.append(own)
            cut.append(sets)
        return cut

    def idle(self, g: int) -> list[list[Array]]:
        """What a skipped microbatch of group `g` writes: zeros."""
        rows = [self.program.partition.split_rows(self.arrays[i], self.program.slots[i].axis)[g] for i in self.rows]
        return [[jnp.zeros_like(x[0]) for x in rows] for _ in self.gradient.sets]

    def merged(self, scanned: Scanned) -> list[list[Array]]:
        """For each set, the gradients of the differentiated rows, back in the batch's order."""
        sets = range(len(self.gradient.sets))
        axes = [self.program.slots[i].axis for i in self.rows]
        merge = self.program.partition.merge_rows
        return [[merge([group[s][j] for group in scanned.written], axis) for j, axis in enumerate(axes)] for s in sets]

    def shapes(self) -> tuple[list[Any], list[list[Array]]]:
        """The shapes of all parts and of the gradients of rows, for buffers to write them to."""
        pairs = zip(self.program.outputs.parts, self.program.traces[-1].jaxpr.outvars, strict=True)
        parts = [whole_shape(self.program, part.reduction, v.aval) for part, v in pairs]
        return parts, [[self.arrays[i] for i in self.rows] for _ in self.gradient.sets]

    def result(self, parts: list[Array], sums: list[list[Array]], rows: list[list[Array]]) -> Result:
        """Gradients in the order of `wrt`."""
        grads = []
        for whole, own in zip(sums, rows, strict=True):
            by_slot = dict(zip([*self.whole, *self.rows], [*whole, *own], strict=True))
            grads.append([by_slot[i] for i in self.gradient.wrt])
        return Result(parts, grads)


def whole_shape(program: Program, reduction: Reduction, aval: Any) -> Any:
    """The shape of a part, of the given type in one microbatch, over the whole batch."""
    shape = aval.shape
    if reduction is Reduction.CONCAT:
        shape = (program.partition.batch_size, *shape[1:])
    elif reduction is Reduction.STACK:
        shape = (program.partition.num_microbatches, *shape)
    return aval.update(shape=shape)
