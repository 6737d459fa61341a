"""A coupled program from its first stage to its gradients."""

from __future__ import annotations

from collections.abc import Sequence

import jax.extend.core as jex

from jaxaccum._base.entries import entries
from jaxaccum._base.trees import cast
from jaxaccum._base.types import Array
from jaxaccum._coupled.cut import Cuts, cut, moved_by
from jaxaccum._coupled.execute import StagedProgram, Sweep
from jaxaccum._coupled.gradient import Reverse
from jaxaccum._coupled.schedule import Schedule, choose
from jaxaccum._coupled.schedule import schedule as described
from jaxaccum._coupled.trace import opened
from jaxaccum._jaxpr.variables import Var, numbered
from jaxaccum._loop import Gradient, Result
from jaxaccum._loop.differentiated import differentiated, moved_arguments
from jaxaccum._program.program import Program


def run(program: Program, arrays: Sequence[Array], *, checkpoint: bool = False) -> list[Array]:
    """The combined parts of the whole batch; with `checkpoint`, JAX may derive it and recomputes
    every pass."""
    cuts = _cuts(program)
    staged = StagedProgram(program, list(arrays), cuts, choose(cuts, program.memory, ()))
    sweep = Sweep.begin(staged, checkpoint=checkpoint)
    for level in range(len(cuts.stages)):
        sweep.enter(level)
        sweep.leave(level)
    return _in_order(sweep)


def run_with_gradient(
    program: Program, arrays: Sequence[Array], gradient: Gradient, seeds: Sequence[Array]
) -> Result:
    """The combined parts, and the gradients of all microbatches, of one seed for each of the
    gradient's parts."""
    (trace,) = program.traces
    if trace.has_other_derivative(moved_arguments(program, 0, gradient.wrt)):
        raise trace.refusal()
    cuts = _cuts(program)
    moved = _moved(program, cuts, gradient.wrt)
    staged = StagedProgram(program, list(arrays), cuts, choose(cuts, program.memory, moved))
    sweep = Sweep.begin(staged, moved)
    for level in range(cuts.last):
        sweep.enter(level)
        sweep.leave(level)
    sweep.enter(cuts.last)
    return _reversed(sweep, gradient, seeds)


def schedule(program: Program, wrt: tuple[int, ...]) -> Schedule | None:
    """What the gradient with respect to the slots `wrt` stores and costs; None for a program that
    is not coupled."""
    if not program.coupled:
        return None
    cuts = _cuts(program)
    return described(cuts, program.memory, _moved(program, cuts, wrt))


def _moved(program: Program, cuts: Cuts, wrt: Sequence[int]) -> set[Var]:
    """The variables that have a derivative with respect to the slots `wrt`."""
    return moved_by(cuts.jaxpr, [v for v, i in _slots(program, cuts.jaxpr).items() if i in wrt])


def _slots(program: Program, jaxpr: jex.Jaxpr) -> dict[Var, int]:
    """The arguments of a microbatch, and the slot of each."""
    return dict(zip(jaxpr.invars[1:], program.sources(0), strict=True))


def _cuts(program: Program) -> Cuts:
    (trace,) = program.traces
    jaxpr = opened(trace)
    own = []
    for v, i in _slots(program, jaxpr).items():
        if not program.slots[i].is_same(coupled=True):
            own.append(v)
    cuts = cut(jaxpr, [jaxpr.invars[0], *own], trace.axis)
    for i, part in enumerate(program.outputs.parts):
        if part.once and cuts.output(i) in cuts.own:
            raise ValueError(
                f"{part.name} differs between microbatches, and a coupled loss updates a carried "
                "state once, as the full batch would. Compute it from collectives, as lax.pmean(…, "
                f"{trace.axis[0]!r}), or return it as Stack, Mean or Last. What is drawn from a "
                "key of the microbatch's own (KEY, EXAMPLE_KEY, BATCH_KEY, a model's random "
                "stream) differs too."
            )
    return cuts


def _reversed(sweep: Sweep, gradient: Gradient, seeds: Sequence[Array]) -> Result:
    """Back over the stages of a finished sweep; gradients in the order of `wrt`."""
    staged, sums = sweep.staged, gradient.accumulator
    program, arrays = staged.program, staged.arrays
    slots = differentiated(program, gradient.wrt)
    variable = {i: v for v, i in _slots(program, staged.cuts.jaxpr).items()}
    reverse = Reverse(
        staged,
        sweep,
        parameters=numbered(entries(variable, slots.summed)),
        sums=list(map(sums.zeros, entries(arrays, slots.summed))),
        overwritten=frozenset(entries(variable, slots.overwritten)),
        in_place=sums.in_place,
        seeds=dict(zip(gradient.parts, seeds, strict=True)),
    )
    reverse.run()
    grads = dict(zip(slots.summed, reverse.sums, strict=True))
    for i in slots.overwritten:
        grads[i] = cast(reverse.maximum(i, variable[i]), sums.dtype_for(arrays[i]))
    for i in slots.rows:
        grads[i] = reverse.rows(i, variable[i])
    return Result(_in_order(sweep), entries(grads, gradient.wrt))


def _in_order(sweep: Sweep) -> list[Array]:
    """The outputs of the whole batch, in the order of the program's."""
    return entries(sweep.parts, range(len(sweep.parts)))
