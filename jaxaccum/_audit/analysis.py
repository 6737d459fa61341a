"""The audit from end to end: read the arguments, trace twice, walk both programs, judge every output."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxaccum._arguments import Role
from jaxaccum._audit import fixes
from jaxaccum._audit.judge import Judged, judge
from jaxaccum._audit.lattice import Fault, FaultKind, Layout, Sizes, Value, fixed, rows
from jaxaccum._audit.nans import any_nan, constants
from jaxaccum._audit.probe import probe as run_probe
from jaxaccum._audit.report import AuditReport, Finding, Verdict
from jaxaccum._audit.sources import Site
from jaxaccum._audit.traces import Arguments, Output, Traced, read, trace
from jaxaccum._audit.walk import ProgramsDifferError, Walk
from jaxaccum._closure import closed_over, name_of
from jaxaccum._types import Axes, Fun


def audit(
    fun: Fun,
    *args: Any,
    in_axes: Sequence[Axes] = (None, 0),
    num_microbatches: int = 2,
    has_aux: bool = False,
    axis_name: str = "microbatch",
    probe: bool = False,
) -> AuditReport:
    """Whether the accumulated gradient of a loss is the full batch's: by which rule, and if not, by which line.

    The loss is traced at the batch's size and at the microbatch's, and both programs are walked together; nothing is
    compiled or computed. It asks whether the loss L is additive over the examples i, up to one normalizer::

        SUM    L = Σᵢ f(xᵢ)         MEAN   L = Σᵢ f(xᵢ) / n        RATIO  L = Σᵢ f(xᵢ) / Σᵢ w(xᵢ)

    and whether that is what its tag says. It decides, for every loss, what this tests for one batch::

        def exact(fun, params, batch):
            expected = jax.grad(full_batch(fun))(params, batch)
            return all(grad(fun, num_microbatches=n)(params, batch) == expected for n in range(1, len(batch) + 1))

    Args:
        fun: the loss, as `value_and_grad` takes it.
        *args: its arguments, the whole batch included; arrays, or ``jax.ShapeDtypeStruct``.
        in_axes: one entry an argument, as in `value_and_grad`.
        num_microbatches: how many there will be.
        has_aux: whether `fun` returns ``(loss, aux)``; aux is judged too, but for `Stack`, `Last` and `Carry`.
        axis_name: the name of the loop's axis.
        probe: whether to compare numerically as well, in float64 on an unequal split.

    Returns:
        An `AuditReport`: ``verdict``, ``exact``, ``random``, ``findings``; printable; ``raise_if_inexact()``.

    Guarantees:
        Never exact when unsure: a primitive without a rule, a program that differs between the sizes, and every other
        doubt end in ``UNKNOWN``. Derivative rules of the user's own are traced and walked; JAX's are trusted.

    Raises:
        ValueError, TypeError: as `value_and_grad` does for the same arguments.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> def loss(w, batch):
        ...     return jnp.sqrt(jnp.mean((batch["x"] @ w - batch["y"]) ** 2))
        >>> report = jaxaccum.audit(loss, jnp.ones(3), {"x": jnp.ones((8, 3)), "y": jnp.ones(8)})
        >>> str(report.verdict), report.exact
        ('COUPLED', False)
    """
    arguments = read(args, in_axes, num_microbatches)
    judged, counts = _judged(fun, arguments, axis_name=axis_name, has_aux=has_aux)
    report = _summed_up(judged, counts)
    if not probe:
        return report
    equal = num_microbatches if any(f.kind == FaultKind.COLLECTIVE for f in report.findings) else None
    found = run_probe(fun, args, in_axes=in_axes, has_aux=has_aux, axis_name=axis_name, equal=equal)
    return dataclasses.replace(report, probe=found)


def _judged(fun: Fun, arguments: Arguments, *, axis_name: str, has_aux: bool) -> tuple[list[Judged], Counter[str]]:
    """The answers for every output, and for every size of microbatch."""
    partition, counts = arguments.partition, Counter[str]()
    size, number = partition.batch_size, partition.num_microbatches
    if number == 1:  # any second size will do to see how the loss depends on it
        size, number = 2 * size, 2
    try:
        whole = trace(fun, arguments, size, axis=(axis_name, 1), has_aux=has_aux)
    except Exception as error:  # of the user's function, which may be written for the batch's size alone
        if size == partition.batch_size:
            raise
        whole = trace(fun, arguments, partition.batch_size, axis=(axis_name, 1), has_aux=has_aux)
        found = _closures(fun, whole, Sizes(partition.batch_size, size))
        return [_undecided(o, _cannot(size, error), closures=found) for o in whole.outputs], counts
    judged: list[Judged] = []
    for group in partition.groups:
        walk = Walk(Sizes(size, group.size), axis_name, (1, number))
        judged += _at(fun, arguments, whole, walk, has_aux=has_aux)
        counts += walk.counts
    if len(partition.groups) > 1:
        judged = [_unequal(each) for each in judged]
    return judged, counts


def _at(fun: Fun, arguments: Arguments, whole: Traced, walk: Walk, *, has_aux: bool) -> list[Judged]:
    """The answers for one size of microbatch."""
    size = walk.sizes.second
    try:
        part = trace(fun, arguments, size, axis=(walk.axis_name, walk.axis_sizes[1]), has_aux=has_aux)
    except Exception as error:  # of the user's function: at this size it cannot be accumulated at all
        found = _closures(fun, whole, walk.sizes)
        return [_undecided(o, _cannot(size, error), closures=found) for o in whole.outputs]
    names = [[(o.name, o.tag) for o in traced.outputs] for traced in (whole, part)]
    if names[0] != names[1]:
        return [_undecided(output, f"it returns other outputs for {size} examples") for output in whole.outputs]
    numbers = (*arguments.given, *constants(whole.closed), *constants(part.closed))
    walk.name_of = functools.partial(name_of, fun)
    walk.may_be_nan = functools.cache(lambda: any_nan(numbers))
    try:
        values = _walked(walk, arguments, whole, part)
    except ProgramsDifferError as error:
        reason = (
            f"the programs for {walk.sizes.first} and for {size} examples are not the same: does Python code branch "
            "on the batch size?"
        )
        found = _closures(fun, whole, walk.sizes)
        return [_undecided(output, reason, error.site, closures=found) for output in whole.outputs]
    found, start = [], 0
    for output, other, count in zip(whole.outputs, part.outputs, whole.counts, strict=True):
        judged = judge(walk, output, values[start : start + count])
        own = 1 if output.tag == "Concat" else 0  # the axis of the examples
        if judged is not None and judged.exact and output.shape[own:] != other.shape[own:]:
            judged = _undecided(output, "its shape changes with the batch size")
        found.append(judged)
        start += count
    named = _repeated(fun, arguments, whole, walk, has_aux=has_aux)
    return [_with_cause(each, named) for each in found if each is not None]


def _cannot(size: int, error: Exception) -> str:
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return f"it cannot be traced with {size} examples: {said}"


def _repeated(fun: Fun, arguments: Arguments, whole: Traced, walk: Walk, *, has_aux: bool) -> list[Finding]:
    """Arrays of the closure for which JAX repeats a microbatch of one example: no larger one fits them."""
    if walk.sizes.second > 1 or not (found := _closures(fun, whole, walk.sizes)):
        return []
    larger = 2 if walk.sizes.first > 2 else 3
    try:
        trace(fun, arguments, larger, axis=(walk.axis_name, walk.axis_sizes[1]), has_aux=has_aux)
    except Exception:  # of the user's function: the shapes do not fit
        return found
    return []


def _with_cause(judged: Judged, named: Sequence[Finding]) -> Judged:
    if judged.exact:
        return judged
    own = tuple(dataclasses.replace(each, output=judged.output.name) for each in named)
    return dataclasses.replace(judged, findings=(*own, *judged.findings))


def _walked(walk: Walk, arguments: Arguments, whole: Traced, part: Traced) -> list[Value]:
    first, second = whole.closed, part.closed
    if len(first.consts) != len(second.consts):
        raise ProgramsDifferError
    consts = [walk.constant(a, b) for a, b in zip(first.consts, second.consts, strict=True)]
    unchanged = _unchanged(arguments, whole)
    ins = []
    for slot, v in zip(arguments.slots, first.jaxpr.invars, strict=True):
        scalar = v.aval.shape == ()
        number = walk.fresh()
        match slot.role:
            case Role.ROWS:
                value = rows(Layout((slot.axis,)), number=number)
            case Role.EXAMPLE_KEY:
                value = rows(Layout((0,)), number=number)
            case Role.KEY:
                fault = Fault(FaultKind.RANDOM, None, None, f"{slot.name} is folded with the microbatch's index")
                value = fixed(faults=frozenset([fault]), number=number, scalar=scalar)
            case Role.CARRY if id(v) not in unchanged:
                fault = Fault(FaultKind.STATE, None, None, f"{slot.name} changes from microbatch to microbatch")
                value = fixed(faults=frozenset([fault]), number=number, scalar=scalar)
            case _:
                value = fixed(
                    number=number, scalar=scalar, params=slot.argnum == 0 and jnp.issubdtype(v.aval.dtype, jnp.inexact)
                )
        ins.append(value)
    return walk.run(first.jaxpr, second.jaxpr, consts, ins)


def _unchanged(arguments: Arguments, traced: Traced) -> set[int]:
    """The variables of the carried leaves that come back in their own place of the `Carry`, as they went in."""
    jaxpr = traced.closed.jaxpr
    # A carried key goes in as the integers that it is made of, and comes out typed.
    made_of = {eqn.outvars[0]: eqn.invars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "random_wrap"}
    tags = [output.tag for output, count in zip(traced.outputs, traced.counts, strict=True) for _ in range(count)]
    new = [v for v, tag in zip(jaxpr.outvars, tags, strict=True) if tag == "Carry"]
    old = [v for v, slot in zip(jaxpr.invars, arguments.slots, strict=True) if slot.role is Role.CARRY]
    if len(new) != len(old):
        return set()
    back = [v if isinstance(v, jex.Literal) else made_of.get(v, v) for v in new]
    return {id(before) for before, after in zip(old, back, strict=True) if after is before}


def _undecided(output: Output, reason: str, site: Site | None = None, *, closures: Sequence[Finding] = ()) -> Judged:
    """No answer, for a reason; arrays of the closure that are as long as the batch are the likelier one."""
    line = site.frame if site is not None else None
    fix = fixes.fix_of(Fault(FaultKind.UNKNOWN, None, None, ""), "")
    finding = Finding("unknown", line, line, fix, note=reason, output=output.name)
    named = [dataclasses.replace(each, output=output.name) for each in closures]
    return Judged(output, Verdict.UNKNOWN, False, findings=(*named, finding))


def _closures(fun: Fun, whole: Traced, sizes: Sizes) -> list[Finding]:
    """The arrays that the loss closes over and that have a row for each example of the batch."""
    used = {id(x) for x in constants(whole.closed)}
    found = []
    for name, x in closed_over(fun):
        is_used = id(x) in used or isinstance(x, np.ndarray)  # of numpy's arrays JAX keeps a copy
        if is_used and x.shape[:1] == (sizes.first,):
            note = (
                f"the loss closes over {name}, {x.dtype}{list(x.shape)}: a microbatch of {sizes.second} examples "
                f"meets all {sizes.first} rows of it"
            )
            found.append(Finding("closure", None, None, fixes.ROWS_ARGUMENT.format(name=name), note=note))
    return found


def _unequal(judged: Judged) -> Judged:
    """A loss with collectives is refused on microbatches of different sizes."""
    if not any(f.kind == FaultKind.COLLECTIVE for f in judged.findings):
        return judged
    finding = Finding(
        "collective", None, None, fixes.EQUAL, note="the microbatches are not of one size", output=judged.output.name
    )
    return dataclasses.replace(judged, verdict=Verdict.COUPLED, exact=False, findings=(*judged.findings, finding))


def _summed_up(judged: list[Judged], counts: Counter[str]) -> AuditReport:
    """One report: the loss's worst verdict, and what is wrong anywhere."""
    losses = [each for each in judged if not each.output.aux]
    worst = min(losses, key=lambda each: each.rank)
    by_name: dict[str, Judged] = {}
    for each in judged:
        known = by_name.get(each.output.name)
        by_name[each.output.name] = each if known is None else min(known, each, key=lambda one: one.rank)
    findings = tuple(dict.fromkeys(finding for each in judged for finding in each.findings))
    return AuditReport(
        worst.verdict, all(each.exact for each in judged), any(each.random for each in judged), findings,
        terms=tuple((name, each.verdict, each.exact) for name, each in by_name.items()), counts=dict(counts),
    )  # fmt: skip
