"""What one call computes at each microbatch: its arguments, its partition, and `fun` as traced once
per size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.extend.core as jex

from jaxaccum._base.entries import entries, places_of, with_entries
from jaxaccum._base.trees import safe_map
from jaxaccum._base.types import Array, Memory, Unroll
from jaxaccum._devices import varying
from jaxaccum._jaxpr import reversible
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._jaxpr.variables import Type, types_of
from jaxaccum._program import argument_slots, batch_keys, reductions
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.example_keys import example_keys
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.named_outputs import Output
from jaxaccum._program.output_parts import Outputs, Part, Term
from jaxaccum._program.reductions import Reduction
from jaxaccum._program.whole_outputs import Whole


class NeedsGlobalArraysError(Exception):
    """A loss whose collectives would stop at one device's rows, or an output without a tag that one
    device divides."""


@dataclasses.dataclass(frozen=True)
class Observed:
    """`fun` as it was traced at one size of microbatch, before anything was changed in its
    program."""

    trace: Trace
    consts: list[Array]
    outputs: tuple[Output, ...]
    """What the program computes, leaf by leaf."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What one microbatch computes.

    It takes the arrays of the call, one per slot, this microbatch's rows and its index, and returns
    the parts of the output.

    The slots are those of the arguments and then, for each size of microbatch, what its trace
    closed over.
    """

    slots: tuple[Slot, ...]
    partition: Partition
    outputs: Outputs
    terms: tuple[Term, ...]
    traces: tuple[Trace, ...]
    axes: frozenset[str]
    """The mesh axes over which anything in the loop varies."""
    mesh_axes: tuple[str, ...]
    """Those over which the caller asks to sum."""
    given_axes: tuple[frozenset[str], ...]
    """The mesh axes over which each slot varied as the caller gave it, before the loop's cast."""
    limit: int | None = None
    """The slot that counts the real examples, if the call has one; the rest is padding."""
    memory: Memory = None
    """The budget of a coupled program."""
    unroll: Unroll = 1
    """What the loop writes out; see `Unroll`."""
    checked: bool = True
    """Whether JAX could follow which values vary over a mesh; see `without_checks`."""
    shard: Array | None = None
    """The place of this device's shard, where it is known beforehand."""
    whole: Whole | None = None
    """The outputs that depend on whole arguments alone, which no loop computes."""
    observed: Mapping[int, Observed] = dataclasses.field(default_factory=dict)
    """For the audit: what was traced, by the size of the microbatch."""
    observe: Callable[[int, int], Observed] | None = None
    """For the audit: `fun` traced at another size, for another number of microbatches."""

    @property
    def under_mapped_axes(self) -> bool:
        """Whether it holds collectives over axes of an outer `vmap`, whose names a custom rule
        would not see."""
        return bool(self.other_axes - set(jax.sharding.get_abstract_mesh().manual_axes))

    @property
    def other_axes(self) -> frozenset[str]:
        """The named axes, other than the loop's, that its collectives mention."""
        return frozenset().union(*(one.other_axes for one in self.traces))

    @property
    def coupled(self) -> bool:
        """Whether it holds a collective over the axis of the loop, so that no microbatch stands
        alone."""
        return any(one.coupling is not None for one in self.traces)

    def positions(self, role: Role) -> list[int]:
        """The slots that have the role."""
        return argument_slots.positions(self.slots, role)

    @property
    def types(self) -> list[Type]:
        """The type of each part in a microbatch of the first group."""
        return types_of(self.traces[0].jaxpr.outvars)

    def over_mesh(self, values: Sequence[Array]) -> list[Array]:
        """The combined parts over all shards of the batch."""

        def over_mesh(part: Part, x: Array) -> Array:
            return reductions.over_mesh(part.reduction, x, self.mesh_axes)

        return safe_map(over_mesh, self.outputs.parts, values)

    def parts(
        self,
        g: int,
        arrays: Sequence[Array],
        *,
        rows: Sequence[Array],
        carry: Sequence[Array],
        index: Array,
    ) -> list[Array]:
        """The parts of microbatch `index` of group `g`; `rows` and `carry` are its own, `arrays`
        the whole call's."""
        return self.traces[g](index, self.inputs(g, arrays, rows=rows, carry=carry, index=index))

    def inputs(
        self,
        g: int,
        arrays: Sequence[Array],
        *,
        rows: Sequence[Array],
        carry: Sequence[Array],
        index: Array,
    ) -> list[Array]:
        """What the trace of group `g` reads at microbatch `index`, of the arguments of `parts`."""
        own = with_entries(arrays, self.positions(Role.ROWS), rows)
        own = with_entries(own, self.positions(Role.CARRY), carry)
        for i, slot in enumerate(self.slots):
            own[i] = self._folded(slot, own[i], g=g, index=index)
        return entries(own, self.sources(g))

    def depends(self, parts: Sequence[int], wrt: Collection[int]) -> bool:
        """Whether any of the parts depends on any of the slots `wrt`."""
        for g, one in enumerate(self.traces):
            used = entries(self.sources(g), places_of(one.needs(parts)))
            if not set(wrt).isdisjoint(used):
                return True
        return False

    def is_reversible(self, wrt: Collection[int]) -> bool:
        """Whether JAX has a reverse derivative with respect to the slots `wrt`."""
        for g, one in enumerate(self.traces):
            moved = [i in wrt for i in self.sources(g)]
            if not one.is_reversible(moved):
                return False
        return True

    @property
    def _jaxprs(self) -> list[jex.Jaxpr]:
        return [one.jaxpr for one in self.traces]

    @property
    def has_backward_rule(self) -> bool:
        """Whether a ``jax.custom_vjp`` in it may treat a cotangent in a way that is not linear."""
        return any(map(reversible.has_backward_rule, self._jaxprs))

    @property
    def has_checks(self) -> bool:
        """Whether it holds checks of ``checkify``."""
        return any(map(reversible.has_checks, self._jaxprs))

    def only(self, parts: Sequence[int]) -> tuple[Program, list[int]]:
        """The program that computes the given parts alone, and which parts it returns: these and
        what they carry."""
        carried = self.outputs.positions(Reduction.CARRY)
        kept = sorted(parts)
        if carried and self.depends(kept, self.positions(Role.CARRY)):
            kept = sorted({*kept, *carried})
        traces = tuple(one.only(kept) for one in self.traces)
        outputs = dataclasses.replace(self.outputs, parts=tuple(entries(self.outputs.parts, kept)))
        return dataclasses.replace(self, traces=traces, outputs=outputs), kept

    @property
    def num_arguments(self) -> int:
        """How many slots are those of the arguments."""
        return len(self.slots) - sum(_num_consts(self.traces))

    def sources(self, g: int) -> list[int]:
        """The slots that trace `g` reads: its constants, then the arguments."""
        return sources(self.slots, self.traces, g)

    def _folded(self, slot: Slot, x: Array, *, g: int, index: Array) -> Array:
        """A key of the whole call, made this microbatch's: global over the shards of a mesh."""
        if slot.role is Role.KEY:
            place = index + self._shard() * self.partition.num_microbatches
            return jax.random.fold_in(slot.value(x), place)
        if slot.role is Role.EXAMPLE_KEY:
            examples = self.partition.examples(self.partition.groups[g], index)
            return self._keys_of(slot.value(x), examples)
        if slot.role is Role.BATCH_KEY:
            first = self.partition.first_example(self.partition.groups[g], index)
            return batch_keys.moved(x, first + self._shard() * self.partition.batch_size)
        return x

    def _keys_of(self, key: Array, examples: Array) -> Array:
        """The keys of these examples of the device's own shard."""
        own = self.partition.batch_size
        size = own * varying.num_shards(self.mesh_axes)
        return example_keys(key, examples + self._shard() * own, batch_size=size)

    def _shard(self) -> Array | int:
        """The place of this device's shard of the batch."""
        return varying.shard_index(self.mesh_axes) if self.shard is None else self.shard


def sources(slots: Sequence[Slot], traces: Sequence[Trace], g: int) -> list[int]:
    """The slots that trace `g` reads: what it closes over, then the arguments."""
    counts = _num_consts(traces)
    num_args = len(slots) - sum(counts)
    first = num_args + sum(counts[:g])
    return [*range(first, first + counts[g]), *range(num_args)]


def _num_consts(traces: Sequence[Trace]) -> list[int]:
    return [one.num_consts for one in traces]
