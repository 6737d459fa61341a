"""What an output is, before faults: whether that is exact under its tag, and if not, what to write.

Without faults, an output is a value of a known kind and known terms (see `lattice`). Whether its
microbatches' parts add up to it depends on its tag::

    what it is                    without a tag (a mean)   Mean(total, weight)    Sum
    sum of scale 1                no: say Sum              as total, as weight    exact
    sum of scale 1 / batch_size   exact                    no: do not divide      no: drop the tag
    sum / sum of weights          no: say Mean             no: do not divide      no: say Mean
    independent of the batch      exact                    exact if both are      no: counts N times

`Concat` wants rows along axis 0, and `Max` and `Min` want the extremum itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import assert_never

from jaxaccum._audit import fixes
from jaxaccum._audit.lattice import (
    ONE_EXAMPLE,
    Addend,
    Fault,
    FaultKind,
    Kind,
    Layout,
    Scale,
    Value,
    Weight,
)
from jaxaccum._audit.report import Verdict
from jaxaccum._audit.sources import Site
from jaxaccum._audit.states import Update
from jaxaccum._audit.walk import Walk
from jaxaccum._program.named_outputs import Output
from jaxaccum._program.reductions import Reduction
from jaxaccum._program.tags import Mean, Sum, Tag

_ONE = Scale()
_BATCH_SIZE = Scale(Fraction(1))
_PER_BATCH_SIZE = Scale(Fraction(-1))


@dataclasses.dataclass(frozen=True)
class Claim:
    """What an output is, before faults: whether that is exact under its tag, and if not, why and
    what to write."""

    verdict: Verdict
    exact: bool
    note: str = ""
    fix: str = ""
    lines: tuple[Site | None, ...] = ()


def _exact(verdict: Verdict) -> Claim:
    return Claim(verdict, True)


def _inexact(verdict: Verdict, note: str, fix: str, *lines: Site | None) -> Claim:
    return Claim(verdict, False, note, fix, lines)


def _mis_scaled(note: str, fix: str, *lines: Site | None) -> Claim:
    return Claim(Verdict.MIS_SCALED, False, note, fix, lines)


def claim_of(walk: Walk, output: Output, values: Sequence[Value]) -> Claim | None:
    """What an output is under its tag; None where it depends on the partition by its meaning."""
    claim = _claim_of_numbers(walk, output, values)
    if claim is None or not any(value.placed or value.by_order for value in values):
        return claim
    note = "the output is a place, or is in the order of the microbatches"
    return _inexact(Verdict.POSITION, note, fixes.PLACE, values[0].origin)


def claim_of_update(walk: Walk, update: Update, value: Value) -> Claim:
    """Whether a state that a microbatch updates is the whole batch's after the last one."""
    if update.kind == "adds" and _is_sum(value):
        return _exact(Verdict.SUM)
    if update.kind == "replaces" and _is_constant(value):
        return _exact(Verdict.UNBATCHED)
    done = "replaces it by what it computes" if update.kind == "replaces" else "updates it"
    note = f"each microbatch {done}, and the whole batch does so once"
    fix = fixes.UPDATE.format(axis=walk.axis_name)
    return _inexact(Verdict.COUPLED, note, fix, update.site)


def _claim_of_numbers(walk: Walk, output: Output, values: Sequence[Value]) -> Claim | None:
    """The same, of values that are numbers like any other."""
    reduction = Reduction.SUM if output.tag is None else output.tag.reduction
    match reduction:
        case Reduction.STACK | Reduction.LAST | Reduction.CARRY:
            return None
        case Reduction.CONCAT:
            return _claim_rows(walk, values[0])
        case Reduction.MAX | Reduction.MIN:
            claim = _claim_extremum(values[0], reduction.value)
        case Reduction.SUM:
            claim = _claim_total(walk, output.tag, values)
        case _:
            assert_never(reduction)
    of_one = walk.one_by_one and _of_one_example(values)
    return _exact(Verdict.PER_EXAMPLE) if of_one else claim


def _claim_total(walk: Walk, tag: type[Tag] | None, values: Sequence[Value]) -> Claim:
    """What is added up over microbatches."""
    if tag is None:
        return _claim_untagged(walk, values[0])
    if tag is Mean:
        return _claim_mean(walk, values[0], values[1])
    if tag is Sum:
        return _claim_sum(walk, values[0])
    raise AssertionError(f"the audit knows no claim of the tag {tag.__name__}")


# -- what a value is -------------------------------------------------------------------------------


def _scales(value: Value, *, fixed: bool) -> set[Scale]:
    return {term.scale for term in value.terms if term.fixed is fixed}


def _is_constant(value: Value) -> bool:
    """Whether it is independent of the batch, and of its size."""
    return value.fixed and value.scale.trivial


def _is_sum(value: Value) -> bool:
    """Whether the value over a batch is the sum of its values over the parts of any partition."""
    if value.fixed:
        return value.zero or value.scale == _BATCH_SIZE
    own = value.kind is Kind.TOTAL and _scales(value, fixed=False) <= {_ONE}
    return own and _scales(value, fixed=True) <= {_BATCH_SIZE}


def _is_mean(value: Value) -> bool:
    own = value.kind is Kind.TOTAL and _scales(value, fixed=False) == {_PER_BATCH_SIZE}
    return own and _scales(value, fixed=True) <= {_ONE}


def _ratio_of(value: Value) -> int | None:
    """The weight that divides all addends, where there is one."""
    scales = _scales(value, fixed=False)
    if value.kind is not Kind.TOTAL or len(scales) != 1:
        return None
    if not _scales(value, fixed=True) <= {_ONE}:
        return None
    weight = _one_weight(scales.pop())
    return weight.number if weight is not None and weight.exponent == -1 else None


def _one_weight(scale: Scale) -> Weight | None:
    """The power of a total that a scale is; None where it is something else."""
    if scale.power != 0 or len(scale.weights) != 1:
        return None
    return next(iter(scale.weights))


def _is_guarded(value: Value) -> bool:
    """Whether a weight is a sum over the examples but for a guard."""
    weight = _one_weight(value.weight) if value.weight is not None else None
    return weight is not None and weight.exponent == 1


def _of_one_example(values: Sequence[Value]) -> bool:
    """Whether a loss written for one example came to this, so that its microbatches are its
    examples.

    A sum over the examples of such a microbatch is the example's own value too.
    """
    return any(v.rows for v in values) and all(map(_belongs_to_one_example, values))


def _belongs_to_one_example(value: Value) -> bool:
    whole = value.layout == ONE_EXAMPLE if value.rows else value.fixed or _is_sum(value)
    return whole and all(term.scale.trivial for term in value.terms)


# -- what it is under its tag ----------------------------------------------------------------------


def _claim_untagged(walk: Walk, value: Value) -> Claim:
    if _is_constant(value):
        return _exact(Verdict.UNBATCHED)
    if value.fixed:
        return _mis_scaled("it depends on the size of the batch alone", fixes.OF_SIZE)
    if value.rows:
        fix = fixes.TAG["PER_EXAMPLE"]
        return _inexact(Verdict.PER_EXAMPLE, "rows without a tag", fix)
    if value.kind is Kind.STATISTIC:
        return _claim_statistic(walk, value)
    if _is_mean(value):
        return _exact(Verdict.MEAN)
    if _is_sum(value):
        note = "a sum without a tag, which declares a mean"
        return _inexact(Verdict.SUM, note, fixes.TAG["SUM"], value.origin)
    if (weight := _ratio_of(value)) is not None:
        note = "a ratio without a tag: each microbatch divides by its own denominator"
        lines = (walk.weights.get(weight), value.origin)
        return _inexact(Verdict.RATIO, note, fixes.TAG["RATIO"], *lines)
    return _claim_mis_scaled(walk, value)


def _claim_statistic(walk: Walk, value: Value) -> Claim:
    if value.extremum is not None:
        tag = value.extremum.capitalize()
        note = f"a {value.extremum}imum over examples, which needs the tag {tag}"
        collective = f"p{value.extremum}"
        fix = fixes.EXTREMUM.format(tag=tag, collective=collective, axis=walk.axis_name)
        return _inexact(Verdict.COUPLED, note, fix, value.origin)
    fault = Fault(FaultKind.COUPLING, value.origin, value.origin, "")
    fix = fixes.fix_of(fault, walk.axis_name, walk.summed_axes)
    return _inexact(Verdict.COUPLED, "the output is not a sum over examples", fix, value.origin)


def _claim_mis_scaled(walk: Walk, value: Value) -> Claim:
    own, fixed = _scales(value, fixed=False), _scales(value, fixed=True)
    if own == {_ONE} and fixed:
        once = [walk.sites.get(Addend(scale, fixed=True)) for scale in fixed]
        note = "a sum over examples plus a term that does not depend on the batch"
        return _mis_scaled(note, fixes.OUTSIDE, *once)
    lines = [walk.sites.get(term) for term in sorted(value.terms, key=str)]
    if len(own) > 1:
        return _mis_scaled("terms with different denominators are added", fixes.TERMS, *lines)
    if walk.sized is not None and not any(scale.weights for scale in own):
        note = "the number of examples enters other than as the denominator"
        return _mis_scaled(note, fixes.BATCH_SIZE, walk.sized)
    note = "the denominator is neither the number of examples nor a sum of weights"
    return _mis_scaled(note, fixes.TAG["RATIO"], *lines)


def _claim_mean(walk: Walk, total: Value, weight: Value) -> Claim:
    lines = (total.origin, weight.origin)
    if total.kind is Kind.STATISTIC:
        return _claim_statistic(walk, total)
    if _is_sum(total) and _is_sum(weight):
        return _exact(Verdict.RATIO)
    if _is_constant(total) and _is_constant(weight):
        return _exact(Verdict.RATIO)
    if _is_sum(total) and _is_guarded(weight):
        note = "the weight of a Mean is guarded against 0"
        return _inexact(Verdict.RATIO, note, fixes.NO_GUARD, *lines)
    if weight.kind is Kind.STATISTIC:
        return _claim_statistic(walk, weight)
    if total.rows or weight.rows:
        note = "a Mean of rows adds examples of different microbatches"
        return _mis_scaled(note, fixes.NO_DIVISION)
    note = (
        "the total or the weight of a Mean is not a sum over examples, so the microbatches' values "
        "do not add up to the batch's value"
    )
    return _mis_scaled(note, fixes.NO_DIVISION, *lines)


def _claim_sum(walk: Walk, value: Value) -> Claim:
    if value.kind is Kind.STATISTIC:
        return _claim_statistic(walk, value)
    if _is_sum(value):
        return _exact(Verdict.SUM)
    if _is_constant(value):
        note = "a Sum of what is independent of the batch"
        return _mis_scaled(note, fixes.OUTSIDE, value.origin)
    if _is_mean(value):
        note = "a mean over examples tagged Sum: the microbatches' means would be added"
        return _mis_scaled(note, "drop the tag, or return jaxaccum.Sum of the sum", value.origin)
    if value.rows:
        note = "a Sum of rows adds examples of different microbatches"
        return _mis_scaled(note, fixes.NO_DIVISION)
    return _claim_mis_scaled(walk, value)


def _claim_rows(walk: Walk, value: Value) -> Claim:
    along_axis_0 = value.rows and value.layout == Layout((0,), inner=walk.group)
    if (along_axis_0 or value.fixed) and value.scale.trivial:
        return _exact(Verdict.PER_EXAMPLE)
    if value.kind is Kind.STATISTIC:
        return _claim_statistic(walk, value)
    if along_axis_0:
        note = (
            "the rows of Concat are divided by one microbatch's weights, or by its number of "
            "examples"
        )
        return _mis_scaled(note, fixes.UNDIVIDED_ROWS, value.origin)
    note = "Concat of what is not one row per example along axis 0"
    return _mis_scaled(note, fixes.ROWS, value.origin)


def _claim_extremum(value: Value, op: str) -> Claim:
    if value.extremum == op:
        return _exact(Verdict.PER_EXAMPLE)
    if _is_constant(value):
        return _exact(Verdict.UNBATCHED)
    note = f"what is tagged {op.capitalize()} is not the {op}imum over the examples"
    fix = f"return the {op}imum over the examples itself"
    return _inexact(Verdict.COUPLED, note, fix, value.origin)
