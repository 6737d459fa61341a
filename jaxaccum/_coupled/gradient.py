"""Differentiate the stages in reverse: the cotangents of what each reads, once those of what it
emits are known.

The problem. The statistics s of a cut depend on every microbatch, and every microbatch on s. The
gradient of one microbatch with s held fixed is wrong, and that through s needs all others.

The idea. In the order of the stages that system is triangular. When stage l is reached in reverse,
the cotangents of all statistics behind it are complete. So are, by the adjoint of the cut, those of
all that stage l emits. One pass over the microbatches then gives the cotangents of the parameters,
statistics and rows that stage l itself reads.

    ds  = Σ over microbatches of vjp(stages l + 1 … e; s)      the pass of stage l + 1
    de  = vjp(the cut; ds)                                     once, for what all of them emit
    dw += Σ over microbatches of vjp(stages l … e; w)          the pass of stage l, of de too

A pass back-propagates from the end e of its segment, the nearest stored boundary behind it. The
cotangent of that boundary is known. A boundary is overwritten by its cotangent.

Example. The loss ``Σ (h - m)²`` of ``h = w x``, ``m = pmean(h)``; two microbatches of one example,
and nothing stored:

    pass of stage 1    dm  = -2 (h₁ - m) - 2 (h₂ - m)
    the cut, once      dh₁ = dm / 2,  dh₂ = dm / 2
    pass of stage 0    dw += x₁ (dh₁ + 2 (h₁ - m)) + x₂ (dh₂ + 2 (h₂ - m))

The cost. A segment of m stages takes about 2 m² stages; memory as in the forward passes.

Known weakness. A stage is differentiated anew in every pass of its segment that runs through it,
and each of these derivatives is traced and compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.entries import entries, part_of
from jaxaccum._base.trees import cast, widen
from jaxaccum._base.types import Array
from jaxaccum._coupled import targets
from jaxaccum._coupled.cut import Stage
from jaxaccum._coupled.execute import Pull, StagedProgram, Sweep
from jaxaccum._coupled.targets import Emitted, End, Part, Target
from jaxaccum._devices import varying
from jaxaccum._jaxpr.variables import Env, Var, bound, numbered, read, type_of
from jaxaccum._loop.derivative import added, unread
from jaxaccum._loop.maxima import larger, lowest

# -- all stages ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reverse:
    """The cotangents that have arrived so far; those of parameters are added to `sums`."""

    staged: StagedProgram
    sweep: Sweep
    parameters: dict[Var, int]
    """The differentiated arguments that every microbatch reads whole: variable, and place in
    `sums`."""
    sums: list[Array]
    """The gradients of `parameters`."""
    overwritten: frozenset[Var]
    """The differentiated arguments whose gradients combine by maximum. They arrive in `shared`."""
    in_place: bool
    """Whether the backward pass adds to the sums itself (`running_sums`)."""
    seeds: dict[int, Array]
    """The cotangents of outputs."""
    shared: Env = dataclasses.field(default_factory=dict)
    """Of statistics and what follows from them, one for all microbatches; at least in float32."""
    stacked: Env = dataclasses.field(default_factory=dict)
    """Of rows, and of collectives' results that have an entry per microbatch."""
    emitted: dict[Emitted, Array] = dataclasses.field(default_factory=dict)
    """Of what a cut takes."""
    boundary: Env = dataclasses.field(default_factory=dict)
    """Of the boundary at the end of the segment."""

    def run(self) -> None:
        """From the last stage to the first."""
        for level in reversed(range(len(self.staged.cuts.stages))):
            for v, x in self._pulled(self.sweep.cut_pulls.get(level)).items():
                if v in self.staged.cuts.own:
                    self.emitted[Emitted(level, v)] = x
                else:
                    self._add(v, x)
            self._microbatches(level)
            for v, x in self._pulled(self.sweep.shared_pulls.get(level)).items():
                self._add(v, x)

    def rows(self, slot: int, v: Var) -> Array:
        """The gradient of a differentiated argument that holds rows, in the batch's order."""
        program = self.staged.program
        if v not in self.stacked:
            return jnp.zeros_like(self.staged.arrays[slot])
        return program.partition.merge_rows([self.stacked[v]], program.slots[slot].axis)

    def maximum(self, slot: int, v: Var) -> Array:
        """The maximum that is the gradient of a differentiated argument; 0 where nothing reads
        it."""
        return self.shared[v] if v in self.shared else jnp.zeros_like(self.staged.arrays[slot])

    def _pulled(self, pull: Pull | None) -> Env:
        return pull(self.shared | self.stacked) if pull else {}

    def _add(self, v: Var, x: Array) -> None:
        """Add a cotangent that was computed once, outside of the passes."""
        if v in self.parameters:
            place = self.parameters[v]
            self.sums[place] += cast(x, self.sums[place].dtype)
            return
        own = v in self.staged.cuts.own
        table = self.stacked if own else self.shared
        x = x if own else cast(x, widen(x.dtype))
        table[v] = self.combined(v, table[v], x) if v in table else x

    def combined(self, v: Var, old: Array, new: Array) -> Array:
        """Two shares of the cotangent of a variable."""
        return larger(old, new) if v in self.overwritten else old + cast(new, old.dtype)

    def _before(self, v: Var) -> Array:
        """The share of no microbatch."""
        dtype, value = widen(type_of(v).dtype), self.sweep.shared[v]
        if v in self.overwritten:
            return lowest(value, dtype)
        return varying.zeros(jax.typeof(value), dtype)

    def _microbatches(self, level: int) -> None:
        """The pass over microbatches that completes the cotangents of what stage `level` reads."""
        is_last = level == self.staged.cuts.last
        step = _Step.of(self, level)
        if not step.targets and not is_last:
            self.boundary = {} if step.starts else self.boundary
            return
        before = _Sums(
            entries(self.sums, step.places),
            list(map(self._before, step.shared)),
            read(self.sweep.boundaries.get(level, {}), step.live),
        )
        held = dict(self.sweep.boundaries[step.start])
        for v in step.live:
            held.pop(v)
        after, written = self.sweep.over_microbatches(
            step.visit,
            parts=self.staged.cuts.stages[level].parts if is_last else (),
            stored=held | self.sweep.stacked,
            extra=targets.stacked(step.targets),
            sums=before,
        )
        self._after(step, after, written)

    def _after(self, step: _Step, sums: _Sums, written: Env) -> None:
        """Keep what a pass has left."""
        for place, x in zip(step.places, sums.parameters, strict=True):
            self.sums[place] = x
        for v, x in bound(step.shared, sums.shared).items():
            self._add(v, x)
        for v in step.own:
            self._add(v, written[v])
        if step.starts:
            self.boundary = bound(step.live, sums.boundary) | part_of(written, step.through)
            self.emitted = {}


# -- one pass --------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """What a pass over the microbatches carries."""

    parameters: list[Array]
    shared: list[Array]
    boundary: list[Array]
    """The entries of all microbatches: values where a microbatch is still to come, cotangents where
    it is done."""


class _Inputs(NamedTuple):
    """What a segment is differentiated by, besides the parameters."""

    shared: list[Array]
    own: list[Array]
    crossing: list[Array]


@dataclasses.dataclass(frozen=True)
class _Step:
    """One microbatch, from stage `level` to the end of its segment and back."""

    reverse: Reverse
    level: int
    parameters: list[Var]
    shared: list[Var]
    own: list[Var]
    """What stage `level` reads of rows and of collectives' stacked results."""
    live: list[Var]
    """The stored boundary at its entry, where the segment starts with it: overwritten by its
    cotangent."""
    through: list[Var]
    """What crosses that boundary and an earlier one, for which it is still needed."""
    targets: list[Target]

    @classmethod
    def of(cls, reverse: Reverse, level: int) -> _Step:
        staged, sweep = reverse.staged, reverse.sweep
        step = cls(reverse, level, [], [], [], [], [], _with_cotangents(reverse, level))
        stage, outside = step._first, {*staged.cuts.jaxpr.invars, *staged.cuts.stacked}
        for v in dict.fromkeys([*stage.local.reads, *stage.emits]):
            if v not in sweep.moved:
                continue
            if v in reverse.parameters:
                step.parameters.append(v)
            elif v not in staged.cuts.own:
                step.shared.append(v)
            elif v in outside:
                step.own.append(v)
        if level > 0 and step.starts:
            earlier = sweep.boundaries[staged.start(level - 1)]
            for v in stage.live:
                if v in sweep.moved:
                    (step.through if v in earlier else step.live).append(v)
        return step

    @property
    def start(self) -> int:
        return self.reverse.staged.start(self.level)

    @property
    def starts(self) -> bool:
        """Whether its segment starts with it."""
        return self.start == self.level

    @property
    def places(self) -> list[int]:
        """Those of the parameters among the sums."""
        return [self.reverse.parameters[v] for v in self.parameters]

    def visit(
        self, sums: _Sums, own: Env, index: Array, cotangents: dict[int, Array]
    ) -> tuple[list[Array], _Sums, Env]:
        """Add to the sums what one microbatch contributes."""
        base = self.reverse.sweep.shared | own
        for v, x in bound(self.live, sums.boundary).items():
            base[v] = lax.dynamic_index_in_dim(x, index, keepdims=False)
        for k in range(self.start, self.level):
            base |= self.reverse.staged.cuts.stages[k].run(base)[1]
        parts, parameters, grads = self._differentiated(base, sums.parameters, cotangents)
        shared = list(map(self.reverse.combined, self.shared, sums.shared, grads.shared))
        of_live, of_through = _split(grads.crossing, len(self.live))
        boundary = [
            lax.dynamic_update_index_in_dim(x, new, index, 0)
            for x, new in zip(sums.boundary, of_live, strict=True)
        ]
        written = bound(self.own, grads.own) | bound(self.through, of_through)
        is_last = self.level == self.reverse.staged.cuts.last
        return parts if is_last else [], _Sums(parameters, shared, boundary), written

    def _differentiated(
        self, base: Env, sums: list[Array], cotangents: dict[int, Array]
    ) -> tuple[list[Array], list[Array], _Inputs]:
        """The outputs of the first stage, the sums with the parameters' gradients, and the other
        gradients."""
        crossing = read(base, [*self.live, *self.through])
        inputs = _Inputs(read(base, self.shared), read(base, self.own), crossing)
        if self.reverse.in_place:
            forward = self._forward_with_sums(base)
            (outs, _), pull, parts = jax.vjp(forward, unread(sums), inputs, has_aux=True)
            sums, grads = pull((targets.at_one_microbatch(self.targets, outs, cotangents), sums))
            return parts, sums, grads
        parameters = read(base, self.parameters)
        outs, pull, parts = jax.vjp(self._forward(base), parameters, inputs, has_aux=True)
        shares, grads = pull(targets.at_one_microbatch(self.targets, outs, cotangents))
        return parts, added(sums, shares), grads

    def _forward(self, base: Env) -> Any:
        """The targets of one microbatch, as a function of what its first stage reads; and that
        stage's outputs."""

        def forward(parameters: list[Array], inputs: _Inputs) -> tuple[list[Array], list[Array]]:
            known = bound(self.parameters, parameters) | self._known(inputs)
            crossing = self._crossing(inputs)
            parts, made = self._first.run(base | crossing | known)
            return self._reached(base, crossing, known, parts, made), parts

        return forward

    def _forward_with_sums(self, base: Env) -> Any:
        """The same, of the running sums of the parameters' gradients, which come back with the
        targets."""
        places = numbered(self.parameters)

        def forward(
            sums: list[Array], inputs: _Inputs
        ) -> tuple[tuple[list[Array], list[Array]], list[Array]]:
            known, crossing = self._known(inputs), self._crossing(inputs)
            env = base | crossing | known
            parts, made, sums = self._first.run_with_sums(env, sums, places)
            return (self._reached(base, crossing, known, parts, made), sums), parts

        return forward

    @property
    def _first(self) -> Stage:
        return self.reverse.staged.cuts.stages[self.level]

    def _known(self, inputs: _Inputs) -> Env:
        """What the first stage alone is differentiated by."""
        return bound(self.shared, inputs.shared) | bound(self.own, inputs.own)

    def _crossing(self, inputs: _Inputs) -> Env:
        """What every stage of the segment is differentiated by."""
        return bound([*self.live, *self.through], inputs.crossing)

    def _reached(
        self, base: Env, crossing: Env, known: Env, parts: list[Array], made: Env
    ) -> list[Array]:
        """The targets, from the results of the first stage: run the others of the segment."""
        staged, values = self.reverse.staged, {}
        for k in range(self.level, staged.end(self.level)):
            stage, env = staged.cuts.stages[k], base | crossing
            if k > self.level:
                parts, made = stage.run(env)
            else:
                env |= known
            env |= made
            crossing = crossing | made
            values |= {Part(i): x for i, x in zip(stage.parts, parts, strict=True)}
            values |= {Emitted(k, v): env[v] for v in stage.emits}
        values |= {End(v): (base | crossing)[v] for v in self.reverse.boundary}
        return [values[target.name] for target in self.targets]


def _with_cotangents(reverse: Reverse, level: int) -> list[Target]:
    """What a cotangent has arrived for, from stage `level` to the end of its segment."""
    staged = reverse.staged
    found: list[Target] = []
    for k in range(level, staged.end(level)):
        stage = staged.cuts.stages[k]
        for i in stage.parts:
            if i in reverse.seeds and staged.cuts.output(i) in reverse.sweep.moved:
                found.append(targets.of_output(staged.program, i, reverse.seeds[i]))
        for v in stage.emits:
            if (name := Emitted(k, v)) in reverse.emitted:
                found.append(Target(name, reverse.emitted[name], stacked=True))
    for v, x in reverse.boundary.items():
        found.append(Target(End(v), x, stacked=True))
    return found


def _split(xs: Sequence[Array], count: int) -> tuple[Sequence[Array], Sequence[Array]]:
    return xs[:count], xs[count:]
