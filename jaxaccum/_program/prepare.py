"""A call made ready for the loop: the batch partitioned, `fun` traced once per size, and all that a
microbatch computes put into one `Program`.

Example. A call with a batch of 10 examples and ``microbatch_size=4`` has two groups: two
microbatches of 4 examples and one of 2. `fun` is traced twice, once for each size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from jaxaccum._base.adapted import adapted
from jaxaccum._base.entries import entries
from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._program import (
    argument_slots,
    batch_keys,
    output_parts,
    states_of_models,
    validate,
    without_tags,
)
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.call import Call, Options
from jaxaccum._program.flat_function import FlatFunction
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.program import Program
from jaxaccum._program.tracing import Group, OnMesh, Tracing


def prepare(
    call: Call, *, loss: bool = False, has_aux: bool = False
) -> tuple[Program, list[Array]]:
    """The program of a call, and the arrays of its slots: its arguments, and what `fun` closes
    over.

    A `loss` has terms to differentiate; with `has_aux` it comes with other outputs.
    """
    options = call.options
    memory, unroll = validate.memory(options.memory), validate.unroll(options.unroll)
    limit = argument_slots.counter(call.tree.slots, call.arrays, call.counted)
    partition = _partition(options, call.batch_size)
    if partition.num_microbatches == 1 and not options.mesh_axes:
        call = _with_ordinary_keys(call)
    arguments = _on_mesh(call)
    flat = FlatFunction(
        call.fun, call.tree, partition, loss, has_aux, padded=limit is not None,
        audited=validate.audit(options.audit) is not None,
        num_shards=varying.num_shards(arguments.mesh_axes),
    )  # fmt: skip
    arguments = _as_the_value_varies(flat, options, partition, arguments, call.arrays)
    tracing = Tracing(flat, options, partition, arguments)
    groups = list(map(tracing.group, partition.groups))
    at_another_size = functools.partial(tracing.at_another_size, groups)
    slots, arguments = _with_closed_over(call.tree.slots, arguments, groups)
    outputs = flat.returned[0].outputs
    coupled = groups[0].trace.coupling is not None
    alone = partition.num_microbatches == 1 and not arguments.mesh_axes
    if coupled:
        # Padding is masked in every sum, so that a microbatch of padding alone need not be skipped.
        slots = states_of_models.read_before(slots, outputs, groups, at_another_size)
        outputs, limit = outputs.updated_once(), None
    elif (model := adapted(flat.fun)).draws_from_state and not alone:
        beside = states_of_models.beside_loop(
            slots, outputs, groups, at_another_size, as_they_are=model.draws_declared
        )
        slots, outputs = beside.slots, outputs.beside_loop(beside.parts)
        if beside.parts:
            groups = [group.rearranged(beside.order(outputs)) for group in groups]
    if not coupled and arguments.mesh_axes and argument_slots.positions(slots, Role.CARRY):
        raise ValueError(
            "a state declared CARRY runs through the microbatches of one device, and mesh_axes "
            "sums over several; drop one of the two."
        )
    flat.check_sizes()
    terms = output_parts.terms(outputs, flat.num_terms) if loss else ()
    found = without_tags.apart(
        groups, outputs, slots, arguments, options, at_another_size,
        alone=alone and limit is None,
    )  # fmt: skip
    program = Program(
        tuple(slots), partition, found.outputs, terms, found.traces, arguments.axes,
        arguments.mesh_axes, tuple(arguments.given_axes), limit, memory, unroll,
        groups[-1].checked, whole=found.whole,
        observed={group.size: group.observed for group in groups}, observe=tracing.observe,
    )  # fmt: skip
    _check_padding(program)
    return program, list(arguments.arrays)


def _with_ordinary_keys(call: Call) -> Call:
    """The same call, in which keys of the batch are whole arguments: the one microbatch draws all
    rows."""
    slots, arrays = list(call.tree.slots), list(call.arrays)
    for i in call.tree.positions(Role.BATCH_KEY):
        arrays[i] = batch_keys.ordinary(arrays[i], slots[i].key)
        slots[i] = dataclasses.replace(slots[i], role=Role.WHOLE, key=None)
    tree = dataclasses.replace(call.tree, slots=tuple(slots))
    return dataclasses.replace(call, tree=tree, arrays=arrays)


def _on_mesh(call: Call) -> OnMesh:
    """The arguments, cast to vary over the mesh axes over which the loop's values do."""
    options, arrays = call.options, call.arrays
    seen = list(map(varying.axis_names, arrays))
    mesh_axes = validate.mesh_axes(options.mesh_axes, options.axis_name, seen)
    given_axes = list(map(varying.varying_axes, arrays))
    axes = _loop_axes(call.tree.slots, given_axes, mesh_axes)
    return OnMesh(varying.vary(arrays, axes), given_axes, axes, mesh_axes)


def _as_the_value_varies(
    flat: FlatFunction, options: Options, partition: Partition, arguments: OnMesh,
    given: Sequence[Array],
) -> OnMesh:  # fmt: skip
    """The arguments, cast over further axes only where every value varies over them too.

    With tokens divided over "seq" and a loss that sums over "seq", all devices have one loss. Cast
    to vary, its labels would make it one loss per device, and the gradient that of their sum.
    """
    further = arguments.axes.difference(arguments.mesh_axes)
    if not further:
        return arguments
    own = frozenset(arguments.mesh_axes)
    plain = arguments._replace(arrays=varying.vary(given, own), axes=own)
    other = flat.elsewhere()
    Tracing(other, options, partition, plain).group(partition.groups[0])
    outputs, types, _ = other.returned[0]
    leaves = outputs.leaves[: other.num_terms] if other.loss else outputs.leaves
    of_value = [varying.varying_axes(types[leaf.part]) for leaf in leaves if not leaf.whole]
    axes = own | further.intersection(*of_value) if of_value else own
    return plain._replace(arrays=varying.vary(given, axes), axes=axes)


def _with_closed_over(
    slots: Sequence[Slot], arguments: OnMesh, groups: Sequence[Group]
) -> tuple[list[Slot], OnMesh]:
    """The slots and their arrays, with those that the trace of each group closes over."""
    every = list(slots)
    for group in groups:
        consts = group.observed.consts
        every += [Slot("a value that fun closes over", Role.WHOLE)] * len(consts)
        arguments = arguments.followed_by(consts)
    return every, arguments


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
