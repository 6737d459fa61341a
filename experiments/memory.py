"""How much temporary memory does a training step need, against the number of microbatches?

An AdamW step with donated state on a model that scans over 12 layers of width 1024, batch size 16,
compiled for the present device and never run. Two lengths of sequence: one token, where parameters
dominate and each further copy of the gradients shows, and many, where activations dominate and
microbatches save them.

Command   python -m experiments memory
Cost      about a minute: some thirty compilations
Expected  in units of the parameters' bytes, at N = 8 and one token: jaxaccum at most 1.2, close to
          the full batch; a hand-written scan, which adds trees of gradients, and
          `optax.microbatching` about 2.1
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from matplotlib.figure import Figure

import jaxaccum
from experiments import _report

Params = Any
Gradient = Callable[[Params, jax.Array], Params]

NUM_MICROBATCHES = (1, 2, 4, 8, 16)
OPTIMIZER = optax.adamw(1e-3)
BOUND = 1.2  # of the parameters' bytes


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    layers: int = 12,
    width: int = 1024,
    batch_size: int = 16,
    lengths: tuple[int, ...] = (1, 64),
    num_microbatches: tuple[int, ...] = NUM_MICROBATCHES,
) -> _report.Record:
    """Compile every way at every number of microbatches; check ours at one token and N = 8."""
    del full  # compiled sizes do not depend on how long one waits
    shapes = {"w": (layers, width, width), "b": (layers, width)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    points = [(way, length, n) for length in lengths for way in WAYS for n in num_microbatches]
    points += [("full batch", length, 1) for length in lengths]
    rows = []
    for way, length, n in track(points, "memory"):
        batch = jax.ShapeDtypeStruct((batch_size, length, width), jnp.float32)
        gradient = WAYS[way](n) if way in WAYS else jax.grad(mean_square)
        temporary = temporary_bytes(gradient, params, batch)
        rows.append(
            {
                "way": way,
                "tokens": length,
                "N": n,
                "temporary / parameters": temporary / size(params),
            }
        )
    ours = measured(rows, "jaxaccum", lengths[0])[8]
    return _report.Record(
        name="memory",
        question=(
            "How much temporary memory does a training step need, against the number of "
            "microbatches?"
        ),
        settings={
            "layers": layers,
            "width": width,
            "batch_size": batch_size,
            "lengths": lengths,
            "device": jax.devices()[0].device_kind,
            "parameter_bytes": size(params),
        },
        rows=[pivoted(rows, way, length) for length in lengths for way in (*WAYS, "full batch")],
        checks=[
            _report.Check(f"temporary memory / parameters, N = 8, {lengths[0]} token", ours, BOUND)
        ],
        figure=picture(rows, lengths),
        data={"points": rows},
    )


def layers_of(params: Params, x: jax.Array) -> jax.Array:
    """A residual network: x + tanh(x w + b), layer after layer."""

    def layer(x: jax.Array, leaf: Params) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ leaf["w"] + leaf["b"][None, None]), None

    return lax.scan(layer, x, params)[0]


def mean_square(params: Params, x: jax.Array) -> jax.Array:
    """The loss, a mean over the microbatch's examples."""
    return jnp.mean(layers_of(params, x) ** 2)


def with_jaxaccum(n: int) -> Gradient:
    """Gradients added in place."""
    return jaxaccum.grad(mean_square, num_microbatches=n)


def with_scan(n: int) -> Gradient:
    """The scan that everyone writes: a tree of gradients a microbatch, added to the carry."""

    def gradient(params: Params, batch: jax.Array) -> Params:
        def body(carry: Params, microbatch: jax.Array) -> tuple[Params, None]:
            return jax.tree.map(jnp.add, carry, jax.grad(mean_square)(params, microbatch)), None

        microbatches = batch.reshape(n, -1, *batch.shape[1:])
        total, _ = lax.scan(body, jax.tree.map(jnp.zeros_like, params), microbatches)
        return jax.tree.map(lambda leaf: leaf / n, total)

    return gradient


def with_optax(n: int) -> Gradient:
    """`optax.microbatching`, the gradient function's output averaged."""

    def gradient(params: Params, batch: jax.Array) -> Params:
        mean = optax.microbatching.AccumulationType.MEAN
        return optax.microbatching.microbatch(jax.grad(mean_square), 1, len(batch) // n, mean)(
            params, batch
        )

    return gradient


WAYS: dict[str, Callable[[int], Gradient]] = {
    "jaxaccum": with_jaxaccum,
    "hand-written scan": with_scan,
    "optax.microbatching": with_optax,
}


def temporary_bytes(gradient: Gradient, params: Params, batch: jax.ShapeDtypeStruct) -> int:
    """What the compiled AdamW step needs beyond its arguments and results."""

    def step(
        params: Params, state: optax.OptState, batch: jax.Array
    ) -> tuple[Params, optax.OptState]:
        grads = gradient(params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on its own
            updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(OPTIMIZER.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend does not report its memory"
    return analysis.temp_size_in_bytes


def size(params: Params) -> int:
    """The parameters' bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def measured(rows: list[dict[str, Any]], way: str, length: int) -> dict[int, float]:
    """N → temporary memory over the parameters' bytes."""
    return {
        row["N"]: row["temporary / parameters"]
        for row in rows
        if (row["way"], row["tokens"]) == (way, length)
    }


def pivoted(rows: list[dict[str, Any]], way: str, length: int) -> dict[str, Any]:
    """A table's row: one column for each N."""
    points = measured(rows, way, length)
    columns = dict.fromkeys(row["N"] for row in rows)
    return {
        "temporary / parameters": way,
        "tokens": length,
        **{f"N = {n}": points.get(n) for n in columns},
    }


def picture(rows: list[dict[str, Any]], lengths: tuple[int, ...]) -> Figure:
    """Temporary memory against N, a panel for each length."""
    figure, axes = _report.panels(len(lengths))
    styles = dict(
        zip(
            WAYS,
            ((_report.BLUE, "o", 6), (_report.RED, "s", 10), (_report.ORANGE, "x", 7)),
            strict=True,
        )
    )
    for panel, length in zip(axes, lengths, strict=True):
        (full,) = measured(rows, "full batch", length).values()
        panel.axhline(
            full,
            color=_report.BLACK,
            linestyle="--",
            linewidth=1.2,
            label="full batch, no microbatches",
        )
        for way, (color, marker, points_wide) in styles.items():
            points = measured(rows, way, length)
            style: dict[str, Any] = {
                "marker": marker,
                "markersize": points_wide,
                "markerfacecolor": "none",
            }
            panel.plot(*zip(*points.items(), strict=True), color=color, label=way, **style)
        panel.set_xscale("log", base=2)
        ticks = sorted({row["N"] for row in rows})
        panel.set(
            ylim=(0, 1.05 * panel.get_ylim()[1]),
            xticks=ticks,
            xticklabels=list(map(str, ticks)),
            xlabel="number of microbatches N",
            title=f"{length} token{'s' * (length > 1)} per example",
        )
    axes[0].set_ylabel("temporary bytes / parameter bytes")
    axes[0].legend(frameon=False, fontsize=9)
    return figure
