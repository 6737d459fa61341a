"""Outputs without a tag, which are the same for every microbatch: the loop keeps those that follow
from collectives, and the others are computed once beside it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxaccum._base.entries import entries
from jaxaccum._devices.without_checks import unchecked
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._program import shared_outputs, whole_outputs
from jaxaccum._program.argument_slots import Slot
from jaxaccum._program.call import Options
from jaxaccum._program.other_sizes import Traced, computed_alike
from jaxaccum._program.output_parts import Outputs
from jaxaccum._program.program import NeedsGlobalArraysError, sources
from jaxaccum._program.tracing import Group, OnMesh
from jaxaccum._program.whole_outputs import Whole


class Apart(NamedTuple):
    """The outputs of the loop, and those that are computed beside it."""

    outputs: Outputs
    """Which of its outputs the loop keeps."""
    traces: tuple[Trace, ...]
    """What computes those, for each group of microbatches."""
    whole: Whole | None
    """What computes the others, if there are any."""


def apart(
    groups: Sequence[Group],
    outputs: Outputs,
    slots: Sequence[Slot],
    arguments: OnMesh,
    options: Options,
    at_another_size: Callable[[], Traced | None],
    *,
    alone: bool,
) -> Apart:
    """The outputs that the loop keeps, and those without a tag that it does not; an error where one
    of these differs between microbatches. `alone`: there is one microbatch, and nothing else."""
    traces = tuple(group.trace for group in groups)
    if alone:
        outputs, traces = shared_outputs.with_models_in_loop(traces, outputs)
    if not outputs.whole:
        return Apart(outputs, traces, None)
    one = traces[0], groups[0].observed.consts
    outputs = compared(outputs, one, at_another_size)
    reads = [sources(slots, traces, g) for g in range(len(traces))]
    same = _same_everywhere(slots, arguments, options, coupled=traces[0].coupling is not None)
    is_same = [entries(same, own) for own in reads]
    if traces[0].coupling is not None:
        with contextlib.nullcontext() if groups[-1].checked else unchecked():
            outputs, traces = shared_outputs.with_shared_in_loop(
                traces, outputs, is_same, arguments.mesh_axes
            )
    found = whole_outputs.refusal(traces, outputs, is_same)
    if found and options.device_axes:
        raise NeedsGlobalArraysError
    if found:
        raise found
    given_axes = entries(arguments.given_axes, reads[0])
    whole = whole_outputs.separated(traces[0], outputs, given_axes)
    return Apart(outputs, tuple(one.first(len(outputs.parts)) for one in traces), whole)


def compared(
    outputs: Outputs, one: Traced, at_another_size: Callable[[], Traced | None]
) -> Outputs:
    """The outputs, of which those without a tag that may depend on the number of examples are
    compared with those of microbatches of another size.

    They are the parameters that a model assigns to, and what depends on no array. A coupled loss
    may return such a constant, as the flag that a BatchNorm keeps beside its statistics.
    """
    trace, whole = one[0], list(outputs.whole)
    sized = []
    for i, untagged in enumerate(whole):
        is_constant = trace.is_of(len(outputs.parts) + i, [False] * len(trace.arguments))
        if untagged.of_model or (is_constant and trace.coupling is not None):
            sized.append(i)
    other = at_another_size() if sized else None
    if other is None:
        return outputs
    if trace.places:
        other = other[0].rearranged(trace.places), other[1]
    count = len(outputs.parts)
    for i in computed_alike([count + i for i in sized], one, other):
        whole[i - count] = dataclasses.replace(whole[i - count], at_all_sizes=True)
    return dataclasses.replace(outputs, whole=tuple(whole))


def _same_everywhere(
    slots: Sequence[Slot], arguments: OnMesh, options: Options, *, coupled: bool
) -> list[bool]:
    """Which slots are the same for every microbatch, and for every device.

    One device sees a share of a parameter that is divided, gathered at every microbatch as if it
    were rows.
    """
    over_devices = {*options.device_axes, *(arguments.mesh_axes if coupled else ())}
    same = []
    for slot, axes in zip(slots, arguments.given_axes, strict=True):
        same.append(slot.is_same(coupled=coupled) and over_devices.isdisjoint(axes))
    return same
