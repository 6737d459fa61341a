"""What stages cost: operations of a microbatch, forward and back, and bytes at the cuts.

Counted in the jaxprs that will run, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec as P

from jaxaccum._base.types import Array
from jaxaccum._coupled.collectives import resolve
from jaxaccum._coupled.cut import Cuts, Fragment
from jaxaccum._jaxpr import flops


@dataclasses.dataclass(frozen=True)
class Costs:
    """The operations of all microbatches together, by stage."""

    forward: tuple[float, ...]
    """The stage, computed."""
    back: tuple[float, ...]
    """The stage, computed and differentiated with respect to all that it reads."""
    through: tuple[float, ...]
    """The stage, computed and differentiated with respect to its boundary alone."""
    once: float
    """All that is computed once, whatever the schedule: collectives and what follows from them, and
    their adjoints."""

    @property
    def full_batch(self) -> float:
        """The operations of the same loss and gradient in one pass over the whole batch."""
        return sum(self.back) + self.once


def costs(cuts: Cuts, moved: Collection[Any]) -> Costs:
    """The costs of a program whose variables `moved` are differentiated; none for the value
    alone."""
    size = cuts.axis[1]
    forward, back, through, once = [], [], [], 0.0
    for stage in cuts.stages:
        local = lambda values, fragment=stage.local: fragment(
            dict(zip(fragment.reads, values, strict=True))
        )
        live = set(stage.live) & set(moved)
        forward.append(size * _operations(local, stage.local, ()))
        back.append(size * _operations(local, stage.local, moved))
        through.append(size * _operations(local, stage.local, live))
        for fragment in (stage.shared, stage.cut):
            if fragment.writes:
                mapped = {v for v in fragment.reads if v in cuts.own} | cuts.stacked
                run = lambda values, f=fragment, mapped=mapped: resolve(
                    f, values, cuts.axis, mapped
                )
                once += _operations(
                    run, fragment, moved, {v: size for v in fragment.reads if v in mapped}
                )
    return Costs(tuple(forward), tuple(back), tuple(through), once)


def _operations(
    run: Callable[[list[Array]], list[Array]],
    fragment: Fragment,
    moved: Collection[Any],
    sizes: Any = None,
) -> float:
    """The operations of a fragment and of its derivative with respect to the variables `moved`
    among what it reads."""
    reads, sizes = fragment.reads, sizes or {}
    shapes = [_stacked(v.aval, [sizes[v]] if v in sizes else []) for v in reads]
    places = [i for i, v in enumerate(reads) if v in moved]

    def work(values: list[Array]) -> Any:
        if not places:
            return run(values)

        def of(inputs: list[Array]) -> list[Array]:
            own = list(values)
            for i, x in zip(places, inputs, strict=True):
                own[i] = x
            return [x for x in run(own) if jnp.issubdtype(x.dtype, jnp.inexact)]

        outs, pull = jax.vjp(of, [values[i] for i in places])
        return outs, pull([jnp.ones_like(x) for x in outs])

    jaxpr = jax.make_jaxpr(work)(shapes).jaxpr
    return flops.flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _stacked(aval: Any, sizes: list[int]) -> jax.ShapeDtypeStruct:
    """The shape of a value with leading axes of the given sizes, which no mesh divides; the others
    stay as they are."""
    sharding = aval.sharding if aval.sharding.mesh.explicit_axes else None
    if sharding is not None:
        sharding = sharding.update(spec=P(*[None] * len(sizes), *sharding.spec))
    return jax.ShapeDtypeStruct((*sizes, *aval.shape), aval.dtype, sharding=sharding)


def bytes_of(variables: Iterable[Any], count: int = 1) -> int:
    """The bytes of `count` values of each variable; keys count as what they hold."""
    return count * sum(_bytes(v.aval) for v in variables)


def _bytes(aval: Any) -> int:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        held = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return held.size * held.dtype.itemsize
    return aval.size * aval.dtype.itemsize


def statistics_bytes(cuts: Cuts) -> int:
    """What every schedule holds of the full batch: the results of all collectives, and the largest
    cut's operands."""
    size, stages = cuts.axis[1], cuts.stages
    stacked = lambda variables: [v for v in variables if v in cuts.own]
    same: Callable[[Sequence[Any]], list[Any]] = lambda variables: [
        v for v in variables if v not in cuts.own
    ]
    results = [v for stage in stages for v in stage.cut.writes]
    largest = max((bytes_of(stacked(stage.emits), size) for stage in stages), default=0)
    return bytes_of(same(results)) + bytes_of(stacked(results), size) + largest


def microbatch_bytes(cuts: Cuts) -> int:
    """What one microbatch computes, stage by stage."""
    made = [v for stage in cuts.stages for eqn in stage.local.jaxpr.eqns for v in eqn.outvars]
    return bytes_of(made)
