"""Does the noise scale that the accumulator measures predict the critical batch size?

A network of one hidden layer learns digits by SGD. Along one run `accumulators.noise_scale`
measures S / |G|² from the microbatches (arXiv 1812.06162). A sweep over batch sizes, each at its
best learning rate, counts the steps and the examples that the loss takes to a target; the critical
batch size is that of the paper's curve through all of them, S = S_min (1 + B_crit / B), fitted to
the logarithms.

Command   python -m experiments noise_scale
Cost      two minutes
Expected  both agree in their order of magnitude, as in the paper (103 and 14); the measured noise
          scale grows as the loss falls
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

import jaxaccum
from experiments import _digits, _report

SIZES = (4, 16, 64, 256, 1024)
RATES = tuple(2.0**k for k in range(-4, 3))
TARGET = 0.3


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    sizes: tuple[int, ...] = SIZES,
    examples: int = 120_000,
) -> _report.Record:
    """Measure along one run, sweep, compare."""
    sweep = {}
    for size in track(sizes, "noise_scale"):
        limit = min(examples // size, 3000 if full else 1500)
        sweep[size] = int(np.min(steps_to_target(size, limit)))
    losses, scales = measured()
    reached = int(np.argmax(np.asarray(losses) < TARGET)) or len(losses) - 1
    predicted = float(np.mean(scales[: reached + 1]))
    critical = critical_batch(sweep)
    return _report.Record(
        name="noise_scale",
        question=(
            "Does the noise scale that the accumulator measures predict the critical batch size?"
        ),
        settings={"sizes": sizes, "learning rates": RATES, "target loss": TARGET, "hidden": 32},
        rows=[
            {"batch": size, "steps": count, "examples": size * count}
            for size, count in sweep.items()
        ],
        checks=[
            _report.Check(
                "|log10(mean measured noise scale / critical batch)|",
                float(abs(np.log10(predicted / critical))),
                1.0,
            ),
            _report.Check("noise scale, first tenth over last tenth", growth(scales), 0.5),
        ],
        figure=picture(sweep, losses, scales, critical),
        data={
            "noise scale": list(scales),
            "loss": list(losses),
            "critical batch": critical,
            "predicted": predicted,
        },
        text=(
            f"mean measured noise scale until the target {predicted:.0f}, critical batch "
            f"{critical:.0f}"
        ),
    )


def critical_batch(sweep: dict[int, int]) -> float:
    """B_crit of ``S = S_min (1 + B_crit / B)``, by least squares of log S over a fine grid."""
    sizes, steps = np.asarray(list(sweep)), np.log(list(sweep.values()))
    grid = 2.0 ** np.arange(0.0, 12.0, 0.01)
    apart = steps - np.log1p(grid[:, None] / sizes)
    return float(grid[np.argmin(np.var(apart, axis=1))])


def steps_to_target(size: int, limit: int) -> np.ndarray:
    """For each learning rate, the steps of SGD to the target; infinity where it is not reached."""
    x, y = _digits.data()
    order = jnp.asarray(np.random.default_rng(size).integers(len(x), size=(limit, size)))

    def train(rate: jax.Array) -> jax.Array:
        def step(params: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
            grads = jax.grad(_digits.mean_loss)(params, x[rows], y[rows])
            params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
            return params, _digits.mean_loss(params, x, y) < TARGET

        return lax.scan(step, _digits.network(0, 32), order)[1]

    reached = np.asarray(jax.jit(jax.vmap(train))(jnp.asarray(RATES)))
    return np.where(reached.any(1), reached.argmax(1) + 1, 2**31 - 1)


def measured(
    steps: int = 400, size: int = 256, rate: float = 0.5, memory: float = 0.95
) -> tuple[list[float], list[float]]:
    """The loss and the noise scale along one run: numerator and denominator are averaged, then
    divided."""
    x, y = _digits.data()
    order = jnp.asarray(np.random.default_rng(1).integers(len(x), size=(steps, size)))
    noise = jaxaccum.accumulators.noise_scale()
    step = jaxaccum.value_and_grad(
        _digits.loss, in_axes=(None, 0, 0), microbatch_size=8, accumulator=noise
    )

    def body(params: Any, rows: jax.Array) -> tuple[Any, Any]:
        (_, report), grads = step(params, x[rows], y[rows])
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads)
        return params, (_digits.mean_loss(params, x, y), report.trace, report.squared_norm)

    _, (losses, traces, norms) = jax.jit(lambda p: lax.scan(body, p, order))(_digits.network(0, 32))
    weights = memory ** np.arange(steps)[::-1]
    average = lambda values: np.asarray(
        [np.average(values[: i + 1], weights=weights[-i - 1 :]) for i in range(steps)]
    )
    scales = average(np.asarray(traces)) / average(np.asarray(norms))
    return np.asarray(losses).tolist(), scales.tolist()


def growth(scales: list[float]) -> float:
    """How much smaller the noise scale is at the start than at the end."""
    tenth = max(len(scales) // 10, 1)
    return float(np.mean(scales[:tenth]) / np.mean(scales[-tenth:]))


def picture(
    sweep: dict[int, int], losses: list[float], scales: list[float], critical: float
) -> Figure:
    """Left: the measured noise scale; right: examples against steps, where the sweep bends."""
    figure, (left, right) = _report.panels(2)
    left.plot(scales, color=_report.BLUE, label="measured noise scale")
    left.axhline(critical, color=_report.RED, linestyle="--", label="critical batch of the sweep")
    left.axvline(
        int(np.argmax(np.asarray(losses) < TARGET)),
        color=_report.BLACK,
        linewidth=0.8,
        label="target loss",
    )
    left.set_yscale("log")
    left.set(xlabel="step", ylabel="examples")
    left.legend(frameon=False, fontsize=8)
    steps = list(sweep.values())
    right.plot(
        steps, [size * count for size, count in sweep.items()], color=_report.BLUE, marker="o"
    )
    for size, count in sweep.items():
        right.annotate(
            f"B = {size}",
            (count, size * count),
            textcoords="offset points",
            xytext=(5, 5),
            fontsize=8,
        )
    right.set_xscale("log")
    right.set_yscale("log")
    right.set(xlabel="steps to the target", ylabel="examples to the target")
    return figure
