"""A call made ready for the loop: the arguments read, the batch partitioned, `fun` traced once a size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from jaxaccum import _arguments, _check, _mesh, _no_gradient, _outputs, _reversible, _whole
from jaxaccum._arguments import Layout, Role, Slot
from jaxaccum._batch import Partition
from jaxaccum._call import Call
from jaxaccum._example_keys import example_keys
from jaxaccum._in_axes import ArgumentAxes
from jaxaccum._outputs import Outputs, Part, Term
from jaxaccum._reduce import Reduction
from jaxaccum._returned import Output
from jaxaccum._trace import Trace, axes_of, trace
from jaxaccum._tree import key_impl
from jaxaccum._types import Array, Audit, Fun, InAxes, Memory, PyTree, Split, WithStreams
from jaxaccum._unchecked import unchecked, untyped_shard_index, with_exchanges
from jaxaccum._whole import Whole


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that every transformation shares, as the user gave them."""

    in_axes: InAxes | ArgumentAxes = (None, 0)
    """As the user gave it; in the options of one call, the entry of every argument."""
    num_microbatches: int | None = None
    microbatch_size: int | None = None
    split: Split = "contiguous"
    num_examples_argnum: int | None = None
    axis_name: str = "microbatch"
    mesh_axes: str | Sequence[str] | None = None
    memory: Memory = None
    audit: Audit = "warn"
    device_axes: tuple[str, ...] = ()
    """The axes of an explicit mesh over which the call runs device by device."""
    blocks: int = 1
    """In how many blocks, one on each device, the rows of a batch of global arrays lie."""

    def axes(self, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArgumentAxes:
        """The entry of every argument of the call ``fun(*args, **kwargs)``."""
        return _arguments.assigned(self.in_axes, args, kwargs, fun)

    def of_call(self, fun: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Options:
        """The options of one call, whose arguments have no names from then on."""
        return dataclasses.replace(self, in_axes=self.axes(fun, args, kwargs))


class NeedsGlobalArraysError(Exception):
    """A loss whose collectives would stop at one device's rows, or an output without a tag that one device divides."""


@dataclasses.dataclass(frozen=True)
class Observed:
    """`fun` as it was traced at one size of microbatch, before anything was changed in its program."""

    trace: Trace
    consts: list[Any]
    outputs: tuple[Output, ...]
    """What the program computes, leaf by leaf."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What one microbatch computes: the parts of the output, of the arrays of all slots, its rows and its index.

    The slots are those of the arguments and then, for each size of microbatch, what its trace closed over.
    """

    slots: tuple[Slot, ...]
    partition: Partition
    outputs: Outputs
    terms: tuple[Term, ...]
    traces: tuple[Trace, ...]
    axes: frozenset[str]
    mesh_axes: tuple[str, ...]
    given_axes: tuple[frozenset[str], ...]
    """The mesh axes over which each slot varied as the caller gave it, before the loop's cast."""
    limit: int | None = None
    """The slot that counts the examples that are no padding, if the call has one."""
    memory: Memory = None
    """The budget of a coupled program."""
    checked: bool = True
    """Whether JAX could follow which values vary over a mesh; see `_unchecked`."""
    shard: Array | None = None
    """The place of this device's shard, where it is known beforehand."""
    whole: Whole | None = None
    """The outputs that depend on whole arguments alone, which no loop computes."""
    observed: Mapping[int, Observed] = dataclasses.field(default_factory=dict)
    """For the audit: what was traced, by the size of the microbatch. Empty where nothing is audited."""
    observe: Callable[[int, int], Observed] | None = None
    """For the audit: `fun` traced at another size, as one of another number of microbatches."""

    @property
    def under_mapped_axes(self) -> bool:
        """Whether it holds collectives over axes of an outer `vmap`, whose names a custom rule would not see."""
        named = frozenset().union(*(one.other_axes for one in self.traces))
        return bool(named - set(jax.sharding.get_abstract_mesh().manual_axes))

    @property
    def coupled(self) -> bool:
        """Whether it holds a collective over the axis of the loop, so that no microbatch stands alone."""
        return any(one.coupling is not None for one in self.traces)

    def positions(self, role: Role) -> list[int]:
        """The slots that have the role."""
        return [i for i, slot in enumerate(self.slots) if slot.role is role]

    def parts(
        self, g: int, arrays: Sequence[Any], *, rows: Sequence[Any], carry: Sequence[Any], index: Any
    ) -> list[Any]:
        """The parts of microbatch `index` of group `g`; `rows` and `carry` are its own, `arrays` the whole call's."""
        return self.traces[g](index, self.inputs(g, arrays, rows=rows, carry=carry, index=index))

    def inputs(
        self, g: int, arrays: Sequence[Any], *, rows: Sequence[Any], carry: Sequence[Any], index: Any
    ) -> list[Any]:
        """What the trace of group `g` reads at microbatch `index`, of the arguments of `parts`."""
        own = list(arrays)
        for positions, values in ((self.positions(Role.ROWS), rows), (self.positions(Role.CARRY), carry)):
            for position, value in zip(positions, values, strict=True):
                own[position] = value
        for position, slot in enumerate(self.slots):
            own[position] = self._folded(slot, own[position], g=g, index=index)
        return [own[i] for i in self.sources(g)]

    def depends(self, parts: Sequence[int], wrt: Collection[int]) -> bool:
        """Whether any of the parts depends on any of the slots `wrt`."""
        for g, one in enumerate(self.traces):
            used = zip(self.sources(g), one.needs(parts), strict=True)
            if any(needed and i in wrt for i, needed in used):
                return True
        return False

    def is_reversible(self, wrt: Collection[int]) -> bool:
        """Whether JAX has a reverse derivative with respect to the slots `wrt`."""
        pairs = [(one, [i in wrt for i in self.sources(g)]) for g, one in enumerate(self.traces)]
        return all(one.is_reversible(moved) for one, moved in pairs)

    @property
    def has_backward_rule(self) -> bool:
        """Whether a ``jax.custom_vjp`` in it may treat a cotangent in a way that is not linear."""
        return any(_reversible.has_backward_rule(one.jaxpr) for one in self.traces)

    @property
    def has_checks(self) -> bool:
        """Whether it holds checks of ``checkify``."""
        return any(_reversible.has_checks(one.jaxpr) for one in self.traces)

    def pure(self) -> Program:
        """The program without its prints and callbacks, unless an output depends on one."""
        return dataclasses.replace(self, traces=tuple(one.pure() for one in self.traces))

    def only(self, parts: Sequence[int]) -> tuple[Program, list[int]]:
        """The program that computes the given parts alone, and which parts it returns: these and what they carry."""
        carried = [i for i, part in enumerate(self.outputs.parts) if part.reduction is Reduction.CARRY]
        kept = sorted(parts)
        if carried and self.depends(kept, self.positions(Role.CARRY)):
            kept = sorted({*kept, *carried})
        traces = tuple(one.only(kept) for one in self.traces)
        outputs = dataclasses.replace(self.outputs, parts=tuple(self.outputs.parts[i] for i in kept))
        return dataclasses.replace(self, traces=traces, outputs=outputs), kept

    @property
    def num_arguments(self) -> int:
        """How many slots are those of the arguments."""
        return len(self.slots) - sum(one.num_consts for one in self.traces)

    def sources(self, g: int) -> list[int]:
        """The slots that trace `g` reads: its constants, then the arguments."""
        return _sources(self.slots, self.traces, g)

    def _folded(self, slot: Slot, x: Any, *, g: int, index: Any) -> Any:
        """A key of the whole call, made this microbatch's: global over the shards of a mesh."""
        if slot.role is Role.KEY:
            place = index + self._shard() * self.partition.num_microbatches
            return jax.random.fold_in(slot.value(x), place)
        if slot.role is Role.EXAMPLE_KEY:
            examples = self.partition.examples(self.partition.groups[g], index)
            return self._keys_of(slot.value(x), examples)
        return x

    def _keys_of(self, key: Array, examples: Array) -> Array:
        """The keys of these examples of the device's own shard."""
        own = self.partition.batch_size
        shards = math.prod(jax.lax.axis_size(name) for name in self.mesh_axes)
        return example_keys(key, examples + self._shard() * own, batch_size=own * shards)

    def _shard(self) -> Array | int:
        """The place of this device's shard of the batch."""
        return _mesh.shard_index(self.mesh_axes) if self.shard is None else self.shard


def _sources(slots: Sequence[Slot], traces: Sequence[Trace], g: int) -> list[int]:
    num_args = len(slots) - sum(one.num_consts for one in traces)
    first = num_args + sum(one.num_consts for one in traces[:g])
    return [*range(first, first + traces[g].num_consts), *range(num_args)]


def _unwrapped(slots: Sequence[Slot], arrays: Sequence[Any]) -> tuple[list[Slot], list[Any]]:
    """The same, but typed keys that are folded are the integers that they are made of.

    JAX's check for keys that are used twice (``jax_debug_key_reuse``) takes a typed key that a
    loop closes over for one that every iteration uses.
    """
    new, values = list(slots), list(arrays)
    for i, (slot, x) in enumerate(zip(slots, arrays, strict=True)):
        if slot.role in (Role.KEY, Role.EXAMPLE_KEY):
            new[i] = dataclasses.replace(slot, key=key_impl(x))
            values[i] = new[i].array(x)
    return new, values


def read(
    options: Options, args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Collection[int]
) -> tuple[Layout, list[Array], int | None]:
    """The layout of the arguments, the arrays of its slots, and the argument that counts the examples."""
    counted = options.num_examples_argnum
    if counted is not None:
        counted = _check.argnum(counted, len(args), f"num_examples_argnum={counted!r}")
    return *_arguments.read(args, kwargs, options.in_axes, differentiated=argnums, counted=counted), counted


def prepare(
    fun: Fun,
    options: Options,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    argnums: Collection[int] = (),
    loss: bool = False,
    has_aux: bool = False,
) -> tuple[Program, list[Array]]:
    """The program of one call and the arrays of its slots."""
    layout, arrays, counted = read(options, args, kwargs, argnums)
    mesh_axes = _check.mesh_axes(options.mesh_axes, options.axis_name, [_mesh.axis_names(x) for x in arrays])
    memory = _check.memory(options.memory)
    limit = _arguments.counter(layout.slots, arrays, counted)
    partition = _check.partition(
        _arguments.batch_size(layout.slots, arrays, fun),
        num_microbatches=options.num_microbatches,
        microbatch_size=options.microbatch_size,
        split=options.split,
    )
    if options.split == "contiguous":
        partition = dataclasses.replace(partition, blocks=options.blocks)
    given_axes = [_mesh.varying_axes(x) for x in arrays]
    _check.divided(
        mesh_axes, [axes for slot, axes in zip(layout.slots, given_axes, strict=True) if slot.role is Role.ROWS]
    )
    own = [axes for slot, axes in zip(layout.slots, given_axes, strict=True) if slot.role is not Role.WHOLE]
    axes = frozenset(mesh_axes).union(*own)
    arrays = _mesh.vary(arrays, axes)
    audited = _check.audit(options.audit) is not None
    call = Call(fun, layout, loss, has_aux, limit is not None, audited, partition.batch_size)
    axis = (options.axis_name, partition.num_microbatches)
    given, observed = arrays[: len(layout.slots)], dict[int, Observed]()
    checked, traces, slots, shadows = True, [], list(layout.slots), _check.is_bound(options.axis_name)
    shapes = functools.partial(_shapes, layout, given, mesh_axes=mesh_axes)
    at = lambda call, size: _traced(call.at(size), shapes(size), axis)
    for g, group in enumerate(partition.groups):
        one, own, consts, checked = call.traced(at, group.size)
        one, _ = one.split(len(call.shapes[g]))
        observed[group.size] = Observed(own.split(len(call.shapes[g]))[1], consts, call.returned[g])
        if (coupling := one.coupling) is not None:
            if not set(options.device_axes) <= set(axes_of(coupling)):
                raise NeedsGlobalArraysError
            _check.coupled(coupling, options.axis_name, partition, shadows=shadows)
            if not checked:
                _check.undivided([(slot.name, own) for slot, own in zip(slots, given_axes, strict=True)], axes)
            if isinstance(fun, WithStreams) and (partition.num_microbatches > 1 or mesh_axes):
                with contextlib.nullcontext() if checked else unchecked():
                    one = _with_own_streams(one, call.outputs[g], layout.slots, partition, mesh_axes)
        traces.append(one)
        slots += [Slot("a value that fun closes over", Role.WHOLE)] * len(consts)
        arrays += consts
        given_axes += [_mesh.varying_axes(x) for x in consts]
    outputs = call.outputs[0]
    if traces[0].coupling is not None:
        # Padding is masked in every sum, so that a microbatch of padding alone need not be skipped.
        outputs, limit = outputs.updated_once(), None
    elif mesh_axes and any(slot.role is Role.CARRY for slot in slots):
        raise ValueError(
            "a state declared CARRY runs through the microbatches of one device, and mesh_axes sums over several; "
            "drop one of the two."
        )
    call.check_sizes(partition)
    whole = None
    if outputs.whole:
        reads = [_sources(slots, traces, g) for g in range(len(traces))]
        may = [slot.role is Role.WHOLE for slot in slots]
        # One device sees a share of a parameter that is divided, gathered at every microbatch as if it were rows.
        same = [not given & set(options.device_axes) for given in given_axes]
        found = _whole.refusal(traces, outputs, [[may[i] and same[i] for i in own] for own in reads])
        if found and options.device_axes:
            raise NeedsGlobalArraysError
        if found:
            raise TypeError(found)
        whole = _whole.separated(traces[0], outputs, [given_axes[i] for i in reads[0]])
        traces = [one.first(len(outputs.parts)) for one in traces]
    terms = _outputs.terms(outputs, call.num_terms) if loss else ()
    slots, arrays = _unwrapped(slots, arrays)
    program = Program(
        tuple(slots), partition, outputs, terms, tuple(traces), axes, mesh_axes, tuple(given_axes), limit,
        memory, checked, whole=whole,
    )  # fmt: skip
    _check_padding(program)
    if audited:
        observe = functools.partial(_observed, call, shapes, options.axis_name)
        program = dataclasses.replace(program, observed=observed, observe=observe)
    return program, arrays


def _observed(call: Call, shapes: Shapes, axis_name: str, size: int, count: int) -> Observed:
    """`fun` traced for one of `count` microbatches of `size` examples."""
    other = call.elsewhere()
    _, own, consts, _ = _traced(other.at(size), shapes(size), (axis_name, count))
    return Observed(own.split(len(other.shapes[0]))[1], consts, other.returned[0])


def _traced(fun: Fun, shapes: list[Any], axis: tuple[str, int]) -> tuple[Trace, Trace, list[Any], bool]:
    """The trace, as it was before anything was changed in it, and its constants.

    Last, whether JAX could follow in it which values vary over a mesh.
    """
    if not any(map(_mesh.varying_axes, shapes)):
        one, consts = trace(fun, shapes, axis)
        return one, one, consts, True
    try:
        one, consts = trace(fun, shapes, axis)
        return one, one, consts, True
    except (AssertionError, ValueError) as error:  # what JAX says of a collective over an axis that is not the mesh's
        with unchecked():
            plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
            try:
                one, consts = trace(fun, plain, axis)
            except Exception:  # of the user's function: what JAX said first is about the program as it stands
                raise error from None
        if one.coupling is None:
            raise
        return dataclasses.replace(one, jaxpr=with_exchanges(one.jaxpr, axis[0])), one, consts, False


def _with_own_streams(
    one: Trace, outputs: Outputs, slots: Sequence[Slot], partition: Partition, mesh_axes: tuple[str, ...]
) -> Trace:
    """A coupled trace of a model, in which every carried key is folded with the microbatch's index.

    A coupled program updates its state once, so that all microbatches would draw the same numbers. What follows from
    the old state alone is made of the keys as they came: the next keys, and whatever is not drawn from a key.
    """
    keys = {one.num_consts + i: slot.key for i, slot in enumerate(slots) if slot.key is not None}
    own = {one.num_consts + i for i, slot in enumerate(slots) if slot.role not in (Role.WHOLE, Role.CARRY)}
    states = [i for i, part in enumerate(outputs.parts) if part.reduction is Reduction.CARRY]
    carried = [slot for slot in slots if slot.role is Role.CARRY]
    pure, kept = one.pure(), set()
    for i, slot in zip(states, carried, strict=True):
        needed = {j for j, read in enumerate(pure.needs([i])) if read}
        if not needed & (own if slot.key is not None else own | keys.keys()):
            kept.add(i)

    def folded(index: Array, arrays: list[Any]) -> list[Any]:
        place = index + untyped_shard_index(mesh_axes) * partition.num_microbatches
        for i, impl in keys.items():
            given = jax.random.wrap_key_data(arrays[i], impl=impl)
            drawn_from = jax.vmap(jax.random.fold_in, (0, None))(given.reshape(-1), place)
            arrays[i] = jax.random.key_data(drawn_from.reshape(given.shape))
        return arrays

    return one.before(folded, keep=kept) if keys else one


def _check_padding(program: Program) -> None:
    """Where padding is skipped, the weight of a mean over rows depends on the arguments.

    One that does not counts padding as examples.
    """
    if program.limit is None:
        return
    every, rows = range(len(program.slots)), program.positions(Role.ROWS)
    for leaf in program.outputs.leaves:
        if leaf.weight is None or program.depends([leaf.weight], every):
            continue
        if program.depends([leaf.part], rows):
            raise ValueError(
                f"{program.outputs.parts[leaf.weight].name} depends on no argument, so it counts "
                "padding as examples. With num_examples_argnum return Mean(total, weight), with the "
                "mask of real examples in both; to divide by a constant, return "
                "Sum(total / constant)."
            )


def _shapes(
    layout: Layout, arrays: list[Array], size: int, mesh_axes: tuple[str, ...]
) -> list[Any]:
    """The types of the arguments for `size` examples: shapes alone would lose how a mesh divides them."""

    def cut(arrays: list[Array]) -> list[Array]:
        own, index = [], _mesh.vary(jax.numpy.int32(0), frozenset(mesh_axes))
        for slot, x in zip(layout.slots, arrays, strict=True):
            if slot.role is Role.ROWS:
                if size > x.shape[slot.axis]:  # for the audit, which may ask for more than there are
                    x = jax.numpy.concatenate([x, x], axis=slot.axis)
                x = jax.lax.slice_in_dim(x, 0, size, axis=slot.axis)
            elif slot.role is Role.KEY:
                x = jax.random.fold_in(x, index)
            elif slot.role is Role.EXAMPLE_KEY:
                x = example_keys(x, index + jax.numpy.arange(size, dtype=jax.numpy.int32))
            own.append(x)
        return own

    return list(jax.make_jaxpr(cut)(arrays).out_avals)


Shapes = Callable[[int], list[Any]]
"""The types of the arguments of a microbatch, by its size."""


def _refusing_itself(part: Part, x: Array) -> Array:
    says = functools.partial(_no_gradient.refusal, part.name, part.tag, whole=False)
    one = _no_gradient.Refused((0,), says)
    return _no_gradient.refusing([jax.lax.stop_gradient(x)], [x], {0: one})[0]


def whole(fun: Fun, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyTree:
    """`fun` in one pass over the whole batch, its tags resolved: the full-batch oracle.

    The axis of the loop is bound with size 1, so that a collective over it sees all examples at once.
    """
    layout, arrays = _arguments.read(args, kwargs, options.axes(fun, args, kwargs))
    size = _arguments.batch_size(layout.slots, arrays)
    partition = _check.partition(size, num_microbatches=1, microbatch_size=None, split="contiguous")
    call = Call(fun, layout, False, False, False, False, size, constant=_refusing_itself)
    flat = call.at(size)

    def one(_: Array) -> list[Any]:
        own = []
        for slot, x in zip(layout.slots, arrays, strict=True):
            if slot.role is Role.KEY:
                x = jax.random.fold_in(x, 0)
            elif slot.role is Role.EXAMPLE_KEY:
                x = example_keys(x, partition.examples(partition.groups[0], jax.numpy.int32(0)))
            own.append(x)
        return flat(*own)

    stacked = jax.vmap(one, axis_name=options.axis_name)(jax.numpy.zeros(1))
    outputs = call.outputs[0]
    if outputs.whole:
        traced, _, consts, _ = _traced(flat, _shapes(layout, arrays, size, ()), (options.axis_name, 1))
        given = [slot.role is Role.WHOLE for slot in layout.slots]
        if found := _whole.refusal([traced], outputs, [[True] * len(consts) + given]):
            raise TypeError(found)
    combined, whole = stacked[: len(outputs.parts)], stacked[len(outputs.parts) :]
    pairs = zip(outputs.parts, combined, strict=True)
    parts = [x if part.reduction is Reduction.STACK else x[0] for part, x in pairs]
    return outputs.finalize(parts, [x[0] for x in whole])
