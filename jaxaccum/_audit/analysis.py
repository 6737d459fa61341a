"""The audit of one loss: trace it at two sizes, walk both programs, judge every output."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Sequence

import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._audit import fixes
from jaxaccum._audit.judge import Judged, judge
from jaxaccum._audit.lattice import Fault, FaultKind, Index, Layout, Sizes, Value, fixed, rows
from jaxaccum._audit.nans import any_nan, constants
from jaxaccum._audit.report import AuditReport, Finding, Verdict
from jaxaccum._audit.sources import Site
from jaxaccum._audit.traces import Subject, Traced
from jaxaccum._audit.twins import same_work
from jaxaccum._audit.walk import ProgramsDifferError, Walk
from jaxaccum._base.types import Fun
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.closures import ROWS_ARGUMENT, is_array_of, name_of, of_length
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.named_outputs import Output
from jaxaccum._program.validate import counted


def report_on(
    subject: Subject,
    partition: Partition,
    axis_name: str,
    *,
    mesh_axes: Iterable[str] = (),
    whole_runs: bool = True,
) -> AuditReport:
    """The report on a loss that runs under a partition.

    `mesh_axes` are the devices' axes over which the batch is sharded as well. An error that `fun`
    raises for the whole batch is raised where `whole_runs` says that it is written for it.
    """
    counts = Counter[str]()
    size, number = partition.batch_size, partition.num_microbatches
    if number == 1:  # any second size will do to see how the loss depends on it
        size, number = 2 * size, 2
    try:
        whole = subject.trace(size, 1)
    except Exception as error:  # of the user's function, which may be written for one size alone
        known = partition.batch_size if whole_runs else partition.groups[0].size
        if size == known:
            raise
        one = subject.trace(known, 1 if whole_runs else number)
        return _summed_up(
            _of_one_size(subject, one, error, size=size, known=known, whole_runs=whole_runs), counts
        )
    judged: list[Judged] = []
    for group in partition.groups:
        walk = Walk(Sizes(size, group.size), axis_name, (1, number))
        walk.outer_axes = frozenset(mesh_axes)
        judged += _at(subject, whole, walk)
        counts += walk.counts
    if len(partition.groups) > 1:
        judged = [_unequal(each) for each in judged]
    return _summed_up(judged, counts)


def _of_one_size(
    subject: Subject, one: Traced, error: Exception, *, size: int, known: int, whole_runs: bool
) -> list[Judged]:
    """The answers for a loss that runs on `known` examples and raises `error` for `size` of
    them."""
    if whole_runs:
        found = _closures(subject.fun, one, Sizes(known, size))
    elif known == 1 and not of_length(subject.fun, size):
        return [
            Judged(output, Verdict.PER_EXAMPLE, True) for output in one.outputs
        ]  # written for one example
    else:
        found = _closures(subject.fun, one, Sizes(size, known))
    return [_undecided(output, _cannot(size, error), closures=found) for output in one.outputs]


def _at(subject: Subject, whole: Traced, walk: Walk) -> list[Judged]:
    """The answers for one size of microbatch."""
    size = walk.sizes.second
    try:
        part = subject.trace(size, walk.axis_sizes[1])
    except (
        Exception
    ) as error:  # of the user's function: at this size it cannot be accumulated at all
        found = _closures(subject.fun, whole, walk.sizes)
        return [_undecided(o, _cannot(size, error), closures=found) for o in whole.outputs]
    names = [[(o.name, o.tag) for o in traced.outputs] for traced in (whole, part)]
    if names[0] != names[1]:
        return [
            _undecided(output, f"it returns other outputs for {size} examples")
            for output in whole.outputs
        ]
    walk.name_of = functools.partial(name_of, subject.fun)
    walk.may_be_nan = functools.cache(
        lambda: any_nan((*subject.given, *constants(whole.closed), *constants(part.closed)))
    )
    judged = _walked_and_judged(walk, subject, whole, part)
    if any(each.cause is not None for each in judged):
        judged = (
            _for_one_example(walk, subject, whole, part)
            or _in_groups(walk, subject, whole, part)
            or judged
        )
    named = _repeated(subject, whole, walk)
    return [_with_cause(each, named) for each in judged]


def _walked_and_judged(walk: Walk, subject: Subject, whole: Traced, part: Traced) -> list[Judged]:
    """The answers, where both programs could be traced."""
    try:
        values = _walked(walk, subject, whole, part)
    except ProgramsDifferError as error:
        first, second = walk.group * walk.sizes.first, walk.group * walk.sizes.second
        reason = (
            f"the programs for {first} and for {second} examples are not the same: does Python "
            "code branch on the batch size, or on the number of microbatches?"
        )
        found = _closures(subject.fun, whole, walk.sizes)
        return [_undecided(output, reason, error.site, closures=found) for output in whole.outputs]
    found, start = [], 0
    for output, other in zip(whole.outputs, part.outputs, strict=True):
        judged = judge(walk, output, values[start : start + output.count])
        own = 1 if output.tag == "Concat" else 0  # the axis of the examples
        if judged is not None and judged.exact and output.shape[own:] != other.shape[own:]:
            judged = _undecided(output, "its shape changes with the batch size")
        found.append(judged)
        start += output.count
    return [each for each in found if each is not None]


def _like(walk: Walk, sizes: Sizes) -> Walk:
    """Another walk of the same programs, which takes the sizes for others."""
    again = Walk(sizes, walk.axis_name, walk.axis_sizes)
    again.outer_axes, again.name_of, again.may_be_nan = (
        walk.outer_axes,
        walk.name_of,
        walk.may_be_nan,
    )
    return again


def _for_one_example(
    walk: Walk, subject: Subject, whole: Traced, part: Traced
) -> list[Judged] | None:
    """The answers for microbatches of one example, from a program for more; None where that does
    not help.

    JAX leaves out what moves nothing where there is one row, so that the program for one is another
    than that for the batch. Or the loss is written for one example, which it reads as ``x[0]``.
    """
    if walk.sizes.second > 1:
        return None
    first = walk.sizes.first
    larger = next((n for n in range(2, first) if first % n == 0), 2 if first > 2 else 3)
    count = max(first // larger, 1)
    try:
        more = subject.trace(larger, count)
    except Exception:  # of the user's function
        return None
    for one_by_one in (False, True):
        again = _like(walk, Sizes(first, larger))
        again.one_by_one, again.axis_sizes = one_by_one, (1, count)
        judged = _walked_and_judged(again, subject, whole, more)
        if not any(each.cause is not None for each in judged) and same_work(
            part.closed, more.closed
        ):
            return judged
    return None


def _in_groups(walk: Walk, subject: Subject, whole: Traced, part: Traced) -> list[Judged] | None:
    """The answers where adjacent examples in groups, such as pairs or completions of one prompt,
    are taken for one.

    A group is exact as an example is: the microbatches must hold whole groups. None where that does
    not help.
    """
    for group in sorted(walk.groups):
        sizes = walk.sizes.divided(group)
        if sizes is None or not subject.keeps_groups(group):
            continue
        again = _like(walk, sizes)
        again.group = group
        judged = _walked_and_judged(again, subject, whole, part)
        if not any(each.cause is not None for each in judged):
            note = (
                f"examples come in groups of {group} adjacent ones, and every microbatch holds "
                "whole groups"
            )
            finding = Finding("assumption", None, None, "", note=note)
            return [
                dataclasses.replace(each, findings=(*each.findings, finding)) for each in judged
            ]
    return None


def _cannot(size: int, error: Exception) -> str:
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return f"it cannot be traced with {size} examples: {said}"


def _repeated(subject: Subject, whole: Traced, walk: Walk) -> list[Finding]:
    """Arrays of the closure for which JAX repeats a microbatch of one example: no larger one fits
    them."""
    if walk.sizes.second > 1 or not (found := _closures(subject.fun, whole, walk.sizes)):
        return []
    larger = 2 if walk.sizes.first > 2 else 3
    try:
        subject.trace(larger, walk.axis_sizes[1])
    except Exception:  # of the user's function: the shapes do not fit
        return found
    return []


def _with_cause(judged: Judged, named: Sequence[Finding]) -> Judged:
    if judged.exact:
        return judged
    own = tuple(dataclasses.replace(each, output=judged.output.name) for each in named)
    cause = own[0] if own else judged.cause
    return dataclasses.replace(judged, findings=(*own, *judged.findings), cause=cause)


def _walked(walk: Walk, subject: Subject, whole: Traced, part: Traced) -> list[Value]:
    first, second = whole.closed, part.closed
    if len(first.consts) != len(second.consts):
        raise ProgramsDifferError
    consts = [walk.constant(a, b) for a, b in zip(first.consts, second.consts, strict=True)]
    unchanged = _unchanged(subject.slots, whole)
    ins = [fixed(index=Index.MICROBATCH, scalar=True, number=walk.fresh())] if whole.indexed else []
    for slot, v in zip(subject.slots, whole.arguments, strict=True):
        scalar = v.aval.shape == ()
        number = walk.fresh()
        match slot.role:
            case Role.ROWS:
                value = rows(Layout((slot.axis,), inner=walk.group), number=number)
            case Role.EXAMPLE_KEY:
                value = rows(Layout((0,), inner=walk.group), number=number)
            case Role.KEY:
                note = f"{slot.name} is folded with the microbatch's index"
                fault = Fault(FaultKind.RANDOM, None, None, note, declared=True)
                value = fixed(faults=frozenset([fault]), number=number, scalar=scalar)
            case Role.CARRY if id(v) not in unchanged:
                fault = Fault(
                    FaultKind.STATE,
                    None,
                    None,
                    f"{slot.name} changes from microbatch to microbatch",
                )
                value = fixed(faults=frozenset([fault]), number=number, scalar=scalar)
            case _:
                params = subject.differentiates(slot.argnum) and jnp.issubdtype(
                    v.aval.dtype, jnp.inexact
                )
                value = fixed(
                    number=number, scalar=scalar, params=params, overwritten=slot.overwritten
                )
        ins.append(value)
    return walk.run(first.jaxpr, second.jaxpr, consts, ins)


def _unchanged(slots: Sequence[Slot], traced: Traced) -> set[int]:
    """The variables of the carried leaves that come back in their own place of the `Carry`, as they
    went in."""
    jaxpr = traced.closed.jaxpr
    # A carried key goes in as the integers that it is made of, and comes out typed.
    made_of = {
        eqn.outvars[0]: eqn.invars[0] for eqn in jaxpr.eqns if eqn.primitive.name == "random_wrap"
    }
    tags = [output.tag for output in traced.outputs for _ in range(output.count)]
    new = [v for v, tag in zip(jaxpr.outvars, tags, strict=True) if tag == "Carry"]
    old = [v for v, slot in zip(traced.arguments, slots, strict=True) if slot.role is Role.CARRY]
    if len(new) != len(old):
        return set()
    back = [v if isinstance(v, jex.Literal) else made_of.get(v, v) for v in new]
    return {id(before) for before, after in zip(old, back, strict=True) if after is before}


def _undecided(
    output: Output, reason: str, site: Site | None = None, *, closures: Sequence[Finding] = ()
) -> Judged:
    """No answer, for a reason; arrays of the closure that are as long as the batch are the likelier
    one."""
    line = site.frame if site is not None else None
    fix = fixes.fix_of(Fault(FaultKind.UNKNOWN, None, None, ""), "")
    finding = Finding("unknown", line, line, fix, note=reason, output=output.name)
    named = [dataclasses.replace(each, output=output.name) for each in closures]
    findings = (*named, finding)
    return Judged(output, Verdict.UNKNOWN, False, findings=findings, cause=findings[0])


def _closures(fun: Fun, whole: Traced, sizes: Sizes) -> list[Finding]:
    """The arrays that the loss closes over and that have a row for each example of the batch."""
    used = list(constants(whole.closed))
    found = []
    for name, x in of_length(fun, sizes.first):
        if any(is_array_of(x, constant) for constant in used):
            microbatch = f"a microbatch of {counted(sizes.second, 'example')}"
            shown = f"{name}, {x.dtype}{list(x.shape)}"
            note = f"the loss closes over {shown}: {microbatch} uses all {sizes.first} rows of it"
            found.append(Finding("closure", None, None, ROWS_ARGUMENT.format(name=name), note=note))
    return found


def _unequal(judged: Judged) -> Judged:
    """A loss with collectives is refused on microbatches of different sizes."""
    if not any(f.kind == FaultKind.COLLECTIVE for f in judged.findings):
        return judged
    finding = Finding(
        "collective",
        None,
        None,
        fixes.EQUAL,
        note="the microbatches are not of one size",
        output=judged.output.name,
    )
    findings = (*judged.findings, finding)
    return dataclasses.replace(
        judged, verdict=Verdict.COUPLED, exact=False, findings=findings, cause=finding
    )


def _summed_up(judged: list[Judged], counts: Counter[str]) -> AuditReport:
    """One report: the loss's worst verdict, and what is wrong anywhere."""
    losses = [each for each in judged if not each.output.aux]
    worst = min(losses, key=lambda each: each.rank).verdict if losses else Verdict.UNBATCHED
    by_name: dict[str, Judged] = {}
    for each in judged:
        known = by_name.get(each.output.name)
        by_name[each.output.name] = (
            each if known is None else min(known, each, key=lambda one: one.rank)
        )
    findings = tuple(dict.fromkeys(finding for each in judged for finding in each.findings))
    return AuditReport(
        worst, all(each.exact for each in judged), any(each.random for each in judged), findings,
        terms=tuple((name, each.verdict, each.exact) for name, each in by_name.items()),
        counts=dict(counts), causes=tuple(each.cause for each in judged if each.cause is not None),
    )  # fmt: skip
