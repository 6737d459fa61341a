"""The ways to accumulate gradients over a mesh that `gpu` and `tpu` compare."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum
from experiments._compiled_models import Loss, model

Gradient = Callable[[Any, Any], tuple[jax.Array, Any]]
Way = Callable[[Loss, int, Mesh], Gradient]


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


OURS, SCAN, OPTAX = "jaxaccum", "hand-written scan", "optax.microbatching"
WAYS: dict[str, Way] = {OURS: with_jaxaccum, SCAN: with_scan, OPTAX: with_optax}
NARROW, WIDE = "jaxaccum, bfloat16 sums", "scan, float32 sums"
OTHER_SUMS: dict[str, Way] = {NARROW: with_narrow_jaxaccum, WIDE: with_wide_scan}
"""For bfloat16 parameters, which jaxaccum sums in float32 and the scan in bfloat16: each as the
other does."""


def ways(name: str) -> dict[str, Way]:
    """The ways of one model."""
    return WAYS | (OTHER_SUMS if model(name).low_precision else {})


def widening(name: str, way: str) -> int:
    """The bytes of jaxaccum's sums over those of the parameters: bfloat16 is summed in float32."""
    return 2 if way == OURS and model(name).low_precision else 1
