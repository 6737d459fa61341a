"""Is accumulation wasteful? Accumulated batches against small ones, at equal examples.

Adam on digits, every run over the same number of examples and at its best learning rate of a grid,
mean of two seeds. The half-life of Adam's second moment, counted in examples, is that of the
accumulated batch: β₂ = ½^(B / half-life) (arXiv 2507.07101).

Command   python -m experiments small_batch
Cost      two minutes
Expected  at equal examples small batches end at half the loss of the accumulated one, under the
          rule and, on a problem this small, under a fixed β₂ too: accumulate for memory or for
          devices, and not for the loss
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure

import jaxaccum
from experiments import _digits, _report

LARGE, SMALL, BETA = 256, (4, 16, 64), 0.95
RATES = tuple(10.0**k for k in (-3.5, -3.0, -2.5, -2.0, -1.5))


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    small: tuple[int, ...] = SMALL,
    examples: int = 8_192,
    seeds: int = 2,
) -> _report.Record:
    """Train every batch size under both rules; compare the ends."""
    examples *= 4 if full else 1
    runs = [
        (size, rule)
        for size in (*small, LARGE)
        for rule in (("fixed", "half-life") if size != LARGE else ("fixed",))
    ]
    rows = []
    for size, rule in track(runs, "small_batch"):
        beta = BETA if rule == "fixed" else BETA ** (size / LARGE)
        ends = np.asarray(train(size, beta, examples, seeds))
        best = int(np.nanargmin(ends.mean(0)))
        rows.append(
            {
                "batch": size,
                "β₂ rule": rule,
                "β₂": beta,
                "best rate": RATES[best],
                "loss": float(ends.mean(0)[best]),
            }
        )
    large = rows[-1]["loss"]
    ruled = {row["batch"]: row["loss"] for row in rows if row["β₂ rule"] == "half-life"}
    return _report.Record(
        name="small_batch",
        question=(
            "Is accumulation wasteful? Accumulated batches against small ones at equal examples."
        ),
        settings={
            "large": LARGE,
            "small": small,
            "rates": RATES,
            "examples": examples,
            "seeds": seeds,
        },
        rows=rows,
        checks=[
            _report.Check(
                "loss of the best small batch with the half-life rule / accumulated",
                min(ruled.values()) / large,
                1.0,
            )
        ],
        figure=picture(rows),
    )


def train(size: int, beta: float, examples: int, seeds: int) -> jax.Array:
    """The loss over all digits at the end, (seeds, rates)."""
    x, y = _digits.data()
    microbatches = max(size // 64, 1)
    gradient = jaxaccum.grad(_digits.loss, in_axes=(None, 0, 0), num_microbatches=microbatches)

    def one(order: jax.Array, params: Any, rate: jax.Array) -> jax.Array:
        opt = optax.adam(rate, b1=0.9, b2=beta)

        def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            params, state = carry
            updates, state = opt.update(gradient(params, x[rows], y[rows]), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = lax.scan(step, (params, opt.init(params)), order)
        return _digits.mean_loss(params, x, y)

    orders = [
        np.random.default_rng(s).integers(len(x), size=(examples // size, size))
        for s in range(seeds)
    ]
    params = jax.tree.map(lambda *p: jnp.stack(p), *[_digits.network(s, 32) for s in range(seeds)])
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on its own
        over_rates = jax.vmap(one, (None, None, 0))
        return jax.jit(jax.vmap(over_rates, (0, 0, None)))(
            jnp.asarray(np.stack(orders)), params, jnp.asarray(RATES)
        )


def picture(rows: list[dict[str, Any]]) -> Figure:
    """The final loss against the batch size, for both rules."""
    figure, (panel,) = _report.panels(1)
    for rule, color in (("fixed", _report.RED), ("half-life", _report.BLUE)):
        points = [
            (row["batch"], row["loss"])
            for row in rows
            if row["β₂ rule"] == rule and row["batch"] != LARGE
        ]
        label = (
            f"β₂ = {BETA}" if rule == "fixed" else "β₂ with the half-life of the accumulated batch"
        )
        panel.plot(*zip(*points, strict=True), color=color, marker="o", label=label)
    panel.axhline(
        rows[-1]["loss"], color=_report.BLACK, linestyle="--", label=f"accumulated, B = {LARGE}"
    )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set(xlabel="batch size", ylabel="loss after equal examples")
    panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.95))
    return figure
