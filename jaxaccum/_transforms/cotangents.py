"""The cotangents of a loss's terms, known before the loop: each microbatch then back-propagates its
share in one pass.

The loss is ``Σₜ Tₜ / Wₜ`` with ``Tₜ = Σᵢ totalᵢ`` and ``Wₜ = Σᵢ weightᵢ`` over microbatches i. The
cotangent of each total is ``1 / Wₜ``, that of each weight ``-Tₜ / Wₜ²``. Both are known before the
loop, so one backward pass per microbatch serves any number of terms.

A constant weight, such as the number of examples of a plain mean, is multiplied by the number of
microbatches. Weights that depend on the batch alone are summed by a scan that does nothing else.
Where a weight depends on parameters, that scan computes the totals too, and costs one forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.core
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.source_lines import frame_of
from jaxaccum._base.trees import cast, is_inexact, ratio, safe_map
from jaxaccum._base.types import Array
from jaxaccum._jaxpr.equations import with_invars
from jaxaccum._jaxpr.reversible import equations_inside
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._jaxpr.variables import operands_of, variables
from jaxaccum._program import reductions
from jaxaccum._program.output_parts import Term
from jaxaccum._program.program import Program
from jaxaccum._transforms import engine


class Seeds(NamedTuple):
    """The parts of the output that have a cotangent, and their cotangents over the whole batch."""

    parts: tuple[int, ...]
    values: list[Array]


def of_terms(program: Program, wrt: tuple[int, ...], known: dict[int, Array]) -> Seeds:
    """The cotangents of all terms, of the parts that are `known_first`."""
    seeds: dict[int, Array] = {}
    for term in program.terms:
        seeds[term.total] = _total_seed(program, term, known)
        for weight in _moving_weights(program, term, wrt):
            seeds[weight] = _weight_seed(known[term.total], known[weight])
    return Seeds(tuple(seeds), list(seeds.values()))


def known_first(
    program: Program, arrays: Sequence[Array], wrt: tuple[int, ...]
) -> dict[int, Array]:
    """The parts that cotangents are made of, over the whole batch. Prints and callbacks wait for
    the loop itself."""
    wanted: set[int] = set()
    for term in program.terms:
        if term.weight is not None:
            wanted.add(term.weight)
        if _moving_weights(program, term, wrt):
            wanted.add(term.total)
    restricted, kept = program.only(sorted(wanted))
    for one in restricted.traces:
        _check_computed_twice(one)
    if _is_static(restricted):
        totals = _static(restricted)
    else:
        totals = restricted.over_mesh(engine.run(restricted, arrays))
    return dict(zip(kept, totals, strict=True))


def _check_computed_twice(weights: Trace) -> None:
    """Weights are computed before the loop and again in it, so they must be the same both times."""
    for eqn in equations_inside(weights.jaxpr):
        if eqn.primitive.name in _STATEFUL:
            raise ValueError(
                f"the weight of a Mean depends on {_STATEFUL[eqn.primitive.name]} (at "
                f"{frame_of(eqn)}). jaxaccum computes the weights of the whole batch before the "
                "loss, so the weight must not depend on side effects; compute it from the "
                "arguments, or pass it as an argument."
            )


_STATEFUL = {
    "io_callback": "an io_callback",
    "get": "a reference",
    "swap": "a reference",
    "addupdate": "a reference",
}


def _is_static(program: Program) -> bool:
    """Whether every microbatch of one size adds the same on every device, and none is skipped."""
    if program.coupled or program.limit is not None:
        return False
    return all(map(_is_constant, program.traces))


def _is_constant(trace: Trace) -> bool:
    """Whether a trace without dead code reads no argument, no index and no other axis."""
    read = {*variables(trace.jaxpr.outvars), *operands_of(trace.jaxpr.eqns)}
    return not trace.other_axes and read.isdisjoint(trace.jaxpr.invars)


def _static(program: Program) -> list[Array]:
    """The sums of parts that depend on nothing: each microbatch of one size, on every shard, adds
    the same."""
    shards = math.prod(lax.axis_size(name) for name in program.mesh_axes)
    before = lambda part, type: reductions.initial(part.reduction, type)
    totals = safe_map(before, program.outputs.parts, program.types)
    for trace, group in zip(program.traces, program.partition.groups, strict=True):
        count = group.count * shards
        values = jax.core.eval_jaxpr(with_invars(trace.jaxpr, []), [])
        totals = safe_map(lambda total, value, n=count: total + value * n, totals, values)
    return totals


def _moving_weights(program: Program, term: Term, wrt: tuple[int, ...]) -> list[int]:
    """The denominator of a term, if it has a gradient of its own."""
    if term.weight is None or not is_inexact(_zero(program, term.weight)):
        return []
    return [term.weight] if program.depends([term.weight], wrt) else []


def _zero(program: Program, part: int) -> Array:
    kind = program.types[part]
    return jnp.zeros(kind.shape, kind.dtype)


def _total_seed(program: Program, term: Term, known: dict[int, Array]) -> Array:
    """The cotangent of a total: ``1 / W``, 0 where W is 0, and 1 for a sum."""
    one = jnp.ones_like(_zero(program, term.total))
    return one if term.weight is None else ratio(one, known[term.weight])


def _weight_seed(total: Array, weight: Array) -> Array:
    """The cotangent of a weight: ``-T / W²``."""
    return cast(-ratio(ratio(total, weight), weight), weight.dtype)
