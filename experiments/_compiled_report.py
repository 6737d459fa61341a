"""What `gpu` and `tpu` share: a table, a list of checks, and a picture."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import _compiled_devices as places
from experiments import _report
from experiments._compiled_models import model
from experiments._compiled_steps import measured
from experiments._compiled_ways import NARROW, OPTAX, OURS, SCAN, WIDE, ways, widening

MODELS = ("scanned", "decoder", "bert")
NUM_MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
EXAMPLES = 64  # per device

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to compile: the models, at these N, for these places; None: for the devices that are
    here, and where there are none of this kind, for the usual described ones.

    The first place has every model at N = 8, and the first model at every N; the other places have
    the first model at N = 8. With `full`, every model is compiled at every N for the first place,
    and at N = 8 for the others.
    """

    kind: str
    usual: Sequence[str]
    topologies: Sequence[str] | None = None
    models: Sequence[str] = MODELS
    num_microbatches: Sequence[int] = NUM_MICROBATCHES
    examples: int = EXAMPLES
    full: bool = False
    bound: float | None = None
    """Of the temporary memory over the parameters, where layers are scanned in float32."""

    def points(self, names: Sequence[str]) -> list[tuple[str, str, int, str]]:
        """Place, model, N and way of every program."""
        return [
            (place, name, n, way)
            for place in names
            for name in self.models
            for n in self._numbers(name, is_first=place == names[0])
            for way in ways(name)
        ]

    def _numbers(self, name: str, *, is_first: bool) -> Sequence[int]:
        is_main = name == self.models[0]
        if is_first and (self.full or is_main):
            return self.num_microbatches
        return (8,) if self.full or is_first or is_main else ()


def record(plan: Plan, *, name: str, question: str, track: _report.Track) -> _report.Record:
    """Compile everything of the plan, and run it on the devices that are here."""
    real = plan.topologies is None and places.present(plan.kind)
    here = {"here": np.array(jax.devices())} if real else _described(plan)
    points = plan.points(list(here))
    rows = []
    for place, one, n, way in track(points, name):
        devices = here[place]
        rows.append(measured(place, devices, one, n=n, way=way, examples=plan.examples, real=real))
    compiler = jax.devices()[0].device_kind if real else places.compiler(plan.kind)
    shown = plan.models if plan.full else plan.models[:1]
    return _report.Record(
        name=name,
        question=question,
        settings={
            "topologies": list(here),
            "examples a device": plan.examples,
            "compiled by": compiler,
        },
        rows=rows,
        checks=checks(rows, plan.bound),
        figure=picture([row for row in rows if row["topology"] == points[0][0]], shown),
    )


def _described(plan: Plan) -> dict[str, np.ndarray]:
    names = plan.topologies or plan.usual
    return {name: places.described(name, plan.kind) for name in names}


def checks(rows: Sequence[Row], bound: float | None) -> list[_report.Check]:
    """What holds of jaxaccum's rows, whatever N and the number of devices."""
    ours = [row for row in rows if row["way"] in (OURS, NARROW)]
    sent = [row["gradients sent"] / widening(row["model"], row["way"]) for row in ours]
    whole = [row["whole leaves in loops"] for row in ours if model(row["model"]).scans]
    claims: dict[str, tuple[Sequence[float], float]] = {
        "bytes reduced a step, jaxaccum, over those of its sums": (sent, 1.0),
        "collectives inside loops, jaxaccum": ([row["inside loops"] for row in ours], 0),
        "whole gradients of layers made inside loops, jaxaccum": (whole, 0),
    }
    if bound is not None:
        scanned = [row["temporary / parameters"] for row in ours if row["model"] == MODELS[0]]
        claims[f"temporary memory / parameters, {MODELS[0]}, jaxaccum"] = (scanned, bound)
    return [
        _report.Check(claim, max(values), most)
        for claim, (values, most) in claims.items()
        if values
    ]


PANELS = {"peak / parameters": "peak memory / parameters", "gradients sent": "gradients sent"}
_OURS = {"color": _report.BLUE, "marker": "o", "markersize": 6}
_SCAN = {"color": _report.RED, "marker": "s", "markersize": 10}
STYLES = {
    OURS: _OURS,
    SCAN: _SCAN,
    OPTAX: {"color": _report.ORANGE, "marker": "x", "markersize": 7},
    NARROW: _OURS | {"linestyle": "dashed"},
    WIDE: _SCAN | {"linestyle": "dashed"},
}


def picture(rows: Sequence[Row], models: Sequence[str]) -> Figure:
    """Memory beyond the arguments and whole-gradient reductions against N, a row for each model."""
    figure, axes = _report.panels(2, rows=len(models))
    for i, name in enumerate(models):
        own = [row for row in rows if row["model"] == name]
        for panel, (key, label) in zip(axes[2 * i : 2 * i + 2], PANELS.items(), strict=True):
            _draw(panel, own, key)
            panel.set_title(f"{name}: {label}")
        axes[2 * i + 1].legend(frameon=False, fontsize=9)
    return figure


def _draw(panel: Any, rows: Sequence[Row], key: str) -> None:
    """One model's lines, one for each way; programs that exceed the device are left out."""
    ticks = sorted({row["N"] for row in rows})
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [r for r in rows if r["way"] == way and np.isfinite(r["peak / parameters"])]
        line = [row["N"] for row in own], [row[key] for row in own]
        panel.plot(*line, **STYLES[way], markerfacecolor="none", label=way)
    panel.set_xscale("log", base=2)
    labels = list(map(str, ticks))
    panel.set(ylim=(0, None), xticks=ticks, xticklabels=labels, xlabel="microbatches N")
