"""How long does a gradient take, against a hand-written scan?

The gradient of a 4-layer transformer over 8 microbatches, float32, on the present device. The two programs run in turn
in one process, A B A B …, so that a machine whose speed drifts slows both; the ratio is that of the medians.

Command   python -m experiments speed
Cost      about a minute
Expected  jaxaccum at most 1.03 × the hand-written scan
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

import jaxaccum
from experiments import _report

BOUND = 1.03


class Block(nn.Module):
    """A pre-norm transformer layer."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Attention and a two-layer network, each beside an identity."""
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x))))


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    width: int = 256,
    length: int = 64,
    batch_size: int = 16,
    n: int = 8,
    rounds: int = 15,
) -> _report.Record:
    """Time both ways in turn and compare their medians."""
    model = nn.Sequential([Block(width) for _ in range(4)])
    x = jax.random.normal(jax.random.key(0), (batch_size, length, width), jnp.float32)
    params = model.init(jax.random.key(1), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(model.apply(params, x) ** 2)  # pyright: ignore[reportOperatorIssue]

    ways = {
        "jaxaccum": jax.jit(jaxaccum.value_and_grad(loss, num_microbatches=n)),
        "hand-written scan": jax.jit(by_hand(loss, n)),
    }
    for way in ways.values():
        jax.block_until_ready(way(params, x))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in track(range(3 * rounds if full else rounds), "speed"):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way(params, x))
            seconds[name].append(time.perf_counter() - start)
    medians = {name: median(times) for name, times in seconds.items()}
    ratio = medians["jaxaccum"] / medians["hand-written scan"]
    return _report.Record(
        name="speed",
        question="How long does a gradient take, against a hand-written scan?",
        settings={
            "width": width,
            "length": length,
            "batch_size": batch_size,
            "N": n,
            "rounds": len(seconds["jaxaccum"]),
        },
        rows=[{"way": name, "median seconds": value} for name, value in medians.items()],
        checks=[_report.Check("median seconds, jaxaccum / hand-written scan", ratio, BOUND)],
        figure=picture(seconds),
        data={"seconds": seconds},
    )


def by_hand(loss: Callable[..., jax.Array], n: int) -> Callable[..., Any]:
    """The scan that everyone writes."""

    def value_and_grad(params: Any, x: jax.Array) -> Any:
        def add(total: Any, rows: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, rows)), None

        zeros = (jnp.zeros((), x.dtype), jax.tree.map(jnp.zeros_like, params))
        total, _ = lax.scan(add, zeros, x.reshape(n, -1, *x.shape[1:]))
        return jax.tree.map(lambda leaf: leaf / n, total)

    return value_and_grad


def picture(seconds: dict[str, list[float]]) -> Any:
    """Every pair of runs, in the order in which they ran."""
    figure, (panel,) = _report.panels(1)
    for (name, times), color in zip(seconds.items(), (_report.BLUE, _report.RED), strict=True):
        panel.plot(range(1, len(times) + 1), times, "o-", color=color, label=f"{name}, median {median(times):.3f} s")
    panel.set(xlabel="round", ylabel="seconds a gradient", ylim=(0, None))
    panel.legend(frameon=False, fontsize=9)
    return figure
