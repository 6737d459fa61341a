"""The one scan over microbatches, and the gradient of one microbatch.

`run` combines the parts of every microbatch. Asked for a gradient, the loop also back-propagates each microbatch with
given cotangents and carries the sum of what arrives. By default the backward pass adds to that sum itself, slice by
slice where it can (`_running_sums`); with ``tree()`` a whole tree of gradients is added after it.

The loop is made of ``lax.scan`` and ``jax.vjp`` alone, so every transformation of JAX applies to it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxaccum import _mesh, _reduce
from jaxaccum._accumulators import Sums
from jaxaccum._arguments import Role
from jaxaccum._batch import Group
from jaxaccum._program import Program
from jaxaccum._reduce import Reduction
from jaxaccum._tree import cast, promote
from jaxaccum._types import Array


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What to differentiate: the slots `wrt`; and the parts of the output that have a cotangent."""

    wrt: tuple[int, ...]
    parts: tuple[int, ...]
    sums: Sums


class Result(NamedTuple):
    """The combined parts of the output, and one gradient per slot of `wrt`."""

    parts: list[Array]
    grads: list[Array]


def run(program: Program, arrays: Sequence[Array], *, checkpoint: bool = False) -> list[Array]:
    """The combined parts of the whole batch, at one microbatch's memory; `checkpoint` keeps it under JAX's own AD."""
    return scan(program, arrays, _forward(program, arrays), checkpoint=checkpoint).parts


def run_with_gradient(program: Program, arrays: Sequence[Array], gradient: Gradient, seeds: Sequence[Array]) -> Result:
    """The combined parts, and ``Σ vjp(seeds)`` over microbatches; one seed for each of the gradient's parts.

    The seed of a summed part is the cotangent in every microbatch; that of rows or of a stack is cut as the rows are.
    """
    step = Derivative(program, gradient, list(arrays), list(seeds))
    visit = step.add_in_place if gradient.sums.in_place else step.add_tree
    scanned = scan(program, arrays, visit, sums=step.zeros(), idle=step.idle, extra=step.extra())
    return step.result(scanned)


# -- the scan ---------------------------------------------------------------------------------------------------------

Visit = Callable[..., tuple[list[Array], Any, Any]]
"""``visit(g, sums, rows, carry, index, extra) -> (parts, sums, written)``, once per microbatch."""


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
    """The one loop: state and sums go from microbatch to microbatch, in the batch's order, one scan per size.

    `keep` reads off what a microbatch wrote whether it counts; one that does not leaves the state as it was.
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
                state = new if keep is None else jax.tree.map(functools.partial(lax.select, keep(out)), new, state)
                return _mesh.vary(((state, sums), (entries, out)), program.axes)

            if program.limit is None:
                return active(carried)
            skipped = _mesh.vary((_empty_entries(program, g), idle(g)), program.axes)
            padding = _is_padding(partition.first_example(group, index), arrays[program.limit])
            return lax.cond(padding, lambda carried: (carried, skipped), active, carried)

        indices = jnp.arange(group.first, group.first + group.count, dtype=jnp.int32)
        rows = [partition.split_rows(arrays[i], program.slots[i].axis)[g] for i in program.positions(Role.ROWS)]
        init = _mesh.vary((state, sums), program.axes)
        body = jax.checkpoint(step) if checkpoint else step
        (state, sums), (entries, out) = lax.scan(body, init, (indices, rows, extra[g] if extra else None))
        written.append(out)
        stacked.append(entries)
    return Scanned(state.parts(program, stacked), sums, written)


def _is_padding(first: Array, num_examples: Array) -> Array:
    """Whether a microbatch that begins at example `first` holds padding alone; the number has any integer dtype."""
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


@dataclasses.dataclass(frozen=True)
class Derivative:
    """The derivative of one microbatch: its cotangents, and where its gradients go."""

    program: Program
    gradient: Gradient
    arrays: list[Array]
    seeds: list[Array]

    @property
    def whole(self) -> list[int]:
        """The differentiated slots that every microbatch reads whole."""
        return [*self.summed, *self.overwritten]

    @property
    def summed(self) -> list[int]:
        """Those whose gradients are summed over microbatches."""
        return [i for i in self._wrt(Role.WHOLE) if not self.program.slots[i].is_overwritten]

    @property
    def overwritten(self) -> list[int]:
        """Those whose "gradients" are maxima over the examples, and so combine by maximum. They are never negative."""
        return [i for i in self._wrt(Role.WHOLE) if self.program.slots[i].is_overwritten]

    def _wrt(self, role: Role) -> list[int]:
        return [i for i in self.gradient.wrt if self.program.slots[i].role is role]

    @property
    def rows(self) -> list[int]:
        """The differentiated slots whose gradients are rows, each of one microbatch."""
        return self._wrt(Role.ROWS)

    @property
    def parameters(self) -> list[Array]:
        """The arrays of `whole`."""
        return [self.arrays[i] for i in self.whole]

    def zeros(self) -> list[Array]:
        """The sums before the first microbatch."""
        return [self.gradient.sums.zeros(x) for x in self.parameters]

    # -- one microbatch

    def add_in_place(
        self, g: int, sums: Any, rows: Any, carry: Any, index: Array, extra: Any
    ) -> tuple[list[Array], Any, Any]:
        """The backward pass maps the sums so far to the sums with this microbatch."""
        places, count = self._places(g), len(self.summed)

        def forward(
            sums: list[Array], overwritten: list[Array], own: list[Array]
        ) -> tuple[tuple[list[Array], list[Array]], list[Array]]:
            arrays, cut = self._with_arrays(self.overwritten, overwritten), self._with_rows(rows, own)
            inputs = self.program.inputs(g, arrays, rows=cut, carry=carry, index=index)
            parts, sums = self.program.traces[g].with_sums(index, inputs, sums, places)
            return (self._wanted(parts), sums), parts

        unread = [_mesh.zeros(jax.typeof(x)) for x in sums[:count]]
        overwritten = [self.arrays[i] for i in self.overwritten]
        (outs, _), pull, parts = jax.vjp(forward, unread, overwritten, self._differentiated(rows), has_aux=True)
        added, news, written = pull((self.cotangents(outs, extra), sums[:count]))
        return parts, [*added, *self._maxima(sums[count:], news)], written

    def add_tree(
        self, g: int, sums: Any, rows: Any, carry: Any, index: Array, extra: Any
    ) -> tuple[list[Array], Any, Any]:
        """The backward pass returns a tree of gradients, which is added to the sums."""
        parts, pull, outs = self.at(g, rows=rows, carry=carry, index=index)
        grads, written = pull(self.cotangents(outs, extra))
        count = len(self.summed)
        added = [total + cast(grad, total.dtype) for total, grad in zip(sums[:count], grads[:count], strict=True)]
        return parts, [*added, *self._maxima(sums[count:], grads[count:])], written

    def _maxima(self, olds: list[Array], news: list[Array]) -> list[Array]:
        return [jnp.maximum(old, cast(new, old.dtype)) for old, new in zip(olds, news, strict=True)]

    def at(
        self, g: int, *, rows: list[Array], carry: Any, index: Array
    ) -> tuple[list[Array], Callable[[list[Array]], Any], list[Array]]:
        """One microbatch forward: all its parts, the pullback to parameters and rows, and the parts it starts from."""

        def forward(parameters: list[Array], own: list[Array]) -> tuple[list[Array], list[Array]]:
            arrays, cut = self._with_arrays(self.whole, parameters), self._with_rows(rows, own)
            inputs = self.program.inputs(g, arrays, rows=cut, carry=carry, index=index)
            parts = self.program.traces[g].derived(index, inputs)
            return self._wanted(parts), parts

        outs, pull, parts = jax.vjp(forward, self.parameters, self._differentiated(rows), has_aux=True)
        return parts, pull, outs

    def _places(self, g: int) -> dict[int, int]:
        """The arguments of trace `g` that have a running sum: their positions there, and those of the sums."""
        place_of = {slot: place for place, slot in enumerate(self.summed)}
        sources = enumerate(self.program.sources(g))
        return {position: place_of[slot] for position, slot in sources if slot in place_of}

    def _with_arrays(self, slots: list[int], values: Sequence[Array]) -> list[Array]:
        """The arrays of the call, with those of the given slots replaced."""
        arrays = list(self.arrays)
        for i, x in zip(slots, values, strict=True):
            arrays[i] = x
        return arrays

    def _wanted(self, parts: list[Array]) -> list[Array]:
        return [parts[i] for i in self.gradient.parts]

    def _differentiated(self, rows: Sequence[Array]) -> list[Array]:
        """Of one microbatch's rows, those to differentiate."""
        order = self.program.positions(Role.ROWS)
        return [rows[order.index(i)] for i in self.rows]

    def _with_rows(self, rows: Sequence[Array], own: Sequence[Array]) -> list[Array]:
        """One microbatch's rows, with those to differentiate replaced."""
        order, cut = self.program.positions(Role.ROWS), list(rows)
        for i, x in zip(self.rows, own, strict=True):
            cut[order.index(i)] = x
        return cut

    # -- cotangents

    def cotangents(self, outs: list[Array], extra: Any) -> list[Array]:
        """The cotangents of the wanted parts at one microbatch; `extra` are its own entries of the stacked ones."""
        entries, given = iter(extra), []
        for part, seed, out in zip(self.gradient.parts, self.seeds, outs, strict=True):
            own = next(entries) if self.program.outputs.parts[part].reduction.stacked else seed
            axes = _mesh.varying_axes(out)
            # An output that all devices share receives the cotangents of all of them.
            given.append(_mesh.sum_over_others(_mesh.vary(own, axes), axes))
        return given

    def extra(self) -> list[list[Array]]:
        """The cotangents of rows and stacks, cut for each group as the rows are."""
        partition = self.program.partition
        cut: list[list[Array]] = [[] for _ in partition.groups]
        for part, seed in zip(self.gradient.parts, self.seeds, strict=True):
            kind = self.program.outputs.parts[part].reduction
            for g, group in enumerate(partition.groups):
                if kind is Reduction.CONCAT:
                    cut[g].append(partition.split_rows(seed, 0)[g])
                elif kind is Reduction.STACK:
                    cut[g].append(seed[group.first : group.first + group.count])
        return cut

    # -- the result

    def idle(self, g: int) -> list[Array]:
        """What a skipped microbatch of group `g` writes: zeros."""
        rows = [self.program.partition.split_rows(self.arrays[i], self.program.slots[i].axis)[g] for i in self.rows]
        return [jnp.zeros_like(x[0]) for x in rows]

    def result(self, scanned: Scanned) -> Result:
        """Gradients in the order of `wrt`; those of rows back in the batch's order."""
        by_slot = dict(zip(self.whole, scanned.sums, strict=True))
        for j, i in enumerate(self.rows):
            groups = [group[j] for group in scanned.written]
            by_slot[i] = self.program.partition.merge_rows(groups, self.program.slots[i].axis)
        return Result(scanned.parts, [by_slot[i] for i in self.gradient.wrt])


def whole_shape(program: Program, reduction: Reduction, aval: Any) -> Any:
    """The shape of a part, of the given type in one microbatch, over the whole batch."""
    shape = aval.shape
    if reduction is Reduction.CONCAT:
        shape = (program.partition.batch_size, *shape[1:])
    elif reduction is Reduction.STACK:
        shape = (program.partition.num_microbatches, *shape)
    return aval.update(shape=shape)
