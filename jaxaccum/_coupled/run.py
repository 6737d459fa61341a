"""A coupled program from its first stage to its gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

from jaxaccum._base.trees import cast, is_inexact
from jaxaccum._base.types import Array
from jaxaccum._coupled.cut import Cuts, cut, moved_by
from jaxaccum._coupled.execute import Call, Sweep
from jaxaccum._coupled.gradient import Reverse
from jaxaccum._coupled.schedule import Schedule, choose
from jaxaccum._coupled.trace import opened
from jaxaccum._loop import Gradient, Result
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.program import Program


def run(program: Program, arrays: Sequence[Array], *, checkpoint: bool = False) -> list[Array]:
    """The combined parts of the whole batch; with `checkpoint`, JAX may derive it and recomputes
    every pass."""
    cuts = _cuts(program)
    call = Call(program, list(arrays), cuts, choose(cuts, program.memory, ()).stored)
    sweep = Sweep.begin(call, checkpoint=checkpoint)
    for level in range(len(cuts.stages)):
        sweep.enter(level)
        sweep.leave(level)
    return _in_order(sweep)


def run_with_gradient(
    program: Program, arrays: Sequence[Array], gradient: Gradient, seeds: Sequence[Array]
) -> Result:
    """The combined parts, and the gradients of all microbatches, of one seed for each of the
    gradient's parts."""
    cuts = _cuts(program)
    plan = _Plan(
        program,
        cuts,
        gradient,
        choose(cuts, program.memory, _moved(program, cuts, gradient.wrt)).stored,
    )
    return _reversed(plan, list(arrays), list(seeds))


def schedule(program: Program, wrt: tuple[int, ...]) -> Schedule | None:
    """What the gradient with respect to the slots `wrt` stores and costs; None for a program that
    is not coupled."""
    if not program.coupled:
        return None
    cuts = _cuts(program)
    return choose(cuts, program.memory, _moved(program, cuts, wrt))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is to be differentiated, and how."""

    program: Program
    cuts: Cuts
    gradient: Gradient
    stored: frozenset[int]

    @property
    def whole(self) -> list[int]:
        """The differentiated slots whose gradients are summed over microbatches."""
        return [i for i in self._wrt(Role.WHOLE) if not self.program.slots[i].overwritten]

    @property
    def overwritten(self) -> list[int]:
        """The differentiated slots whose gradients combine by maximum."""
        return [i for i in self._wrt(Role.WHOLE) if self.program.slots[i].overwritten]

    @property
    def rows(self) -> list[int]:
        """The differentiated slots whose gradients are rows."""
        return self._wrt(Role.ROWS)

    def _wrt(self, role: Role) -> list[int]:
        return [i for i in self.gradient.wrt if self.program.slots[i].role is role]

    def dtype(self, parameter: Array) -> Any:
        """The dtype in which a gradient is combined."""
        return self.gradient.sums.dtype_for(parameter)

    def zeros(self, arrays: list[Array]) -> list[Array]:
        """The sums of `whole` before the first microbatch."""
        return [self.gradient.sums.zeros(arrays[i]) for i in self.whole]


def _moved(program: Program, cuts: Cuts, wrt: Sequence[int]) -> set[Any]:
    """The variables that have a derivative with respect to the slots `wrt`."""
    return moved_by(cuts.jaxpr, [v for v, i in _pairs(program, cuts.jaxpr) if i in wrt], is_inexact)


def _pairs(program: Program, jaxpr: jex.Jaxpr) -> list[tuple[Any, int]]:
    """The arguments of a microbatch, and the slot of each."""
    return list(zip(jaxpr.invars[1:], program.sources(0), strict=True))


def _cuts(program: Program) -> Cuts:
    (trace,) = program.traces
    jaxpr = opened(trace)
    own = [
        v
        for v, i in _pairs(program, jaxpr)
        if program.slots[i].role in (Role.ROWS, Role.KEY, Role.EXAMPLE_KEY)
    ]
    cuts = cut(jaxpr, [jaxpr.invars[0], *own], trace.axis)
    for i, part in enumerate(program.outputs.parts):
        if part.once and cuts.output(i) in cuts.own:
            raise ValueError(
                f"{part.name} differs between microbatches, and a coupled loss updates a carried "
                "state once, as the full batch would. Compute it from collectives, as lax.pmean(…, "
                f"{trace.axis[0]!r}), or return it as Stack, Mean or Last. What is drawn from a "
                "key of the microbatch's own (KEY, EXAMPLE_KEY, a model's random stream) differs "
                "too."
            )
    return cuts


def _reversed(plan: _Plan, arrays: list[Array], seeds: list[Array]) -> Result:
    """One sweep over the stages, and back; gradients in the order of `wrt`."""
    call = Call(plan.program, arrays, plan.cuts, plan.stored)
    variables = {i: v for v, i in _pairs(plan.program, plan.cuts.jaxpr)}
    sweep = Sweep.begin(call, _moved(plan.program, plan.cuts, plan.gradient.wrt))
    for level in range(plan.cuts.last):
        sweep.enter(level)
        sweep.leave(level)
    sweep.enter(plan.cuts.last)
    parameters = {variables[i]: place for place, i in enumerate(plan.whole)}
    given = dict(zip(plan.gradient.parts, seeds, strict=True))
    overwritten = frozenset(variables[i] for i in plan.overwritten)
    reverse = Reverse(
        call, sweep, parameters, plan.zeros(arrays), overwritten, plan.gradient.sums.in_place, given
    )
    reverse.run()
    grads = dict(zip(plan.whole, reverse.sums, strict=True))
    grads |= {
        i: cast(reverse.maximum(i, variables[i]), plan.dtype(arrays[i])) for i in plan.overwritten
    }
    grads |= {i: reverse.rows(i, variables[i]) for i in plan.rows}
    return Result(_in_order(sweep), [grads[i] for i in plan.gradient.wrt])


def _in_order(sweep: Sweep) -> list[Array]:
    return [sweep.parts[i] for i in range(len(sweep.parts))]
