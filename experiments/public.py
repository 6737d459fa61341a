"""What does the usual accumulation change in losses of public training code, and does ours?

Seven losses, each written after its published form in a file of `public_losses`: experts with a
load-balancing loss, a masked language model, packed texts, PPO, SigLIP, a ResNet with BatchNorm,
devices with unequal tokens. Each is trained three ways, from the same parameters on the same real
data in float64: the full batch in one pass of plain JAX; the usual way, the mean of the
microbatches' gradients with state carried from one to the next; and jaxaccum. The loss is that of
held-out data, and of PPO that of its rollouts. For scale, the full batch is also trained on the
same batches in reverse order.

Command   python -m experiments public [--full]
Cost      two and a half minutes of processor time; --full takes 1000 steps instead of 100
Expected  jaxaccum: the full batch's gradient to rounding (at most 1e-12), and its parameters and
          loss after training; the usual way: a gradient off by at least a hundredth, and a loss
          that is twice the full batch's for SigLIP, worse than another order's for PPO, and for
          the others at most as far away as another order's
"""

import dataclasses
import importlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import _report
from experiments.public_losses import Gradient, PublicLoss
from jaxaccum.testing.bounds import normwise

# Several host devices must be asked for before JAX's first computation.
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=4".strip()

LOSSES = {  # file -> name in the table
    "moe": "experts, balance loss",
    "masked_lm": "masked language model",
    "packed": "packed texts",
    "ppo": "PPO",
    "siglip": "SigLIP",
    "resnet": "ResNet, BatchNorm",
    "devices": "devices, unequal tokens",  # stays the last: see `all_measured`
}
BOUND = 1e-12  # of a gradient, normwise, in float64
WHOLE, USUAL, OURS, OTHER = "full batch", "usual", "jaxaccum", "other order"


@dataclasses.dataclass(frozen=True)
class Run:
    """The first gradient, and what training leaves behind."""

    gradient: Any
    params: Any
    loss: float


def run(
    *, full: bool = False, track: _report.Track = _report.quiet, steps: int | None = None
) -> _report.Record:
    """Train every loss three ways, and compare both accumulations with the full batch."""
    steps = steps or (1000 if full else 100)
    found = all_measured(list(LOSSES), steps, track=track)
    rows = [row(LOSSES[name], runs, way) for name, (_, runs) in found.items() for way in runs]
    losses = {LOSSES[name]: loss for name, (loss, _) in found.items()}
    return _report.Record(
        name="public",
        question="What does the usual accumulation change in public losses, and does ours?",
        settings={"steps": steps, "dtype": "float64"},
        rows=rows,
        checks=checks(rows, steps),
        figure=picture(rows, steps),
        text="\n".join(legend(name, loss) for name, loss in losses.items()),
        data={"loss before training": {name: started(loss) for name, loss in losses.items()}},
    )


def all_measured(names: list[str], steps: int, *, track: _report.Track) -> dict[str, Any]:
    """Two losses at a time, since the programs are too small to keep two cores busy alone.

    The last one, `devices`, has them to itself: a program over several host devices must not wait
    for threads that other programs hold.
    """
    *others, last = names
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        pending = {name: pool.submit(measured, name, steps) for name in others}
        found = {name: pending[name].result() for name in track(others, "public")}
    return {**found, last: measured(last, steps)}


def measured(name: str, steps: int) -> tuple[PublicLoss, dict[str, Run]]:
    """One loss, trained in every way."""
    # Both settings are a thread's own; optax and Flax mix dtypes.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        loss = importlib.import_module(f"experiments.public_losses.{name}").task(steps)
        step = updating(loss.optimizer)
        runs = {
            WHOLE: trained(loss, loss.whole, step),
            USUAL: trained(loss, loss.usual, step),
            OURS: trained(loss, loss.exact, step),
        }
        # For scale: what another order of the same batches does to the loss.
        other = dataclasses.replace(loss, batches=loss.batches[::-1])
        return loss, {**runs, OTHER: trained(other, loss.whole, step)}


def trained(loss: PublicLoss, gradient: Gradient, step: Callable[..., Any]) -> Run:
    """One optimizer step per batch."""
    params, state, first = loss.params, loss.state, None
    opt_state = loss.optimizer.init(params)
    for batch in loss.batches:
        grads, state = gradient(params, state, batch)
        first = grads if first is None else first
        # One program at a time: of those over several host devices, two could wait for each other.
        params, opt_state = jax.block_until_ready(step(params, opt_state, grads))
    return Run(first, params, float(loss.evaluate(params, state)))


def updating(optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """An optimizer step, compiled."""

    def step(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(step)


def row(name: str, runs: dict[str, Run], way: str) -> dict[str, Any]:
    """How far a way is from the full batch: gradient and parameters normwise, and the loss."""
    own, whole = runs[way], runs[WHOLE]
    accumulates = way in (USUAL, OURS)
    return {
        "loss": name,
        "way": way,
        "Δ gradient": normwise(own.gradient, whole.gradient) if accumulates else None,
        "Δ parameters": normwise(own.params, whole.params) if accumulates else None,
        "loss after": own.loss,
        "Δ loss after": None if way == WHOLE else own.loss - whole.loss,
    }


def column(rows: list[dict[str, Any]], way: str, what: str) -> np.ndarray:
    """The size of one difference of one way, for each loss."""
    return np.abs([row[what] for row in rows if row["way"] == way])


def checks(rows: list[dict[str, Any]], steps: int) -> list[_report.Check]:
    """Ours is the full batch's to rounding, for every loss; the usual way is so for none."""
    ours = column(rows, OURS, "Δ gradient").max()
    usual = column(rows, USUAL, "Δ gradient").min()
    params = column(rows, OURS, "Δ parameters").max()
    loss = column(rows, OURS, "Δ loss after").max()
    drift = steps * BOUND  # every step rounds anew; training that amplified it would show
    found = {
        "jaxaccum: gradient error, the largest": (ours, BOUND),
        "jaxaccum: parameters after training, the largest difference": (params, drift),
        "jaxaccum: loss after training, the largest difference": (loss, drift),
        "usual: 1 / gradient error, the smallest": (1 / usual, 100),
        "jaxaccum's largest gradient error over the smallest usual one": (ours / usual, 1e-9),
    }
    return [_report.Check(claim, float(value), bound) for claim, (value, bound) in found.items()]


def legend(name: str, loss: PublicLoss) -> str:
    """Where a loss is from, and what the usual loop changes."""
    return f"{name} ({loss.published}): each microbatch {loss.alone}"


def started(loss: PublicLoss) -> float:
    """The loss before training."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return float(loss.evaluate(loss.params, loss.state))


def picture(rows: list[dict[str, Any]], steps: int) -> Figure:
    """How far both ways are from the full batch: gradient, parameters, loss."""
    figure, panels = _report.panels(3, height=3.6)
    titles = {
        "Δ gradient": "first gradient, relative",
        "Δ parameters": f"parameters after {steps} steps, relative",
        "Δ loss after": f"loss after {steps} steps",
    }
    for panel, what in zip(panels, titles, strict=True):
        dots(panel, rows, what)
        panel.set_title(titles[what], fontsize=11)
        panel.set_xlabel("difference from the full batch")
    other = column(rows, OTHER, "Δ loss after")
    style: dict[str, Any] = {"marker": "x", "linestyle": "none", "color": _report.BLACK}
    panels[2].plot(other, range(len(other))[::-1], label="full batch, other order", **style)
    for panel in panels[1:]:
        panel.tick_params(labelleft=False)
    panels[2].legend(frameon=True, framealpha=1, fontsize=9, loc="center")
    return figure


def dots(panel: Axes, rows: list[dict[str, Any]], what: str) -> None:
    """A line per loss, from our difference to the usual one; 0 is drawn at 1e-17."""
    names = list(dict.fromkeys(row["loss"] for row in rows))
    heights = np.arange(len(names))[::-1]
    usual = column(rows, USUAL, what)
    ours = np.maximum(column(rows, OURS, what), 1e-17)
    panel.hlines(heights, ours, usual, color=_report.BLACK, linewidth=0.8, alpha=0.3)
    panel.plot(usual, heights, "o", color=_report.RED, label="usual accumulation")
    panel.plot(ours, heights, "s", color=_report.BLUE, label="jaxaccum")
    panel.set(xscale="log", yticks=heights, yticklabels=names, xlim=(4e-18, 30))
