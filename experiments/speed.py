"""How long does a training step take, against a hand-written scan?

An AdamW step of a 4-layer transformer over 8 microbatches, float32, on the present device. The two
programs run in turn in one process, A B B A …, so that a machine whose speed drifts slows both; the
ratio is that of the medians.

Command   python -m experiments speed
Cost      about a minute
Expected  jaxaccum at most 1.03 × the hand-written scan
"""

import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxaccum
from experiments import _report

BOUND = 1.03


class Block(nn.Module):
    """A pre-norm transformer layer."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Attention and a two-layer network, each added to its input."""
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
    layers: int = 4,
    rounds: int = 40,
) -> _report.Record:
    """Time both ways in turn and compare their medians."""
    model = nn.Sequential([Block(width) for _ in range(layers)])
    x = jax.random.normal(jax.random.key(0), (batch_size, length, width), jnp.float32)
    params = model.init(jax.random.key(1), x)

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.square(jnp.asarray(model.apply(params, x))))

    ways = {
        "jaxaccum": Training(jaxaccum.value_and_grad(loss, num_microbatches=n), params),
        "hand-written scan": Training(by_hand(loss, n), params),
    }
    for way in ways.values():
        way.step(x)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in track(range(3 * rounds if full else rounds), "speed"):
        for name, way in list(ways.items())[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            way.step(x)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: median(times) for name, times in seconds.items()}
    ratio = medians["jaxaccum"] / medians["hand-written scan"]
    return _report.Record(
        name="speed",
        question="How long does a training step take, against a hand-written scan?",
        settings={
            "layers": layers,
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


class Training:
    """Parameters and AdamW's state, updated in place by one compiled step."""

    def __init__(self, value_and_grad: Callable[..., Any], params: Any):
        optimizer = optax.adamw(1e-3)
        self.state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            params, opt_state = state
            value, grads = value_and_grad(params, x)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        self._step = step

    def step(self, x: jax.Array) -> None:
        """One step, to its end."""
        self.state, value = self._step(self.state, x)
        jax.block_until_ready((self.state, value))


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
        panel.plot(
            range(1, len(times) + 1),
            times,
            "o-",
            color=color,
            label=f"{name}, median {median(times):.3f} s",
        )
    panel.set(xlabel="round", ylabel="seconds a step", ylim=(0, None))
    panel.legend(frameon=False, fontsize=9)
    return figure
