"""Cut the program at its collectives: stages of one microbatch, and between them what all
microbatches share.

The problem. A mean over the batch, as in BatchNorm, needs all microbatches before any of them can
go on. A loop that runs one microbatch to its end cannot compute it.

The idea. The loop stops there. All microbatches run up to the collective, the collective is
computed, and all of them go on. The level of a value is the number of collectives above it. All
collectives whose operands have one level are one cut, and stage l is what a microbatch computes
between cut l and cut l + 1. A value is

* given, if it depends on parameters alone: every stage that reads it computes it, as the plain loop
  does;
* shared, if it follows from collectives and is the same for every microbatch: it is computed once;
* own, if it differs between microbatches. An equation of own values is in the last stage that its
  readers allow, so that little crosses a cut.

The outputs of the program belong to the stage of their level.

Example. The loss ``Σ (h - m)²`` of ``h = w x``, ``m = pmean(h)`` has one cut. Two microbatches:

    stage 0   h₁ = w x₁                      h₂ = w x₂
    cut 1     m = (h₁ + h₂) / 2
    stage 1   T₁ = Σ (h₁ - m)²               T₂ = Σ (h₂ - m)²

h is own, and stage 1 reads it: it crosses the cut. Either the h of all microbatches are stored, or
the pass to stage 1 computes h again (`schedule`).

The cost. One pass over the microbatches for each cut, and what crosses it or is computed again.

Known weakness. A collective inside a ``while`` or ``cond`` is not in the flat list of equations,
and the program is refused (`trace`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._base.entries import entries
from jaxaccum._base.source_lines import Frame, frame_of
from jaxaccum._base.trees import dtype_of
from jaxaccum._base.types import Array
from jaxaccum._coupled.trace import is_collective
from jaxaccum._jaxpr import running_sums
from jaxaccum._jaxpr.equations import axes_of, with_invars
from jaxaccum._jaxpr.same_everywhere import COLLECTIVES
from jaxaccum._jaxpr.variables import (
    Atom,
    Env,
    Var,
    among,
    bound,
    differentiable,
    operands_of,
    read,
    results_of,
    taken_by,
    variables,
)

_OVER_SEVERAL_AXES = (*COLLECTIVES, "reduce_scatter")  # which users call psum_scatter


@dataclasses.dataclass(frozen=True)
class Fragment:
    """Some equations of the program, from the variables that they read to those that are wanted of
    them."""

    jaxpr: jex.Jaxpr

    @property
    def reads(self) -> list[Var]:
        """The variables that it takes from elsewhere."""
        return list(self.jaxpr.invars)

    @property
    def writes(self) -> list[Atom]:
        """The variables, or literals, that it computes."""
        return list(self.jaxpr.outvars)

    def __call__(self, env: Env) -> list[Array]:
        """The values of `writes`."""
        return self._as_arrays(jax.core.eval_jaxpr(self.jaxpr, [], *read(env, self.reads)))

    def with_sums(
        self, env: Env, sums: list[Array], places: Mapping[Var, int]
    ) -> tuple[list[Array], list[Array]]:
        """The values of `writes`, and the running sums of the gradients of the variables at
        `places`."""
        positions = {i: places[v] for i, v in enumerate(self.reads) if v in places}
        values, sums = running_sums.evaluate(self.jaxpr, read(env, self.reads), sums, positions)
        return self._as_arrays(values), sums

    def _as_arrays(self, values: Sequence[Array]) -> list[Array]:
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
    emits: tuple[Var, ...]
    """The own values that the cut takes."""
    live: tuple[Var, ...]
    """The own values of earlier stages that this stage or a later one reads: the full-batch
    boundary, if stored."""

    def run(self, env: Env) -> tuple[list[Array], Env]:
        """The outputs of one microbatch, and the values that it hands on."""
        return self._divided(self.local(env))

    def run_with_sums(
        self, env: Env, sums: list[Array], places: Mapping[Var, int]
    ) -> tuple[list[Array], Env, list[Array]]:
        """The same, and the running sums of the gradients of the variables at `places`."""
        values, sums = self.local.with_sums(env, sums, places)
        return *self._divided(values), sums

    def _divided(self, values: list[Array]) -> tuple[list[Array], Env]:
        count = len(self.parts)
        return values[:count], bound(variables(self.local.writes[count:]), values[count:])


@dataclasses.dataclass(frozen=True)
class Cuts:
    """A program in stages."""

    jaxpr: jex.Jaxpr
    axis: tuple[str, int]
    stages: tuple[Stage, ...]
    own: frozenset[Var]
    stacked: frozenset[Var]
    """The results of collectives that differ between microbatches, as those of ``ppermute``."""

    @property
    def last(self) -> int:
        """The number of cuts, and the index of the last stage."""
        return len(self.stages) - 1

    def output(self, part: int) -> Var | None:
        """The variable of an output; None for a constant."""
        v = self.jaxpr.outvars[part]
        return None if isinstance(v, jex.Literal) else v

    @property
    def frames(self) -> tuple[tuple[Frame | None, ...], ...]:
        """The lines of the collectives of every cut."""
        found = []
        for stage in self.stages[:-1]:
            lines = map(frame_of, stage.cut.jaxpr.eqns)
            found.append(tuple(dict.fromkeys(lines)))
        return tuple(found)


def cut(jaxpr: jex.Jaxpr, own: Collection[Var], axis: tuple[str, int]) -> Cuts:
    """The stages of an opened program, whose arguments `own` differ between microbatches."""
    graph = _Graph.of(jaxpr, own, axis[0])
    stages = tuple(map(graph.stage, range(graph.num_stages)))
    return Cuts(jaxpr, axis, stages, frozenset(graph.own), frozenset(graph.stacked))


def moved_by(jaxpr: jex.Jaxpr, sources: Collection[Var]) -> set[Var]:
    """The variables that have a derivative with respect to `sources`."""
    moved = set(sources)
    for eqn in jaxpr.eqns:
        moves = not moved.isdisjoint(variables(eqn.invars))
        if moves and eqn.primitive.name != "stop_gradient":
            moved.update(differentiable(eqn.outvars))
    return moved


# -- what every equation is ------------------------------------------------------------------------

ByStage = dict[int, list[int]]
"""Equations, by their place in the program, of every stage."""


def _by_stage() -> ByStage:
    return collections.defaultdict(list)


@dataclasses.dataclass
class _Graph:
    """What every equation is, and which stage it belongs to."""

    jaxpr: jex.Jaxpr
    axis_name: str
    own: set[Var]
    shared: set[Var] = dataclasses.field(default_factory=set)
    stacked: set[Var] = dataclasses.field(default_factory=set)
    levels: dict[Var, int] = dataclasses.field(default_factory=dict)
    given: dict[Var, int] = dataclasses.field(default_factory=dict)
    """The equation that computes a given variable."""
    stage_of: dict[Var, int] = dataclasses.field(default_factory=dict)
    """The stage in which an own variable is computed."""
    locals: ByStage = dataclasses.field(default_factory=_by_stage)
    shareds: ByStage = dataclasses.field(default_factory=_by_stage)
    cuts: ByStage = dataclasses.field(default_factory=_by_stage)

    @classmethod
    def of(cls, jaxpr: jex.Jaxpr, own: Collection[Var], axis_name: str) -> _Graph:
        graph = cls(jaxpr, axis_name, set(own))
        local: list[int] = []
        for i, eqn in enumerate(jaxpr.eqns):
            if is_collective(eqn, axis_name):
                graph._add_collective(i, eqn)
            elif graph._differs(eqn):
                graph._set_level(eqn, graph._depth(eqn.invars))
                graph.own.update(eqn.outvars)
                local.append(i)
            else:
                graph._add_common(i, eqn)
        graph._place(local)
        return graph

    @property
    def num_stages(self) -> int:
        return 1 + max(self.levels.values(), default=0)

    def _depth(self, atoms: Iterable[Atom]) -> int:
        """The level of the deepest of some values."""
        return max((self.levels.get(v, 0) for v in variables(atoms)), default=0)

    def _set_level(self, eqn: jex.JaxprEqn, level: int) -> None:
        self.levels |= dict.fromkeys(eqn.outvars, level)

    def _differs(self, eqn: jex.JaxprEqn) -> bool:
        """Whether an operand differs between microbatches."""
        return not self.own.isdisjoint(variables(eqn.invars))

    def _add_collective(self, i: int, eqn: jex.JaxprEqn) -> None:
        """One more collective: a cut, unless all that it does is count microbatches."""
        _check_supported(eqn, self.axis_name)
        depth, same = self._depth(eqn.invars), eqn.primitive.name in COLLECTIVES
        is_cut = self._differs(eqn) or not same
        (self.cuts if is_cut else self.shareds)[depth].append(i)
        self._set_level(eqn, depth + is_cut)
        if same:
            self.shared.update(eqn.outvars)
        else:
            self.stacked.update(eqn.outvars)
            self.own.update(eqn.outvars)

    def _add_common(self, i: int, eqn: jex.JaxprEqn) -> None:
        """One more equation that is the same for every microbatch."""
        depth = self._depth(eqn.invars)
        self._set_level(eqn, depth)
        if self.shared.isdisjoint(variables(eqn.invars)):
            self.given |= dict.fromkeys(eqn.outvars, i)
        else:
            self.shared.update(eqn.outvars)
            self.shareds[depth].append(i)

    def _place(self, local: list[int]) -> None:
        """Every own equation in the last stage that its readers allow; one that nothing reads, at
        its level."""
        latest: dict[Var, int] = {}

        def read_in(atoms: Iterable[Atom], stage: int) -> None:
            for v in variables(atoms):
                latest[v] = min(stage, latest.get(v, stage))

        for v in self.jaxpr.outvars:
            read_in([v], self._depth([v]))
        for level in range(self.num_stages):
            read_in(operands_of(self._equations(self.cuts[level])), level)
        for i in reversed(local):
            eqn = self.jaxpr.eqns[i]
            readers = [latest[v] for v in eqn.outvars if v in latest]
            stage = min(readers, default=self._depth(eqn.invars))
            read_in(eqn.invars, stage)
            self.locals[stage].append(i)
            self.stage_of |= dict.fromkeys(eqn.outvars, stage)
        for equations in self.locals.values():
            equations.reverse()

    # -- fragments

    def _equations(self, places: Iterable[int]) -> list[jex.JaxprEqn]:
        return entries(self.jaxpr.eqns, places)

    def _fragment(self, equations: Sequence[int], wanted: Sequence[Atom]) -> Fragment:
        """The equations, and those of given values that they need, up to the wanted variables."""
        included = set(equations)
        todo = variables([*wanted, *operands_of(self._equations(equations))])
        while todo:
            i = self.given.get(todo.pop())
            if i is not None and i not in included:
                included.add(i)
                todo += variables(self.jaxpr.eqns[i].invars)
        chosen = self._equations(sorted(included))
        jaxpr = self.jaxpr.replace(eqns=chosen, outvars=list(wanted))
        return Fragment(with_invars(jaxpr, taken_by(chosen, wanted)))

    def stage(self, level: int) -> Stage:
        """One stage, once all equations have their places."""
        local, shared, cut = self.locals[level], self.shareds[level], self.cuts[level]
        outvars = self.jaxpr.outvars
        parts = [i for i, v in enumerate(outvars) if self._depth([v]) == level]
        emits = dict.fromkeys(self._own_among(operands_of(self._equations(cut))))
        read_later = {*self._read_from(level + 1), *emits}
        handed_on = among(results_of(self._equations(local)), read_later)
        earlier = [v for v in self._read_from(level) if self.stage_of.get(v, level) < level]
        return Stage(
            shared=self._fragment(shared, results_of(self._equations(shared))),
            local=self._fragment(local, [*entries(outvars, parts), *handed_on]),
            cut=self._fragment(cut, results_of(self._equations(cut))),
            parts=tuple(parts),
            emits=tuple(emits),
            live=tuple(earlier),
        )

    def _own_among(self, atoms: Iterable[Atom]) -> list[Var]:
        """Those that differ between microbatches."""
        return among(variables(atoms), self.own)

    def _read_from(self, level: int) -> dict[Var, None]:
        """The own variables that stages from `level` on read: their equations, their cuts and their
        outputs."""
        atoms: list[Atom] = []
        for table in (self.locals, self.cuts):
            for stage in range(level, self.num_stages):
                atoms += operands_of(self._equations(table[stage]))
        atoms += [v for v in self.jaxpr.outvars if self._depth([v]) >= level]
        return dict.fromkeys(self._own_among(atoms))


def _check_supported(eqn: jex.JaxprEqn, axis_name: str) -> None:
    if eqn.params.get("axis_index_groups") is not None:
        raise ValueError(
            f"{eqn.primitive.name} over {axis_name!r} with axis_index_groups (at "
            f"{frame_of(eqn)}): groups of microbatches are not supported; leave "
            "axis_index_groups out."
        )
    if len(axes_of(eqn)) > 1 and eqn.primitive.name not in _OVER_SEVERAL_AXES:
        raise NotImplementedError(
            f"{eqn.primitive.name} over {axes_of(eqn)} (at {frame_of(eqn)}): over several "
            "axes at once only psum, pmax, pmin, all_gather and psum_scatter are divided "
            "between microbatches; name one axis per call."
        )
