"""The derivative of one microbatch, and the sum of all of them: where gradients are accumulated.

The problem. ``jax.grad`` of a sum over microbatches keeps the activations of all of them; a loop
that adds gradients keeps those of one, but then has two trees of gradients at once: the sum, and
what is to be added to it.

The idea. The loop runs every microbatch forward and backward before the next, and the backward pass
itself maps the sum so far to the sum with this microbatch: of a program that reads a parameter w,
`running_sums` makes one that passes the sum on from reader to reader, and each reader adds its
share.

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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._base.trees import cast
from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._loop import maxima
from jaxaccum._loop.loop import Scanned, scan
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.program import Program
from jaxaccum._program.reductions import Reduction
from jaxaccum.accumulators._record import Sums


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What to differentiate: the slots `wrt`; and the parts of the output that have a cotangent."""

    wrt: tuple[int, ...]
    parts: tuple[int, ...]
    sums: Sums


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

    @property
    def whole(self) -> list[int]:
        """The differentiated slots that every microbatch reads whole."""
        return [*self.summed, *self.overwritten]

    @property
    def summed(self) -> list[int]:
        """Those whose gradients are summed over microbatches."""
        return [i for i in self._wrt(Role.WHOLE) if not self.program.slots[i].overwritten]

    @property
    def overwritten(self) -> list[int]:
        """Those whose "gradients" are maxima over the examples, and so combine by maximum."""
        return [i for i in self._wrt(Role.WHOLE) if self.program.slots[i].overwritten]

    def _wrt(self, role: Role) -> list[int]:
        return [i for i in self.gradient.wrt if self.program.slots[i].role is role]

    @property
    def rows(self) -> list[int]:
        """The differentiated slots whose gradients are rows, each of one microbatch."""
        return self._wrt(Role.ROWS)

    @property
    def parameters(self) -> list[Array]:
        """The arrays of `whole`."""
        return [self.arrays[i] for i in self.whole]

    @property
    def is_in_place(self) -> bool:
        """Whether the backward pass adds to the sums. A lone microbatch adds to nothing: its
        gradients are the sums.

        Where these are wider than the parameters, the backward pass widens each share before it
        adds it.
        """
        lone = self.program.partition.num_microbatches == 1
        widened = any(self.gradient.sums.dtype_for(x) != x.dtype for x in self.parameters)
        return self.gradient.sums.in_place and (widened or not lone)

    def zeros(self) -> list[Array]:
        """The sums, and the maxima, before the first microbatch."""
        sums = self.gradient.sums
        summed = [sums.zeros(self.arrays[i]) for i in self.summed]
        overwritten = [self.arrays[i] for i in self.overwritten]
        return [*summed, *(maxima.lowest(x, sums.dtype_for(x)) for x in overwritten)]

    # -- one microbatch

    def add_in_place(
        self, g: int, sums: Any, rows: Any, carry: Any, index: Array, extra: Any
    ) -> tuple[list[Array], Any, Any]:
        """The backward pass maps the sums so far to the sums with this microbatch."""
        places, count = self._places(g), len(self.summed)

        def forward(
            sums: list[Array], overwritten: list[Array], own: list[Array]
        ) -> tuple[tuple[list[Array], list[Array]], list[Array]]:
            arrays, cut = (
                self._with_arrays(self.overwritten, overwritten),
                self._with_rows(rows, own),
            )
            inputs = self.program.inputs(g, arrays, rows=cut, carry=carry, index=index)
            parts, sums = self.program.traces[g].with_sums(index, inputs, sums, places)
            return (self._wanted(parts), sums), parts

        unread = [varying.zeros(jax.typeof(x)) for x in sums[:count]]
        overwritten = [self.arrays[i] for i in self.overwritten]
        (outs, _), pull, parts = jax.vjp(
            forward, unread, overwritten, self._differentiated(rows), has_aux=True
        )
        added, news, written = pull((self.cotangents(outs, extra), sums[:count]))
        return parts, [*added, *maxima.combine(sums[count:], news)], written

    def add_tree(
        self, g: int, sums: Any, rows: Any, carry: Any, index: Array, extra: Any
    ) -> tuple[list[Array], Any, Any]:
        """The backward pass returns a tree of gradients, which is added to the sums."""
        parts, pull, outs = self.at(g, rows=rows, carry=carry, index=index)
        grads, written = pull(self.cotangents(outs, extra))
        count = len(self.summed)
        added = [
            total + cast(grad, total.dtype)
            for total, grad in zip(sums[:count], grads[:count], strict=True)
        ]
        return parts, [*added, *maxima.combine(sums[count:], grads[count:])], written

    def at(
        self, g: int, *, rows: list[Array], carry: Any, index: Array
    ) -> tuple[list[Array], Callable[[list[Array]], Any], list[Array]]:
        """One microbatch forward: all its parts, the pullback to parameters and rows, and the parts
        it starts from."""

        def forward(parameters: list[Array], own: list[Array]) -> tuple[list[Array], list[Array]]:
            arrays, cut = self._with_arrays(self.whole, parameters), self._with_rows(rows, own)
            inputs = self.program.inputs(g, arrays, rows=cut, carry=carry, index=index)
            parts = self.program.traces[g].derived(index, inputs)
            return self._wanted(parts), parts

        outs, pull, parts = jax.vjp(
            forward, self.parameters, self._differentiated(rows), has_aux=True
        )
        return parts, pull, outs

    def _places(self, g: int) -> dict[int, int]:
        """The arguments of trace `g` that have a running sum: their positions there, and those of
        the sums."""
        place_of = {slot: place for place, slot in enumerate(self.summed)}
        sources = enumerate(self.program.sources(g))
        return {position: place_of[slot] for position, slot in sources if slot in place_of}

    def _with_arrays(self, slots: list[int], values: Sequence[Array]) -> list[Array]:
        """The arrays of the call, with those of the given slots replaced."""
        arrays = list(self.arrays)
        for i, x in zip(slots, values, strict=True):
            arrays[i] = x
        return arrays

    def _wanted(self, parts: list[Array]) -> list[Array]:
        return [parts[i] for i in self.gradient.parts]

    def _differentiated(self, rows: Sequence[Array]) -> list[Array]:
        """Of one microbatch's rows, those to differentiate."""
        order = self.program.positions(Role.ROWS)
        return [rows[order.index(i)] for i in self.rows]

    def _with_rows(self, rows: Sequence[Array], own: Sequence[Array]) -> list[Array]:
        """One microbatch's rows, with those to differentiate replaced."""
        order, cut = self.program.positions(Role.ROWS), list(rows)
        for i, x in zip(self.rows, own, strict=True):
            cut[order.index(i)] = x
        return cut

    # -- cotangents

    def cotangents(self, outs: list[Array], extra: Any) -> list[Array]:
        """The cotangents of the wanted parts at one microbatch; `extra` are its own entries of the
        stacked ones."""
        entries, given = iter(extra), []
        for part, seed, out in zip(self.gradient.parts, self.seeds, outs, strict=True):
            own = next(entries) if self.program.outputs.parts[part].reduction.stacked else seed
            axes = varying.varying_axes(out)
            # An output that all devices share receives the cotangents of all of them.
            given.append(varying.sum_over_others(varying.vary(own, axes), axes))
        return given

    def extra(self) -> list[list[Array]]:
        """The cotangents of rows and stacks, cut for each group as the rows are."""
        partition = self.program.partition
        cut: list[list[Array]] = [[] for _ in partition.groups]
        for part, seed in zip(self.gradient.parts, self.seeds, strict=True):
            kind = self.program.outputs.parts[part].reduction
            for g, group in enumerate(partition.groups):
                if kind is Reduction.CONCAT:
                    cut[g].append(partition.split_rows(seed, 0)[g])
                elif kind is Reduction.STACK:
                    cut[g].append(seed[group.first : group.first + group.count])
        return cut

    # -- the result

    def idle(self, g: int) -> list[Array]:
        """What a skipped microbatch of group `g` writes: zeros."""
        rows = [
            self.program.partition.split_rows(self.arrays[i], self.program.slots[i].axis)[g]
            for i in self.rows
        ]
        return [jnp.zeros_like(x[0]) for x in rows]

    def result(self, scanned: Scanned) -> Result:
        """Gradients in the order of `wrt`; those of rows back in the batch's order."""
        by_slot = dict(zip(self.whole, scanned.sums, strict=True))
        for j, i in enumerate(self.rows):
            groups = [group[j] for group in scanned.written]
            by_slot[i] = self.program.partition.merge_rows(groups, self.program.slots[i].axis)
        return Result(scanned.parts, [by_slot[i] for i in self.gradient.wrt])
