"""Coupled programs: a loss with collectives over the loop's axis, exact at one microbatch's memory.

`trace` opens the program, `cut` divides it into stages, `schedule` chooses which boundaries to store, `execute` runs
the stages and `gradient` differentiates them. `run` and `run_with_gradient` have the meaning that they have in
`_loop`, to which every program without a collective goes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jaxaccum import _loop
from jaxaccum._arguments import Role
from jaxaccum._coupled.cut import Cuts, cut, moved_by
from jaxaccum._coupled.execute import Call, Sweep
from jaxaccum._coupled.gradient import Reverse
from jaxaccum._coupled.schedule import stored
from jaxaccum._coupled.trace import opened
from jaxaccum._loop import Gradient, Result, Seeds
from jaxaccum._program import Program
from jaxaccum._tree import is_inexact
from jaxaccum._types import Array


def run(program: Program, arrays: Sequence[Array]) -> list[Array]:
    """The combined parts of the whole batch."""
    if not program.coupled:
        return _loop.run(program, arrays)
    cuts = _cuts(program)
    sweep = Sweep.begin(Call(program, list(arrays), cuts, stored(cuts, program.memory)))
    for level in range(len(cuts.stages)):
        sweep.enter(level)
        sweep.leave(level)
    return _in_order(sweep)


def run_with_gradient(program: Program, arrays: Sequence[Array], gradient: Gradient, seeds: Seeds) -> Result:
    """The combined parts, and the gradients of all microbatches for each set of cotangents."""
    if not program.coupled:
        return _loop.run_with_gradient(program, arrays, gradient, seeds)
    cuts = _cuts(program)
    summed = functools.partial(_summed, program, cuts, gradient)
    if not gradient.sums.in_place:
        return summed(list(arrays), seeds)
    return _loop.sealed(functools.partial(_in_place, program, cuts, gradient), summed)(list(arrays), seeds)


def _cuts(program: Program) -> Cuts:
    (trace,) = program.traces
    jaxpr = opened(trace)
    pairs = zip(jaxpr.invars[1:], program.sources(0), strict=True)
    own = [v for v, i in pairs if program.slots[i].role in (Role.ROWS, Role.KEY, Role.EXAMPLE_KEY)]
    return cut(jaxpr, [jaxpr.invars[0], *own], trace.axis)


def _summed(program: Program, cuts: Cuts, gradient: Gradient, arrays: list[Array], seeds: Seeds) -> Result:
    """The gradients as values: JAX differentiates it any number of times, in either mode."""
    sums = [[gradient.sums.zeros(arrays[i]) for i in _whole(program, gradient)] for _ in gradient.sets]
    parts, rows = _reversed(program, cuts, gradient, arrays, seeds, sums, in_place=False)
    return _result(program, gradient, parts, sums, rows)


def _in_place(program: Program, cuts: Cuts, gradient: Gradient, arrays: list[Array], seeds: Seeds) -> Result:
    """The gradients in references: every backward pass adds to them."""
    sums = [[gradient.sums.zeros(arrays[i]) for i in _whole(program, gradient)] for _ in gradient.sets]
    pairs = zip(program.outputs.parts, cuts.jaxpr.outvars, strict=True)
    parts = [_loop.whole_shape(program, part.reduction, v.aval) for part, v in pairs]
    rows = [[arrays[i] for i in _rows(program, gradient)] for _ in gradient.sets]
    fill = lambda refs: _reversed(program, cuts, gradient, arrays, seeds, refs, in_place=True)
    sums, (parts, rows) = _loop.in_references(sums, (parts, rows), fill, program.axes)
    return _result(program, gradient, parts, sums, rows)


def _reversed(
    program: Program, cuts: Cuts, gradient: Gradient, arrays: list[Array], seeds: Seeds, sums: Any, *, in_place: bool
) -> tuple[list[Array], list[list[Array]]]:
    """One sweep over the stages, and back for each set of cotangents, whose gradients are added to `sums`."""
    call = Call(program, arrays, cuts, stored(cuts, program.memory))
    wrt = call.variables(gradient.wrt)
    sweep = Sweep.begin(call, moved_by(cuts.jaxpr, wrt.values(), is_inexact))
    for level in range(cuts.last):
        sweep.enter(level)
        sweep.leave(level)
    sweep.enter(cuts.last)
    parameters = {wrt[i]: place for place, i in enumerate(_whole(program, gradient))}
    rows = []
    for parts, given, own in zip(gradient.sets, seeds, sums, strict=True):
        reverse = Reverse(call, sweep, parameters, own, in_place, dict(zip(parts, given, strict=True)))
        reverse.run()
        rows.append([reverse.rows(i, wrt[i]) for i in _rows(program, gradient)])
    return _in_order(sweep), rows


def _in_order(sweep: Sweep) -> list[Array]:
    return [sweep.parts[i] for i in range(len(sweep.parts))]


def _whole(program: Program, gradient: Gradient) -> list[int]:
    return [i for i in gradient.wrt if program.slots[i].role is Role.WHOLE]


def _rows(program: Program, gradient: Gradient) -> list[int]:
    return [i for i in gradient.wrt if program.slots[i].role is Role.ROWS]


def _result(program: Program, gradient: Gradient, parts: Any, sums: Any, rows: Any) -> Result:
    """Gradients in the order of `wrt`."""
    order = [*_whole(program, gradient), *_rows(program, gradient)]
    grads = [dict(zip(order, [*whole, *own], strict=True)) for whole, own in zip(sums, rows, strict=True)]
    return Result(parts, [[by_slot[i] for i in gradient.wrt] for by_slot in grads])
