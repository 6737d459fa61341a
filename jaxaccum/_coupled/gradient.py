"""Differentiate the stages in reverse: the cotangents of what each reads, once those of what it
emits are known.

The statistics s of a cut depend on every microbatch, and every microbatch on s. In the order of the
stages that system is triangular: when stage l is reached, the cotangents of the statistics behind
it are complete, hence, through the adjoint of the cut, those of all that stage l emits. One pass
over the microbatches then gives the cotangents of the parameters, statistics and rows that stage l
itself reads; back-propagating from the end of its segment, the nearest stored boundary behind it,
whose cotangent is known. A boundary is overwritten by its cotangent.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.trees import cast, widen
from jaxaccum._base.types import Array
from jaxaccum._coupled.cut import Env, Stage
from jaxaccum._coupled.execute import Call, Sweep
from jaxaccum._devices import varying
from jaxaccum._loop.maxima import lowest
from jaxaccum._program.reductions import Reduction


@dataclasses.dataclass
class Reverse:
    """The cotangents that have arrived so far; those of parameters are added to `sums`."""

    call: Call
    sweep: Sweep
    parameters: dict[Any, int]
    """The differentiated arguments that every microbatch reads whole: variable, and place in
    `sums`."""
    sums: list[Array]
    """The gradients of `parameters`."""
    overwritten: frozenset[Any]
    """The differentiated arguments whose gradients combine by maximum. They arrive in `shared`."""
    in_place: bool
    """Whether the backward pass adds to the sums itself (`_running_sums`)."""
    seeds: dict[int, Array]
    """The cotangents of outputs."""
    shared: Env = dataclasses.field(default_factory=dict)
    """Of statistics and what follows from them, one for all microbatches; at least in float32."""
    stacked: Env = dataclasses.field(default_factory=dict)
    """Of rows, and of collectives' results that have an entry per microbatch."""
    emitted: Env = dataclasses.field(default_factory=dict)
    """Of what a cut takes, by cut and variable."""
    boundary: Env = dataclasses.field(default_factory=dict)
    """Of the boundary at the end of the segment."""

    def run(self) -> None:
        """From the last stage to the first."""
        cuts = self.call.cuts
        for level in reversed(range(len(cuts.stages))):
            if level < cuts.last:
                for v, x in self._pulled("cut", level).items():
                    if v in cuts.own:
                        self.emitted[level, v] = x
                    else:
                        self._add(v, x)
            self._microbatches(level)
            for v, x in self._pulled("shared", level).items():
                self._add(v, x)

    def rows(self, slot: int, v: Any) -> Array:
        """The gradient of a differentiated argument that holds rows, in the batch's order."""
        x, axis = self.call.arrays[slot], self.call.program.slots[slot].axis
        return (
            self.call.program.partition.merge_rows([self.stacked[v]], axis)
            if v in self.stacked
            else jnp.zeros_like(x)
        )

    def maximum(self, slot: int, v: Any) -> Array:
        """The maximum that is the gradient of a differentiated argument; 0 where nothing reads
        it."""
        return self.shared[v] if v in self.shared else jnp.zeros_like(self.call.arrays[slot])

    def _pulled(self, kind: str, level: int) -> Env:
        pull = self.sweep.pulls.get((kind, level))
        return pull(self.shared | self.stacked) if pull else {}

    def _add(self, v: Any, x: Array) -> None:
        """Add a cotangent that was computed once, outside of the passes."""
        if v in self.parameters:
            place = self.parameters[v]
            self.sums[place] += cast(x, self.sums[place].dtype)
        else:
            table = self.stacked if v in self.call.cuts.own else self.shared
            x = x if v in self.call.cuts.own else cast(x, widen(x.dtype))
            table[v] = self.combined(v, table[v], x) if v in table else x

    def combined(self, v: Any, old: Array, new: Array) -> Array:
        """Two shares of the cotangent of a variable."""
        new = cast(new, old.dtype)
        return jnp.maximum(old, new) if v in self.overwritten else old + new

    def _before(self, v: Any) -> Array:
        """The share of no microbatch."""
        dtype, value = widen(v.aval.dtype), self.sweep.shared[v]
        return lowest(value, dtype) if v in self.overwritten else jnp.zeros_like(value, dtype)

    def _microbatches(self, level: int) -> None:
        """The pass over microbatches that completes the cotangents of what stage `level` reads."""
        cuts, is_last = self.call.cuts, level == self.call.cuts.last
        step = _Step.of(self, level)
        if not step.targets and not is_last:
            self.boundary = {} if step.starts else self.boundary
            return
        buffers = [self.sweep.boundaries[level][v] for v in step.live]
        added = [self.sums[self.parameters[v]] for v in step.parameters]
        sums = (added, [self._before(v) for v in step.shared], buffers)
        boundary = {
            v: x for v, x in self.sweep.boundaries[step.start].items() if v not in step.live
        }
        (added, shared, buffers), written = self.sweep.over_microbatches(
            step.visit,
            parts=cuts.stages[level].parts if is_last else (),
            extra=boundary | self.sweep.stacked | step.cotangents,
            sums=sums,
        )
        for v, x in zip(step.parameters, added, strict=True):
            self.sums[self.parameters[v]] = x
        for v, x in zip(step.shared, shared, strict=True):
            self._add(v, x)
        for v in step.own:
            self._add(v, written[v])
        if step.starts:
            self.boundary = dict(zip(step.live, buffers, strict=True)) | {
                v: written[v] for v in step.through
            }
            self.emitted = {}


@dataclasses.dataclass(frozen=True)
class _Step:
    """One microbatch, from stage `level` to the end of its segment and back."""

    reverse: Reverse
    level: int
    parameters: list[Any]
    shared: list[Any]
    own: list[Any]
    """What stage `level` reads of rows and of collectives' stacked results."""
    live: list[Any]
    """The stored boundary at its entry, where the segment starts with it: overwritten by its
    cotangent."""
    through: list[Any]
    """What crosses that boundary and an earlier one, for which it is still needed."""
    targets: list[Any]
    """What a cotangent has arrived for: ``("part", i)``, ``("emit", cut, v)`` or ``("end", v)``."""

    @classmethod
    def of(cls, reverse: Reverse, level: int) -> _Step:
        call, sweep = reverse.call, reverse.sweep
        stages, own = call.cuts.stages, call.cuts.own
        reads = [
            v
            for v in dict.fromkeys([*stages[level].local.reads, *stages[level].emits])
            if v in sweep.moved
        ]
        outside = {*call.cuts.jaxpr.invars, *call.cuts.stacked}
        starts = level > 0 and level == call.start(level)
        live = [v for v in stages[level].live if v in sweep.moved] if starts else []
        earlier = sweep.boundaries[call.start(level - 1)] if starts else {}
        targets: list[Any] = []
        for k in range(level, call.end(level)):
            targets += [
                ("part", i)
                for i in stages[k].parts
                if i in reverse.seeds and call.cuts.output(i) in sweep.moved
            ]
            targets += [("emit", k, v) for v in stages[k].emits if (k, v) in reverse.emitted]
        targets += [("end", v) for v in reverse.boundary]
        return cls(
            reverse, level,
            parameters=[v for v in reads if v in reverse.parameters],
            shared=[v for v in reads if v not in own and v not in reverse.parameters],
            own=[v for v in reads if v in own and v in outside],
            live=[v for v in live if v not in earlier],
            through=[v for v in live if v in earlier],
            targets=targets,
        )  # fmt: skip

    @property
    def start(self) -> int:
        return self.reverse.call.start(self.level)

    @property
    def starts(self) -> bool:
        """Whether its segment starts with it."""
        return self.start == self.level

    @property
    def cotangents(self) -> Env:
        """The cotangents that have an entry per microbatch, by target."""
        tables = {"emit": self.reverse.emitted, "end": self.reverse.boundary}
        found = {
            t: tables[t[0]][t[1:] if t[0] == "emit" else t[1]]
            for t in self.targets
            if t[0] in tables
        }
        program = self.reverse.call.program
        for target in self.targets:
            if target[0] == "part" and program.outputs.parts[target[1]].reduction.stacked:
                seed = self.reverse.seeds[target[1]]
                concat = program.outputs.parts[target[1]].reduction is Reduction.CONCAT
                found[target] = program.partition.split_rows(seed, 0)[0] if concat else seed
        return found

    def visit(self, sums: Any, own: Env, index: Array) -> tuple[list[Array], Any, Env]:
        """Add to the sums what one microbatch contributes."""
        added, shared, buffers = sums
        base = self.reverse.sweep.shared | own
        base |= {
            v: lax.dynamic_index_in_dim(x, index, keepdims=False)
            for v, x in zip(self.live, buffers, strict=True)
        }
        for k in range(self.start, self.level):
            base |= self.reverse.call.cuts.stages[k].run(base)[1]
        inputs = [
            [base[v] for v in names]
            for names in (self.shared, self.own, [*self.live, *self.through])
        ]
        if self.reverse.in_place:
            unread = [varying.zeros(jax.typeof(x)) for x in added]
            (outs, _), pull, parts = jax.vjp(
                self._forward_with_sums(base), unread, *inputs, has_aux=True
            )
            added, of_shared, of_own, of_live = pull((self._cotangents(outs, own), added))
        else:
            parameters = [base[v] for v in self.parameters]
            outs, pull, parts = jax.vjp(self._forward(base), parameters, *inputs, has_aux=True)
            grads, of_shared, of_own, of_live = pull(self._cotangents(outs, own))
            added = [old + cast(x, old.dtype) for old, x in zip(added, grads, strict=True)]
        triples = zip(self.shared, shared, of_shared, strict=True)
        shared = [self.reverse.combined(v, old, new) for v, old, new in triples]
        buffers = [
            lax.dynamic_update_index_in_dim(x, new, index, 0)
            for x, new in zip(buffers, of_live, strict=False)
        ]
        if self.level < self.reverse.call.cuts.last:
            parts = []
        of_through = of_live[len(self.live) :]
        written = dict(zip([*self.own, *self.through], [*of_own, *of_through], strict=True))
        return parts, (added, shared, buffers), written

    def _forward(self, base: Env) -> Any:
        """The targets of one microbatch, as a function of what its first stage reads; and that
        stage's outputs."""

        def forward(
            parameters: list[Array], shared: list[Array], own: list[Array], live: list[Array]
        ) -> Any:
            read = dict(zip(self.parameters, parameters, strict=True))
            read |= dict(zip([*self.shared, *self.own], [*shared, *own], strict=True))
            carried = dict(zip([*self.live, *self.through], live, strict=True))
            return self._targets(base, carried, lambda env: self._first.run(env | read), read)

        return forward

    def _forward_with_sums(self, base: Env) -> Any:
        """The same, of the running sums of the parameters' gradients, which come back with the
        targets."""
        places = {v: place for place, v in enumerate(self.parameters)}

        def forward(
            sums: list[Array], shared: list[Array], own: list[Array], live: list[Array]
        ) -> Any:
            read = dict(zip([*self.shared, *self.own], [*shared, *own], strict=True))
            carried = dict(zip([*self.live, *self.through], live, strict=True))
            after = list(sums)

            def first(env: Env) -> tuple[list[Array], Env]:
                parts, made, after[:] = self._first.run_with_sums(env | read, sums, places)
                return parts, made

            targets, parts = self._targets(base, carried, first, read)
            return (targets, after), parts

        return forward

    @property
    def _first(self) -> Stage:
        return self.reverse.call.cuts.stages[self.level]

    def _targets(
        self, base: Env, carried: Env, run_first: Any, read: Env
    ) -> tuple[list[Array], list[Array]]:
        """Run the stages of the segment; the targets, and the outputs of the first stage."""
        call, values, outputs = self.reverse.call, {}, []
        for k in range(self.level, call.end(self.level)):
            stage, env = call.cuts.stages[k], base | carried
            parts, made = run_first(env) if k == self.level else stage.run(env)
            outputs = parts if k == self.level else outputs
            env |= (read if k == self.level else {}) | made
            carried |= made
            values |= {("part", i): x for i, x in zip(stage.parts, parts, strict=True)}
            values |= {("emit", k, v): env[v] for v in stage.emits}
        values |= {("end", v): (base | carried)[v] for v in self.reverse.boundary}
        return [values[t] for t in self.targets], outputs

    def _cotangents(self, outs: list[Array], own: Env) -> list[Array]:
        return [self._cotangent(t, x, own) for t, x in zip(self.targets, outs, strict=True)]

    def _cotangent(self, target: Any, x: Array, own: Env) -> Array:
        given = own[target] if target in own else self.reverse.seeds[target[1]]
        return cast(given, x.dtype)
