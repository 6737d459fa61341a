"""Outputs of whole arguments alone: found in the trace, taken out of the loop, computed once beside
it.

Such an output is the same for every microbatch, as it is for the whole batch. So it needs no tag,
and JAX differentiates it as it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._devices.without_checks import typed, unchecked, untyped
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._program.output_parts import Outputs


@dataclasses.dataclass(frozen=True)
class Whole:
    """The program of the outputs that depend on whole arguments alone."""

    trace: Trace
    given_axes: tuple[frozenset[str], ...]
    """For each output, the mesh axes over which the arguments that it depends on varied as
    given."""

    def values(
        self, arrays: Sequence[Array], axes: frozenset[str], *, checked: bool
    ) -> list[Array]:
        """The outputs, of the arrays that the trace reads, which the loop has cast to vary over
        `axes`."""
        first = jnp.zeros((), jnp.int32)
        if checked:
            values = self.trace(first, arrays)
        else:
            with unchecked():
                values = self.trace(first, untyped(list(arrays)))
            values = typed(values, axes)
        pairs = zip(values, self.given_axes, strict=True)
        return [varying.of_one_shard(jnp.asarray(x), axes - given) for x, given in pairs]


def refusal(
    traces: Sequence[Trace], outputs: Outputs, is_whole: Sequence[Sequence[bool]]
) -> str | None:
    """What to say of an output without a tag that depends on more than whole arguments; or None.

    `is_whole` says for each trace which of the arrays that it reads are whole.
    """
    refused = []
    for i, untagged in enumerate(outputs.whole, start=len(outputs.parts)):
        pairs = zip(traces, is_whole, strict=True)
        if not all(one.is_of(i, whole) for one, whole in pairs):
            refused.append(untagged)
    if not refused:
        return None
    others = ", ".join(one.name for one in refused[1:])
    return refused[0].refusal + (f" The same holds for {others}." if others else "")


def separated(one: Trace, outputs: Outputs, given_axes: Sequence[frozenset[str]]) -> Whole:
    """The whole outputs of a trace of all outputs, the whole ones last."""
    places = range(len(outputs.parts), len(outputs.parts) + len(outputs.whole))
    axes = []
    for i in places:
        needed = zip(given_axes, one.needs([i]), strict=True)
        axes.append(frozenset().union(*(given for given, reads in needed if reads)))
    return Whole(one.pure().only(places), tuple(axes))
