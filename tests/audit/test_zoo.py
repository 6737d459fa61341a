"""Losses as people write them: the verdict, the lines that are reported, and none where there is
nothing to report."""

import pathlib
import re

import jax
import pytest

import jaxaccum
from tests.audit import zoo, zoo_models
from tests.audit.zoo import CASES

SOURCES = [module.__file__ for module in (zoo, zoo_models)]
MARKS = {
    mark: (source, number)
    for source in SOURCES
    for number, line in enumerate(pathlib.Path(source).read_text().splitlines(), 1)
    for mark in re.findall(r"# <<(\w+)$", line)
}


def audited(case, **options):
    """As a user would run it, under JAX's own numerics."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loss, *args = case.make()
        return jaxaccum.audit(loss, *args, in_axes=(None, case.axes), **options)


def lines(report):
    frames = [
        frame
        for finding in report.findings
        for frame in (finding.origin, finding.use)
        if frame is not None
    ]
    return {(frame.file, frame.line) for frame in frames if frame.file in SOURCES}


def test_the_zoo_is_whole():
    assert len(CASES) == 66
    assert {mark for case in CASES.values() for mark in case.marks} == set(MARKS)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_verdict_and_lines(name):
    case = CASES[name]
    report = audited(case)
    assert (report.verdict, report.random) == (case.verdict, case.random), report
    assert report.exact == (case.verdict == "MEAN" and not case.random)
    wanted = {MARKS[mark] for mark in case.marks}
    assert lines(report) >= wanted, report
    assert wanted or not lines(report), report
    assert all(finding.fix for finding in report.findings)
