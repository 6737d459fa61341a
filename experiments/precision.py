"""How far from the true sum does each accumulator end, against the number of microbatches?

N real gradients in float32 (softmax regression on digits, one example each, drawn with replacement)
are averaged by `value_and_grad` with each accumulator, and compared, normwise, with their mean in
float64.

Command   python -m experiments precision
Cost      half a minute
Expected  at N = 4096: of bfloat16 nothing is right, of float16 one digit; compensated bfloat16, in
          the bytes of one float32 sum, stays below 1e-3; compensated float32 at the rounding of one
          float32 number, whatever N
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxaccum
from experiments import _digits, _report
from jaxaccum.testing.bounds import normwise

NUMBERS = (1, 4, 16, 64, 256, 1024, 4096)
WAYS: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: jaxaccum.accumulators.in_place(jnp.bfloat16),
    "float16": lambda: jaxaccum.accumulators.in_place(jnp.float16),
    "float32": lambda: jaxaccum.accumulators.in_place(jnp.float32),
    "compensated bfloat16": lambda: jaxaccum.accumulators.compensated(jnp.bfloat16),
    "compensated float32": lambda: jaxaccum.accumulators.compensated(jnp.float32),
}


def run(
    *, full: bool = False, track: _report.Track = _report.quiet, numbers: tuple[int, ...] = NUMBERS
) -> _report.Record:
    """Every accumulator at every N; check the ends of the curves."""
    del full
    terms, errors = gradients(max(numbers)), {way: {} for way in WAYS}
    for way, n in track([(way, n) for way in WAYS for n in numbers], "precision"):
        errors[way][n] = error(WAYS[way](), terms[:n])
    last = max(numbers)
    eps = float(jnp.finfo(jnp.float32).eps)
    return _report.Record(
        name="precision",
        question=(
            "How far from the true sum does each accumulator end, against the number of "
            "microbatches?"
        ),
        settings={
            "numbers": numbers,
            "gradient": "softmax regression on digits, 64 × 10",
            "norm": "largest entry",
        },
        rows=[
            {"relative error": way, **{f"N = {n}": errors[way][n] for n in numbers}} for way in WAYS
        ],
        checks=[
            _report.Check(
                f"compensated float32, N = {last}", errors["compensated float32"][last], 2 * eps
            ),
            _report.Check(
                f"float32, N = {last}, against N · eps", errors["float32"][last], last * eps
            ),
            _report.Check(
                "compensated bfloat16 over bfloat16, two arrays for one",
                errors["compensated bfloat16"][last] / errors["bfloat16"][last],
                0.01,
            ),
        ],
        figure=picture(errors),
        data={
            "errors": {
                way: {str(n): e for n, e in points.items()} for way, points in errors.items()
            }
        },
    )


def gradients(count: int) -> jax.Array:
    """Real gradients of single examples in float32, (count, 64, 10)."""
    x, y = _digits.data()
    rows = np.random.default_rng(0).integers(len(x), size=count)
    w = jnp.asarray(0.1 * np.random.default_rng(1).normal(size=(64, 10)), jnp.float32)
    each = lambda x, y: jnp.outer(x, jax.nn.softmax(x @ w) - jax.nn.one_hot(y, 10))
    return jax.vmap(each)(x[rows], y[rows])


def error(accumulator: Any, terms: jax.Array) -> float:
    """The distance of the accumulated mean from that in float64."""

    def fun(w: jax.Array, g: jax.Array) -> Any:
        return jaxaccum.Mean(jnp.sum(w * g[0]), 1.0)

    zero = jnp.zeros(terms.shape[1:], jnp.float32)
    grads = jax.jit(jaxaccum.grad(fun, microbatch_size=1, accumulator=accumulator))(zero, terms)
    return normwise(grads, np.asarray(terms, np.float64).mean(0))


def picture(errors: dict[str, dict[int, float]]) -> Figure:
    """Errors against N, both on logarithmic axes."""
    figure, (panel,) = _report.panels(1, height=3.8)
    colors = (_report.RED, _report.ORANGE, _report.SKY, _report.GREEN, _report.BLUE)
    for (way, points), color in zip(errors.items(), colors, strict=True):
        values = [max(e, 1e-9) for e in points.values()]
        panel.plot(list(points), values, color=color, marker="o", markersize=4, label=way)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set(
        xlabel="number of microbatches N", ylabel="error of the mean gradient", ylim=(1e-9, 30)
    )
    panel.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    return figure
