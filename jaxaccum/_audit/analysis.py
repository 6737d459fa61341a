"""The audit of one loss: trace it at two sizes, walk both programs, judge every output.

The problem. The loss runs on microbatches, and the user wants to know before training whether their
gradients add up to the full batch's.

The idea. Trace the loss for the whole batch and for each size of microbatch. Walk each pair
(`walk`), and judge the outputs (`judge`). With 10 examples in microbatches of 4, 4 and 2, two pairs
are walked, 10 with 4 and 10 with 2, and the worst answer counts.

Two programs may differ and yet mean the same. So what does not come out exact is tried again:

- With one example, JAX leaves out the equations that would move nothing, such as a broadcast from
  1 to 1. So a larger microbatch is walked instead, if it foretells the program for one (`of_one`).
  Or the loss is written for one example, and reads it as ``x[0]``.
- The loss may read adjacent examples together, as pairs. Then a group counts as one example.

The cost. One trace for the whole batch, one per size of microbatch, and a walk of each pair. Only
what is not exact costs the further tries.

The weakness. A loss that raises an error at one of the two sizes cannot be decided.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxaccum._audit import fixes, states
from jaxaccum._audit.inputs import input_values
from jaxaccum._audit.judge import Judged, judge
from jaxaccum._audit.lattice import Fault, FaultKind, Sizes, Value
from jaxaccum._audit.nans import any_nan, are_finite, constants
from jaxaccum._audit.of_one import same_work
from jaxaccum._audit.report import AuditReport, Finding, Verdict
from jaxaccum._audit.sources import Site, line_of
from jaxaccum._audit.states import Update
from jaxaccum._audit.traces import Subject, Traced
from jaxaccum._audit.walk import ProgramsDifferError, Walk
from jaxaccum._base.types import Fun
from jaxaccum._devices import varying
from jaxaccum._program.closures import ROWS_ARGUMENT, is_array_of, name_of, of_length
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.named_outputs import Output
from jaxaccum._program.tags import Concat, Tag
from jaxaccum._program.validate import counted


def report_on(
    subject: Subject,
    partition: Partition,
    axis_name: str,
    *,
    mesh_axes: Sequence[str] = (),
    whole_runs: bool = True,
) -> AuditReport:
    """The report on a loss that runs under a partition.

    `mesh_axes` are the devices' axes over which the batch is sharded as well. An error that `fun`
    raises for the whole batch is raised where `whole_runs` says that it is written for it.
    """
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
        judged = _of_one_size(subject, one, error, size=size, known=known, whole_runs=whole_runs)
        return _summed_up(judged, Counter())
    judged, counts = [], Counter[str]()
    for group in partition.groups:
        walk = Walk(Sizes(size, group.size), axis_name, (1, number))
        walk.outer_axes = frozenset(mesh_axes)
        if mesh_axes and not varying.checked(mesh_axes):
            walk.untyped_axes = walk.outer_axes
        judged += _at(subject, whole, walk)
        counts += walk.counts
    if len(partition.groups) > 1:
        judged = list(map(_unequal, judged))
    return _summed_up(judged, counts)


def _at(subject: Subject, whole: Traced, walk: Walk) -> list[Judged]:
    """The answers for one size of microbatch."""
    size = walk.sizes.second
    try:
        part = subject.trace(size, walk.axis_sizes[1])
    except Exception as error:  # of the user's function: this size cannot be accumulated at all
        found = _closures(subject.fun, whole, walk.sizes)
        return _undecided(whole.outputs, _cannot(size, error), closures=found)
    if _named(whole) != _named(part):
        return _undecided(whole.outputs, f"it returns other outputs for {size} examples")
    pair = _Pair(subject, whole, part)
    walk.name_of = functools.partial(name_of, subject.fun)
    walk.may_be_nan = functools.cache(pair.has_nan)
    walk.is_finite = functools.cache(lambda: are_finite(subject.given))
    walk.keeps_groups = subject.keeps_groups
    walk.in_order = subject.keeps_order
    judged = pair.judged(walk)
    if not _all_accumulate(judged):
        judged = _for_one_example(pair, walk) or _in_groups(pair, walk) or judged
    named = _repeated(subject, whole, walk)
    return [_with_cause(each, named) for each in judged]


def _named(traced: Traced) -> list[tuple[str, type[Tag] | None]]:
    return [(output.name, output.tag) for output in traced.outputs]


def _all_accumulate(judged: Iterable[Judged]) -> bool:
    return all(each.cause is None for each in judged)


# -- one pair of programs --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The loss traced for the whole batch and for a microbatch."""

    subject: Subject
    whole: Traced
    part: Traced

    def has_nan(self) -> bool:
        """Whether the loss is called with a NaN, or one is written in its programs."""
        numbers = (constants(self.whole.closed), constants(self.part.closed))
        return any_nan(itertools.chain(self.subject.given, *numbers))

    def judged(self, walk: Walk) -> list[Judged]:
        """The answers of a walk through both."""
        updates = [states.updates_of(self.subject, each, walk.axis_name) for each in self.traced]
        try:
            values = self._values(walk, updates)
        except ProgramsDifferError as error:
            return self._differ(walk, error.site)
        found: list[Judged] = []
        place = 0
        for output, other in zip(self.whole.outputs, self.part.outputs, strict=True):
            own = values[place : place + output.count]
            judged = judge(walk, output, own, updates[0].get(place))
            place += output.count
            if judged is not None and judged.exact and _grows(output, other):
                (judged,) = _undecided([output], "its shape changes with the batch size")
            if judged is not None:
                found.append(judged)
        return found

    @property
    def traced(self) -> tuple[Traced, Traced]:
        return self.whole, self.part

    def _values(self, walk: Walk, updates: Sequence[dict[int, Update]]) -> list[Value]:
        """The results at both sizes; of a state of the model what decides about its update."""
        first, second = self.whole.closed, self.part.closed
        if len(first.consts) != len(second.consts):
            raise ProgramsDifferError
        consts = walk.constants(first.consts, second.consts)
        ins = input_values(walk, self.subject, self.whole)
        judged = states.with_judged(first.jaxpr, updates[0])
        other = states.with_judged(second.jaxpr, updates[1])
        return walk.run(judged, other, consts, ins)

    def _differ(self, walk: Walk, site: Site | None) -> list[Judged]:
        first, second = walk.group * walk.sizes.first, walk.group * walk.sizes.second
        reason = (
            f"the programs for {first} and for {second} examples are not the same: does Python "
            "code branch on the batch size, or on the number of microbatches?"
        )
        found = _closures(self.subject.fun, self.whole, walk.sizes)
        return _undecided(self.whole.outputs, reason, site, closures=found)


def _grows(output: Output, other: Output) -> bool:
    """Whether the shape changes with the batch size, but for the rows of a `Concat`."""
    own = 1 if output.tag is Concat else 0
    return output.shape[own:] != other.shape[own:]


# -- second tries ----------------------------------------------------------------------------------


def _for_one_example(pair: _Pair, walk: Walk) -> list[Judged] | None:
    """The answers for microbatches of one example, from a program for more; None where that does
    not help.

    JAX leaves out what moves nothing where there is one row, so that the program for one is another
    than that for the batch. Or the loss is written for one example, which it reads as ``x[0]``.
    """
    if walk.sizes.second > 1:
        return None
    first = walk.sizes.first
    larger = _second_size(first)
    count = max(first // larger, 1)
    try:
        more = pair.subject.trace(larger, count)
    except Exception:  # of the user's function
        return None
    instead = dataclasses.replace(pair, part=more)
    if not same_work(pair.part.closed, more.closed, pair.whole.closed, Sizes(first, larger)):
        return None
    for one_by_one in (False, True):
        again = walk.again(Sizes(first, larger))
        again.one_by_one, again.axis_sizes = one_by_one, (1, count)
        judged = instead.judged(again)
        if _all_accumulate(judged):
            return judged
    return None


def _second_size(whole: int) -> int:
    """The smallest divisor of the batch's size above 1; of a prime, another small size."""
    for size in range(2, whole):
        if whole % size == 0:
            return size
    return 2 if whole > 2 else 3


def _in_groups(pair: _Pair, walk: Walk) -> list[Judged] | None:
    """The answers where adjacent examples in groups, such as pairs or completions of one prompt,
    are taken for one.

    A group is exact as an example is: the microbatches must hold whole groups. None where that does
    not help.
    """
    for group in sorted(walk.groups):
        sizes = walk.sizes.divided(group)
        if sizes is None or not pair.subject.keeps_groups(group):
            continue
        again = walk.again(sizes)
        again.group = group
        judged = pair.judged(again)
        if _all_accumulate(judged):
            note = (
                f"examples come in groups of {group} adjacent ones, and every microbatch holds "
                "whole groups"
            )
            assumed = Finding("assumption", None, None, "", note=note)
            return [
                dataclasses.replace(each, findings=(*each.findings, assumed)) for each in judged
            ]
    return None


# -- no answer -------------------------------------------------------------------------------------


def _of_one_size(
    subject: Subject, one: Traced, error: Exception, *, size: int, known: int, whole_runs: bool
) -> list[Judged]:
    """The answers for a loss that runs on `known` examples and raises `error` for `size` of
    them."""
    if known == 1 and not whole_runs and not of_length(subject.fun, size):
        written_for_one = Verdict.PER_EXAMPLE
        return [Judged(output, written_for_one, True) for output in one.outputs]
    sizes = Sizes(known, size) if whole_runs else Sizes(size, known)
    found = _closures(subject.fun, one, sizes)
    return _undecided(one.outputs, _cannot(size, error), closures=found)


def _cannot(size: int, error: Exception) -> str:
    said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return f"it cannot be traced with {size} examples: {said}"


def _undecided(
    outputs: Iterable[Output],
    reason: str,
    site: Site | None = None,
    *,
    closures: Sequence[Finding] = (),
) -> list[Judged]:
    """No answer, for a reason; arrays of the closure that are as long as the batch are the likelier
    one."""
    line = line_of(site)
    fix = fixes.fix_of(Fault(FaultKind.UNKNOWN, None, None, ""), "")
    judged: list[Judged] = []
    for output in outputs:
        finding = Finding("unknown", line, line, fix, note=reason, output=output.name)
        found = (*_concerning(output, closures), finding)
        judged.append(Judged(output, Verdict.UNKNOWN, False, findings=found, cause=found[0]))
    return judged


def _concerning(output: Output, findings: Iterable[Finding]) -> list[Finding]:
    """The findings, as those of one output."""
    return [dataclasses.replace(each, output=output.name) for each in findings]


# -- arrays of the closure -------------------------------------------------------------------------


def _closures(fun: Fun, whole: Traced, sizes: Sizes) -> list[Finding]:
    """The arrays that the loss closes over and that have a row for each example of the batch."""
    used = list(constants(whole.closed))
    found: list[Finding] = []
    for name, x in of_length(fun, sizes.first):
        if any(is_array_of(x, constant) for constant in used):
            microbatch = f"a microbatch of {counted(sizes.second, 'example')}"
            shown = f"{name}, {x.dtype}{list(x.shape)}"
            note = f"the loss closes over {shown}: {microbatch} uses all {sizes.first} rows of it"
            found.append(Finding("closure", None, None, ROWS_ARGUMENT.format(name=name), note=note))
    return found


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
    own = _concerning(judged.output, named)
    cause = own[0] if own else judged.cause
    return dataclasses.replace(judged, findings=(*own, *judged.findings), cause=cause)


# -- one report ------------------------------------------------------------------------------------


def _unequal(judged: Judged) -> Judged:
    """A loss with collectives is refused on microbatches of different sizes."""
    if not any(finding.kind == FaultKind.COLLECTIVE for finding in judged.findings):
        return judged
    note, name = "the microbatches are not of one size", judged.output.name
    finding = Finding("collective", None, None, fixes.EQUAL, note=note, output=name)
    findings = (*judged.findings, finding)
    return dataclasses.replace(
        judged, verdict=Verdict.COUPLED, exact=False, findings=findings, cause=finding
    )


def _summed_up(judged: Sequence[Judged], counts: Counter[str]) -> AuditReport:
    """One report: the loss's worst verdict, and what is wrong anywhere."""
    worst: dict[str, Judged] = {}
    findings: dict[Finding, None] = {}
    for each in judged:
        name = each.output.name
        worst[name] = min(worst.get(name, each), each, key=_rank)
        findings |= dict.fromkeys(each.findings)
    losses = [each for each in judged if not each.output.aux]
    verdict = min(losses, key=_rank).verdict if losses else Verdict.UNBATCHED
    exact = all(each.exact for each in judged)
    random = any(each.random for each in judged)
    terms = [(name, each.verdict, each.exact) for name, each in worst.items()]
    causes = [each.cause for each in judged if each.cause is not None]
    return AuditReport(
        verdict, exact, random, tuple(findings),
        terms=tuple(terms), counts=dict(counts), causes=tuple(causes),
    )  # fmt: skip


def _rank(judged: Judged) -> tuple[bool, int]:
    return judged.rank
