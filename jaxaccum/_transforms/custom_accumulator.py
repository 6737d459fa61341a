"""Value and gradient where the user says how gradients combine: each microbatch's mean gradient,
handed to a record.

It is the same scan over microbatches, in which each microbatch returns its gradients as a tree. An
accumulator that is linear takes shares of the batch's gradient in the place of means.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxaccum import _loop
from jaxaccum._base.entries import entries
from jaxaccum._base.trees import cast, dtype_of, leaves_with_names, ratio, safe_map, widen
from jaxaccum._base.types import Array, PyTree
from jaxaccum._devices import varying
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.program import Program
from jaxaccum._program.tags import Stack
from jaxaccum._transforms import cotangents, over_shards
from jaxaccum.accumulators._record import AccumulatorLike, accepted_by, in_place, returned

Assemble = Callable[[Sequence[Array]], PyTree]
"""The differentiated arguments' own structure, around one array per slot."""
Handed = tuple[list[Array], Array]
"""What an accumulator takes of a microbatch: gradients, one per slot, and their weight."""
Hand = Callable[[list[Array], Any, list[Array]], Handed]
"""Of a microbatch's parts, the pullback, and what is pulled back: what the accumulator takes."""


class Accumulated(NamedTuple):
    """The combined parts, the gradients in their own structure, and the accumulator's report or
    None."""

    parts: list[Array]
    grads: PyTree
    report: PyTree


def value_and_grad(
    program: Program,
    wrt: tuple[int, ...],
    accumulator: AccumulatorLike,
    assemble: Assemble,
    arrays: Sequence[Array],
) -> Accumulated:
    """The value's parts over all shards, and what `accumulator` makes of the microbatches'
    gradients.

    A report stays the device's own, its scalars with an axis, so that ``out_specs=P(axes)`` puts
    all of them together.
    """
    _check_shared(program, wrt)
    own = _Pass(program, wrt, accumulator, assemble, arrays)
    (parts, grads), report = own.of_shares() if own.linear else own.of_means()
    if program.mesh_axes:
        # Each device has its own report, and along a leading axis there is room for all.
        report = jax.tree.map(lambda x: x[None] if jnp.ndim(x) == 0 else x, report)
    grads = safe_map(functools.partial(returned, accumulator), grads, entries(arrays, wrt))
    return Accumulated(parts, assemble(grads), report)


class _Scanned(NamedTuple):
    """What the loop leaves on one device."""

    own: _loop.Result
    report: PyTree
    visited: Array
    """bool, one entry per microbatch: whether it was accepted, and not of padding alone."""


@dataclasses.dataclass(frozen=True)
class _Pass:
    """One pass over the microbatches; its fields are the arguments of `value_and_grad`."""

    program: Program
    wrt: tuple[int, ...]
    accumulator: AccumulatorLike
    assemble: Assemble
    arrays: Sequence[Array]

    @property
    def selective(self) -> bool:
        """Whether the accumulator may leave a microbatch out."""
        return getattr(self.accumulator, "accepts", None) is not None

    @property
    def linear(self) -> bool:
        """Whether it returns a weighted mean of all gradients."""
        return getattr(self.accumulator, "linear", False) and not self.selective

    def of_shares(self) -> tuple[_loop.Result, PyTree]:
        """Each microbatch's share of the batch's gradient, times their number, with weight 1.

        The mean of these is the batch's gradient, whatever the loss's terms and their weights.
        """
        known = cotangents.known_first(self.program, self.arrays, self.wrt)
        seeds = cotangents.of_terms(self.program, self.wrt, known)
        step = self._derivative(seeds.parts, seeds.values)
        count = self.program.partition.num_microbatches

        def hand(parts: list[Array], pull: Any, outs: list[Array]) -> Handed:
            shares, _ = pull(step.cotangents(outs, {}))
            weight = jnp.ones_like(parts[self.program.terms[0].total])
            return [cast(share, widen(share.dtype)) * count for share in shares], weight

        own, report, visited = self._scan(step, hand)
        shares = safe_map(functools.partial(_of_all, visited), own.grads)
        own = _loop.Result(own.parts, shares)
        return over_shards.combined(self.program, self.arrays, self.wrt, own, known), report

    def of_means(self) -> tuple[_loop.Result, PyTree]:
        """Each microbatch's mean gradient, with its own weight."""
        total_part, weight_part = _one_denominator(self.program, self.wrt)
        known = cotangents.known_first(self.program, self.arrays, self.wrt)
        step = self._derivative((total_part,), [])

        def hand(parts: list[Array], pull: Any, outs: list[Array]) -> Handed:
            total = parts[total_part]
            weight = cast(parts[weight_part], total.dtype)
            divisor = _divisor(known[weight_part], weight)
            cotangent = ratio(jnp.ones_like(total), divisor)
            shares, _ = pull([varying.vary(cotangent, varying.varying_axes(outs[0]))])
            means = [_mean_gradient(share, divisor, weight) for share in shares]
            if self.selective:
                weight = jnp.where(jnp.isfinite(total), weight, jnp.full_like(weight, jnp.nan))
            return means, weight

        own, report, _ = self._scan(step, hand)
        return _over_shards(self.program, self.arrays, self.wrt, weight_part, own), report

    def _derivative(self, parts: tuple[int, ...], seeds: list[Array]) -> _loop.Derivative:
        gradient = _loop.Gradient(self.wrt, parts, in_place())
        return _loop.Derivative(self.program, gradient, list(self.arrays), seeds)

    def _scan(self, step: _loop.Derivative, hand: Hand) -> _Scanned:
        """The loop, in which the accumulator takes what `hand` makes of each microbatch."""
        accumulator = self.accumulator
        params = self.assemble(step.parameters)
        state = jax.tree.map(_strong, accumulator.init(params))

        def visit(
            g: int,
            sums: PyTree,
            rows: list[Array],
            carry: list[Array],
            index: Array,
            extra: list[Array],
        ) -> tuple[list[Array], PyTree, PyTree]:
            del extra
            parts, pull, outs = step.at(g, rows=rows, carry=carry, index=index)
            own, weight = hand(parts, pull, outs)
            grads = self.assemble(own)
            new = _checked(accumulator.update(sums, grads, weight, index), sums)
            return parts, new, (accepted_by(accumulator, grads, weight), _entries(new))

        scanned = _loop.scan(
            self.program,
            self.arrays,
            visit,
            sums=state,
            idle=lambda g: (jnp.array(False), list(map(jnp.zeros_like, _entries(state)))),
            keep=(lambda written: written[0]) if self.selective else None,
        )
        joined = lambda *groups: jnp.concatenate(groups)
        visited, written = jax.tree.map(joined, *scanned.written)
        grads, report = _finalized(accumulator, _with_entries(scanned.sums, written), params)
        return _Scanned(_loop.Result(scanned.parts, grads), report, visited)


def _divisor(weight_of_batch: Array, weight: Array) -> Array:
    """What the cotangent of a total is divided by: the weight of the batch, as in the full batch.

    A backward rule of the user's that is not linear, such as one that clips, then does what it does
    there. Where a microbatch has spoiled that weight with NaN or infinity, the others are divided
    by their own.
    """
    whole = cast(weight_of_batch, weight.dtype)
    return jnp.where(jnp.isfinite(whole) & (whole != 0), whole, weight)


def _of_all(visited: Array, mean: Array) -> Array:
    """The sum of the shares, of the mean over the microbatches that were visited: those of padding
    are not."""
    return mean * cast(jnp.mean(visited, dtype=jnp.finfo(mean.dtype).dtype), mean.dtype)


def _mean_gradient(share: Array, divisor: Array, weight: Array) -> Array:
    """A microbatch's mean gradient, of its share ``g / divisor`` of the batch's; infinite where a
    weight of 0 would lose a share."""
    dtype = widen(share.dtype)
    scale = jnp.where(divisor == weight, jnp.ones_like(weight), ratio(divisor, weight))
    mean = cast(share, dtype) * cast(scale, dtype)
    lost = (weight == 0) & (share != 0)
    return jnp.where(lost, jnp.full_like(mean, jnp.inf), mean)


def _check_shared(program: Program, wrt: tuple[int, ...]) -> None:
    """Each microbatch has a gradient of its own, with respect to what all examples and devices
    share."""
    if program.coupled:
        raise ValueError(
            "a custom accumulator sees each microbatch's own gradient, and a loss with a "
            "collective over the axis of the loop has none; use in_place() or tree(), or a loss "
            "without the collective."
        )
    for i in wrt:
        _check_shared_by_examples(program.slots[i])
    for i in wrt:
        _check_shared_by_devices(program, program.slots[i].name, program.given_axes[i])


def _one_denominator(program: Program, wrt: tuple[int, ...]) -> tuple[int, int]:
    """Total and weight of the loss's one term: a microbatch's mean gradient and weight then make
    the batch's."""
    terms = program.terms
    weight = terms[0].weight
    if len(terms) != 1 or weight is None:
        found = f"{len(terms)} terms" if len(terms) != 1 else "a Sum, which has none"
        raise ValueError(
            "a custom accumulator that sees each microbatch's mean gradient needs a loss with one "
            f"denominator, and this loss is {found}; return one scalar or one Mean(total, weight) "
            "whose total adds the terms up, or use in_place(), tree() or compensated()."
        )
    if program.depends([weight], wrt):
        raise ValueError(
            "a custom accumulator needs a loss whose denominator is given, and the weight of this "
            "Mean depends on what is differentiated; stop its gradient, as in Mean(total, "
            "jax.lax.stop_gradient(weight)), or use in_place(), tree() or compensated()."
        )
    return terms[0].total, weight


def _check_shared_by_examples(slot: Slot) -> None:
    if slot.overwritten:
        raise ValueError(
            f"{slot.name} is overwritten with its gradient, as Flax's float8 layers do, and a "
            "custom accumulator would average it; use in_place() or tree()."
        )
    if slot.role is Role.ROWS:
        raise ValueError(
            f"{slot.name} is part of the batch, and a custom accumulator combines gradients of "
            "what all microbatches share; leave it out of argnums, or use in_place() or tree()."
        )


def _check_shared_by_devices(program: Program, name: str, given_axes: frozenset[str]) -> None:
    if shared := given_axes & program.other_axes & set(program.mesh_axes):
        raise ValueError(
            f"{name} is divided over {', '.join(map(repr, sorted(shared)))}, "
            "as the batch is, and gathered at every microbatch: its gradients come of all "
            "devices, and a custom accumulator would weigh them by one device's; on an "
            'explicit mesh pass gather="once", or use in_place() or tree().'
        )
    if others := given_axes - program.axes:
        raise ValueError(
            f"{name} differs between the devices along "
            f"{', '.join(map(repr, sorted(others)))}, and a custom accumulator would decide by "
            "one device's part of its gradient; use in_place() or tree()."
        )


def _over_shards(
    program: Program,
    arrays: Sequence[Array],
    wrt: tuple[int, ...],
    weight: int,
    own: _loop.Result,
) -> _loop.Result:
    """Parts and gradients over the mesh, in one collective; of shards of one batch, the mean by
    their weights."""
    if not program.mesh_axes:
        return over_shards.combined(program, arrays, wrt, own, {})
    share = own.parts[weight]
    weigh = lambda g: jnp.where(share == 0, jnp.zeros_like(g), g * cast(share, g.dtype))
    weighted = _loop.Result(own.parts, list(map(weigh, own.grads)))
    parts, sums = over_shards.combined(program, arrays, wrt, weighted, {})
    return _loop.Result(parts, [ratio(x, parts[weight]) for x in sums])


# -- the state -------------------------------------------------------------------------------------


def _is_stack(x: object) -> bool:
    return isinstance(x, Stack)


def _strong(x: ArrayLike) -> Array:
    """An array that is not weakly typed, so that it keeps its dtype from microbatch to
    microbatch."""
    return cast(x, dtype_of(x))


def _entries(state: PyTree) -> list[Array]:
    """What the state holds under the tag Stack, to be written down at each microbatch."""
    tags = filter(_is_stack, jax.tree.leaves(state, is_leaf=_is_stack))
    return jax.tree.leaves(list(tags))


def _with_entries(state: PyTree, entries: list[Array]) -> PyTree:
    rest = iter(entries)
    fill = lambda x: jax.tree.map(lambda _: next(rest), x) if _is_stack(x) else x
    return jax.tree.map(fill, state, is_leaf=_is_stack)


def _checked(new: PyTree, old: PyTree) -> PyTree:
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"the accumulator's update returns a state of structure {jax.tree.structure(new)}, and "
            f"init one of {jax.tree.structure(old)}; return the structure that came in."
        )
    named = leaves_with_names(new, "the accumulator's state")
    for (name, x), before in zip(named, jax.tree.leaves(old), strict=True):
        if jnp.shape(x) != before.shape or dtype_of(x) != before.dtype:
            raise TypeError(
                f"{name} changes from {before.dtype}{list(before.shape)} to "
                f"{dtype_of(x)}{list(jnp.shape(x))} in the accumulator's update; let init return "
                "the shape and dtype that update does (gradients of parameters of lower precision "
                "come in float32)."
            )
    return jax.tree.map(_strong, new)


def _finalized(
    accumulator: AccumulatorLike, state: PyTree, params: PyTree
) -> tuple[list[Array], PyTree]:
    result = accumulator.finalize(state)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"the accumulator's finalize returns (grads, report); got a {type(result).__name__}."
        )
    grads, report = result
    if jax.tree.structure(grads, is_leaf=_is_stack) != jax.tree.structure(params):
        raise ValueError(
            "the accumulator's finalize returns gradients of structure "
            f"{jax.tree.structure(grads)} for parameters of {jax.tree.structure(params)}; return "
            "gradients like the parameters, and the rest as the report."
        )
    return jax.tree.leaves(grads), report
