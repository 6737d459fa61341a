"""What stages cost: operations of a microbatch, forward and back, and bytes at the cuts.

Counted in the jaxprs that will run, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec as P

from jaxaccum._base.entries import entries, places_of, with_entries
from jaxaccum._base.trees import is_inexact
from jaxaccum._base.types import Array
from jaxaccum._coupled.collectives import resolve
from jaxaccum._coupled.cut import Cuts, Fragment
from jaxaccum._jaxpr import flops
from jaxaccum._jaxpr.variables import Atom, Type, Var, among, bound, type_of, variables


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


def costs(cuts: Cuts, moved: Collection[Var]) -> Costs:
    """The costs of a program whose variables `moved` are differentiated; none for the value
    alone."""
    size = cuts.axis[1]
    forward: list[float] = []
    back: list[float] = []
    through: list[float] = []
    once = 0.0
    for stage in cuts.stages:
        run = functools.partial(_local, stage.local)
        live = set(stage.live) & set(moved)
        forward.append(size * _operations(run, stage.local, ()))
        back.append(size * _operations(run, stage.local, moved))
        through.append(size * _operations(run, stage.local, live))
        once += _once(cuts, stage.shared, moved) + _once(cuts, stage.cut, moved)
    return Costs(tuple(forward), tuple(back), tuple(through), once)


def _local(fragment: Fragment, values: list[Array]) -> list[Array]:
    return fragment(bound(fragment.reads, values))


def _once(cuts: Cuts, fragment: Fragment, moved: Collection[Var]) -> float:
    """The operations of a fragment that is common to all microbatches."""
    if not fragment.writes:
        return 0.0
    stacked = cuts.stacked.union(among(fragment.reads, cuts.own))
    run = lambda values: resolve(fragment, values, cuts.axis, stacked)
    return _operations(run, fragment, moved, stacked, cuts.axis[1])


def _operations(
    run: Callable[[list[Array]], list[Array]],
    fragment: Fragment,
    moved: Collection[Var],
    stacked: Collection[Var] = (),
    size: int = 1,
) -> float:
    """The operations of a fragment and of its derivative with respect to the variables `moved`
    among what it reads; `stacked` variables have an entry for each of `size` microbatches."""
    shapes = [_shape(v, (size,) if v in stacked else ()) for v in fragment.reads]
    places = places_of(v in moved for v in fragment.reads)

    def work(values: list[Array]) -> Any:
        if not places:
            return run(values)

        def of(inputs: list[Array]) -> list[Array]:
            return list(filter(is_inexact, run(with_entries(values, places, inputs))))

        outs, pull = jax.vjp(of, entries(values, places))
        return outs, pull(list(map(jnp.ones_like, outs)))

    jaxpr = jax.make_jaxpr(work)(shapes).jaxpr
    return flops.flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _shape(v: Var, sizes: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The shape of a value with leading axes of the given sizes, which no mesh divides; the others
    stay as they are."""
    aval = type_of(v)
    sharding = aval.sharding if aval.sharding.mesh.explicit_axes else None
    if sharding is not None:
        sharding = sharding.update(spec=P(*[None] * len(sizes), *sharding.spec))
    return jax.ShapeDtypeStruct((*sizes, *aval.shape), aval.dtype, sharding=sharding)


# -- bytes -----------------------------------------------------------------------------------------


def bytes_of(atoms: Iterable[Atom], count: int = 1) -> int:
    """The bytes of `count` values of each variable; keys count as what they hold."""
    return count * sum(_bytes(type_of(v)) for v in atoms)


def _bytes(aval: Type) -> int:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        held = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return held.size * held.dtype.itemsize
    return aval.size * aval.dtype.itemsize


def statistics_bytes(cuts: Cuts) -> int:
    """What every schedule holds of the full batch: the results of all collectives, and the largest
    cut's operands."""
    largest = max((_bytes_of_batch(cuts, stage.emits) for stage in cuts.stages), default=0)
    results = [v for stage in cuts.stages for v in variables(stage.cut.writes)]
    return _bytes_of_batch(cuts, results) + largest


def _bytes_of_batch(cuts: Cuts, found: Sequence[Var]) -> int:
    """The bytes of variables for the whole batch: own values once per microbatch, others once."""
    return sum(bytes_of([v], cuts.axis[1] if v in cuts.own else 1) for v in found)


def microbatch_bytes(cuts: Cuts) -> int:
    """What one microbatch computes, stage by stage."""
    total = 0
    for stage in cuts.stages:
        for eqn in stage.local.jaxpr.eqns:
            total += bytes_of(eqn.outvars)
    return total
