"""Can a contrastive loss, which compares every pair of examples, be accumulated?

Two towers, for the upper and the lower half of scikit-learn's digits, learn to tell which halves
belong together; the loss is CLIP's, with a learned logit scale. Four ways divide the batch: exact
(jaxaccum, the loss written as data parallelism writes it, with `all_gather`), naive (each
microbatch contrasted with itself), open_clip's rule (`--accum-freq k`: features first, then the
whole loss back-propagated once for each replayed microbatch), and GradCache (arXiv 2101.06983: the
gradient of the features first, then of the towers, by hand).

Command   python -m experiments contrastive
Cost      about a minute: some twenty compilations and five gradients
Expected  in float64: exact and GradCache the full batch's gradient to rounding; naive off by a
          quarter; open_clip's towers exact and its logit scale's gradient k times too large.
          Temporary memory of the exact gradient grows with the batch by features and rows of logits
          alone: at a batch of 2048 in 32 microbatches at most 0.10 of the full batch's, where
          GradCache and open_clip hold all logits
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import jaxaccum
from experiments import _report

Params = Any
Gradient = Callable[[Params, Any], Params]
Row = dict[str, Any]

AXIS = "microbatch"
BOUND, MEMORY_BOUND = 1e-12, 0.10
FEATURES = 32
ERROR, SCALE = "Δ gradient of the towers", "gradient of the logit scale / full batch's"


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    width: int = 256,
    layers: int = 6,
    batch_size: int = 256,
    k: int = 8,
    microbatch_size: int = 64,
    batches: tuple[int, ...] = (256, 512, 1024, 2048),
) -> _report.Record:
    """Compare the gradients of every way, compile each for growing batches, and check the exact
    one."""
    del full  # neither gradients nor compiled sizes depend on how long one waits
    rows, scales = gradients_of_each(width, layers, batch_size, k, track=track)
    memory = memory_of_each(width, layers, batches, microbatch_size, track=track)
    largest = max(batches)
    rows.append({**dict.fromkeys(rows[0]), "way": "full batch"})
    for row in rows:
        row[f"temporary MiB, batch {largest}"] = memory[row["way"]][largest] / 2**20
    ratio = memory["exact"][largest] / memory["full batch"][largest]
    return _report.Record(
        name="contrastive",
        question="Can a contrastive loss be accumulated over microbatches?",
        settings={
            "width": width,
            "layers": layers,
            "batch_size": batch_size,
            "k": k,
            "microbatch": microbatch_size,
        },
        rows=rows,
        checks=[
            *checks_of_gradients(rows, k),
            _report.Check(
                f"exact: temporary memory over the full batch's, batch {largest}",
                ratio,
                MEMORY_BOUND,
            ),
        ],
        figure=picture(rows, memory, k, microbatch_size),
        data={"temporary bytes": memory, "logit scale": scales},
    )


def gradients_of_each(
    width: int, layers: int, batch_size: int, k: int, *, track: _report.Track
) -> tuple[list[Row], dict[str, float]]:
    """How far each way's gradient, in float64, is from the full batch's; and that of the logit
    scale."""
    rows: list[Row] = []
    scales: dict[str, float] = {}
    with jax.enable_x64(True):
        params, batch = towers(width, layers, jnp.float64), halves(batch_size)
        whole = jax.jit(jax.grad(clip))(params, batch)
        for way in track(list(WAYS), "contrastive: gradients"):
            grads = jax.jit(WAYS[way](k))(params, batch)
            error = apart(grads["towers"], whole["towers"])
            scales[way] = float(grads["scale"])
            rows.append({"way": way, ERROR: error, SCALE: float(grads["scale"] / whole["scale"])})
    return rows, scales


def memory_of_each(
    width: int,
    layers: int,
    batches: tuple[int, ...],
    microbatch_size: int,
    *,
    track: _report.Track,
) -> dict[str, dict[int, int]]:
    """The temporary bytes of each way's gradient, compiled for each batch size."""
    memory: dict[str, dict[int, int]] = {}
    points = [(way, b) for b in batches for way in ("full batch", *WAYS)]
    for way, b in track(points, "contrastive: memory"):
        gradient = jax.grad(clip) if way == "full batch" else WAYS[way](b // microbatch_size)
        params = towers(width, layers, jnp.float32)
        memory.setdefault(way, {})[b] = temporary_bytes(gradient, params, b)
    return memory


def checks_of_gradients(rows: list[Row], k: int) -> list[_report.Check]:
    """Ours and GradCache are exact, and the other two are wrong by what is known."""
    errors, scales = ({row["way"]: row[of] for row in rows} for of in (ERROR, SCALE))
    check = _report.Check
    return [
        check("exact: gradient error of the towers", errors["exact"], BOUND),
        check("exact: logit scale's gradient, off 1 by", abs(scales["exact"] - 1), BOUND),
        check("GradCache: gradient error of the towers", errors["GradCache"], BOUND),
        check("naive: 1 / gradient error of the towers", 1 / errors["naive"], 10.0),
        check(f"open_clip: logit scale's gradient, off {k} by", abs(scales["open_clip"] - k), 1e-9),
    ]


def towers(width: int, layers: int, dtype: Any) -> Params:
    """Two residual networks, and the logarithm of the logit scale, which starts at CLIP's 1 /
    0.07."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape) / shape[-2] ** 0.5, dtype)
    tower = lambda: {
        "in": normal(32, width),
        "layers": normal(layers, width, width),
        "out": normal(width, FEATURES),
    }
    return {"towers": [tower(), tower()], "scale": jnp.asarray(np.log(1 / 0.07), dtype)}


def halves(batch_size: int) -> tuple[jax.Array, jax.Array]:
    """The upper and the lower halves of the first digits, pixels from 0 to 1."""
    images = jnp.asarray(load_digits(return_X_y=True)[0][:batch_size] / 16)
    return images[:, :32], images[:, 32:]


def embed(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
    """The features of both halves, of length 1."""
    first, second = (embedding(tower, x) for tower, x in zip(params["towers"], batch, strict=True))
    return first, second


def embedding(tower: Params, x: jax.Array) -> jax.Array:
    """The features of one half, of length 1."""
    x = x @ tower["in"]
    for w in tower["layers"]:
        x = x + jnp.tanh(x @ w)
    z = x @ tower["out"]
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def cross_entropy(scale: jax.Array, own: jax.Array, other: jax.Array, first: Any = 0) -> jax.Array:
    """Of each row, its partner's number being `first` plus its own."""
    logits = jnp.exp(scale) * own @ other.T
    rows = jnp.arange(len(own), dtype=jnp.int32)
    return -jnp.mean(jax.nn.log_softmax(logits)[rows, first + rows])


def of_features(scale: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """CLIP's loss of all features."""
    return (cross_entropy(scale, a, b) + cross_entropy(scale, b, a)) / 2


def clip(params: Params, batch: Any) -> jax.Array:
    """CLIP's loss of the batch at hand."""
    return of_features(params["scale"], *embed(params, batch))


def exact(k: int) -> Gradient:
    """Each microbatch scores its own rows against the features that all have sent."""

    def loss(params: Params, batch: Any) -> jax.Array:
        a, b = embed(params, batch)
        first = lax.axis_index(AXIS) * len(a)
        all_a, all_b = (lax.all_gather(z, AXIS, tiled=True) for z in (a, b))
        return (
            cross_entropy(params["scale"], a, all_b, first)
            + cross_entropy(params["scale"], b, all_a, first)
        ) / 2

    return jaxaccum.grad(loss, num_microbatches=k)


def naive(k: int) -> Gradient:
    """Each microbatch contrasted with itself."""
    return jaxaccum.grad(clip, num_microbatches=k)


def open_clip(k: int) -> Gradient:
    """All features without gradients, then for each microbatch the whole loss, of its features
    computed again."""

    def gradient(params: Params, batch: Any) -> Params:
        parts = divided(batch, k)
        cached = lax.stop_gradient(lax.map(lambda part: embed(params, part), parts))

        def replayed(params: Params, j: jax.Array, part: Any) -> jax.Array:
            own = zip(cached, embed(params, part), strict=True)
            a, b = (
                lax.dynamic_update_index_in_dim(old, z, j, 0).reshape(-1, FEATURES)
                for old, z in own
            )
            return of_features(params["scale"], a, b)

        def body(total: Params, x: Any) -> tuple[Params, None]:
            return jax.tree.map(jnp.add, total, jax.grad(replayed)(params, *x)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return lax.scan(body, zeros, (jnp.arange(k, dtype=jnp.int32), parts))[0]

    return gradient


def grad_cache(k: int) -> Gradient:
    """The gradient of the features, kept; then that of the towers, a microbatch at a time."""

    def gradient(params: Params, batch: Any) -> Params:
        parts = divided(batch, k)
        a, b = (z.reshape(-1, FEATURES) for z in lax.map(lambda part: embed(params, part), parts))
        scale, *cotangents = jax.grad(of_features, argnums=(0, 1, 2))(params["scale"], a, b)

        def body(total: Params, x: Any) -> tuple[Params, None]:
            part, own = x
            _, pull = jax.vjp(lambda towers: embed({"towers": towers}, part), params["towers"])
            return jax.tree.map(jnp.add, total, pull(tuple(own))[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params["towers"])
        summed, _ = lax.scan(body, zeros, (parts, divided(cotangents, k)))
        return {"towers": summed, "scale": scale}

    return gradient


WAYS: dict[str, Callable[[int], Gradient]] = {
    "exact": exact, "naive": naive, "open_clip": open_clip, "GradCache": grad_cache,
}  # fmt: skip


def divided(tree: Any, k: int) -> Any:
    """Every array as k microbatches along a new leading axis."""
    return jax.tree.map(lambda x: x.reshape(k, -1, *x.shape[1:]), tree)


def apart(actual: Params, expected: Params) -> float:
    """The largest difference over the largest entry."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    scale = max(float(jnp.max(jnp.abs(e))) for _, e in pairs)
    return max(float(jnp.max(jnp.abs(a - e))) for a, e in pairs) / scale


def temporary_bytes(gradient: Gradient, params: Params, batch_size: int) -> int:
    """What the compiled gradient needs beyond its arguments and results."""
    half = jax.ShapeDtypeStruct((batch_size, 32), jnp.float32)
    analysis = jax.jit(gradient).lower(params, (half, half)).compile().memory_analysis()
    assert analysis is not None, "this backend does not report its memory"
    return analysis.temp_size_in_bytes


def picture(
    rows: list[Row], memory: dict[str, dict[int, int]], k: int, microbatch_size: int
) -> Figure:
    """The gradient of the logit scale by way, and temporary memory against the batch."""
    figure, (scales, sizes) = _report.panels(2)
    colors = dict(
        zip(
            memory,
            (_report.BLACK, _report.BLUE, _report.RED, _report.PINK, _report.GREEN),
            strict=True,
        )
    )
    measured = [row for row in rows if row["way"] in WAYS]
    values = [row[SCALE] for row in measured]
    scales.bar(
        [row["way"] for row in measured], values, color=[colors[row["way"]] for row in measured]
    )
    scales.axhline(1, color=_report.BLACK, linestyle="--", linewidth=1.2)
    scales.set_title(f"{SCALE}, k = {k}", fontsize=10)
    for way, points in memory.items():
        style: dict[str, Any] = (
            {"linestyle": "--"} if way == "full batch" else {"marker": "o", "markersize": 5}
        )
        sizes.plot(
            list(points),
            [b / 2**20 for b in points.values()],
            color=colors[way],
            label=way,
            **style,
        )
    ticks = list(memory["full batch"])
    sizes.set_xscale("log", base=2)
    sizes.set(
        yscale="log",
        xlabel=f"batch, in microbatches of {microbatch_size}",
        xticks=ticks,
        xticklabels=list(map(str, ticks)),
    )
    sizes.set_title("temporary memory of the gradient, MiB", fontsize=10)
    sizes.legend(frameon=False, fontsize=8)
    return figure
