"""Outputs without a tag that follow from collectives over all microbatches: every microbatch has
the same ones, and so has the whole batch.

The new statistics of a BatchNorm are such outputs. They need no tag: those of the last microbatch
are the whole batch's. A derivative of them is an error, as of `Last`. So a gradient takes one pass
over the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

from jaxaccum._jaxpr.same_everywhere import differing
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._program.output_parts import Outputs


def with_shared_in_loop(
    traces: Sequence[Trace],
    outputs: Outputs,
    same: Sequence[Sequence[bool]],
    mesh_axes: Sequence[str] = (),
) -> tuple[Outputs, tuple[Trace, ...]]:
    """The outputs, in which those that follow from collectives over the loop's axis and all
    `mesh_axes` are parts of the loop; and their traces.

    `same` says for each trace which of the arrays that it reads are the same along the axes.
    """
    count = len(outputs.parts)
    chosen = set(range(len(outputs.whole)))
    for one, own in zip(traces, same, strict=True):
        differ = list(map(operator.not_, own))
        for axis in (one.axis[0], *mesh_axes):
            results = differing(one.jaxpr, [True, *differ], axis)
            chosen = {i for i in chosen if not results[count + i]}
        for i in sorted(chosen):
            if not one.depends(count + i, differ):
                chosen.discard(i)  # it depends on the number of microbatches alone
    if not chosen:
        return outputs, tuple(traces)
    return outputs.with_last(chosen), tuple(_in_loop(one, count, chosen) for one in traces)


def with_models_in_loop(
    traces: Sequence[Trace], outputs: Outputs
) -> tuple[Outputs, tuple[Trace, ...]]:
    """The outputs of one microbatch, which is the whole batch, where the parameters that a model
    assigns to are parts of the loop; and their traces."""
    chosen = {i for i, untagged in enumerate(outputs.whole) if untagged.of_model}
    if not chosen:
        return outputs, tuple(traces)
    count = len(outputs.parts)
    return outputs.with_last(chosen), tuple(_in_loop(one, count, chosen) for one in traces)


def _in_loop(one: Trace, count: int, chosen: Collection[int]) -> Trace:
    """The trace whose first `count` outputs are followed by those that the loop keeps, and then by
    the others."""
    kept = [count + i for i in sorted(chosen)]
    others = [i for i in range(count, len(one.jaxpr.outvars)) if i not in kept]
    return one.with_constant(kept).rearranged([*range(count), *kept, *others])
