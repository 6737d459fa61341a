"""A call made ready for the loop: the arguments read, the batch partitioned, `fun` traced once per
size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from jaxaccum._base.trees import key_impl
from jaxaccum._base.types import Array, Fun, PyTree, WithStreams
from jaxaccum._devices import varying
from jaxaccum._devices.without_checks import unchecked, untyped_shard_index, with_exchanges
from jaxaccum._jaxpr.equations import axes_of
from jaxaccum._jaxpr.traces import Trace, trace
from jaxaccum._program import argument_slots, no_gradient, output_parts, validate, whole_outputs
from jaxaccum._program.argument_slots import Layout, Role, Slot
from jaxaccum._program.call import Call
from jaxaccum._program.example_keys import example_keys
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.output_parts import Outputs, Part
from jaxaccum._program.program import NeedsGlobalArraysError, Observed, Options, Program, sources
from jaxaccum._program.reductions import Reduction
from jaxaccum._program.whole_outputs import Whole


def read(
    options: Options, args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Collection[int]
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
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    argnums: Collection[int] = (),
    loss: bool = False,
    has_aux: bool = False,
) -> tuple[Program, list[Array]]:
    """The program of one call and the arrays of its slots."""
    layout, arrays, counted = read(options, args, kwargs, argnums)
    mesh_axes = validate.mesh_axes(
        options.mesh_axes, options.axis_name, [varying.axis_names(x) for x in arrays]
    )
    memory, audited = validate.memory(options.memory), validate.audit(options.audit) is not None
    unroll = validate.unroll(options.unroll)
    limit = argument_slots.counter(layout.slots, arrays, counted)
    partition = _partition(options, argument_slots.batch_size(layout.slots, arrays, fun))
    given_axes = [varying.varying_axes(x) for x in arrays]
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
        given_axes += [varying.varying_axes(x) for x in consts]
    outputs = call.outputs[0]
    if traces[0].coupling is not None:
        # Padding is masked in every sum, so that a microbatch of padding alone need not be skipped.
        outputs, limit = outputs.updated_once(), None
    elif mesh_axes and any(slot.role is Role.CARRY for slot in slots):
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


def _partition(options: Options, batch_size: int) -> Partition:
    """The partition that the options ask for."""
    partition = validate.partition(
        batch_size,
        num_microbatches=options.num_microbatches,
        microbatch_size=options.microbatch_size,
        split=options.split,
    )
    return (
        dataclasses.replace(partition, blocks=options.blocks)
        if options.split == "contiguous"
        else partition
    )


def _loop_axes(
    slots: Sequence[Slot], given_axes: Sequence[frozenset[str]], mesh_axes: tuple[str, ...]
) -> frozenset[str]:
    """The mesh axes over which the loop's values vary: those of the sums, and of all that is no
    parameter."""
    pairs = list(zip(slots, given_axes, strict=True))
    validate.divided(mesh_axes, [axes for slot, axes in pairs if slot.role is Role.ROWS])
    return frozenset(mesh_axes).union(
        *(axes for slot, axes in pairs if slot.role is not Role.WHOLE)
    )


def _without_tags(
    traces: Sequence[Trace],
    outputs: Outputs,
    slots: Sequence[Slot],
    given_axes: Sequence[frozenset[str]],
    device_axes: tuple[str, ...],
) -> Whole:
    """The program of the outputs without a tag, which must depend on whole arguments alone."""
    reads = [sources(slots, traces, g) for g in range(len(traces))]
    # One device sees a share of a parameter that is divided, gathered at every microbatch as if it
    # were rows.
    same = [not given & set(device_axes) for given in given_axes]
    may = [slot.role is Role.WHOLE and shared for slot, shared in zip(slots, same, strict=True)]
    found = whole_outputs.refusal(traces, outputs, [[may[i] for i in own] for own in reads])
    if found and device_axes:
        raise NeedsGlobalArraysError
    if found:
        raise TypeError(found)
    return whole_outputs.separated(traces[0], outputs, [given_axes[i] for i in reads[0]])


@dataclasses.dataclass(frozen=True)
class _Tracing:
    """How `fun` is traced for one call: of which arguments, under which axes."""

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
        one, own, consts, checked = self.call.traced(at, self.partition.groups[g].size)
        count = len(self.call.shapes[g])
        one, seen = (
            one.split(count)[0],
            Observed(own.split(count)[1], consts, self.call.returned[g]),
        )
        if (coupling := one.coupling) is None:
            return one, seen, checked
        self._check_coupled(coupling, checked)
        if isinstance(self.call.fun, WithStreams) and (number > 1 or self.mesh_axes):
            slots, outputs = self.call.layout.slots, self.call.outputs[g]
            with contextlib.nullcontext() if checked else unchecked():
                one = _with_own_streams(one, outputs, slots, self.partition, self.mesh_axes)
        return one, seen, checked

    def observe(self, size: int, count: int) -> Observed:
        """`fun` traced for one of `count` microbatches of `size` examples."""
        other = self.call.elsewhere()
        _, own, consts, _ = self._at(other, size, count)
        return Observed(own.split(len(other.shapes[0]))[1], consts, other.returned[0])

    def _at(self, call: Call, size: int, count: int) -> tuple[Trace, Trace, list[Any], bool]:
        shapes = _shapes(call.layout, list(self.arrays), size, self.mesh_axes)
        return _traced(call.at(size), shapes, (self.options.axis_name, count))

    def _check_coupled(self, coupling: jex.JaxprEqn, checked: bool) -> None:
        name = self.options.axis_name
        if not set(self.options.device_axes) <= set(axes_of(coupling)):
            raise NeedsGlobalArraysError
        validate.coupled(coupling, name, self.partition, shadows=validate.is_bound(name))
        if not checked:
            pairs = zip(self.call.layout.slots, self.given_axes, strict=True)
            validate.undivided([(slot.name, own) for slot, own in pairs], self.axes)


def _traced(
    fun: Fun, shapes: list[Any], axis: tuple[str, int]
) -> tuple[Trace, Trace, list[Any], bool]:
    """The trace, as it was before anything was changed in it, and its constants.

    Last, whether JAX could follow in it which values vary over a mesh.
    """
    if not any(map(varying.varying_axes, shapes)):
        one, consts = trace(fun, shapes, axis)
        return one, one, consts, True
    try:
        one, consts = trace(fun, shapes, axis)
        return one, one, consts, True
    except (
        AssertionError,
        ValueError,
    ) as error:  # what JAX says of a collective over an axis that is not the mesh's
        with unchecked():
            plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
            try:
                one, consts = trace(fun, plain, axis)
            except (
                Exception
            ):  # of the user's function: what JAX said first is about the program as it stands
                raise error from None
        if one.coupling is None:
            raise
        return (
            dataclasses.replace(one, jaxpr=with_exchanges(one.jaxpr, axis[0])),
            one,
            consts,
            False,
        )


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
    keys = {one.num_consts + i: slot.key for i, slot in enumerate(slots) if slot.key is not None}
    own = {
        one.num_consts + i
        for i, slot in enumerate(slots)
        if slot.role not in (Role.WHOLE, Role.CARRY)
    }
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
                "padding as examples. With num_examples_argnum return Mean(total, weight), with "
                "the mask of real examples in both; to divide by a constant, return Sum(total / "
                "constant)."
            )


def _shapes(
    layout: Layout, arrays: list[Array], size: int, mesh_axes: tuple[str, ...]
) -> list[Any]:
    """The types of the arguments for `size` examples: shapes alone would lose how a mesh divides
    them."""

    def cut(arrays: list[Array]) -> list[Array]:
        own, index = [], varying.vary(jax.numpy.int32(0), frozenset(mesh_axes))
        for slot, x in zip(layout.slots, arrays, strict=True):
            if slot.role is Role.ROWS:
                if (
                    size > x.shape[slot.axis]
                ):  # for the audit, which may ask for more than there are
                    x = jax.numpy.concatenate([x, x], axis=slot.axis)
                x = jax.lax.slice_in_dim(x, 0, size, axis=slot.axis)
            elif slot.role is Role.KEY:
                x = jax.random.fold_in(x, index)
            elif slot.role is Role.EXAMPLE_KEY:
                x = example_keys(x, index + jax.numpy.arange(size, dtype=jax.numpy.int32))
            own.append(x)
        return own

    return list(jax.make_jaxpr(cut)(arrays).out_avals)


def _refusing_itself(part: Part, x: Array) -> Array:
    says = functools.partial(no_gradient.refusal, part.name, part.tag, whole=False)
    one = no_gradient.Refused((0,), says)
    return no_gradient.refusing([jax.lax.stop_gradient(x)], [x], {0: one})[0]


def whole(fun: Fun, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PyTree:
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
        traced, _, consts, _ = _traced(
            flat, _shapes(layout, arrays, size, ()), (options.axis_name, 1)
        )
        given = [slot.role is Role.WHOLE for slot in layout.slots]
        if found := whole_outputs.refusal([traced], outputs, [[True] * len(consts) + given]):
            raise TypeError(found)
    combined, whole = stacked[: len(outputs.parts)], stacked[len(outputs.parts) :]
    pairs = zip(outputs.parts, combined, strict=True)
    parts = [x if part.reduction is Reduction.STACK else x[0] for part, x in pairs]
    return outputs.finalize(parts, [x[0] for x in whole])
