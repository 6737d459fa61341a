"""Is any other way to accumulate gradients faster or smaller than jaxaccum, and is it right?

Nine models, from one that is all dispatch to one that is all convolutions; each against a
hand-written `lax.scan`, the recipe with references of JAX's documentation, an unrolled loop, the
gradient of a checkpointed scan, `optax.microbatching`, `optax.MultiSteps` in a host loop, PyTorch's
eager loop, `torch.compile`, Accelerate's `accumulate`, for the contrastive loss GradCache, and the
full batch for scale. Of each way:

- the time of an AdamW step with donated state, in pairs with ours;
- the bytes beyond parameters, AdamW's state and the batch (as compiled; of torch, the peak of
  resident memory);
- the seconds of tracing and compiling;
- the error of the gradient, of the very program that is timed, against the full batch in float64.

A way whose gradient is wrong is shown, and competes with nobody.

Command   python -m experiments bench [--full]
Cost      about ten minutes on two free cores: 8 microbatches, and half of the ways at 2; an hour or
          more with --full, which takes every way at 1 to 16, and compiles with torch
Expected  no way that is right is faster by more than 3 % at equal memory; ours needs at most 1.1
          times the bytes of one accumulator and one microbatch's step
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import _bench_rivals as rivals
from experiments import _bench_timing as timing
from experiments import _bench_torch, _report
from experiments._bench_cases import CASES, Case, Params
from experiments._bench_why import why
from jaxaccum._jaxpr.flops import flops
from jaxaccum.testing.bounds import normwise

ROUNDING = 2**8 * float(jnp.finfo(jnp.float32).eps)
"""Normwise, in float32: sums of some thousand products, in another order. A wrong rule is far
beyond it."""
TIME, EQUAL, MEMORY = 1.03, 1.05, 1.1
FEW = (
    rivals.OURS,
    rivals.FULL,
    rivals.SCAN,
    rivals.REFS,
    "GradCache",
)  # the ways beside the main number, by default
MAIN = 8
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limit:
    """What to measure by: one accumulator and what a microbatch's gradient needs alone, or what its
    whole step needs; the operations of the full batch and the bytes of AdamW at the machine's peak.

    `allowed` is one accumulator and the whole step of one microbatch: inside of a loop, gradients
    of single matrices are made before they are added.
    """

    memory: int
    allowed: int
    seconds: float


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    cases: Sequence[str] = tuple(CASES),
    sizes: dict[str, dict[str, Any]] | None = None,
    numbers: Sequence[int] | None = None,
    rounds: int = 30,
    seconds: float = 3.0,
    torch: bool = True,
) -> _report.Record:
    """Measure every case at every number of microbatches; `sizes` are options of the cases, by
    their names."""
    options = sizes or {}
    numbers = numbers or ((1, 2, 4, 8, 16) if full else (2, MAIN))
    peak = timing.peak()
    rows: list[dict[str, Any]] = []
    for name, n in track([(name, n) for name in cases for n in numbers], "bench"):
        bench = Bench(CASES[name](**options.get(name, {})), n, options.get(name, {}), peak)
        rows += bench.rows(
            bench.names(full=full, torch=torch), rounds=rounds, seconds=seconds * (3 if full else 1)
        )
    best = {"peak GFLOP/s": peak.flops / 1e9, "peak GB/s": peak.bytes / 1e9}
    return record(rows, {**timing.machine(), **best, "numbers": list(numbers), "sizes": options})


def record(rows: list[dict[str, Any]], settings: dict[str, Any]) -> _report.Record:
    """Table, checks and picture of what was measured."""
    return _report.Record(
        name="bench",
        question=(
            "Is any other way to accumulate gradients faster or smaller than jaxaccum, and is it "
            "right?"
        ),
        settings=settings,
        rows=[shown(row) for row in rows],
        checks=checks(rows),
        figure=picture(rows),
        data={"rows": rows},
        text="\n".join(won(row) for row in rows if row["verdict"] in WINS)
        or "No way that is right wins anywhere.",
    )


# -- one case at one number of microbatches --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bench:
    """A case at a number of microbatches."""

    case: Case
    n: int
    options: dict[str, Any]
    peak: timing.Peak

    def names(self, *, full: bool, torch: bool) -> list[str]:
        """The ways to measure."""
        here = rivals.names(self.case)
        if full or self.n == MAIN:
            return [*here, *(_bench_torch.loops(self.case, full=full) if torch else ())]
        return [name for name in here if name in FEW]

    def rows(self, names: Sequence[str], *, rounds: int, seconds: float) -> list[dict[str, Any]]:
        """A row for each way: compiled, run once for its gradient, and then timed against ours."""
        wanted, limit = oracle(self.case), self.limit()
        ways = {name: self.made(name) for name in names}
        errors = {}
        for name, way in ways.items():
            way.run()
            errors[name] = normwise(way.gradient(), wanted)
        runs = {
            name: way.run for name, way in ways.items()
        }  # ours too: against itself, it shows what chance does
        pairs = timing.in_pairs(ways[rivals.OURS].run, runs, rounds=rounds, seconds=seconds)
        rows = [
            self.row(name, ways[name], errors[name], pairs=pairs[name], limit=limit)
            for name in names
        ]
        ours = [row for row in rows if row["way"] in rivals.ALL_OURS]
        return [row | {"verdict": verdict(row, ours)} for row in rows]

    def made(self, name: str) -> rivals.Way:
        """A way, compiled."""
        if name in _bench_torch.LOOPS:
            return _bench_torch.made(name, self.case, self.n, self.options)
        return rivals.made(name, self.case, self.n)

    def row(
        self, name: str, way: rivals.Way, error: float, *, pairs: timing.Pairs, limit: Limit
    ) -> dict[str, Any]:
        """What was measured of one way."""
        low, middle, high = pairs.quartiles
        return {
            "case": self.case.name,
            "N": self.n,
            "way": name,
            "seconds": float(np.median(timing.walls(pairs.rival))),
            "ours / its": middle,
            "quartiles": [low, high],
            "ours / its, processor": pairs.cpu_ratio,
            "pairs": len(pairs.ours),
            "bytes": way.memory,
            "bytes / limit": None if way.memory is None else way.memory / limit.memory,
            "error": error,
            "trace": way.trace,
            "compile": way.compile,
            "parameter bytes": self.case.parameter_bytes,
            "limit bytes": limit.memory,
            "allowed bytes": limit.allowed,
            "limit seconds": limit.seconds,
        }

    def limit(self) -> Limit:
        """Compiled from one microbatch alone, and counted."""
        rows = jax.tree.map(lambda leaf: leaf[: len(leaf) // self.n], self.case.batch)
        own = jax.jit(jax.value_and_grad(self.case.mean)).lower(self.case.params, rows).compile()
        step = rivals.compiled_step(
            jax.value_and_grad(self.case.mean), dataclasses.replace(self.case, batch=rows)
        )
        whole = jax.make_jaxpr(jax.grad(self.case.mean))(self.case.params, self.case.batch)
        size = self.case.parameter_bytes
        # AdamW reads and writes parameters and two moments; the gradient is written and read.
        least = self.peak.seconds(flops(whole.jaxpr), 8 * size)
        alone = step.memory or 0
        return Limit(max(size + rivals.temporary(own), alone), size + alone, least)


def oracle(case: Case) -> Params:
    """The gradient of the full batch in float64, by JAX alone."""
    with jax.enable_x64(True):
        params, batch = jax.tree.map(wide, (case.params, case.batch))
        return jax.tree.map(np.asarray, jax.jit(jax.grad(case.mean))(params, batch))


def wide(leaf: np.ndarray) -> jax.Array:
    """In float64, if it is a float."""
    return jnp.asarray(leaf, jnp.float64 if np.issubdtype(leaf.dtype, np.floating) else leaf.dtype)


# -- who wins --------------------------------------------------------------------------------------

WRONG, REFERENCE, EVEN = "wrong gradient", "reference", ""
FASTER, SMALLER, BOTH = "faster, with more memory", "smaller", "faster at equal memory"
WINS = (FASTER, SMALLER, BOTH)


def verdict(row: dict[str, Any], ours: Sequence[dict[str, Any]]) -> str:
    """Whether a way beats ours: our default, the first of `ours`, and `unroll=True`.

    It is faster where three of four pairs say so by more than 3 %, by more than chance makes our
    default against itself, and where the processor's seconds say so too: faster than each of ours
    that needs its memory at most, or, where none does, than our default. It is smaller where it
    needs less than each of ours that is as fast.
    """
    if row["error"] > ROUNDING:
        return WRONG
    if row["way"] in (*rivals.ALL_OURS, rivals.FULL):
        return REFERENCE
    default = {**ours[0], "ours / its": 1.0, "ours / its, processor": 1.0}
    every = [default, *ours[1:]]
    chance = max(TIME, ours[0]["quartiles"][1])
    size = None if row["way"] in _bench_torch.LOOPS else row["bytes"]
    if size is None:
        return FASTER if is_faster(row, default, chance) else EVEN
    within = [one for one in every if one["bytes"] <= EQUAL * size]
    fast = all(is_faster(row, one, chance) for one in within or [default])
    if fast and size <= EQUAL * ours[0]["bytes"]:
        return BOTH
    as_fast = [one for one in every if TIME * one["ours / its"] >= row["ours / its"]]
    least = min((one["bytes"] for one in as_fast), default=0)
    if least - size > max(MIB, (EQUAL - 1) * least):
        return SMALLER
    return FASTER if fast else EVEN


def is_faster(row: dict[str, Any], one: dict[str, Any], chance: float) -> bool:
    """Whether a way is faster than one of ours, both measured against our default."""
    sure = row["quartiles"][0] > chance * one["ours / its"]
    return sure and row["ours / its, processor"] > TIME * one["ours / its, processor"]


def won(row: dict[str, Any]) -> str:
    """A win of a rival, in words."""
    place = (
        f"{row['case']}, N = {row['N']}: {row['way']} is {row['verdict']} ({row['ours / its']:.2f} "
        "in time)"
    )
    return f"{place}: {why(row['case'], row['way'])}"


def checks(rows: list[dict[str, Any]]) -> list[_report.Check]:
    """Ours is right, a wrong rival is seen, and neither time nor memory is lost."""
    ours = [row for row in rows if row["way"] == rivals.OURS]
    equal = [row for row in rows if row["verdict"] == BOTH]
    found = [
        _report.Check(
            "jaxaccum: largest error of a gradient, float32",
            max(row["error"] for row in ours),
            ROUNDING,
        ),
        _report.Check(
            "a right way at equal memory: lower quartile of ours / its",
            max((row["quartiles"][0] for row in equal), default=0.0),
            TIME,
        ),
        _report.Check(
            "jaxaccum: bytes / (one accumulator and the step of one microbatch)",
            max(
                (row["bytes"] / row["allowed bytes"] for row in ours if row["bytes"] > MIB),
                default=0.0,
            ),
            MEMORY,
        ),
    ]
    usual = [row["error"] for row in rows if row["way"] == rivals.USUAL]
    if usual:
        found.append(
            _report.Check(
                "rounding / the usual scan's error, where it is wrong", ROUNDING / min(usual), 0.1
            )
        )
    return found


# -- what is shown ---------------------------------------------------------------------------------


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    low, high = row["quartiles"]
    beaten = row["verdict"] in WINS
    return {
        "case": row["case"],
        "N": row["N"],
        "way": row["way"],
        "ms": 1e3 * row["seconds"],
        "ours / its": row["ours / its"],
        "quartiles": f"{low:.2f}–{high:.2f}",
        "processor": row["ours / its, processor"],
        "MiB": None if row["bytes"] is None else row["bytes"] / MIB,
        "/ limit": row["bytes / limit"],
        "error": row["error"],
        "trace s": row["trace"],
        "compile s": row["compile"],
        "why": f"{row['verdict']}: {why(row['case'], row['way'])}" if beaten else row["verdict"],
    }


STYLES: dict[str, dict[str, Any]] = {
    rivals.OURS: {"color": _report.BLUE, "marker": "o", "markersize": 7, "linewidth": 2},
    rivals.UNROLLED: {"color": _report.BLUE, "marker": "^", "markersize": 7},
    rivals.FULL: {"color": _report.BLACK, "linestyle": "--", "linewidth": 1.2},
    rivals.SCAN: {"color": _report.RED, "marker": "s", "markersize": 9},
    rivals.REFS: {"color": _report.PINK, "marker": "D", "markersize": 5},
    "unrolled": {"color": _report.GREEN, "marker": "^", "markersize": 7},
    "checkpointed scan": {"color": "#999999", "marker": "v", "markersize": 6},
    "optax.microbatching": {"color": _report.ORANGE, "marker": "x", "markersize": 7},
    "optax.MultiSteps": {"color": _report.ORANGE, "marker": "+", "markersize": 9},
    "GradCache": {"color": _report.GREEN, "marker": "P", "markersize": 7},
    "torch eager": {"color": _report.SKY, "marker": "*", "markersize": 9},
    "torch.compile": {"color": _report.SKY, "marker": "1", "markersize": 9},
}


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Time and memory against N, a pair of panels for each case; dotted, what no way can do
    without."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, axes = _report.panels(4, rows=-(-len(cases) // 2), height=2.8)
    for panel in axes[2 * len(cases) :]:
        panel.set_axis_off()
    for i, case in enumerate(cases):
        own = [row for row in rows if row["case"] == case and row["verdict"] != WRONG]
        times, sizes = axes[2 * i : 2 * i + 2]
        for way, style in STYLES.items():
            points = [row for row in own if row["way"] == way]
            draw(times, points, "seconds", way, style, 1e3)
            draw(
                sizes,
                [row for row in points if row["bytes"] is not None],
                "bytes",
                way,
                style,
                1 / MIB,
            )
        ours = [row for row in own if row["way"] == rivals.OURS]
        draw(times, ours, "limit seconds", "limit", LIMIT, 1e3)
        draw(sizes, ours, "limit bytes", "limit", LIMIT, 1 / MIB)
        finish(times, ours, f"{case}: ms a step")
        finish(sizes, ours, f"{case}: MiB beyond the state")
    lines = {str(line.get_label()): line for panel in axes for line in panel.get_lines()}
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=6, frameon=False
    )
    return figure


LIMIT: dict[str, Any] = {"color": _report.BLACK, "linestyle": ":", "linewidth": 1.6}


def draw(
    panel: Any,
    rows: list[dict[str, Any]],
    key: str,
    label: str,
    style: dict[str, Any],
    scale: float,
) -> None:
    """One way's line."""
    if rows:
        heights = [scale * row[key] for row in rows]
        panel.plot(
            [row["N"] for row in rows], heights, label=label, markerfacecolor="none", **style
        )


def finish(panel: Any, rows: list[dict[str, Any]], title: str) -> None:
    """The scales of a panel."""
    ticks = [row["N"] for row in rows]
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set(xticks=ticks, xticklabels=list(map(str, ticks)))
    panel.set_title(title, fontsize=9)
