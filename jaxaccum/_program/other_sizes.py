"""Whether microbatches of another size compute some outputs alike.

A trace holds the number of examples as it holds any other number, so that one trace does not tell
``3 * weight`` from ``len(x) * weight``. Traces at two sizes do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxaccum._base.entries import entries, places_of
from jaxaccum._base.types import Array
from jaxaccum._jaxpr.equations import with_invars
from jaxaccum._jaxpr.same_program import Closed, compute_the_same
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._program.output_parts import Outputs, Untagged

Traced = tuple[Trace, Sequence[Array]]
"""A trace of a microbatch, and what it closes over."""


def compute_alike(outputs: Sequence[int], one: Traced, other: Traced) -> bool:
    """Whether two traces, at different sizes, compute the outputs alike."""
    if one[0].needs(outputs) != other[0].needs(outputs):
        return False
    return compute_the_same(_alone(one, outputs), _alone(other, outputs))


def constants(
    outputs: Outputs, one: Traced, at_another_size: Callable[[], Traced | None]
) -> list[Untagged]:
    """The outputs without a tag of a coupled loss that depend on no array, and not on the number of
    examples: beside its statistics a BatchNorm may return a flag."""
    if one[0].coupling is None:
        return []
    found = {}
    for i, untagged in enumerate(outputs.whole, start=len(outputs.parts)):
        if not any(one[0].needs([i])):
            found[i] = untagged
    if not found or (other := at_another_size()) is None:
        return []
    return [untagged for i, untagged in found.items() if compute_alike([i], one, other)]


def _alone(traced: Traced, outputs: Sequence[int]) -> Closed:
    """The program of the outputs, of what they need."""
    one, consts = traced
    needed = places_of(one.needs(outputs))
    index, *arguments = one.only(outputs).jaxpr.invars
    del index  # which none of them reads
    jaxpr = with_invars(one.only(outputs).jaxpr, entries(arguments, needed))
    return jaxpr, [consts[i] for i in needed if i < len(consts)]
