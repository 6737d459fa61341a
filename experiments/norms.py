"""Can BatchNorm be trained with accumulated gradients, or is GroupNorm the better choice?

The seed's third claim. A network of two convolutions with BatchNorm learns scikit-learn's digits
(1437 images to train on, 360 to test) in batches of 32, divided into microbatches of 1 to 32. Naive
accumulation normalizes each microbatch by its own statistics, and what it keeps for evaluation are
those of the last microbatch, or running ones carried through all of them as PyTorch does. Exact
accumulation is the same model with `axis_name="microbatch"`. GroupNorm needs no batch.

Command   python -m experiments norms [--full]
Cost      about 7 minutes on one core, most of them compilation: five seeds at once, 150 steps of
          SGD with momentum, the rate going to 0 along a cosine; with --full 1000 steps and six
          sizes, about 15 minutes
Expected  exact: the full batch's gradient to rounding (float64, at most 1e-12), and its test
          accuracy within 0.01 at every size; naive: a gradient off by at least a tenth at
          microbatches of 1
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import jaxaccum
import jaxaccum.linen
from experiments import _report

Variables = Any
BATCH_SIZE, CLASSES, TRAIN = 32, 10, 1437
BOUND = 1e-12  # of the gradient, normwise, in float64
RATE = 0.1


class Convolution(nn.Module):
    """A 3 × 3 convolution as one product of nine shifted images: XLA on a CPU is slow at its
    gradient in a loop."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve images of shape (batch, height, width, channels)."""
        height, width = x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return nn.Dense(self.features, use_bias=False, param_dtype=x.dtype)(
            jnp.concatenate(shifts, axis=-1)
        )


class Network(nn.Module):
    """Two convolutions, each with a normalization and pooling."""

    norm: str
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """The logits of images of shape (batch, 8, 8, 1)."""
        for features in (8, 16):
            x = nn.relu(self.normalize(Convolution(features)(x), train))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES, param_dtype=x.dtype)(x.reshape(len(x), -1))

    @nn.nowrap
    def normalize(self, x: jax.Array, train: bool) -> jax.Array:
        """The normalization that the way asks for."""
        if self.norm == "group":
            return nn.GroupNorm(4, param_dtype=x.dtype)(x)
        options: dict[str, Any] = {
            "use_running_average": not train,
            "momentum": 0.9,
            "param_dtype": x.dtype,
        }
        return jaxaccum.linen.BatchNorm(axis_name=self.axis_name, **options)(x)


def loss(
    network: Network, params: Variables, batch: Any, stats: Variables
) -> tuple[jax.Array, Variables]:
    """Cross entropy of one microbatch, and the new running statistics."""
    pair: Any = network.apply(
        {"params": params, "batch_stats": stats}, batch["x"], True, mutable=["batch_stats"]
    )
    logits, new = pair
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1)
    return -jnp.mean(picked), new.get("batch_stats", {})


def carried(network: Network, **options: Any) -> Callable[..., Any]:
    """State that runs through the microbatches; of a coupled network it is the same in all and
    updated once."""

    def fun(params: Variables, batch: Any, stats: Variables) -> Any:
        value, new = loss(network, params, batch, stats)
        return value, jaxaccum.Carry(new) if new else None

    axes = (None, 0, jaxaccum.CARRY)
    return jaxaccum.value_and_grad(
        fun, has_aux=True, in_axes=axes, audit=None, **options
    )  # naive ones are inexact


def last(network: Network, **options: Any) -> Callable[..., Any]:
    """State that only the last microbatch leaves behind."""

    def fun(params: Variables, batch: Any, stats: Variables) -> Any:
        value, new = loss(network, params, batch, stats)
        return value, jaxaccum.Last(new)

    return jaxaccum.value_and_grad(
        fun, has_aux=True, in_axes=(None, 0, None), audit=None, **options
    )


WAYS: dict[str, tuple[Network, Callable[..., Any]]] = {
    "exact": (Network("batch", "microbatch"), functools.partial(carried, memory="store")),
    "naive": (Network("batch"), last),
    "naive, carried statistics": (Network("batch"), carried),
    "GroupNorm": (Network("group"), carried),
}
COLORS = dict(zip(WAYS, (_report.BLUE, _report.RED, _report.ORANGE, _report.GREEN), strict=True))


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    steps: int | None = None,
    seeds: int = 5,
    sizes: tuple[int, ...] | None = None,
) -> _report.Record:
    """Train every way at every microbatch size; check the gradient and the accuracy of the exact
    one."""
    steps = steps or (1000 if full else 150)
    sizes = sizes or ((1, 2, 4, 8, 16, 32) if full else (1, 4, 32))
    data = digits()
    rows, curves = [], {}
    for way, size in track([(way, size) for way in WAYS for size in sizes], "norms"):
        losses, accuracies = trained(way, size, steps, seeds, data)
        curves[f"{way}, {size}"] = np.mean(losses, axis=0).tolist()
        rows.append({
            "way": way, "microbatch": size, "Δ gradient": gradient_error(way, size, data),
            "test accuracy": float(np.mean(accuracies)), "± (seeds)": float(np.std(accuracies)),
        })  # fmt: skip
    found = {(row["way"], row["microbatch"]): row for row in rows}
    exact = [row for row in rows if row["way"] == "exact"]
    small, whole = min(sizes), found["exact", max(sizes)]["test accuracy"]
    return _report.Record(
        name="norms",
        question=(
            "Can BatchNorm be trained with accumulated gradients, or is GroupNorm the better "
            "choice?"
        ),
        settings={
            "batch_size": BATCH_SIZE,
            "steps": steps,
            "seeds": seeds,
            "optimizer": f"sgd({RATE} to 0 by cosine, momentum 0.9)",
        },
        rows=rows,
        checks=[
            _report.Check(
                "exact: gradient error, any microbatch size",
                max(r["Δ gradient"] for r in exact),
                BOUND,
            ),
            _report.Check(
                "exact: test accuracy apart from the full batch's",
                max(abs(r["test accuracy"] - whole) for r in exact),
                0.01,
            ),
            _report.Check(
                f"naive: 1 / gradient error, microbatches of {small}",
                1 / found["naive", small]["Δ gradient"],
                10.0,
            ),
        ],
        figure=picture(rows, curves, sizes),
        data={"curves": curves},
    )


def digits() -> dict[str, np.ndarray]:
    """The images, shuffled once, their pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return {"x": images[order].reshape(-1, 8, 8, 1) / 16, "y": labels[order]}


def trained(
    way: str, size: int, steps: int, seeds: int, data: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Training losses (seeds, steps) and test accuracies (seeds); all ways see the same batches and
    first weights."""
    network, accumulate = WAYS[way]
    optimizer = optax.sgd(optax.cosine_decay_schedule(RATE, steps), momentum=0.9)
    x, y = jnp.asarray(data["x"], jnp.float32), jnp.asarray(data["y"], jnp.int32)
    gradient = accumulate(network, microbatch_size=size)

    def one(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        variables = network.init(jax.random.key(seed), x[:2], True)
        params, stats = variables["params"], variables.get("batch_stats", {})

        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, stats, state = carry
            chosen = jax.random.choice(key, TRAIN, (BATCH_SIZE,), replace=False)
            (value, new), grads = gradient(params, {"x": x[chosen], "y": y[chosen]}, stats)
            updates, state = optimizer.update(grads, state, params)
            return (
                optax.apply_updates(params, updates),
                stats if new is None else new,
                state,
            ), value

        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), steps)
        (params, stats, _), losses = lax.scan(step, (params, stats, optimizer.init(params)), keys)
        logits = network.apply({"params": params, "batch_stats": stats}, x[TRAIN:], False)
        return losses, jnp.mean(jnp.argmax(jnp.asarray(logits), axis=1) == y[TRAIN:])

    with jax.numpy_dtype_promotion("standard"):  # Flax and optax mix dtypes on their own
        losses, accuracies = jax.jit(jax.vmap(one))(jnp.arange(seeds))
    return np.asarray(losses), np.asarray(accuracies)


def gradient_error(way: str, size: int, data: dict[str, np.ndarray]) -> float:
    """Of the first batch, in float64: the largest difference from the full batch's gradient over
    its largest entry."""
    network, accumulate = WAYS[way]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        batch = {"x": jnp.asarray(data["x"][:BATCH_SIZE]), "y": jnp.asarray(data["y"][:BATCH_SIZE])}
        variables = network.init(jax.random.key(0), batch["x"], True)
        params, stats = variables["params"], variables.get("batch_stats", {})
        whole = jax.grad(
            lambda params: loss(network.clone(axis_name=None), params, batch, stats)[0]
        )(params)
        _, grads = jax.jit(accumulate(network, microbatch_size=size))(params, batch, stats)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True)
        scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(whole))
        return max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs) / scale


def picture(
    rows: list[dict[str, Any]], curves: dict[str, list[float]], sizes: tuple[int, ...]
) -> Figure:
    """Gradient error and accuracy against the microbatch size, and the training loss at the
    smallest."""
    figure, (errors, losses, accuracies) = _report.panels(3)
    for way, color in ((way, COLORS[way]) for way in WAYS):
        own = [row for row in rows if row["way"] == way]
        x = [row["microbatch"] for row in own]
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 5, "label": way}
        errors.plot(x, [max(row["Δ gradient"], 1e-17) for row in own], **style)
        spread = [row["± (seeds)"] for row in own]
        accuracies.errorbar(x, [row["test accuracy"] for row in own], spread, capsize=3, **style)
        smooth = np.convolve(curves[f"{way}, {min(sizes)}"], np.ones(10) / 10, "valid")
        losses.plot(smooth, color=color, label=way)
    for panel in (errors, accuracies):
        panel.set_xscale("log", base=2)
        panel.set(
            xticks=list(sizes),
            xticklabels=list(map(str, sizes)),
            xlabel="microbatch size (batch 32)",
        )
    errors.set(yscale="log", title="gradient error, float64")
    losses.set(yscale="log", xlabel="step", title=f"training loss, microbatches of {min(sizes)}")
    accuracies.set_title("test accuracy, 5 seeds")
    errors.legend(frameon=False, fontsize=8)
    return figure
