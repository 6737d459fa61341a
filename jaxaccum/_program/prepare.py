"""A call made ready for the loop: the arguments read, the batch partitioned, `fun` traced once per
size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Sequence

import jax
import jax.extend.core as jex

from jaxaccum._base.entries import entries, places_of
from jaxaccum._base.trees import key_impl
from jaxaccum._base.types import Array, Fun, PyTree, WithStreams
from jaxaccum._devices import varying
from jaxaccum._devices.without_checks import unchecked, untyped_shard_index, with_exchanges
from jaxaccum._jaxpr.equations import axes_of
from jaxaccum._jaxpr.traces import Trace, trace
from jaxaccum._jaxpr.variables import Type, types_of
from jaxaccum._program import argument_slots, no_gradient, output_parts, validate, whole_outputs
from jaxaccum._program.argument_slots import Layout, Role, Slot
from jaxaccum._program.call import Call, Traced
from jaxaccum._program.example_keys import example_keys
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.output_parts import Outputs, Part
from jaxaccum._program.program import NeedsGlobalArraysError, Observed, Options, Program, sources
from jaxaccum._program.reductions import Reduction
from jaxaccum._program.whole_outputs import Whole


def read(
    options: Options, args: tuple[PyTree, ...], kwargs: dict[str, PyTree], argnums: Collection[int]
) -> tuple[Layout, list[Array], int | None]:
    """The layout of the arguments, the arrays of its slots, and the argument that counts the
    examples."""
    counted = options.num_examples_argnum
    if counted is not None:
        counted = validate.argnum(counted, len(args), f"num_examples_argnum={counted!r}")
    return *argument_slots.read(
        args, kwargs, options.in_axes, differentiated=argnums, counted=counted
    ), counted


def prepare(
    fun: Fun,
    options: Options,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    *,
    argnums: Collection[int] = (),
    loss: bool = False,
    has_aux: bool = False,
) -> tuple[Program, list[Array]]:
    """The program of one call and the arrays of its slots."""
    layout, arrays, counted = read(options, args, kwargs, argnums)
    seen = list(map(varying.axis_names, arrays))
    mesh_axes = validate.mesh_axes(options.mesh_axes, options.axis_name, seen)
    memory, audited = validate.memory(options.memory), validate.audit(options.audit) is not None
    unroll = validate.unroll(options.unroll)
    limit = argument_slots.counter(layout.slots, arrays, counted)
    partition = _partition(options, argument_slots.batch_size(layout.slots, arrays, fun))
    given_axes = list(map(varying.varying_axes, arrays))
    axes = _loop_axes(layout.slots, given_axes, mesh_axes)
    arrays = varying.vary(arrays, axes)
    call = Call(fun, layout, loss, has_aux, limit is not None, audited, partition.batch_size)
    tracing = _Tracing(call, options, partition, tuple(arrays), tuple(given_axes), axes, mesh_axes)
    checked, traces, slots, observed = True, [], list(layout.slots), dict[int, Observed]()
    for g, group in enumerate(partition.groups):
        one, observed[group.size], checked = tracing.group(g)
        consts = observed[group.size].consts
        traces.append(one)
        slots += [Slot("a value that fun closes over", Role.WHOLE)] * len(consts)
        arrays += consts
        given_axes += map(varying.varying_axes, consts)
    outputs = call.returned[0].outputs
    if traces[0].coupling is not None:
        # Padding is masked in every sum, so that a microbatch of padding alone need not be skipped.
        outputs, limit = outputs.updated_once(), None
    elif mesh_axes and argument_slots.positions(slots, Role.CARRY):
        raise ValueError(
            "a state declared CARRY runs through the microbatches of one device, and mesh_axes "
            "sums over several; drop one of the two."
        )
    call.check_sizes(partition)
    terms = output_parts.terms(outputs, call.num_terms) if loss else ()
    whole = None
    if outputs.whole:
        whole = _without_tags(traces, outputs, slots, given_axes, options.device_axes)
        traces = [one.first(len(outputs.parts)) for one in traces]
    slots, arrays = _unwrapped(slots, arrays)
    program = Program(
        tuple(slots), partition, outputs, terms, tuple(traces), axes, mesh_axes, tuple(given_axes),
        limit, memory, unroll, checked, whole=whole, observed=observed, observe=tracing.observe,
    )  # fmt: skip
    _check_padding(program)
    return program, arrays


def _unwrapped(slots: Sequence[Slot], arrays: Sequence[Array]) -> tuple[list[Slot], list[Array]]:
    """The same, but typed keys that are folded are the integers that they are made of.

    JAX's check for keys that are used twice (``jax_debug_key_reuse``) takes a typed key that a
    loop closes over for one that every iteration uses.
    """
    new, values = list(slots), list(arrays)
    for i, slot in enumerate(slots):
        if slot.role in (Role.KEY, Role.EXAMPLE_KEY):
            new[i] = dataclasses.replace(slot, key=key_impl(arrays[i]))
            values[i] = new[i].array(arrays[i])
    return new, values


def _partition(options: Options, batch_size: int) -> Partition:
    """The partition that the options ask for."""
    partition = validate.partition(
        batch_size,
        num_microbatches=options.num_microbatches,
        microbatch_size=options.microbatch_size,
        split=options.split,
    )
    if options.split == "strided":
        return partition
    return dataclasses.replace(partition, blocks=options.blocks)


def _loop_axes(
    slots: Sequence[Slot], given_axes: Sequence[frozenset[str]], mesh_axes: tuple[str, ...]
) -> frozenset[str]:
    """The mesh axes over which the loop's values vary: those of the sums, and of all that is no
    parameter."""
    rows = argument_slots.positions(slots, Role.ROWS)
    validate.divided(mesh_axes, entries(given_axes, rows))
    others = [i for i, slot in enumerate(slots) if slot.role is not Role.WHOLE]
    return frozenset(mesh_axes).union(*entries(given_axes, others))


def _without_tags(
    traces: Sequence[Trace],
    outputs: Outputs,
    slots: Sequence[Slot],
    given_axes: Sequence[frozenset[str]],
    device_axes: tuple[str, ...],
) -> Whole:
    """The program of the outputs without a tag, which must depend on whole arguments alone."""

    def is_whole(i: int) -> bool:
        # One device sees a share of a parameter that is divided, gathered at every microbatch as
        # if it were rows.
        return slots[i].role is Role.WHOLE and not given_axes[i] & set(device_axes)

    reads = [sources(slots, traces, g) for g in range(len(traces))]
    allowed = [list(map(is_whole, own)) for own in reads]
    found = whole_outputs.refusal(traces, outputs, allowed)
    if found and device_axes:
        raise NeedsGlobalArraysError
    if found:
        raise TypeError(found)
    return whole_outputs.separated(traces[0], outputs, entries(given_axes, reads[0]))


@dataclasses.dataclass(frozen=True)
class _Tracing:
    """How `fun` is traced for one call: with which arguments, under which axes."""

    call: Call
    options: Options
    partition: Partition
    arrays: tuple[Array, ...]
    """The arguments, cast to vary over `axes`."""
    given_axes: tuple[frozenset[str], ...]
    axes: frozenset[str]
    mesh_axes: tuple[str, ...]

    def group(self, g: int) -> tuple[Trace, Observed, bool]:
        """The trace of one size of microbatch, what the audit sees of it, and whether JAX could
        follow its mesh."""
        number = self.partition.num_microbatches
        at = lambda call, size: self._at(call, size, number)
        one, original, consts, checked = self.call.traced(at, self.partition.groups[g].size)
        outputs, types, leaves = self.call.returned[g]
        one, seen = one.split(len(types))[0], original.split(len(types))[1]
        seen = Observed(seen, consts, leaves)
        if (coupling := one.coupling) is None:
            return one, seen, checked
        self._check_coupled(coupling, checked)
        if isinstance(self.call.fun, WithStreams) and (number > 1 or self.mesh_axes):
            slots = self.call.layout.slots
            with contextlib.nullcontext() if checked else unchecked():
                one = _with_own_streams(one, outputs, slots, self.partition, self.mesh_axes)
        return one, seen, checked

    def observe(self, size: int, count: int) -> Observed:
        """`fun` traced for one of `count` microbatches of `size` examples."""
        other = self.call.elsewhere()
        _, original, consts, _ = self._at(other, size, count)
        _, types, leaves = other.returned[0]
        return Observed(original.split(len(types))[1], consts, leaves)

    def _at(self, call: Call, size: int, count: int) -> Traced:
        shapes = _shapes(call.layout, list(self.arrays), size, self.mesh_axes)
        return _traced(call.at(size), shapes, (self.options.axis_name, count))

    def _check_coupled(self, coupling: jex.JaxprEqn, checked: bool) -> None:
        name = self.options.axis_name
        if not set(self.options.device_axes) <= set(axes_of(coupling)):
            raise NeedsGlobalArraysError
        validate.coupled(coupling, name, self.partition, shadows=validate.is_bound(name))
        if not checked:
            names = [slot.name for slot in self.call.layout.slots]
            validate.undivided(list(zip(names, self.given_axes, strict=True)), self.axes)


def _traced(fun: Fun, types: list[Type], axis: tuple[str, int]) -> Traced:
    """`fun` traced with JAX's checks of what varies over a mesh, or without where they refuse a
    collective over the loop's axis."""
    try:
        one, consts = trace(fun, types, axis)
        return Traced(one, one, consts, checked=True)
    except (AssertionError, ValueError) as error:
        # JAX says so of a collective over an axis that is not the mesh's.
        if not any(map(varying.varying_axes, types)):
            raise
        with unchecked():
            plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in types]
            try:
                one, consts = trace(fun, plain, axis)
            except Exception:  # of the user's function: what JAX said first is about the program
                raise error from None
        if one.coupling is None:
            raise
        changed = dataclasses.replace(one, jaxpr=with_exchanges(one.jaxpr, axis[0]))
        return Traced(changed, one, consts, checked=False)


def _with_own_streams(
    one: Trace,
    outputs: Outputs,
    slots: Sequence[Slot],
    partition: Partition,
    mesh_axes: tuple[str, ...],
) -> Trace:
    """A coupled trace of a model, in which every carried key is folded with the microbatch's index.

    A coupled program updates its state once, so that all microbatches would draw the same numbers.
    What follows from the old state alone is made of the keys as they came: the next keys, and
    whatever is not drawn from a key.
    """
    keys, own, carried = {}, set(), []
    for place, slot in enumerate(slots, start=one.num_consts):
        if slot.key is not None:
            keys[place] = slot.key
        if slot.role is Role.CARRY:
            carried.append(slot)
        elif slot.role is not Role.WHOLE:
            own.add(place)
    pure, kept = one.pure(), set()
    for i, slot in zip(outputs.positions(Reduction.CARRY), carried, strict=True):
        needed = set(places_of(pure.needs([i])))
        if not needed & (own if slot.key is not None else own | keys.keys()):
            kept.add(i)

    def folded(index: Array, arrays: list[Array]) -> list[Array]:
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
                "padding as examples. With num_examples_argnum return Mean(total, weight), with "
                "the mask of real examples in both; to divide by a constant, return Sum(total / "
                "constant)."
            )


def _shapes(
    layout: Layout, arrays: list[Array], size: int, mesh_axes: tuple[str, ...]
) -> list[Type]:
    """The types of the arguments for `size` examples: shapes alone would lose how a mesh divides
    them."""

    def cut(arrays: list[Array]) -> list[Array]:
        own, index = list(arrays), varying.vary(jax.numpy.int32(0), frozenset(mesh_axes))
        for i, slot in enumerate(layout.slots):
            x = own[i]
            if slot.role is Role.ROWS:
                if size > x.shape[slot.axis]:  # the audit may ask for more than there are
                    x = jax.numpy.concatenate([x, x], axis=slot.axis)
                x = jax.lax.slice_in_dim(x, 0, size, axis=slot.axis)
            elif slot.role is Role.KEY:
                x = jax.random.fold_in(x, index)
            elif slot.role is Role.EXAMPLE_KEY:
                x = example_keys(x, index + jax.numpy.arange(size, dtype=jax.numpy.int32))
            own[i] = x
        return own

    return types_of(jax.make_jaxpr(cut)(arrays).jaxpr.outvars)


def _refusing_itself(part: Part, x: Array) -> Array:
    says = functools.partial(no_gradient.refusal, part.name, part.tag, whole=False)
    one = no_gradient.Refused((0,), says)
    return no_gradient.refusing([jax.lax.stop_gradient(x)], [x], {0: one})[0]


def whole(
    fun: Fun, options: Options, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> PyTree:
    """`fun` in one pass over the whole batch, its tags resolved: the full-batch oracle.

    The axis of the loop is bound with size 1, so that a collective over it sees all examples at
    once.
    """
    layout, arrays = argument_slots.read(args, kwargs, options.axes(fun, args, kwargs))
    size = argument_slots.batch_size(layout.slots, arrays)
    partition = validate.partition(
        size, num_microbatches=1, microbatch_size=None, split="contiguous"
    )
    call = Call(fun, layout, False, False, False, False, size, constant=_refusing_itself)
    flat = call.at(size)

    def one(_: Array) -> list[Array]:
        own = list(arrays)
        for i in layout.positions(Role.KEY):
            own[i] = jax.random.fold_in(own[i], 0)
        for i in layout.positions(Role.EXAMPLE_KEY):
            examples = partition.examples(partition.groups[0], jax.numpy.int32(0))
            own[i] = example_keys(own[i], examples)
        return flat(*own)

    stacked = jax.vmap(one, axis_name=options.axis_name)(jax.numpy.zeros(1))
    outputs = call.returned[0].outputs
    if outputs.whole:
        types = _shapes(layout, arrays, size, ())
        traced, _, consts, _ = _traced(flat, types, (options.axis_name, 1))
        given = [slot.role is Role.WHOLE for slot in layout.slots]
        if found := whole_outputs.refusal([traced], outputs, [[True] * len(consts) + given]):
            raise TypeError(found)
    values = list(stacked)
    for i in set(range(len(values))) - set(outputs.positions(Reduction.STACK)):
        values[i] = stacked[i][0]
    return outputs.finalize(values[: len(outputs.parts)], values[len(outputs.parts) :])
