"""What the audit says: a verdict, the lines that cause it, and what to write instead."""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import linecache
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from jaxaccum._base.markup import Markup, element, joined, source, table
from jaxaccum._base.source_lines import Frame


class Verdict(enum.StrEnum):
    """How a loss depends on the examples of its batch; as a string, its own name."""

    SUM = "SUM"
    MEAN = "MEAN"
    RATIO = "RATIO"
    PER_EXAMPLE = "PER_EXAMPLE"
    UNBATCHED = "UNBATCHED"
    MIS_SCALED = "MIS_SCALED"
    POSITION = "POSITION"
    COUPLED = "COUPLED"
    UNKNOWN = "UNKNOWN"


MEANING = {
    Verdict.SUM: "a sum over examples",
    Verdict.MEAN: "a mean over examples",
    Verdict.RATIO: "a sum over examples divided by the sum of their weights",
    Verdict.PER_EXAMPLE: "one entry per example",
    Verdict.UNBATCHED: "independent of the batch",
    Verdict.MIS_SCALED: "its parts scale differently with the size of the batch",
    Verdict.POSITION: "an example's part depends on its place in the batch",
    Verdict.COUPLED: "its examples are coupled",
    Verdict.UNKNOWN: "the analysis cannot decide",
}


class InexactWarning(UserWarning):
    """The accumulated gradient is not, or may not be, the full batch's."""


class InexactError(ValueError, AssertionError):
    """The accumulated gradient is not, or may not be, the full batch's: a bad argument, and a
    failed check."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One reason for the verdict.

    Attributes:
        kind: coupling, pairwise, selection, state, batch_size, derivative, position, random,
            closure, unknown, gathered, collective, scale, tag; in an exact report, what it rests
            on: collective, assumption.
        origin: the line where examples first meet, or None.
        use: the line that makes it matter, or None.
        fix: what to write instead.
        note: what happens there.
        fix_lines: the lines that the fix speaks of.
        output: which output it concerns.
    """

    kind: str
    origin: Frame | None
    use: Frame | None
    fix: str
    note: str = ""
    fix_lines: tuple[Frame, ...] = ()
    output: str = "the loss"

    def __str__(self) -> str:
        return "\n".join(_finding_lines(self))


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the numbers say.

    Attributes:
        exact: whether the accumulated value and gradient equal the full batch's; None where they
            could not be computed.
        rule: how the microbatches' own values combine to the full batch's: "SUM", "MEAN", or None.
        errors: the largest difference of each leaf, over the largest entry of all.
        sizes: of the microbatches.
        note: why it, or the rule, could not be computed.
        dtype: the narrowest floating dtype that the loss computes in, whose rounding is allowed.
    """

    exact: bool | None
    rule: str | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    note: str = ""
    dtype: str = "float64"

    def __str__(self) -> str:
        split = " + ".join(map(str, self.sizes))
        if self.exact is None:
            return f"probe: could not be computed ({self.note})"
        said = "equal" if self.exact else "NOT equal"
        worst = max(self.errors, key=lambda name: self.errors[name], default="")
        rule = self.note or "no rule combines the microbatches"
        if self.rule:
            rule = f"the microbatches' own losses combine as a {self.rule}"
        return (
            f"probe: {said} in {self.dtype} over {split} examples (largest error "
            f"{self.errors[worst]:.2g}, {worst}); {rule}"
        )


@dataclasses.dataclass(frozen=True)
class AuditReport:
    """The answer of `jaxaccum.audit`.

    Attributes:
        verdict: how the loss depends on its examples; of a dict, its worst term's.
        exact: whether ``value_and_grad(fun, …)`` as called equals the full batch, aux included
            where it is comparable.
        random: whether random draws depend on how the batch is split.
        findings: why not, line by line, each with its fix.
        terms: the verdict of each output by its name.
        probe: the numeric check, where it was asked for.
    """

    verdict: Verdict
    exact: bool
    random: bool
    findings: tuple[Finding, ...]
    terms: tuple[tuple[str, Verdict, bool], ...] = ()
    probe: Probe | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    """How often each primitive was walked."""
    causes: tuple[Finding, ...] = dataclasses.field(default=(), repr=False, compare=False)
    """Of each output that is not exact, why: what a call warns of. A key that the call declares is
    no reason."""

    def raise_if_inexact(self) -> None:
        """Raise unless the loss can be accumulated as it stands: for the first line of a training
        script."""
        if not self.exact:
            raise InexactError(f"{self}\n(jaxaccum.audit)")

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def __rich__(self) -> Any:
        """The same in color, for ``rich.print``."""
        from rich.text import Text

        text = Text(str(self))
        text.highlight_regex(r"(?m)^\S.*$", "bold green" if self.exact else "bold red")
        text.highlight_regex(r"(?m)^\s+> .*$", "yellow")
        text.highlight_regex(r"(?m)^\s+fix: .*$", "cyan")
        return text

    def _repr_html_(self) -> str:
        """The same in a notebook: one row per finding, with its lines of source."""
        left = "text-align:left; vertical-align:top"
        parts = [element("p", element("b", self._answer()))]
        if len(self.terms) > 1:
            rows = [_term_cells(term) for term in self.terms]
            parts.append(table(("output", "verdict", ""), rows, cells=left))
        if self.findings:
            rows = [_finding_cells(finding) for finding in self.findings]
            parts.append(table(("finding", "where", "fix"), rows, cells=left))
        if self.probe is not None:
            parts.append(element("p", str(self.probe)))
        return joined(parts, "\n")

    def show(self) -> None:
        """Print it, in color where rich is installed."""
        if importlib.util.find_spec("rich"):
            from rich.console import Console

            Console().print(self, soft_wrap=True)
        else:
            print(self)

    def _answer(self) -> str:
        answer = "accumulates exactly"
        if self.verdict is Verdict.UNKNOWN:
            answer = "may not accumulate exactly"
        elif not self.exact:
            answer = "does not accumulate exactly, as it stands"
        random = " (random draws depend on the split)" if self.random else ""
        return f"{self.verdict}: {MEANING[self.verdict]}; it {answer}{random}"

    def _lines(self) -> Iterator[str]:
        yield self._answer()
        if len(self.terms) > 1:
            for name, verdict, exact in self.terms:
                yield f"  {name}: {verdict}{'' if exact else ', not exact'}"
        for finding in self.findings:
            yield from _finding_lines(finding)
        if self.probe is not None:
            yield f"  {self.probe}"


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield f"  {_said(finding)}"
    yield from _places(finding)
    if finding.fix:
        yield f"    fix: {finding.fix}"
    yield from _fix_places(finding)


def _term_cells(term: tuple[str, Verdict, bool]) -> tuple[str, Verdict, str]:
    name, verdict, exact = term
    return name, verdict, "" if exact else "not exact"


def _finding_cells(finding: Finding) -> tuple[str, str, str]:
    """The same as cells of a table: what was found, where, and the fix with its lines."""
    fix = joined([finding.fix, _source(_fix_places(finding))])
    return _said(finding), _source(_places(finding)), fix


def _source(lines: Iterable[str]) -> Markup:
    return source(textwrap.dedent("\n".join(lines)).splitlines())


def _said(finding: Finding) -> str:
    where = "" if finding.output == "the loss" else f" [{finding.output}]"
    return f"{finding.kind}: {finding.note}{where}"


def _places(finding: Finding) -> Iterator[str]:
    """The line where examples first meet, and the line that makes it matter."""
    origin, use = finding.origin, finding.use
    if use == origin:
        use = None
    if origin is not None:
        yield from _marked(origin, "from" if use is not None else "at")
    if use is not None:
        yield from _marked(use, "used at" if origin is not None else "at")


def _fix_places(finding: Finding) -> Iterator[str]:
    for frame in finding.fix_lines:
        yield from _marked(frame, "    line", around=0)


def _marked(frame: Frame, word: str, around: int = 1) -> Iterator[str]:
    """A line of the source with its neighbours."""
    yield f"    {word} {frame}"
    for number in range(frame.line - around, frame.line + around + 1):
        code = linecache.getline(frame.file, number).rstrip()
        if code:
            yield f"      {'>' if number == frame.line else ' '} {number:4d} | {code}"
