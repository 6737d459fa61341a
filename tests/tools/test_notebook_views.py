"""What a notebook and a waiting user see: tables of HTML with all text escaped, and progress."""

import ast
import dataclasses
import html.parser
import io
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxaccum
from jaxaccum._audit import report as reports
from jaxaccum._base import markup
from jaxaccum._tools.plan import Plan, Row
from tests.support.helpers import data, refused

W, BATCH = data(3), {"x": data(8, 3), "y": data(8, seed=1)}
SHAPES = jax.ShapeDtypeStruct((16, 16), jnp.float32), jax.ShapeDtypeStruct((64, 16), jnp.float32)


class Reader(html.parser.HTMLParser):
    """HTML, read by the standard library's parser: rows of tables, marked text, elements' names."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.marked, self.names, self.text = [], [], set(), ""
        self.open = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "mark":
            self.marked.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "mark" in self.open:
            self.marked[-1] += data


NAMES = {"p", "b", "table", "tr", "th", "td", "pre", "mark"}


def rms(w, b):
    e = jnp.where(b["y"] < 1, b["x"] @ w - b["y"], 0)  # <script>alert("&")</script>
    return jnp.sqrt(jnp.mean(e**2)), {"<img src=x>": jnp.sum(b["y"]) < 3}


def terms(w, b):
    error = (b["x"] @ w - b["y"]) ** 2
    return {"fit": jnp.mean(error), "<i>root</i>": jnp.sqrt(jnp.sum(error))}


def marked_lines(text):
    return [line.strip() for line in text.splitlines() if re.match(r"\s+> +\d+ \|", line)]


@pytest.mark.parametrize(("loss", "has_aux"), [(rms, True), (terms, False)])
def test_a_report_in_a_notebook_says_what_its_text_says(loss, has_aux):
    report = jaxaccum.audit(loss, W, BATCH, has_aux=has_aux)
    report = dataclasses.replace(report, probe=reports.Probe(None, note="a < b"))
    assert not report.exact
    shown = Reader(report._repr_html_())
    assert shown.names <= NAMES
    assert [line.strip() for line in shown.marked] == marked_lines(str(report))
    assert shown.marked
    for finding in report.findings:
        (row,) = [row for row in shown.rows if row[0].startswith(f"{finding.kind}: {finding.note}")]
        assert finding.fix in row[2]
    for name, verdict, exact in report.terms:
        assert [name, verdict, "" if exact else "not exact"] in shown.rows
    words = squeezed(shown.text)
    terms_end = 1 + len(report.terms)
    first, *others = [*str(report).splitlines()[:1], *str(report).splitlines()[terms_end:]]
    assert shown.text.startswith(first)
    missing = [line for line in others if squeezed(line).removeprefix("fix: ") not in words]
    assert not missing


def squeezed(text):
    return " ".join(text.split())


def test_text_that_is_not_escaped_fails_the_same_reading(monkeypatch):
    """The negative control: without the escape, a comment of the user's becomes an element."""
    monkeypatch.setattr(markup.html, "escape", lambda text: text)
    page = jaxaccum.audit(rms, W, BATCH, has_aux=True)._repr_html_()
    assert "<script>" in page
    with pytest.raises(AssertionError):
        assert Reader(page).names <= NAMES


def test_a_line_that_is_not_marked_fails_the_same_reading(monkeypatch):
    report = jaxaccum.audit(terms, W, BATCH)
    monkeypatch.setattr(markup, "_line", markup.escaped)
    assert marked_lines(str(report))
    assert not Reader(report._repr_html_()).marked


def test_an_exact_report_and_one_without_lines():
    exact = jaxaccum.audit(lambda w, b: jnp.mean(b["x"] @ w), W, BATCH)
    assert Reader(exact._repr_html_()).text == str(exact)
    finding = reports.Finding("unknown", None, None, "", note="a < b")
    report = reports.AuditReport(reports.Verdict.UNKNOWN, False, False, (finding,))
    assert Reader(report._repr_html_()).rows == [
        ["finding", "where", "fix"],
        ["unknown: a < b", "", ""],
    ]


def network(w, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)


def centred(w, x):
    h = jnp.tanh(x @ w)
    return jnp.mean((h - lax.pmean(jnp.mean(h, axis=0, keepdims=True), "microbatch")) ** 2)


def planned_by_hand(coupled):
    """Three sizes: one that fits, the best, and one over the limit."""
    rest = {"flops": 100.0, "compiled": True, "predicted_temp_bytes": None}
    rows = [Row(m, 8 // m, "store", m, 1000 * m, fits=m < 4, **rest) for m in (1, 2, 4)]
    return Plan(tuple(rows), 2000, coupled, (3, 5))


@pytest.mark.parametrize("coupled", [False, True])
def test_a_plan_in_a_notebook_is_the_table_of_its_text(coupled):
    plan = planned_by_hand(coupled)
    page = plan._repr_html_()
    shown = Reader(page)
    lines = [line.split() for line in str(plan).splitlines()]
    assert [" ".join(row).split() for row in shown.rows] == lines[:4]
    assert shown.text.endswith("\n".join(str(plan).splitlines()[4:]))
    assert Reader(re.findall(r'<tr style="font-weight:bold">.*</tr>', page)[0]).rows[0][:3] == [
        "best",
        "2",
        "4",
    ]
    assert Reader(re.findall(r'<tr style="opacity:0.5">.*</tr>', page)[0]).rows[0][:3] == [
        "over",
        "4",
        "2",
    ]


class Terminal(io.StringIO):
    """Standard error that is a terminal: what is written, and what a reader sees at each flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def isatty(self):
        return True

    def flush(self):
        screen = ""
        for part in self.getvalue().split("\r"):
            screen = (
                part + screen[len(part) :]
            )  # the cursor goes back, and what follows is overwritten
        self.seen.append(screen.rstrip())


ONE = {"memory_bytes": 14_000, "microbatch_size": 16}


def compiled(plan):
    return {
        f"plan: compiling microbatch_size={row.microbatch_size}"
        for row in plan.rows
        if row.compiled
    }


def test_a_plan_says_what_it_compiles_before_it_does(monkeypatch):
    said, compiles = [], []
    real = jax.stages.Lowered.compile
    counted = lambda lowered: compiles.append(len(said)) or real(lowered)
    monkeypatch.setattr(jax.stages.Lowered, "compile", counted)
    plan = jaxaccum.plan(network, *SHAPES, memory_bytes=14_000, progress=said.append)
    assert said[0] == "plan: tracing the loss"
    assert set(said[1:]) == compiled(plan)
    assert compiles == list(range(2, len(said) + 1))  # each is said, then compiled
    options = {"memory_bytes": 10**6, "microbatch_size": 32, "memory": "store"}
    jaxaccum.plan(centred, *SHAPES, **options, progress=said.append)
    assert said[-1] == "plan: compiling microbatch_size=32, memory='store'"


def test_on_a_terminal_the_line_is_shown_and_removed(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    plan = jaxaccum.plan(network, *SHAPES, **ONE)
    assert set(terminal.seen) == {"plan: tracing the loss", "", *compiled(plan)}
    assert terminal.seen[-1] == ""
    refused(
        lambda: jaxaccum.plan(lambda w, x: 1 / 0, *SHAPES, memory_bytes=1), error=ZeroDivisionError
    )
    assert terminal.seen[-1] == ""


def test_elsewhere_nothing_is_written(capsys):
    jaxaccum.plan(network, *SHAPES, **ONE)
    assert capsys.readouterr() == ("", "")
    call = lambda: jaxaccum.plan(network, *SHAPES, **ONE, progress=True)
    refused(call, "progress=True", "print")


EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


def shows_progress(source):
    """Whether `run` takes `track`, and hands it items or passes it on."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    (run,) = [function for function in functions if function.name == "run"]
    takes = "track" in [argument.arg for argument in run.args.kwonlyargs]
    calls = [node for node in ast.walk(run) if isinstance(node, ast.Call)]
    hands = [call for call in calls if getattr(call.func, "id", None) == "track"]
    passes = [keyword for call in calls for keyword in call.keywords if keyword.arg == "track"]
    return takes and bool(hands or passes)


def test_every_experiment_shows_its_progress():
    names = [path for path in sorted(EXPERIMENTS.glob("*.py")) if not path.name.startswith("_")]
    assert [path.name for path in names if not shows_progress(path.read_text())] == []
    silent = (EXPERIMENTS / "speed.py").read_text().replace("in track(", "in list(")
    assert not shows_progress(silent)
