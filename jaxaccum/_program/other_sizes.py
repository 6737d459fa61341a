"""Whether microbatches of another size compute some outputs alike.

A trace holds the number of examples, and that of microbatches, as it holds any other number. So one
trace does not tell ``3 * weight`` from ``len(x) * weight``. Traces at two sizes do.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from jaxaccum._base.entries import entries, places_of
from jaxaccum._base.types import Array
from jaxaccum._jaxpr.equations import with_invars
from jaxaccum._jaxpr.same_program import Closed, compute_the_same
from jaxaccum._jaxpr.traces import Trace

Traced = tuple[Trace, Sequence[Array]]
"""A trace of a microbatch, and what it closes over."""


def traced_if_possible(trace: Callable[[], Traced]) -> Traced | None:
    """What `trace` returns; None where the user's function does not run at its size."""
    try:
        return trace()
    except Exception:
        return None


def computed_alike(outputs: Collection[int], one: Traced, other: Traced) -> set[int]:
    """Those of the outputs that two traces, at different sizes, compute alike."""
    if _compute_alike(sorted(outputs), one, other):
        return set(outputs)
    return {i for i in outputs if _compute_alike([i], one, other)}


def _compute_alike(outputs: Sequence[int], one: Traced, other: Traced) -> bool:
    """Whether both compute all of the outputs alike."""
    if one[0].needs(outputs) != other[0].needs(outputs):
        return False
    return compute_the_same(_alone(one, outputs), _alone(other, outputs))


def _alone(traced: Traced, outputs: Sequence[int]) -> Closed:
    """The program of these outputs, with only the arguments that they read, and the index."""
    trace, consts = traced
    jaxpr, needed = trace.only(outputs).jaxpr, places_of(trace.needs(outputs))
    index, *arguments = jaxpr.invars
    program = with_invars(jaxpr, [*entries(arguments, needed), index])
    return program, [consts[i] for i in needed if i < len(consts)]
