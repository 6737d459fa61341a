"""Cut the program at its collectives: stages of one microbatch, and between them what all
microbatches share.

The level of a value is the number of collectives above it. All collectives whose operands have one
level are one cut, and stage l is what a microbatch computes between cut l and cut l + 1. A value is
one of

* given: of parameters alone; every stage that reads it computes it, as the plain loop does;
* shared: it follows from collectives and is the same for every microbatch; computed once;
* own: it differs between microbatches. An equation of own values stands in the last stage that its
  readers allow, so that little crosses a cut.

The outputs of the program belong to the stage of their level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._base.source_lines import Frame, frame_of
from jaxaccum._base.trees import dtype_of
from jaxaccum._base.types import Array
from jaxaccum._coupled.trace import is_collective
from jaxaccum._jaxpr import running_sums
from jaxaccum._jaxpr.equations import axes_of, with_invars

Env = dict[Any, Any]
"""Values by variable."""

_SAME_EVERYWHERE = {"psum", "pmax", "pmin", "all_gather"}
"""The collectives whose result is the same for every microbatch."""
_OVER_SEVERAL_AXES = _SAME_EVERYWHERE | {"reduce_scatter"}  # which users call psum_scatter


@dataclasses.dataclass(frozen=True)
class Fragment:
    """Some equations of the program, from the variables that they read to those that are wanted of
    them."""

    jaxpr: jex.Jaxpr

    @property
    def reads(self) -> list[Any]:
        """The variables that it takes from elsewhere."""
        return list(self.jaxpr.invars)

    @property
    def writes(self) -> list[Any]:
        """The variables, or literals, that it computes."""
        return list(self.jaxpr.outvars)

    def __call__(self, env: Env) -> list[Array]:
        """The values of `writes`."""
        return self._as_arrays(
            jax.core.eval_jaxpr(self.jaxpr, [], *(env[v] for v in self.jaxpr.invars))
        )

    def with_sums(
        self, env: Env, sums: list[Array], places: Mapping[Any, int]
    ) -> tuple[list[Array], list[Array]]:
        """The values of `writes`, and the running sums of the gradients of the variables at
        `places`."""
        reads = self.jaxpr.invars
        positions = {i: places[v] for i, v in enumerate(reads) if v in places}
        values, sums = running_sums.evaluate(self.jaxpr, [env[v] for v in reads], sums, positions)
        return self._as_arrays(values), sums

    def _as_arrays(self, values: Sequence[Any]) -> list[Any]:
        """JAX hands a constant output back as a Python scalar."""
        return [jnp.asarray(x, dtype_of(v.aval)) for v, x in zip(self.writes, values, strict=True)]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What lies between two cuts, and the cut that ends it."""

    shared: Fragment
    """What follows from the statistics known by now; run once, before the microbatches."""
    local: Fragment
    """One microbatch: first the outputs `parts`, then what later stages and cuts read of it."""
    cut: Fragment
    """The collectives: of operands stacked over microbatches, the statistics of the next stage."""
    parts: tuple[int, ...]
    """The outputs of the program that this stage computes."""
    emits: tuple[Any, ...]
    """The own values that the cut takes."""
    live: tuple[Any, ...]
    """The own values of earlier stages that this stage or a later one reads: the full-batch
    boundary, if stored."""

    def run(self, env: Env) -> tuple[list[Array], Env]:
        """The outputs of one microbatch, and the values that it hands on."""
        return self._divided(self.local(env))

    def run_with_sums(
        self, env: Env, sums: list[Array], places: Mapping[Any, int]
    ) -> tuple[list[Array], Env, list[Array]]:
        """The same, and the running sums of the gradients of the variables at `places`."""
        values, sums = self.local.with_sums(env, sums, places)
        return *self._divided(values), sums

    def _divided(self, values: list[Array]) -> tuple[list[Array], Env]:
        count = len(self.parts)
        return values[:count], dict(zip(self.local.writes[count:], values[count:], strict=True))


@dataclasses.dataclass(frozen=True)
class Cuts:
    """A program in stages."""

    jaxpr: jex.Jaxpr
    axis: tuple[str, int]
    stages: tuple[Stage, ...]
    own: frozenset[Any]
    stacked: frozenset[Any]
    """The results of collectives that differ between microbatches, as those of ``ppermute``."""

    @property
    def last(self) -> int:
        """The number of cuts, and the index of the last stage."""
        return len(self.stages) - 1

    def output(self, part: int) -> Any:
        """The variable of an output; None for a constant."""
        v = self.jaxpr.outvars[part]
        return None if isinstance(v, jex.Literal) else v

    @property
    def frames(self) -> tuple[tuple[Frame | None, ...], ...]:
        """The lines of the collectives of every cut."""
        found = [[frame_of(eqn) for eqn in stage.cut.jaxpr.eqns] for stage in self.stages[:-1]]
        return tuple(tuple(dict.fromkeys(frames)) for frames in found)


def cut(jaxpr: jex.Jaxpr, own: Collection[Any], axis: tuple[str, int]) -> Cuts:
    """The stages of an opened program, whose arguments `own` differ between microbatches."""
    graph = _Graph.of(jaxpr, own, axis[0])
    stages = tuple(graph.stage(level) for level in range(graph.num_stages))
    return Cuts(jaxpr, axis, stages, frozenset(graph.own), frozenset(graph.stacked))


@dataclasses.dataclass
class _Graph:
    """What every equation is, and in which stage it stands."""

    jaxpr: jex.Jaxpr
    axis_name: str
    own: set[Any]
    shared: set[Any] = dataclasses.field(default_factory=set)
    stacked: set[Any] = dataclasses.field(default_factory=set)
    levels: dict[Any, int] = dataclasses.field(default_factory=dict)
    given: dict[Any, int] = dataclasses.field(default_factory=dict)
    """The equation that computes a given variable."""
    stage_of: dict[Any, int] = dataclasses.field(default_factory=dict)
    """The stage in which an own variable is computed."""
    locals: list[list[int]] = dataclasses.field(default_factory=list)
    shareds: list[list[int]] = dataclasses.field(default_factory=list)
    cuts: list[list[int]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, jaxpr: jex.Jaxpr, own: Collection[Any], axis_name: str) -> _Graph:
        graph = cls(jaxpr, axis_name, set(own))
        kinds = [graph._classify(i, eqn) for i, eqn in enumerate(jaxpr.eqns)]
        for table in (graph.locals, graph.shareds, graph.cuts):
            table += [[] for _ in range(graph.num_stages)]
        for i, kind in enumerate(kinds):
            if kind == "cut":
                graph.cuts[graph._depth(jaxpr.eqns[i].invars)].append(i)
            elif kind == "shared":
                graph.shareds[graph._depth(jaxpr.eqns[i].outvars)].append(i)
        graph._place([i for i, kind in enumerate(kinds) if kind == "local"])
        return graph

    @property
    def num_stages(self) -> int:
        return 1 + max(self.levels.values(), default=0)

    def _depth(self, atoms: Iterable[Any]) -> int:
        return max((self.levels.get(v, 0) for v in _variables(atoms)), default=0)

    def _classify(self, i: int, eqn: jex.JaxprEqn) -> str:
        depth, differs = self._depth(eqn.invars), any(v in self.own for v in _variables(eqn.invars))
        kind = "local" if differs else "given"
        if is_collective(eqn, self.axis_name):
            if eqn.params.get("axis_index_groups") is not None:
                raise ValueError(
                    f"{eqn.primitive.name} over {self.axis_name!r} with axis_index_groups (at "
                    f"{frame_of(eqn)}): groups of microbatches are not supported; leave "
                    "axis_index_groups out."
                )
            if len(axes_of(eqn)) > 1 and eqn.primitive.name not in _OVER_SEVERAL_AXES:
                raise NotImplementedError(
                    f"{eqn.primitive.name} over {axes_of(eqn)} (at {frame_of(eqn)}): over several "
                    "axes at once only psum, pmax, pmin, all_gather and psum_scatter are divided "
                    "between microbatches; name one axis per call."
                )
            same = eqn.primitive.name in _SAME_EVERYWHERE
            kind = "cut" if differs or not same else "shared"
            depth += kind == "cut"
            (self.shared if same else self.stacked).update(eqn.outvars)
            self.own |= set() if same else set(eqn.outvars)
        elif differs:
            self.own.update(eqn.outvars)
        elif any(v in self.shared for v in _variables(eqn.invars)):
            kind = "shared"
            self.shared.update(eqn.outvars)
        else:
            self.given.update((v, i) for v in eqn.outvars)
        self.levels.update((v, depth) for v in eqn.outvars)
        return kind

    def _place(self, equations: list[int]) -> None:
        """Every own equation in the last stage that its readers allow; one that nothing reads, at
        its level."""
        latest: dict[Any, int] = {}

        def read(atoms: Iterable[Any], stage: int) -> None:
            for v in _variables(atoms):
                latest[v] = min(stage, latest.get(v, stage))

        for v in self.jaxpr.outvars:
            read([v], self._depth([v]))
        for level, cut in enumerate(self.cuts):
            for i in cut:
                read(self.jaxpr.eqns[i].invars, level)
        for i in reversed(equations):
            eqn = self.jaxpr.eqns[i]
            stage = min(
                (latest[v] for v in eqn.outvars if v in latest), default=self._depth(eqn.invars)
            )
            read(eqn.invars, stage)
            self.locals[stage].append(i)
            self.stage_of.update((v, stage) for v in eqn.outvars)
        for stage in self.locals:
            stage.reverse()

    # -- fragments

    def fragment(self, equations: Sequence[int], wanted: Sequence[Any]) -> Fragment:
        """The equations, and those of given values that they need, up to the wanted variables."""
        included, eqns = set(equations), self.jaxpr.eqns
        todo = [*wanted, *(v for i in equations for v in eqns[i].invars)]
        while todo:
            v = todo.pop()
            i = None if isinstance(v, jex.Literal) else self.given.get(v)
            if i is not None and i not in included:
                included.add(i)
                todo += eqns[i].invars
        chosen = [eqns[i] for i in sorted(included)]
        made = {v for eqn in chosen for v in eqn.outvars}
        reads = dict.fromkeys(
            v
            for v in _variables([*(v for eqn in chosen for v in eqn.invars), *wanted])
            if v not in made
        )
        jaxpr = self.jaxpr.replace(eqns=chosen, outvars=list(wanted))
        return Fragment(with_invars(jaxpr, list(reads)))

    def stage(self, level: int) -> Stage:
        eqns, made_here = (
            self.jaxpr.eqns,
            [v for i in self.locals[level] for v in self.jaxpr.eqns[i].outvars],
        )
        parts = tuple(i for i, v in enumerate(self.jaxpr.outvars) if self._depth([v]) == level)
        emits = dict.fromkeys(
            v for i in self.cuts[level] for v in _variables(eqns[i].invars) if v in self.own
        )
        later = {*self._read_from(level + 1), *emits}
        handed_on = [v for v in made_here if v in later]
        used = [
            v
            for i in self.shareds[level]
            for v in eqns[i].outvars
            if not isinstance(v, jex.DropVar)
        ]
        results = [
            v for i in self.cuts[level] for v in eqns[i].outvars if not isinstance(v, jex.DropVar)
        ]
        return Stage(
            shared=self.fragment(self.shareds[level], used),
            local=self.fragment(
                self.locals[level], [*(self.jaxpr.outvars[i] for i in parts), *handed_on]
            ),
            cut=self.fragment(self.cuts[level], results),
            parts=parts,
            emits=tuple(emits),
            live=tuple(v for v in self._read_from(level) if self.stage_of.get(v, level) < level),
        )

    def _read_from(self, level: int) -> dict[Any, None]:
        """The own variables that stages from `level` on read: their equations, their cuts and their
        outputs."""
        equations = [
            i for table in (self.locals, self.cuts) for stage in table[level:] for i in stage
        ]
        atoms = [v for i in equations for v in self.jaxpr.eqns[i].invars]
        atoms += [v for v in self.jaxpr.outvars if self._depth([v]) >= level]
        return dict.fromkeys(v for v in _variables(atoms) if v in self.own)


def _variables(atoms: Iterable[Any]) -> list[Any]:
    return [v for v in atoms if not isinstance(v, jex.Literal)]


def moved_by(
    jaxpr: jex.Jaxpr, sources: Collection[Any], is_inexact: Callable[[Any], bool]
) -> set[Any]:
    """The variables that have a derivative with respect to `sources`."""
    moved = set(sources)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "stop_gradient" and any(
            v in moved for v in _variables(eqn.invars)
        ):
            moved.update(v for v in eqn.outvars if is_inexact(v.aval))
    return moved
