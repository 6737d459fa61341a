"""Outputs of whole arguments alone: found in the trace, taken out of the loop, computed once beside
it.

Such an output is the same for every microbatch, as it is for the whole batch. So it needs no tag,
and JAX differentiates it unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxaccum._base.entries import entries, places_of
from jaxaccum._base.trees import safe_map
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
        shared = lambda x, given: varying.of_one_shard(jnp.asarray(x), axes - given)
        return safe_map(shared, values, self.given_axes)


def refusal(
    traces: Sequence[Trace], outputs: Outputs, is_whole: Sequence[Sequence[bool]]
) -> Exception | None:
    """The error where an output without a tag depends on more than whole arguments; or None.

    `is_whole` says for each trace which of the arrays that it reads are whole.
    """
    refused = []
    for i, untagged in enumerate(outputs.whole, start=len(outputs.parts)):
        of_whole = lambda one, whole, output=i: one.is_of(output, whole)
        sized = untagged.of_model or not traces[0].depends(i, [True] * len(traces[0].arguments))
        if (sized and not untagged.at_all_sizes) or not all(safe_map(of_whole, traces, is_whole)):
            refused.append(untagged)
    if not refused:
        return None
    first, *others = refused
    if not others:
        return first.error(first.refusal)
    names = ", ".join(one.name for one in others)
    return first.error(f"{first.refusal} The same holds for {names}.")


def separated(one: Trace, outputs: Outputs, given_axes: Sequence[frozenset[str]]) -> Whole:
    """The whole outputs of a trace of all outputs, the whole ones last."""
    places = range(len(outputs.parts), len(outputs.parts) + len(outputs.whole))
    axes = [frozenset[str]()] * len(places)
    if any(given_axes):
        for k, i in enumerate(places):
            needed = entries(given_axes, places_of(one.needs([i])))
            axes[k] = frozenset().union(*needed)
    return Whole(one.only(places), tuple(axes))
