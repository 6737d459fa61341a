"""The one scan over microbatches: each brings its parts of the output, which the scan combines.

The problem. A function of a batch returns arrays that combine in different ways: totals are added,
rows are put in order, a carried state is handed on. And a batch of 10 examples in microbatches of 4
leaves a microbatch of 2, whose arrays have other shapes.

The idea. Each array of the output, a part, has a reduction (`reductions`). What a reduction has to
remember is the state of the scan; what it writes row by row are the scan's outputs.

    state, sums = initial, zeros
    for index, rows in enumerate(microbatches):
        parts, sums, written = visit(sums, rows, carried state, index)
        state = update(state, parts)

`visit` is what differs between the passes: the value alone, a gradient, a custom accumulator, one
stage of a coupled program. State and sums go from microbatch to microbatch in the batch's order.
Microbatches of two sizes are two scans, one after the other; the second begins with the state of
the first.

Example. ``{"loss": Mean(total, weight), "logits": Concat(z)}`` has three parts. Of microbatches of
2 and 1 examples, the first leaves the state T₁, W₁ and writes z₁. The second leaves T₁ + T₂,
W₁ + W₂ and writes z₂. Then z₁ and z₂ are put together, and `finalize` divides.

The cost. The state and one microbatch at a time; rows and stacks have the size of their result.

Known weakness. Two sizes of microbatch are traced and compiled apart, which doubles both times.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.entries import entries
from jaxaccum._base.trees import as_key, cast, key_data, promote
from jaxaccum._base.types import Array, PyTree
from jaxaccum._devices import varying
from jaxaccum._jaxpr.convolutions import fast_on_cpu, has_convolutions
from jaxaccum._jaxpr.variables import Type, type_of
from jaxaccum._program import reductions
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.program import Program
from jaxaccum._program.reductions import Reduction


class Visit(Protocol):
    """What a pass does at one microbatch."""

    def __call__(
        self,
        g: int,
        sums: PyTree,
        rows: list[Array],
        carry: list[Array],
        index: Array,
        extra: PyTree,
        /,
    ) -> tuple[list[Array], PyTree, PyTree]:
        """The parts of microbatch `index`, which is one of group `g`; the new sums; and what is
        written out. `extra` is the microbatch's entry of what the pass was given."""
        ...


class Scanned(NamedTuple):
    """What a pass leaves."""

    parts: list[Array]
    sums: PyTree
    written: list[PyTree]
    """What each microbatch wrote, stacked, one entry per group."""


def scan(
    program: Program,
    arrays: Sequence[Array],
    visit: Visit,
    *,
    sums: PyTree = (),
    idle: Callable[[int], PyTree] = lambda g: (),
    extra: Sequence[PyTree] = (),
    checkpoint: bool = False,
    keep: Callable[[PyTree], Array] | None = None,
) -> Scanned:
    """One pass over the microbatches, in the batch's order: one scan per size.

    Args:
        program: what one microbatch computes.
        arrays: the arrays of the call, one per slot.
        visit: what the pass does at one microbatch.
        sums: where its sums begin.
        idle: of a group, what a microbatch of padding alone writes.
        extra: for each group, what else `visit` reads, with one entry per microbatch.
        checkpoint: whether JAX is to compute microbatches again where it derives the scan.
        keep: reads off what a microbatch wrote whether it counts; one that does not leaves the
            state as it was.
    """
    step = _Step(program, arrays, visit, idle, keep)
    state, written, stacked = _first(program, arrays), [], []
    for g, group in enumerate(program.partition.groups):
        state = _entering(program, g, state)
        indices = jnp.arange(group.first, group.first + group.count, dtype=jnp.int32)
        rows = rows_of(program, arrays, program.positions(Role.ROWS), g)
        init = varying.vary((state, sums), program.axes)
        body = functools.partial(step.microbatch, g)
        body = fast_on_cpu(body) if has_convolutions(program.traces[g].jaxpr) else body
        body = jax.checkpoint(body) if checkpoint else body
        xs = (indices, rows, extra[g] if extra else None)
        if _last_apart(program, g, sums):
            (state, sums), (own, out) = _over_all_but_the_last(body, init, xs)
        else:
            unroll = 1 if program.unroll == "last" else program.unroll
            (state, sums), (own, out) = lax.scan(body, init, xs, unroll=unroll)
        written.append(out)
        stacked.append(own)
    return Scanned(_combined(program, state, stacked), sums, written)


def rows_of(program: Program, arrays: Sequence[Array], slots: Sequence[int], g: int) -> list[Array]:
    """The arrays of some slots, cut into the microbatches of group `g`."""
    split = program.partition.split_rows
    return [split(arrays[i], program.slots[i].axis)[g] for i in slots]


# -- one scan --------------------------------------------------------------------------------------

Body = Callable[[Any, Any], tuple[Any, Any]]


def _last_apart(program: Program, g: int, sums: PyTree) -> bool:
    """Whether the last microbatch is written out after the loop: only where sums can travel.

    Beside padding every microbatch is in a ``cond``, which completes all sums at once.
    """
    groups = program.partition.groups
    is_last = g == len(groups) - 1 and groups[g].count > 1
    travels = program.limit is None and bool(jax.tree.leaves(sums))
    return program.unroll == "last" and is_last and travels


def _over_all_but_the_last(body: Body, init: Any, xs: Any) -> tuple[Any, Any]:
    """``lax.scan``, with the last microbatch after the loop.

    There XLA sees which sums are complete while it differentiates the rest, and can begin to send
    them. Inside of a loop no sum is complete before the loop ends. The loop reads the rows where
    they lie: a scan over all but the last would copy them. What is written row by row is copied
    once, when the last entry joins the others. Typed keys are read as the integers that they are
    made of: JAX takes a key that a loop closes over for one that every iteration uses.
    """
    count = len(jax.tree.leaves(xs)[0])
    plain = jax.tree.map(key_data, xs)
    entry_of = lambda i, x, like: as_key(lax.dynamic_index_in_dim(x, i, keepdims=False), like)
    read = lambda i: jax.tree.map(functools.partial(entry_of, i), plain, xs)
    others = jnp.arange(count - 1, dtype=jnp.int32)
    carried, written = lax.scan(lambda carried, i: body(carried, read(i)), init, others)
    carried, entry = body(carried, read(count - 1))
    return carried, jax.tree.map(lambda ys, y: jnp.concatenate([ys, y[None]]), written, entry)


# -- one microbatch --------------------------------------------------------------------------------

State = dict[int, Array]
"""What the scan remembers of the output, by part: sums, extrema, last values, the carried state."""
Entries = dict[int, Array]
"""What a microbatch writes of the output, by part: rows and stacks."""
Carried = tuple[State, PyTree]
"""The state and the sums of a pass."""
Written = tuple[Entries, PyTree]
"""What is written of the output, and by the pass."""


@dataclasses.dataclass(frozen=True)
class _Step:
    """The body of the scan; its fields are the arguments of `scan`."""

    program: Program
    arrays: Sequence[Array]
    visit: Visit
    idle: Callable[[int], PyTree]
    keep: Callable[[PyTree], Array] | None

    def microbatch(
        self, g: int, carried: Carried, x: tuple[Array, list[Array], PyTree]
    ) -> tuple[Carried, Written]:
        """One microbatch of group `g`: its index, its rows, its extra; one of padding alone is
        passed over."""
        program, active = self.program, functools.partial(self._active, g, x=x)
        if program.limit is None:
            return active(carried)
        skipped = varying.vary((_empty_entries(program, g), self.idle(g)), program.axes)
        first = program.partition.first_example(program.partition.groups[g], x[0])
        padding = _is_padding(first, self.arrays[program.limit])
        return lax.cond(padding, lambda carried: (carried, skipped), active, carried)

    def _active(
        self, g: int, carried: Carried, x: tuple[Array, list[Array], PyTree]
    ) -> tuple[Carried, Written]:
        (state, sums), (index, rows, extra) = carried, x
        carry = _carried_state(self.program, state, self.arrays)
        parts, sums, out = self.visit(g, sums, rows, carry, index, extra)
        new, own = _updated(self.program, state, parts)
        if self.keep is not None:
            new = jax.tree.map(functools.partial(lax.select, self.keep(out)), new, state)
        return varying.vary(((new, sums), (own, out)), self.program.axes)


def _is_padding(first: Array, num_examples: Array) -> Array:
    """Whether a microbatch that begins at example `first` holds padding alone; the number has any
    integer dtype."""
    dtype = promote(first, num_examples)
    return cast(first, dtype) >= cast(num_examples, dtype)


# -- the output ------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """One array of the output: how it combines, and its type in one microbatch."""

    reduction: Reduction
    type: Type


def _parts(program: Program, g: int, *, stacked: bool) -> dict[int, _Part]:
    """The parts that are written row by row, or those that are not, in group `g`."""
    found: dict[int, _Part] = {}
    for i, part in enumerate(program.outputs.parts):
        if part.reduction.stacked is stacked:
            found[i] = _Part(part.reduction, type_of(program.traces[g].jaxpr.outvars[i]))
    return found


def _first(program: Program, arrays: Sequence[Array]) -> State:
    """The state before the first microbatch."""
    states = iter(entries(arrays, program.positions(Role.CARRY)))
    state: State = {}
    for i, (reduction, aval) in _parts(program, 0, stacked=False).items():
        if reduction is Reduction.CARRY:
            given = lax.stop_gradient(lax.convert_element_type(next(states), aval.dtype))
            state[i] = varying.vary(given, varying.varying_axes(aval))
        else:
            state[i] = reductions.initial(reduction, aval)
    return state


def _entering(program: Program, g: int, state: State) -> State:
    """The state before the first microbatch of group `g`.

    The last value may have the shape of its microbatch; where it has, it starts anew at each size.
    """
    entered: State = {}
    for i, (reduction, aval) in _parts(program, g, stacked=False).items():
        same = state[i].shape == aval.shape
        entered[i] = state[i] if same else reductions.initial(reduction, aval)
    return entered


def _carried_state(program: Program, state: State, arrays: Sequence[Array]) -> list[Array]:
    """The carried state; the initial one in a program that does not compute it, because nothing
    there reads it."""
    parts = program.outputs.parts
    values = [x for i, x in state.items() if parts[i].reduction is Reduction.CARRY]
    return values or entries(arrays, program.positions(Role.CARRY))


def _updated(program: Program, state: State, parts: Sequence[Array]) -> tuple[State, Entries]:
    """The state after a microbatch, and what it writes out."""
    new, written = {}, {}
    for i, part in enumerate(program.outputs.parts):
        if part.reduction.stacked:
            written[i] = parts[i]
        else:
            new[i] = reductions.update(part.reduction, state[i], parts[i])
    return new, written


def _combined(program: Program, state: State, stacked: Sequence[Entries]) -> list[Array]:
    """All parts of the whole batch, in their order; `stacked` has an entry per group."""
    combined = []
    for i, part in enumerate(program.outputs.parts):
        if part.reduction.stacked:
            combined.append(_merged(program, part.reduction, [own[i] for own in stacked]))
        else:
            combined.append(state[i])
    return combined


def _merged(program: Program, reduction: Reduction, groups: list[Array]) -> Array:
    if reduction is Reduction.CONCAT:
        return program.partition.merge_rows(groups)
    return groups[0] if len(groups) == 1 else jnp.concatenate(groups)


def _empty_entries(program: Program, g: int) -> Entries:
    return {i: varying.zeros(part.type) for i, part in _parts(program, g, stacked=True).items()}


# -- forward alone ---------------------------------------------------------------------------------


def run(program: Program, arrays: Sequence[Array], *, checkpoint: bool = False) -> list[Array]:
    """The combined parts of the whole batch, at one microbatch's memory; `checkpoint` keeps it
    under JAX's own AD."""
    return scan(program, arrays, _forward(program, arrays), checkpoint=checkpoint).parts


def _forward(program: Program, arrays: Sequence[Array]) -> Visit:
    def visit(
        g: int, sums: PyTree, rows: list[Array], carry: list[Array], index: Array, extra: None
    ) -> tuple[list[Array], PyTree, tuple[()]]:
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
