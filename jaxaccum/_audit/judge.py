"""From what a value is to a verdict, and from a verdict and a tag to whether the accumulated
gradient is exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from fractions import Fraction

from jaxaccum._audit import fixes
from jaxaccum._audit.lattice import (
    CONSEQUENCES,
    ONE_EXAMPLE,
    Fault,
    FaultKind,
    Kind,
    Layout,
    Scale,
    Term,
    Value,
)
from jaxaccum._audit.report import Finding, Verdict
from jaxaccum._audit.sources import Site
from jaxaccum._audit.walk import Walk
from jaxaccum._base.source_lines import Frame
from jaxaccum._program.named_outputs import Output

_VERDICT_OF = {
    FaultKind.COUPLING: Verdict.COUPLED, FaultKind.PAIRWISE: Verdict.COUPLED,
    FaultKind.SELECTION: Verdict.COUPLED, FaultKind.STATE: Verdict.COUPLED,
    FaultKind.BATCH_SIZE: Verdict.MIS_SCALED, FaultKind.DERIVATIVE: Verdict.MIS_SCALED,
    FaultKind.UNKNOWN: Verdict.UNKNOWN, FaultKind.POSITION: Verdict.POSITION,
}  # fmt: skip
SEVERITY = [
    Verdict.COUPLED, Verdict.MIS_SCALED, Verdict.UNKNOWN, Verdict.POSITION, Verdict.RATIO,
    Verdict.SUM, Verdict.MEAN, Verdict.PER_EXAMPLE, Verdict.UNBATCHED,
]  # fmt: skip
"""The worst first."""
_IGNORED = ("Stack", "Last", "Carry")
"""Outputs that depend on the partition by their meaning."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """The answer for one output."""

    output: Output
    verdict: Verdict
    exact: bool
    random: bool = False
    findings: tuple[Finding, ...] = ()
    cause: Finding | None = None
    """Why it is not exact; None where it is, or where it draws from a key that the call
    declares."""

    @property
    def rank(self) -> tuple[bool, int]:
        """How bad it is; the smaller, the worse."""
        return self.exact, SEVERITY.index(self.verdict)


@dataclasses.dataclass(frozen=True)
class _Claim:
    """What an output is, before faults: whether that is exact under its tag, and if not, why and
    what to write."""

    verdict: Verdict
    exact: bool
    note: str = ""
    fix: str = ""
    lines: tuple[Site | None, ...] = ()


def judge(walk: Walk, output: Output, values: Sequence[Value]) -> Judged | None:
    """The verdict on one output; None where there is nothing to say."""
    if output.tag in _IGNORED:
        return None
    claim = _claim(walk, output, values)
    faults = frozenset().union(*(v.faults for v in values))
    worst = min(
        (SEVERITY.index(_VERDICT_OF[f.kind]) for f in faults if f.kind in _VERDICT_OF), default=None
    )
    verdict = claim.verdict
    if worst is not None:
        verdict = SEVERITY[worst]
    elif any(f.kind is FaultKind.COLLECTIVE for f in faults):
        verdict = Verdict.COUPLED
    draws = [f for f in faults if f.kind is FaultKind.RANDOM]
    causes, others = _reported(faults)
    findings = [_finding(walk, output, fault) for fault in causes]
    if claim.note and worst is None:
        findings.append(_of_claim(output, claim))
    findings += [_finding(walk, output, fault) for fault in others]
    accumulates = claim.exact and worst is None
    undeclared = next((f for f in others if f.kind is FaultKind.RANDOM and not f.declared), None)
    cause = None
    if not accumulates:
        cause = findings[0]
    elif undeclared is not None:
        cause = _finding(walk, output, undeclared)
    return Judged(
        output, verdict, accumulates and not draws, bool(draws), _distinct(findings), cause
    )


def _reported(faults: Iterable[Fault]) -> tuple[list[Fault], list[Fault]]:
    """The faults that decide the verdict and the others, each in the order of the program, the
    cause first."""
    in_order = sorted(faults, key=lambda f: (f.order, f.note))
    coupled = any(_VERDICT_OF.get(f.kind) is Verdict.COUPLED for f in in_order)
    causes: list[Fault] = []
    for fault in in_order:
        repeated = fault.kind in CONSEQUENCES and any(f.kind is fault.kind for f in causes)
        hidden = coupled and fault.kind is FaultKind.POSITION
        if fault.kind in _VERDICT_OF and not repeated and not hidden:
            causes.append(fault)
    return causes, [f for f in in_order if f.kind not in _VERDICT_OF]


def _finding(walk: Walk, output: Output, fault: Fault) -> Finding:
    frame = lambda site: site.frame if site is not None else None
    fix = fixes.fix_of(fault, walk.axis_name, walk.devices)
    return Finding(
        fault.kind.value,
        frame(fault.origin),
        frame(fault.use),
        fix,
        note=fault.note,
        output=output.name,
    )


def _of_claim(output: Output, claim: _Claim) -> Finding:
    frames = [site.frame for site in claim.lines if site is not None]
    lines = tuple(dict.fromkeys(f for f in frames if f is not None))
    if claim.verdict is Verdict.COUPLED:
        origin = lines[0] if lines else None
        return Finding("coupling", origin, origin, claim.fix, note=claim.note, output=output.name)
    kind = "scale" if claim.verdict is Verdict.MIS_SCALED else "tag"
    said = f"{claim.fix} (at {', '.join(map(_short, lines))})" if lines else claim.fix
    return Finding(kind, None, None, said, note=claim.note, fix_lines=lines, output=output.name)


def _short(frame: Frame) -> str:
    return f"{frame.file.rsplit('/', 1)[-1]}:{frame.line}"


def _distinct(findings: list[Finding]) -> tuple[Finding, ...]:
    kept: dict[object, Finding] = {}
    for finding in findings:
        kept.setdefault((finding.kind, finding.origin, finding.use, finding.output), finding)
    return tuple(kept.values())


# -- what a value is -------------------------------------------------------------------------------


def _scales(value: Value, *, fixed: bool) -> set[Scale]:
    return {term.scale for term in value.terms if term.fixed is fixed}


def _is_sum(value: Value) -> bool:
    """Whether the value over a batch is the sum of its values over the parts of any partition."""
    if value.fixed:
        return value.zero or value.scale == Scale(Fraction(1))
    own = value.kind is Kind.TOTAL and _scales(value, fixed=False) <= {Scale()}
    return own and _scales(value, fixed=True) <= {Scale(Fraction(1))}


def _is_mean(value: Value) -> bool:
    own = value.kind is Kind.TOTAL and _scales(value, fixed=False) == {Scale(Fraction(-1))}
    return own and _scales(value, fixed=True) <= {Scale()}


def _ratio_of(value: Value) -> int | None:
    """The weight that divides all addends, where there is one."""
    scales = _scales(value, fixed=False)
    if (
        value.kind is not Kind.TOTAL
        or len(scales) != 1
        or not _scales(value, fixed=True) <= {Scale()}
    ):
        return None
    (scale,) = scales
    numbers = [w.number for w in scale.weights if w.exponent == -1]
    return numbers[0] if scale.power == 0 and len(scale.weights) == 1 and numbers else None


# -- what it is under its tag ----------------------------------------------------------------------


def _claim(walk: Walk, output: Output, values: Sequence[Value]) -> _Claim:
    if (
        walk.one_by_one
        and output.tag in ("", "Mean", "Sum", "Max", "Min")
        and _of_one_example(values)
    ):
        return _Claim(Verdict.PER_EXAMPLE, True)
    match output.tag:
        case "Mean":
            return _claim_mean(walk, values[0], values[1])
        case "Sum":
            return _claim_sum(walk, values[0])
        case "Concat":
            return _claim_rows(walk, values[0])
        case "Max" | "Min":
            return _claim_extremum(values[0], output.tag.lower())
        case _:
            return _claim_untagged(walk, values[0])


def _of_one_example(values: Sequence[Value]) -> bool:
    """Whether a loss written for one example came to this, so that its microbatches are its
    examples.

    A sum over the examples of such a microbatch is the example's own value too.
    """
    known = all(v.layout == ONE_EXAMPLE if v.rows else v.fixed or _is_sum(v) for v in values)
    own = any(v.rows for v in values)
    return known and own and all(term.scale.trivial for v in values for term in v.terms)


def _claim_untagged(walk: Walk, value: Value) -> _Claim:
    if value.fixed:
        if value.scale.trivial:
            return _Claim(Verdict.UNBATCHED, True)
        return _Claim(
            Verdict.MIS_SCALED,
            False,
            "the loss depends on the size of the batch alone",
            fixes.TERMS,
        )
    if value.rows:
        return _Claim(Verdict.PER_EXAMPLE, False, "rows without a tag", fixes.TAG["PER_EXAMPLE"])
    if value.kind is Kind.STATISTIC:
        return _claim_statistic(walk, value)
    if _is_mean(value):
        return _Claim(Verdict.MEAN, True)
    if _is_sum(value):
        return _Claim(
            Verdict.SUM,
            False,
            "a sum without a tag, which declares a mean",
            fixes.TAG["SUM"],
            (value.origin,),
        )
    if (weight := _ratio_of(value)) is not None:
        note = "a ratio without a tag: each microbatch divides by its own denominator"
        return _Claim(
            Verdict.RATIO, False, note, fixes.TAG["RATIO"], (walk.weights.get(weight), value.origin)
        )
    return _mis_scaled(walk, value)


def _claim_statistic(walk: Walk, value: Value) -> _Claim:
    if value.extremum is not None:
        tag = value.extremum.capitalize()
        note, fix = (
            f"a {value.extremum}imum over examples, which needs the tag {tag}",
            fixes.EXTREMUM.format(tag=tag),
        )
        return _Claim(Verdict.COUPLED, False, note, fix, (value.origin,))
    fix = fixes.fix_of(
        Fault(FaultKind.COUPLING, value.origin, value.origin, ""), walk.axis_name, walk.devices
    )
    return _Claim(
        Verdict.COUPLED, False, "the output is not a sum over examples", fix, (value.origin,)
    )


def _mis_scaled(walk: Walk, value: Value) -> _Claim:
    own, fixed = _scales(value, fixed=False), _scales(value, fixed=True)
    lines = tuple(walk.sites.get(term) for term in sorted(value.terms, key=str))
    if own == {Scale()} and fixed:
        once = tuple(walk.sites.get(Term(scale, fixed=True)) for scale in fixed)
        note = "a sum over examples plus a term that does not depend on the batch"
        return _Claim(Verdict.MIS_SCALED, False, note, fixes.OUTSIDE, once)
    if len(own) > 1:
        return _Claim(
            Verdict.MIS_SCALED,
            False,
            "terms with different denominators are added",
            fixes.TERMS,
            lines,
        )
    if walk.sized is not None and not any(scale.weights for scale in own):
        note, fix = (
            "the number of examples enters the loss other than as its denominator",
            fixes.BATCH_SIZE,
        )
        return _Claim(Verdict.MIS_SCALED, False, note, fix, (walk.sized,))
    note = "the denominator is neither the number of examples nor a sum of weights"
    return _Claim(Verdict.MIS_SCALED, False, note, fixes.TAG["RATIO"], lines)


def _claim_mean(walk: Walk, total: Value, weight: Value) -> _Claim:
    lines = (total.origin, weight.origin)
    if total.kind is Kind.STATISTIC:
        return _claim_statistic(walk, total)
    constant = all(v.fixed and v.scale.trivial for v in (total, weight))
    if (_is_sum(total) and _is_sum(weight)) or constant:
        return _Claim(Verdict.RATIO, True)
    if _is_sum(total) and _is_guarded(weight):
        return _Claim(
            Verdict.RATIO, False, "the weight of a Mean is guarded against 0", fixes.NO_GUARD, lines
        )
    if weight.kind is Kind.STATISTIC:
        return _claim_statistic(walk, weight)
    if total.rows or weight.rows:
        return _Claim(
            Verdict.MIS_SCALED,
            False,
            "a Mean of rows adds examples of different microbatches",
            fixes.NO_DIVISION,
        )
    note = (
        "the parts of a Mean are no sums over examples, so their microbatches' do not add up to "
        "the batch's"
    )
    return _Claim(Verdict.MIS_SCALED, False, note, fixes.NO_DIVISION, lines)


def _is_guarded(weight: Value) -> bool:
    """Whether a weight is a sum over the examples but for a guard."""
    scale = weight.weight
    return (
        scale is not None
        and scale.power == 0
        and all(w.exponent == 1 for w in scale.weights)
        and len(scale.weights) == 1
    )


def _claim_sum(walk: Walk, value: Value) -> _Claim:
    if value.kind is Kind.STATISTIC:
        return _claim_statistic(walk, value)
    if _is_sum(value):
        return _Claim(Verdict.SUM, True)
    if value.fixed and value.scale.trivial:
        return _Claim(
            Verdict.MIS_SCALED,
            False,
            "a Sum of what is independent of the batch",
            fixes.OUTSIDE,
            (value.origin,),
        )
    if _is_mean(value):
        note = "a mean over examples tagged Sum: the microbatches' means would be added"
        return _Claim(
            Verdict.MIS_SCALED,
            False,
            note,
            "drop the tag, or return jaxaccum.Sum of the sum",
            (value.origin,),
        )
    if value.rows:
        return _Claim(
            Verdict.MIS_SCALED,
            False,
            "a Sum of rows adds examples of different microbatches",
            fixes.NO_DIVISION,
        )
    return _mis_scaled(walk, value)


def _claim_rows(walk: Walk, value: Value) -> _Claim:
    plain = value.rows and value.layout == Layout((0,), inner=walk.group)
    if (plain or value.fixed) and value.scale.trivial:
        return _Claim(Verdict.PER_EXAMPLE, True)
    if value.kind is Kind.STATISTIC:
        return _claim_statistic(walk, value)
    if plain:
        note = (
            "the rows of Concat are divided by one microbatch's weights, or by its number of "
            "examples"
        )
        return _Claim(Verdict.MIS_SCALED, False, note, fixes.UNDIVIDED_ROWS, (value.origin,))
    note = "Concat of what is not one row per example along axis 0"
    return _Claim(Verdict.MIS_SCALED, False, note, fixes.ROWS, (value.origin,))


def _claim_extremum(value: Value, op: str) -> _Claim:
    if value.extremum == op:
        return _Claim(Verdict.PER_EXAMPLE, True)
    if value.fixed and value.scale.trivial:
        return _Claim(Verdict.UNBATCHED, True)
    note = f"what is tagged {op.capitalize()} is not the {op}imum over the examples"
    return _Claim(
        Verdict.COUPLED,
        False,
        note,
        f"return the {op}imum over the examples itself",
        (value.origin,),
    )
