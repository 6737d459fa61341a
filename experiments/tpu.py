"""What does a training step cost on a TPU pod: memory, collectives, seconds?

An AdamW step under data parallelism, compiled by libtpu for the described topology: no TPU is
needed, and none is used. Where a TPU or GPU is present, the same steps are compiled for it and run,
and the seconds are measured.

Set-up: `scanned` is 12 layers of width 1024 in float32, 64 examples of one token per device;
`decoder` has a billion bfloat16 parameters in one scan over layers, 64 sequences of 256 tokens a
device; `bert` is BERT-base in float32, 64 sequences of 128 tokens a device. Estimated seconds are
the model's operations at the chip's peak, and the bytes of collectives over its links, as
published; they rank programs and predict no clock. `scanned` fits the on-chip memory of v5e and
v6e, where XLA puts its buffers and leaves them out of the temporary memory it reports: the peak
counts them.

Command   python -m experiments tpu          (pip install 'jaxaccum[experiments,tpu]')
Cost      some twenty minutes: `scanned` for N from 1 to 64 and on every topology, the other models
          at N = 8; hours with --full, which compiles every N of every model
Expected  jaxaccum sends its gradients once per step whatever N, outside of loops; a hand-written
          scan and `optax.microbatching` N times, inside
"""

import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure

import jaxaccum
from experiments import _report
from experiments.models import bert, decoder
from jaxaccum._jaxpr.flops import flops
from jaxaccum.testing import collectives

Loss = Callable[[Any, Any], jax.Array]
Gradient = Callable[[Any, Any], tuple[jax.Array, Any]]

TOPOLOGIES = ("v5e:2x2", "v5e:16x16", "v5p:2x2x1", "v6e:2x2")
NUM_MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
OPTIMIZER = optax.adamw(1e-3)
EXAMPLES = 64  # a device


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip: bfloat16 operations a second, bytes a second over its
    links."""

    flops: float
    link: float


CHIPS = {"v5e": Chip(197e12, 200e9), "v5p": Chip(459e12, 600e9), "v6e": Chip(918e12, 448e9)}


@dataclasses.dataclass(frozen=True)
class Model:
    """A loss, the shapes of its parameters, and those of its batch for a number of examples."""

    loss: Loss
    params: Any
    batch: Callable[[int], Any]


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    models: tuple[str, ...] = ("scanned", "decoder", "bert"),
    topologies: tuple[str, ...] = TOPOLOGIES,
    num_microbatches: tuple[int, ...] = NUM_MICROBATCHES,
    examples: int = EXAMPLES,
) -> _report.Record:
    """The first model at every N on the first topology, all others at N = 8; with `full`, every N
    of every model."""
    real = jax.default_backend() in ("tpu", "gpu")
    places = (
        {"here": np.array(jax.devices())}
        if real
        else {name: described(name) for name in topologies}
    )
    first = next(iter(places))
    points = [
        (place, name, n, way)
        for place in places
        for name in models
        for n in (num_microbatches if place == first and (full or name == models[0]) else (8,))
        if full or first in (place,) or name == models[0]
        for way in ways(name)
    ]
    rows = [measured(place, places[place], name, n=n, way=way, examples=examples, real=real)
            for place, name, n, way in track(points, "tpu")]  # fmt: skip
    ours = [row for row in rows if row["way"].startswith("jaxaccum")]
    reduced = max(
        row["gradients sent"] for row in ours
    )  # float32 sums of bfloat16 parameters count twice
    return _report.Record(
        name="tpu",
        question="What does a training step cost on a TPU pod: memory, collectives, seconds?",
        settings={
            "topologies": list(places),
            "examples a device": examples,
            "compiled by": _compiler(real),
        },
        rows=rows,
        checks=[
            _report.Check(
                "parameter bytes reduced a step, jaxaccum, over those of the parameters",
                reduced,
                2.0,
            ),
            _report.Check(
                "collectives inside loops, jaxaccum", max(r["inside loops"] for r in ours), 0
            ),
        ],
        figure=picture(
            [row for row in rows if row["topology"] == first], models if full else models[:1]
        ),
    )


def described(name: str) -> np.ndarray:
    """The devices of a topology that libtpu describes; none is present."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    return np.array(topologies.get_topology_desc(name, platform="tpu").devices)


@functools.cache
def model(name: str) -> Model:
    """One of the three models."""
    if name == "decoder":
        config = decoder.Config()
        ids = lambda count: jax.ShapeDtypeStruct((count, 257), jnp.int32)
        return Model(
            functools.partial(decoder.loss, config), decoder.shapes(config, jnp.bfloat16), ids
        )
    if name == "bert":
        sizes = bert.Config(30522, 768, 12, 12, 3072, 512)
        module = bert.BertForMaskedLM(sizes)
        ids = lambda count: jax.ShapeDtypeStruct((count, 128), jnp.int32)
        params = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, x), ids(1))
        return Model(functools.partial(_masked, module), params, ids)
    shapes = {"w": (12, 1024, 1024), "b": (12, 1024)}
    params = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
    return Model(_scanned, params, lambda count: jax.ShapeDtypeStruct((count, 1024), jnp.float32))


def _scanned(params: Any, x: jax.Array) -> jax.Array:
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"][None]), None), x, params)
    return jnp.mean(h**2)


def _masked(module: bert.BertForMaskedLM, params: Any, ids: jax.Array) -> jax.Array:
    scores: Any = module.apply(params, ids, jnp.ones_like(ids))
    return jnp.mean(
        jax.nn.logsumexp(scores, axis=-1) - jnp.take_along_axis(scores, ids[..., None], -1)[..., 0]
    )


# -- the ways --------------------------------------------------------------------------------------


def with_jaxaccum(loss: Loss, n: int, mesh: Mesh, **options: Any) -> Gradient:
    """The loop inside shard_map: one all-reduce, after it."""
    own = jaxaccum.value_and_grad(loss, num_microbatches=n, mesh_axes="data", **options)
    return jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))


def with_scan(loss: Loss, n: int, mesh: Mesh) -> Gradient:
    """The scan that everyone writes, each microbatch spread over the devices."""
    return _scan(loss, n, mesh, lambda params: params)


def _scan(loss: Loss, n: int, mesh: Mesh, sums: Callable[[Any], Any]) -> Gradient:
    rows = NamedSharding(mesh, P(None, "data"))

    def gradient(params: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        def add(total: Any, microbatch: jax.Array) -> tuple[Any, None]:
            own = jax.value_and_grad(loss)(params, microbatch)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, own), None

        strided = jnp.swapaxes(batch.reshape(-1, n, *batch.shape[1:]), 0, 1)
        zeros = (
            jnp.zeros((), jnp.float32),
            jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), sums(params)),
        )
        total, _ = lax.scan(add, zeros, lax.with_sharding_constraint(strided, rows))
        return jax.tree.map(lambda leaf: leaf / n, total)

    return gradient


def with_wide_scan(loss: Loss, n: int, mesh: Mesh) -> Gradient:
    """The same with sums in float32, whatever the parameters, as jaxaccum sums by itself."""
    wide = lambda params: jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)
    return _scan(loss, n, mesh, wide)


def with_narrow_jaxaccum(loss: Loss, n: int, mesh: Mesh) -> Gradient:
    """Sums in the dtype of the parameters: what the scan does by itself."""
    return with_jaxaccum(loss, n, mesh, accumulator=jaxaccum.accumulators.in_place(jnp.bfloat16))


def with_optax(loss: Loss, n: int, mesh: Mesh) -> Gradient:
    """`optax.microbatching`, the gradient function's output averaged."""
    del mesh

    def gradient(params: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
        mean = optax.microbatching.AccumulationType.MEAN
        return optax.microbatching.microbatch(jax.value_and_grad(loss), 1, len(batch) // n, mean)(
            params, batch
        )

    return gradient


WAYS: dict[str, Callable[[Loss, int, Mesh], Gradient]] = {
    "jaxaccum": with_jaxaccum,
    "hand-written scan": with_scan,
    "optax.microbatching": with_optax,
}
OTHER_SUMS: dict[str, Callable[[Loss, int, Mesh], Gradient]] = {
    "jaxaccum, bfloat16 sums": with_narrow_jaxaccum,
    "scan, float32 sums": with_wide_scan,
}
"""For bfloat16 parameters, which jaxaccum sums in float32 and the scan in bfloat16: each as the
other does."""


def ways(name: str) -> dict[str, Callable[[Loss, int, Mesh], Gradient]]:
    """The ways of one model."""
    low = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(model(name).params))
    return WAYS | (OTHER_SUMS if low else {})


# -- one program -----------------------------------------------------------------------------------


def measured(
    place: str, devices: np.ndarray, name: str, *, n: int, way: str, examples: int, real: bool
) -> dict[str, Any]:
    """A table's row: one step compiled, and run where it can be."""
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    one, count = model(name), len(devices)
    params, state = (
        _laid(one.params, mesh, P()),
        _laid(jax.eval_shape(OPTIMIZER.init, one.params), mesh, P()),
    )
    batch = _laid(one.batch(examples * count), mesh, P("data"))
    step = jax.jit(_step(ways(name)[way](one.loss, n, mesh)), donate_argnums=(0, 1))
    traced = step.trace(params, state, batch)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one.params))
    row = {"topology": place, "model": name, "N": n, "way": way}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"Used (\S+) of (\S+)", str(error))
        none = {
            "temporary / parameters": float("inf"),
            "peak / parameters": float("inf"),
            "gradients sent": 0.0,
            "inside loops": 0,
            "GB moved": float("nan"),
        }
        return (
            row
            | none
            | {"seconds": float("nan"), "note": needs[0] if needs else "exceeds the device"}
        )
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend does not report its memory"
    found = collectives(compiled)
    large = [c for c in found if c.kind in ("all-reduce", "reduce-scatter") and c.bytes > 1024]
    moved = sum(
        c.times * c.bytes * (2 if c.kind == "all-reduce" else 1) * (count - 1) / count
        for c in found
    )
    chip = CHIPS.get(place.partition(":")[0])
    estimate = (
        flops(traced.jaxpr.jaxpr, count) / chip.flops + moved / chip.link if chip else float("nan")
    )
    return row | {
        "temporary / parameters": analysis.temp_size_in_bytes / size,
        # Buffers that are alive together, beyond the arguments: the size of the temporary area
        # counts its gaps too.
        "peak / parameters": (analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes)
        / size,
        # Layers reduce in pieces inside a scan over them: what counts is how often a whole gradient
        # is sent.
        "gradients sent": round(sum(c.times * c.bytes for c in large) / size, 3),
        "inside loops": sum(c.loops > 0 for c in large),
        "GB moved": moved / 1e9,
        "seconds": _seconds(compiled, params, state, batch) if real else estimate,
        "note": "measured" if real else "estimated",
    }


def _step(gradient: Gradient) -> Callable[..., Any]:
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = gradient(params, batch)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on its own
            updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def _laid(tree: Any, mesh: Mesh, spec: P) -> Any:
    lay = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(lay, tree)


def _seconds(compiled: Any, *shapes: Any) -> float:
    """The fastest of five runs, on zeros: what a step takes does not depend on the numbers."""
    params, state, batch = jax.tree.map(
        lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), shapes
    )
    times = []
    for _ in range(6):
        start = time.perf_counter()
        params, state, _ = jax.block_until_ready(compiled(params, state, batch))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _compiler(real: bool) -> str:
    import importlib.metadata

    return (
        jax.devices()[0].device_kind if real else f"libtpu {importlib.metadata.version('libtpu')}"
    )


PANELS = {"peak / parameters": "peak memory / parameters", "gradients sent": "gradients sent"}
STYLES = {
    "jaxaccum": {"color": _report.BLUE, "marker": "o", "markersize": 6},
    "hand-written scan": {"color": _report.RED, "marker": "s", "markersize": 10},
    "optax.microbatching": {"color": _report.ORANGE, "marker": "x", "markersize": 7},
    "jaxaccum, bfloat16 sums": {
        "color": _report.BLUE,
        "marker": "o",
        "markersize": 6,
        "linestyle": "dashed",
    },
    "scan, float32 sums": {
        "color": _report.RED,
        "marker": "s",
        "markersize": 10,
        "linestyle": "dashed",
    },
}


def picture(rows: list[dict[str, Any]], models: tuple[str, ...]) -> Figure:
    """Memory beyond the arguments and whole-gradient reductions against N, a row for each model."""
    figure, axes = _report.panels(2, rows=len(models))
    ticks = sorted({row["N"] for row in rows})
    for i, name in enumerate(models):
        for panel, (key, label) in zip(axes[2 * i : 2 * i + 2], PANELS.items(), strict=True):
            for way in ways(name):
                own = [row for row in rows if (row["model"], row["way"]) == (name, way)]
                own = [
                    row for row in own if np.isfinite(row["peak / parameters"])
                ]  # the others exceed the device
                line = [row["N"] for row in own], [row[key] for row in own]
                panel.plot(*line, **STYLES[way], markerfacecolor="none", label=way)
            panel.set_xscale("log", base=2)
            panel.set(
                ylim=(0, None),
                xticks=ticks,
                xticklabels=list(map(str, ticks)),
                xlabel="microbatches N",
            )
            panel.set_title(f"{name}: {label}")
        axes[2 * i + 1].legend(frameon=False, fontsize=9)
    return figure
