"""One AdamW step of a model, compiled for a mesh: its memory, collectives and seconds."""

import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import _compiled_devices as places
from experiments._compiled_hlo import whole_results
from experiments._compiled_models import model
from experiments._compiled_ways import Gradient, ways
from jaxaccum._jaxpr.flops import flops
from jaxaccum.testing import collectives
from jaxaccum.testing.collectives import Collective

OPTIMIZER = optax.adamw(1e-3)
NO_COMPILER = ("PTX compilation provider", "libdevice not found", "find ptxas")
"""What XLA says where a part of the extra `gpu` is missing."""


def measured(
    place: str, devices: np.ndarray, name: str, *, n: int, way: str, examples: int, real: bool
) -> dict[str, Any]:
    """A table's row: one step compiled, and run where it can be."""
    one, count = model(name), len(devices)
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    shapes = (
        laid(one.params, mesh, P()),
        laid(jax.eval_shape(OPTIMIZER.init, one.params), mesh, P()),
        laid(one.batch(examples * count), mesh, P("data")),
    )
    traced = jax.jit(step(ways(name)[way](one.loss, n, mesh)), donate_argnums=(0, 1)).trace(*shapes)
    row = {"topology": place, "model": name, "N": n, "way": way}
    compiled, refused = _compiled(traced, place)
    if compiled is None:
        return row | _nothing(refused)
    analysis = compiled.memory_analysis()
    assert analysis is not None, "this backend does not report its memory"
    # Buffers that are alive together, beyond the arguments: the size of the temporary area counts
    # its gaps too.
    beyond = analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes
    found = collectives(compiled)
    large = [c for c in found if c.kind in ("all-reduce", "reduce-scatter") and c.bytes > 1024]
    sent = sum(c.times * c.bytes for c in large)
    whole = whole_results(compiled.as_text(), one.largest)
    seconds = _seconds(compiled, *shapes) if real else _estimate(traced, place, count, found)
    return row | {
        "temporary / parameters": analysis.temp_size_in_bytes / one.bytes,
        "peak / parameters": beyond / one.bytes,
        # Layers reduce in pieces inside a scan over them: what counts is how often a whole gradient
        # is sent.
        "gradients sent": round(sent / one.bytes, 3),
        "inside loops": sum(c.loops > 0 for c in large),
        "whole leaves in loops": sum(whole.values()),
        "GB moved": _moved(found, count) / 1e9,
        "seconds": seconds,
        "note": "measured" if real else "estimated",
    }


def step(gradient: Gradient) -> Callable[..., Any]:
    """An AdamW step: parameters, the optimizer's state and a batch to new ones and the value."""

    def run(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        value, grads = gradient(params, batch)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on its own
            updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return run


def laid(tree: Any, mesh: Mesh, spec: P) -> Any:
    """The shapes of a tree, laid out over the mesh."""
    lay = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(lay, tree)


def _compiled(traced: Any, place: str) -> tuple[Any, str]:
    """The program, or None and why: it needs more memory than the device has."""
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if any(part in str(error) for part in NO_COMPILER):
            raise places.NoSuchDevice(places.missing("gpu")) from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needs = re.search(r"Used (\S+) of (\S+)", str(error))
        return None, needs[0] if needs else "exceeds the device"
    chip, analysis = places.chip(place), compiled.memory_analysis()
    needed = analysis.peak_memory_in_bytes if analysis else 0
    if chip and needed > chip.memory:  # XLA refuses such a program for TPUs, but not for GPUs
        return None, f"{needed / 1e9:.0f} of {chip.memory / 1e9:.0f} GB"
    return compiled, ""


def _nothing(note: str) -> dict[str, Any]:
    """The row of a program that does not fit."""
    return {
        "temporary / parameters": float("inf"),
        "peak / parameters": float("inf"),
        "gradients sent": 0.0,
        "inside loops": 0,
        "whole leaves in loops": 0,
        "GB moved": float("nan"),
        "seconds": float("nan"),
        "note": note,
    }


def _moved(found: list[Collective], count: int) -> float:
    """The bytes that each of `count` devices sends; an all-reduce sends its operand twice."""
    weights = [2 if c.kind == "all-reduce" else 1 for c in found]
    sent = sum(w * c.times * c.bytes for w, c in zip(weights, found, strict=True))
    return sent * (count - 1) / count


def _estimate(traced: Any, place: str, count: int, found: list[Collective]) -> float:
    """The model's operations at the chip's peak, and the bytes of collectives over its links."""
    chip = places.chip(place)
    if chip is None:
        return float("nan")
    return flops(traced.jaxpr.jaxpr, count) / chip.flops + _moved(found, count) / chip.link


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
