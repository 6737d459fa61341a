"""The derivative of one microbatch, and the sum of all of them: where gradients are accumulated.

The problem. ``jax.grad`` of a sum over microbatches keeps the activations of all of them; a loop
that adds gradients keeps those of one, but then has two trees of gradients at once: the sum, and
what is to be added to it.

The idea. The loop runs every microbatch forward and backward before the next. The backward pass
takes the sum so far and returns it with this microbatch's gradient added. `running_sums` rewrites
the program for this: the sum passes through every equation that reads a parameter w, and each adds
its share.

    sums = 0
    for rows in microbatches:
        parts, pull = vjp(lambda sums: (loss(w, rows), sums passed on by the readers of w), 0)
        sums = pull(cotangents of the parts, sums)   # sums + d loss / d w, written where they are

Example. The loss ``Mean(total, weight)`` over microbatches of 2 and 1 examples, whose weights add
up to 3. Both totals have the cotangent 1/3, so the sums are 0, then 1/3 dT₁/dw, then 1/3 (dT₁/dw +
dT₂/dw): the gradient of (T₁ + T₂) / 3. No microbatch divides by its own number of examples. With
``tree()`` each microbatch's gradients are a tree of their own, which is added after it.

The cost. One forward and one backward pass for each microbatch; memory for one sum and one
microbatch's activations. The known weakness: inside a ``while`` or a custom rule a gradient is made
whole, and added once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp

from jaxaccum._base.entries import entries, with_entries
from jaxaccum._base.trees import cast
from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._loop import maxima
from jaxaccum._loop.differentiated import Differentiated, differentiated, moved_arguments
from jaxaccum._loop.loop import Scanned, rows_of, scan
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.program import Program
from jaxaccum._program.reductions import Reduction
from jaxaccum.accumulators._record import GradientSum


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What to differentiate: the slots `wrt`; and the parts of the output that have a cotangent."""

    wrt: tuple[int, ...]
    parts: tuple[int, ...]
    accumulator: GradientSum


class Result(NamedTuple):
    """The combined parts of the output, and one gradient per slot of `wrt`."""

    parts: list[Array]
    grads: list[Array]


def run_with_gradient(
    program: Program, arrays: Sequence[Array], gradient: Gradient, seeds: Sequence[Array]
) -> Result:
    """The combined parts, and ``Σ vjp(seeds)`` over microbatches; one seed for each of the
    gradient's parts.

    The seed of a summed part is the cotangent in every microbatch; that of rows or of a stack is
    cut as the rows are.
    """
    step = Derivative(program, gradient, list(arrays), list(seeds))
    visit = step.add_in_place if step.is_in_place else step.add_tree
    scanned = scan(program, arrays, visit, sums=step.zeros(), idle=step.idle, extra=step.extra())
    return step.result(scanned)


@dataclasses.dataclass(frozen=True)
class Derivative:
    """The derivative of one microbatch: its cotangents, and where its gradients go."""

    program: Program
    gradient: Gradient
    arrays: list[Array]
    seeds: list[Array]

    @functools.cached_property
    def slots(self) -> Differentiated:
        """The slots to differentiate, by how their gradients combine."""
        return differentiated(self.program, self.gradient.wrt)

    @property
    def parameters(self) -> list[Array]:
        """The differentiated arrays that every microbatch reads whole."""
        return entries(self.arrays, self.slots.whole)

    @property
    def _overwritten(self) -> list[Array]:
        return entries(self.arrays, self.slots.overwritten)

    @property
    def is_in_place(self) -> bool:
        """Whether the backward pass adds to the sums. A lone microbatch adds to nothing: its
        gradients are the sums.

        Where these are wider than the parameters, the backward pass widens each share before it
        adds it. Where the derivative calls `fun` again, no program is there for sums to pass.
        """
        if any(self.calls_again):
            return False
        lone = self.program.partition.num_microbatches == 1
        widened = any(self.gradient.accumulator.dtype_for(x) != x.dtype for x in self.parameters)
        return self.gradient.accumulator.in_place and (widened or not lone)

    @functools.cached_property
    def calls_again(self) -> list[bool]:
        """For each trace, whether its function is derived in its place."""
        return [self._calls_again(g) for g in range(len(self.program.traces))]

    def _calls_again(self, g: int) -> bool:
        one, places = self.program.traces[g], self._moved(g)
        differs = one.has_other_derivative(places)
        if differs and not one.can_be_called_again(places):
            raise one.refusal()
        return differs

    def zeros(self) -> list[Array]:
        """The sums, and the maxima, before the first microbatch."""
        rule, summed = self.gradient.accumulator, entries(self.arrays, self.slots.summed)
        lowest = [maxima.lowest(x, rule.dtype_for(x)) for x in self._overwritten]
        return [*map(rule.zeros, summed), *lowest]

    # -- one microbatch

    def add_in_place(
        self,
        g: int,
        sums: list[Array],
        rows: list[Array],
        carry: list[Array],
        index: Array,
        extra: Stacked,
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """The backward pass maps the sums so far to the sums with this microbatch."""
        sums, largest = self._apart(sums)
        places = self._places(g)

        def forward(
            sums: list[Array], overwritten: list[Array], own: list[Array]
        ) -> tuple[tuple[list[Array], list[Array]], list[Array]]:
            arrays = with_entries(self.arrays, self.slots.overwritten, overwritten)
            cut = with_entries(rows, self._row_places, own)
            inputs = self.program.inputs(g, arrays, rows=cut, carry=carry, index=index)
            parts, sums = self.program.traces[g].with_sums(index, inputs, sums, places)
            return (self._wanted(parts), sums), parts

        own = entries(rows, self._row_places)
        (outs, _), pull, parts = jax.vjp(
            forward, unread(sums), self._overwritten, own, has_aux=True
        )
        added, news, written = pull((self.cotangents(outs, extra), sums))
        return parts, [*added, *maxima.combine(largest, news)], written

    def add_tree(
        self,
        g: int,
        sums: list[Array],
        rows: list[Array],
        carry: list[Array],
        index: Array,
        extra: Stacked,
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """The backward pass returns a tree of gradients, which is added to the sums."""
        sums, largest = self._apart(sums)
        parts, pull, outs = self.at(g, rows=rows, carry=carry, index=index)
        grads, written = pull(self.cotangents(outs, extra))
        grads, news = self._apart(grads)
        return parts, [*added(sums, grads), *maxima.combine(largest, news)], written

    def at(
        self, g: int, *, rows: list[Array], carry: list[Array], index: Array
    ) -> tuple[list[Array], Callable[[list[Array]], tuple[list[Array], list[Array]]], list[Array]]:
        """One microbatch forward: all its parts, the pullback to parameters and rows, and the parts
        it starts from."""

        def forward(parameters: list[Array], own: list[Array]) -> tuple[list[Array], list[Array]]:
            arrays = with_entries(self.arrays, self.slots.whole, parameters)
            cut = with_entries(rows, self._row_places, own)
            inputs = self.program.inputs(g, arrays, rows=cut, carry=carry, index=index)
            parts = self._parts(g, index, inputs)
            return self._wanted(parts), parts

        own = entries(rows, self._row_places)
        outs, pull, parts = jax.vjp(forward, self.parameters, own, has_aux=True)
        if self.calls_again[g] and self.program.traces[g].has_rules_left(self._moved(g)):
            return without_derivative(parts), lambda ct: without_derivative(pull(ct)), outs
        return parts, pull, outs

    def _moved(self, g: int) -> list[int]:
        """The differentiated arguments of trace `g`."""
        return moved_arguments(self.program, g, self.gradient.wrt)

    def _parts(self, g: int, index: Array, inputs: list[Array]) -> list[Array]:
        """One microbatch's outputs, to be differentiated."""
        one = self.program.traces[g]
        return one.called_again(inputs) if self.calls_again[g] else one.derived(index, inputs)

    def _places(self, g: int) -> dict[int, int]:
        """The arguments of trace `g` that have a running sum: their positions there, and those of
        the sums."""
        places: dict[int, int] = {}
        for position, slot in enumerate(self.program.sources(g)):
            if slot in self.slots.summed:
                places[position] = self.slots.summed.index(slot)
        return places

    @property
    def _row_places(self) -> list[int]:
        """Among one microbatch's rows, the places of those to differentiate."""
        return list(map(self.program.positions(Role.ROWS).index, self.slots.rows))

    def _apart(self, xs: list[Array]) -> tuple[list[Array], list[Array]]:
        """What belongs to sums, and what to maxima."""
        count = len(self.slots.summed)
        return xs[:count], xs[count:]

    def _wanted(self, parts: list[Array]) -> list[Array]:
        return entries(parts, self.gradient.parts)

    # -- cotangents

    def cotangents(self, outs: list[Array], extra: Stacked) -> list[Array]:
        """The cotangents of the wanted parts at one microbatch; `extra` are its own entries of the
        stacked ones."""
        seeds = with_entries(self.seeds, extra.keys(), extra.values())
        return list(map(_cotangent, seeds, outs))

    def extra(self) -> list[Stacked]:
        """The cotangents of rows and stacks, cut for each group as the rows are."""
        partition = self.program.partition
        cut: list[Stacked] = [{} for _ in partition.groups]
        for place, part in enumerate(self.gradient.parts):
            kind, seed = self.program.outputs.parts[part].reduction, self.seeds[place]
            for g, group in enumerate(partition.groups):
                if kind is Reduction.CONCAT:
                    cut[g][place] = partition.split_rows(seed, 0)[g]
                elif kind is Reduction.STACK:
                    cut[g][place] = seed[group.first : group.first + group.count]
        return cut

    # -- the result

    def idle(self, g: int) -> list[Array]:
        """What a skipped microbatch of group `g` writes: zeros."""
        rows = rows_of(self.program, self.arrays, self.slots.rows, g)
        return [jnp.zeros_like(x[0]) for x in rows]

    def result(self, scanned: Scanned) -> Result:
        """Gradients in the order of `wrt`; those of rows back in the batch's order."""
        by_slot = dict(zip(self.slots.whole, scanned.sums, strict=True))
        for place, i in enumerate(self.slots.rows):
            groups = [written[place] for written in scanned.written]
            by_slot[i] = self.program.partition.merge_rows(groups, self.program.slots[i].axis)
        return Result(scanned.parts, entries(by_slot, self.gradient.wrt))


@jax.custom_jvp
def without_derivative(results: Any) -> Any:
    """What a microbatch computes by rules that would run late in a second derivative."""
    return results


@without_derivative.defjvp
def _refuse(primals: tuple[Any], tangents: tuple[Any]) -> NoReturn:
    raise NotImplementedError(
        "A custom_jvp or custom_vjp of the loss reads a Python variable or setting that changes "
        "while the loss runs, or a value that is no argument. Its gradient has no derivative over "
        "microbatches: pass what the rule reads as an argument."
    )


Stacked = dict[int, Array]
"""The cotangents that differ between microbatches, those of rows and stacks: by their places among
the seeds."""


def _cotangent(seed: Array, out: Array) -> Array:
    """The cotangent of an output, which varies over the mesh as the output does.

    An output that all devices share receives the cotangents of all of them.
    """
    axes = varying.varying_axes(out)
    return varying.sum_over_others(varying.vary(seed, axes), axes)


def unread(sums: list[Array]) -> list[Array]:
    """What a forward pass is given as sums: it does not read them."""
    return [varying.zeros(jax.typeof(x)) for x in sums]


def added(sums: list[Array], grads: list[Array]) -> list[Array]:
    """The sums with one more microbatch's gradients."""
    return jax.tree.map(_plus, sums, grads)


def _plus(total: Array, grad: Array) -> Array:
    return total + cast(grad, total.dtype)
