"""From what a value is to a verdict, and from a verdict and a tag to whether the accumulated
gradient is exact.

The problem. The walk ends with a `Value` for each output: a kind, a scale, and a set of faults. The
user wants one word, one line of the program, and what to write there.

The idea. Without faults, kind, scale and tag decide: the `Claim` (`claims`). A fault is stronger
than any claim, and the verdict is the worst fault's. The first fault in the order of the program is
the cause that is reported first; those that only follow from it are left out.

Two outputs, step by step::

    mean(r)               a mean, without a tag               MEAN: exact
    mean((h - m) ** 2)    a mean, with the fault `coupling`   COUPLED, from the line of m, used at
                                                              that of h - m; the fix: lax.pmean

Three kinds of faults are only told. A draw that depends on the partition leaves the verdict, but
the output is then not exact. A collective over the loop's axis makes the verdict COUPLED, and the
output is exact: `_coupled` runs such a loss. An assumption changes neither.

The cost. One pass over the faults of each output.

The weakness. A fault counts wherever the output is computed from it, even where it cancels or is
multiplied by 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

from jaxaccum._audit import fixes
from jaxaccum._audit.claims import Claim, claim_of, claim_of_update
from jaxaccum._audit.lattice import CONSEQUENCES, Fault, FaultKind, Value, faults_of
from jaxaccum._audit.report import Finding, Verdict
from jaxaccum._audit.sources import Site, line_of
from jaxaccum._audit.states import Update
from jaxaccum._audit.walk import Walk
from jaxaccum._base.source_lines import Frame
from jaxaccum._program.named_outputs import Output

_VERDICT_OF = {
    FaultKind.COUPLING: Verdict.COUPLED, FaultKind.PAIRWISE: Verdict.COUPLED,
    FaultKind.SELECTION: Verdict.COUPLED, FaultKind.STATE: Verdict.COUPLED,
    FaultKind.BATCH_SIZE: Verdict.MIS_SCALED, FaultKind.DERIVATIVE: Verdict.MIS_SCALED,
    FaultKind.UNKNOWN: Verdict.UNKNOWN, FaultKind.GATHERED: Verdict.UNKNOWN,
    FaultKind.POSITION: Verdict.POSITION,
}  # fmt: skip
"""What a fault makes of the verdict; of the others, the verdict stays what it is."""
SEVERITY = [
    Verdict.COUPLED, Verdict.MIS_SCALED, Verdict.UNKNOWN, Verdict.POSITION, Verdict.RATIO,
    Verdict.SUM, Verdict.MEAN, Verdict.PER_EXAMPLE, Verdict.UNBATCHED,
]  # fmt: skip
"""The worst first."""


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


def judge(
    walk: Walk, output: Output, values: Sequence[Value], update: Update | None = None
) -> Judged | None:
    """The verdict on one output; None where there is nothing to say.

    Of the state of a model it is one on its `update`: `values` hold what decides about that.
    """
    if update is not None:
        claim = claim_of_update(walk, update, values[0])
        if update.kind == "changes":  # its faults are those of the state before
            finding = _of_claim(output, claim)
            return Judged(output, claim.verdict, False, findings=(finding,), cause=finding)
    elif (claim := claim_of(walk, output, values)) is None:
        return None
    faults = faults_of(values)
    kinds = {fault.kind for fault in faults}
    worst = _worst(kinds)
    verdict = worst or (Verdict.COUPLED if FaultKind.COLLECTIVE in kinds else claim.verdict)
    causes, others = _reported(faults, coupled=worst is Verdict.COUPLED)
    claimed = [_of_claim(output, claim)] if claim.note and worst is None else []
    finding = functools.partial(_finding, walk, output)
    findings = [*map(finding, causes), *claimed, *map(finding, others)]
    accumulates, random = claim.exact and worst is None, FaultKind.RANDOM in kinds
    cause: Finding | None = None
    if not accumulates:
        cause = findings[0]
    elif undeclared := [f for f in others if f.kind is FaultKind.RANDOM and not f.declared]:
        cause = finding(undeclared[0])
    return Judged(output, verdict, accumulates and not random, random, _distinct(findings), cause)


def _worst(kinds: Iterable[FaultKind]) -> Verdict | None:
    """The worst verdict that faults bring; None where they leave it as it is."""
    verdicts = set(map(_VERDICT_OF.get, kinds))
    return next((verdict for verdict in SEVERITY if verdict in verdicts), None)


def _reported(faults: Iterable[Fault], *, coupled: bool) -> tuple[list[Fault], list[Fault]]:
    """The faults that decide the verdict and the others, each in the order of the program, the
    cause first."""
    causes: list[Fault] = []
    others: list[Fault] = []
    repeated: set[FaultKind] = set()
    for fault in sorted(faults, key=lambda f: (f.order, f.note)):
        if fault.kind not in _VERDICT_OF:
            others.append(fault)
            continue
        hidden = coupled and fault.kind is FaultKind.POSITION
        if fault.kind not in repeated and not hidden:
            causes.append(fault)
        if fault.kind in CONSEQUENCES:
            repeated.add(fault.kind)
    return causes, others


# -- what is said ----------------------------------------------------------------------------------


def _finding(walk: Walk, output: Output, fault: Fault) -> Finding:
    origin, use = line_of(fault.origin), line_of(fault.use)
    fix = fixes.fix_of(fault, walk.axis_name, walk.summed_axes)
    return Finding(fault.kind.value, origin, use, fix, note=fault.note, output=output.name)


def _of_claim(output: Output, claim: Claim) -> Finding:
    lines = _lines(claim.lines)
    if claim.verdict is Verdict.COUPLED:
        origin = lines[0] if lines else None
        return Finding("coupling", origin, origin, claim.fix, note=claim.note, output=output.name)
    kind = "scale" if claim.verdict is Verdict.MIS_SCALED else "tag"
    at = f" (at {', '.join(map(_short, lines))})" if lines else ""
    fix, name = f"{claim.fix}{at}", output.name
    return Finding(kind, None, None, fix, note=claim.note, fix_lines=lines, output=name)


def _lines(sites: Iterable[Site | None]) -> tuple[Frame, ...]:
    """The lines of sites, each once."""
    found: dict[Frame, None] = {}
    for site in sites:
        if (line := line_of(site)) is not None:
            found[line] = None
    return tuple(found)


def _short(frame: Frame) -> str:
    return f"{frame.file.rsplit('/', 1)[-1]}:{frame.line}"


def _distinct(findings: list[Finding]) -> tuple[Finding, ...]:
    kept: dict[object, Finding] = {}
    for finding in findings:
        kept.setdefault((finding.kind, finding.origin, finding.use, finding.output), finding)
    return tuple(kept.values())
