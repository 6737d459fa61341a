"""Run the stages in order: microbatches until the next cut, its collectives, what follows from
them; and so on.

A pass over the microbatches starts at the nearest stored boundary and computes again what lies
between, now that the statistics are known. So only statistics, which are small, and stored
boundaries ever exist for the full batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from jaxaccum import _loop
from jaxaccum._base.trees import cast, is_inexact
from jaxaccum._base.types import Array
from jaxaccum._coupled.collectives import resolve
from jaxaccum._coupled.cut import Cuts, Env, Fragment
from jaxaccum._devices import varying
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.program import Program

Visit = Callable[[Any, Env, Array], tuple[list[Array], Any, Env]]


@dataclasses.dataclass(frozen=True)
class Call:
    """A coupled program with its arguments, and what a pass over its microbatches needs."""

    program: Program
    arrays: list[Array]
    cuts: Cuts
    stored: frozenset[int]

    @property
    def given(self) -> Env:
        """The arguments that every microbatch reads whole."""
        pairs = zip(self.cuts.jaxpr.invars[1:], self.program.sources(0), strict=True)
        return {v: self.arrays[i] for v, i in pairs if v not in self.cuts.own}

    def start(self, level: int) -> int:
        """The stage at which a pass to stage `level` starts: that of the nearest boundary that is
        stored."""
        return max(c for c in (0, *self.stored) if c <= level)

    def own(self, rows: Sequence[Array], index: Array) -> Env:
        """The arguments of one microbatch that are its own."""
        carry = [self.arrays[i] for i in self.program.positions(Role.CARRY)]
        values = self.program.inputs(0, self.arrays, rows=rows, carry=carry, index=index)
        pairs = zip(self.cuts.jaxpr.invars, [index, *values], strict=True)
        return {v: x for v, x in pairs if v in self.cuts.own}

    def end(self, level: int) -> int:
        """The end of the segment of stage `level`: the next stored boundary, or the end of the
        program."""
        return min((c for c in self.stored if c > level), default=len(self.cuts.stages))

    def at(self, parts: Sequence[int]) -> Program:
        """The program of a pass that combines the given outputs alone."""
        outputs = dataclasses.replace(
            self.program.outputs, parts=tuple(self.program.outputs.parts[i] for i in parts)
        )
        (trace,) = self.program.traces
        jaxpr = trace.jaxpr.replace(eqns=[], outvars=[self.cuts.jaxpr.outvars[i] for i in parts])
        return dataclasses.replace(
            self.program, outputs=outputs, traces=(dataclasses.replace(trace, jaxpr=jaxpr),)
        )


@dataclasses.dataclass
class Sweep:
    """What the stages leave behind, up to the one that has been reached."""

    call: Call
    moved: Collection[Any]
    """The variables whose cotangents will be asked for."""
    parts: dict[int, Array]
    shared: Env
    """The arguments, the statistics and what follows from them: the same for every microbatch."""
    stacked: Env
    """The results of collectives that have an entry per microbatch."""
    boundaries: dict[int, Env]
    pulls: dict[tuple[str, int], Pull]
    """The derivative of each stage's shared fragment and of its cut."""
    checkpoint: bool
    """Whether JAX is to recompute the passes where it derives them."""

    @classmethod
    def begin(cls, call: Call, moved: Collection[Any] = (), *, checkpoint: bool = False) -> Sweep:
        """Before the first stage."""
        return cls(call, moved, {}, dict(call.given), {}, {0: {}}, {}, checkpoint)

    def enter(self, level: int) -> None:
        """Compute what follows, once, from the statistics of stage `level`."""
        self._once("shared", level, self.call.cuts.stages[level].shared, {})

    def leave(self, level: int) -> None:
        """Run the microbatches to the end of stage `level`, and its cut."""
        stage, keep = self.call.cuts.stages[level], level + 1 in self.call.stored
        start = self.call.start(level)
        held = self.boundaries[start]  # what crosses both boundaries is stored once
        crossing = (
            [v for v in self.call.cuts.stages[level + 1].live if v not in held] if keep else []
        )
        wanted = [*stage.emits, *crossing]

        def visit(sums: Any, own: Env, index: Array) -> tuple[list[Array], Any, Env]:
            env, parts = self.shared | own, []
            for k in range(start, level + 1):
                parts, values = self.call.cuts.stages[k].run(env)
                env |= values
            return parts, sums, {v: env[v] for v in dict.fromkeys(wanted)}

        _, written = self.over_microbatches(visit, parts=stage.parts, extra=held | self.stacked)
        if keep:
            known = held | written
            self.boundaries[level + 1] = {
                v: known[v] for v in self.call.cuts.stages[level + 1].live
            }
        self._once("cut", level, stage.cut, {v: written[v] for v in stage.emits})

    def over_microbatches(
        self, visit: Visit, *, parts: tuple[int, ...], extra: Env, sums: Any = ()
    ) -> tuple[Any, Env]:
        """One pass; returns the sums, and what was written, stacked. The outputs `parts` are
        combined by their tags.

        `visit` takes the sums, a microbatch's own values, `extra` among them, and its index; it
        returns the outputs, the new sums, and what it writes.
        """
        names, written = list(extra), []

        def step(
            g: int, sums: Any, rows: Any, carry: Any, index: Array, cut: list[Array]
        ) -> tuple[Any, Any, Any]:
            own = self.call.own(rows, index) | dict(zip(names, cut, strict=True))
            outputs, sums, out = visit(sums, own, index)
            written[:] = out
            return outputs, sums, list(out.values())

        extras = [[extra[v] for v in names]]
        program, arrays, again = self.call.at(parts), self.call.arrays, self.checkpoint
        scanned = _loop.scan(program, arrays, step, extra=extras, sums=sums, checkpoint=again)
        self.parts |= zip(parts, scanned.parts, strict=True)
        return scanned.sums, dict(zip(written, scanned.written[0], strict=True))

    def _once(self, kind: str, level: int, fragment: Fragment, emitted: Env) -> None:
        if not fragment.writes:
            return
        env = self.shared | self.stacked | emitted
        stacked = {v for v in fragment.reads if v in self.call.cuts.own} | self.call.cuts.stacked
        moved = [v for v in fragment.reads if v in self.moved]

        def run(inputs: list[Array]) -> list[Array]:
            known = env | dict(zip(moved, inputs, strict=True))
            return resolve(
                fragment, [known[v] for v in fragment.reads], self.call.cuts.axis, stacked
            )

        outs, pull = jax.vjp(run, [env[v] for v in moved])
        for v, x in zip(fragment.writes, outs, strict=True):
            (self.stacked if v in self.call.cuts.own else self.shared)[v] = x
        self.pulls[kind, level] = Pull(
            moved, dict(zip(fragment.writes, map(jax.typeof, outs), strict=True)), pull
        )


@dataclasses.dataclass(frozen=True)
class Pull:
    """The derivative of a fragment, by variable."""

    reads: list[Any]
    writes: dict[Any, Any]
    """The types of what was written."""
    pull: Any

    def __call__(self, cotangents: Env) -> Env:
        """The cotangents of what was read, from those of what was written; nothing where none has
        arrived."""
        if not self.reads or not any(v in cotangents for v in self.writes):
            return {}
        given = [cotangent(cotangents.get(v), kind) for v, kind in self.writes.items()]
        return dict(zip(self.reads, self.pull(given)[0], strict=True))


def cotangent(x: Array | None, kind: Any) -> Any:
    """A cotangent of a value of the given type: `x`, or zero where nothing has arrived."""
    if not is_inexact(kind):
        return np.zeros(kind.shape, jax.dtypes.float0)
    return varying.zeros(kind) if x is None else cast(x, kind.dtype)
