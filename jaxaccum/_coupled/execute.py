"""Run the stages in order: microbatches until the next cut, its collectives, what follows from
them; and so on.

The problem. A stage reads own values of earlier stages, which exist for one microbatch at a time.
To store them all is to store the activations of the full batch.

The idea. A pass over the microbatches starts at the nearest stored boundary and computes again what
lies between, now that the statistics are known. So only statistics, which are small, and stored
boundaries ever exist for the full batch.

Example. Two cuts, as of two BatchNorms, and two microbatches. No boundary is stored:

    pass 1   stage 0 of 1, of 2          -> statistics 1
    pass 2   stages 0, 1 of 1, of 2      -> statistics 2
    pass 3   stages 0, 1, 2 of 1, of 2   -> the outputs

If the boundary at cut 1 is stored, pass 3 starts there, and runs the stages 1 and 2.

The cost. Without stored boundaries, n stages take n² / 2 of the stages' time; with all of them
stored, n. `schedule` chooses.

Known weakness. A value that is computed again is compiled in another context than the copy that
went into a collective, and can differ from it by a rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxaccum import _loop
from jaxaccum._base.entries import entries, part_of
from jaxaccum._base.trees import cast, is_inexact
from jaxaccum._base.types import Array, PyTree
from jaxaccum._coupled.collectives import resolve
from jaxaccum._coupled.cut import Cuts, Fragment, Stage
from jaxaccum._devices import varying
from jaxaccum._jaxpr.variables import Env, Type, Var, among, bound, not_among, read, variables
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.program import Program


class Visit(Protocol):
    """What a pass does at one microbatch."""

    def __call__(
        self, sums: Any, own: Env, index: Array, extra: Any, /
    ) -> tuple[list[Array], PyTree, Env]:
        """The outputs of microbatch `index`, the new sums, and what is written out. `own` are its
        arguments and its entries of what is stored, `extra` its entry of what the pass was
        given."""
        ...


@dataclasses.dataclass(frozen=True)
class StagedProgram:
    """A coupled program with its arguments, and what a pass over its microbatches needs."""

    program: Program
    arrays: list[Array]
    cuts: Cuts
    stored: frozenset[int]

    @property
    def given(self) -> Env:
        """The arguments that every microbatch reads whole."""
        arguments = self.cuts.jaxpr.invars[1:]
        values = bound(arguments, entries(self.arrays, self.program.sources(0)))
        return part_of(values, not_among(arguments, self.cuts.own))

    def start(self, level: int) -> int:
        """The stage at which a pass to stage `level` starts: that of the nearest boundary that is
        stored."""
        return max(c for c in (0, *self.stored) if c <= level)

    def end(self, level: int) -> int:
        """The end of the segment of stage `level`: the next stored boundary, or the end of the
        program."""
        return min((c for c in self.stored if c > level), default=len(self.cuts.stages))

    def own(self, rows: list[Array], index: Array) -> Env:
        """The arguments of one microbatch that are its own."""
        carry = entries(self.arrays, self.program.positions(Role.CARRY))
        inputs = self.program.inputs(0, self.arrays, rows=rows, carry=carry, index=index)
        arguments = self.cuts.jaxpr.invars
        values = bound(arguments, [index, *inputs])
        return part_of(values, among(arguments, self.cuts.own))

    def at(self, parts: Sequence[int]) -> Program:
        """The program of a pass that combines the given outputs alone."""
        program = self.program
        outputs = dataclasses.replace(
            program.outputs, parts=tuple(entries(program.outputs.parts, parts))
        )
        (trace,) = program.traces
        jaxpr = trace.jaxpr.replace(eqns=[], outvars=entries(self.cuts.jaxpr.outvars, parts))
        passed = dataclasses.replace(trace, jaxpr=jaxpr)
        return dataclasses.replace(program, outputs=outputs, traces=(passed,))


@dataclasses.dataclass
class Sweep:
    """What the stages leave behind, up to the one that has been reached."""

    staged: StagedProgram
    moved: Collection[Var]
    """The variables whose cotangents will be asked for."""
    shared: Env
    """The arguments, the statistics and what follows from them: the same for every microbatch."""
    checkpoint: bool
    """Whether JAX is to recompute the passes where it derives them."""
    parts: dict[int, Array] = dataclasses.field(default_factory=dict)
    stacked: Env = dataclasses.field(default_factory=dict)
    """The results of collectives that have an entry per microbatch."""
    boundaries: dict[int, Env] = dataclasses.field(default_factory=lambda: {0: {}})
    shared_pulls: dict[int, Pull] = dataclasses.field(default_factory=dict)
    """The derivative of each stage's shared fragment."""
    cut_pulls: dict[int, Pull] = dataclasses.field(default_factory=dict)
    """The derivative of each stage's cut."""

    @classmethod
    def begin(
        cls, staged: StagedProgram, moved: Collection[Var] = (), *, checkpoint: bool = False
    ) -> Sweep:
        """Before the first stage."""
        return cls(staged, moved, dict(staged.given), checkpoint)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of the program."""
        return self.staged.cuts.stages

    def enter(self, level: int) -> None:
        """Compute what follows, once, from the statistics of stage `level`."""
        if pull := self._once(self.stages[level].shared, {}):
            self.shared_pulls[level] = pull

    def leave(self, level: int) -> None:
        """Run the microbatches to the end of stage `level`, and its cut."""
        stage, start = self.stages[level], self.staged.start(level)
        held = self.boundaries[start]
        following = self.stages[level + 1].live if level + 1 in self.staged.stored else ()
        # What crosses both boundaries is stored once.
        crossing = not_among(following, held)

        def visit(
            sums: tuple[()], own: Env, index: Array, extra: None
        ) -> tuple[list[Array], tuple[()], Env]:
            del index, extra
            env, parts = self.shared | own, []
            for k in range(start, level + 1):
                parts, made = self.stages[k].run(env)
                env |= made
            return parts, sums, part_of(env, [*stage.emits, *crossing])

        _, written = self.over_microbatches(visit, parts=stage.parts, stored=held | self.stacked)
        if level + 1 in self.staged.stored:
            self.boundaries[level + 1] = part_of(held | written, following)
        if pull := self._once(stage.cut, part_of(written, stage.emits)):
            self.cut_pulls[level] = pull

    def over_microbatches(
        self,
        visit: Visit,
        *,
        parts: tuple[int, ...],
        stored: Env,
        extra: PyTree = None,
        sums: PyTree = (),
    ) -> tuple[Any, Env]:
        """One pass; returns the sums, and what was written, stacked. The outputs `parts` are
        combined by their tags. `stored` and `extra` have an entry per microbatch."""
        names: list[Var] = list(stored)
        written: list[Var] = []

        def step(
            g: int,
            sums: Any,
            rows: list[Array],
            carry: list[Array],
            index: Array,
            entry: tuple[list[Array], PyTree],
        ) -> tuple[list[Array], PyTree, list[Array]]:
            del g, carry
            own = self.staged.own(rows, index) | bound(names, entry[0])
            outputs, sums, out = visit(sums, own, index, entry[1])
            written[:] = out
            return outputs, sums, list(out.values())

        extras = [(list(stored.values()), extra)]
        program, arrays, again = self.staged.at(parts), self.staged.arrays, self.checkpoint
        scanned = _loop.scan(program, arrays, step, extra=extras, sums=sums, checkpoint=again)
        self.parts |= zip(parts, scanned.parts, strict=True)
        return scanned.sums, bound(written, scanned.written[0])

    def _once(self, fragment: Fragment, emitted: Env) -> Pull | None:
        """Compute what is common to all microbatches; returns its derivative."""
        if not fragment.writes:
            return None
        own, env = self.staged.cuts.own, self.shared | self.stacked | emitted
        stacked = self.staged.cuts.stacked.union(among(fragment.reads, own))
        moved = among(fragment.reads, self.moved)

        def run(inputs: list[Array]) -> list[Array]:
            known = env | bound(moved, inputs)
            return resolve(fragment, read(known, fragment.reads), self.staged.cuts.axis, stacked)

        outs, pull = jax.vjp(run, read(env, moved))
        written = variables(fragment.writes)
        for v, x in bound(written, outs).items():
            (self.stacked if v in own else self.shared)[v] = x
        return Pull(moved, bound(written, map(jax.typeof, outs)), pull)


@dataclasses.dataclass(frozen=True)
class Pull:
    """The derivative of a fragment, by variable."""

    reads: list[Var]
    writes: dict[Var, Type]
    """The types of what was written."""
    pull: Callable[[list[Any]], tuple[list[Array]]]

    def __call__(self, cotangents: Env) -> Env:
        """The cotangents of what was read, from those of what was written; nothing where none has
        arrived."""
        if not self.reads or cotangents.keys().isdisjoint(self.writes):
            return {}
        given = [_cotangent(cotangents.get(v), kind) for v, kind in self.writes.items()]
        return bound(self.reads, self.pull(given)[0])


def _cotangent(x: Array | None, kind: Type) -> Array | np.ndarray:
    """A cotangent of a value of the given type: `x`, or zero where nothing has arrived."""
    if not is_inexact(kind):
        return np.zeros(kind.shape, jax.dtypes.float0)
    return varying.zeros(kind) if x is None else cast(x, kind.dtype)
