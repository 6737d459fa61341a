"""Builds the model language in Flax linen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxaccum._base.types import PyTree
from jaxaccum.testing.language import CLASSES, Batch, Layer, Weights

__all__ = [
    "ACTIVATIONS",
    "STANDARD_PROMOTION",
    "Apply",
    "dropout",
    "linen_model",
    "may_attend",
    "pool",
]

# Flax's normalizations combine float32 with the dtype of the input, which strict promotion refuses.
STANDARD_PROMOTION: Callable[[], AbstractContextManager[None]] = functools.partial(
    jax.numpy_dtype_promotion, "standard"
)

Apply = Callable[[Weights, Weights, Batch], tuple[jax.Array, Weights]]
"""``(weights, state, batch) -> (outputs, new state)``."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}


@functools.cache
def linen_model(layers: tuple[Layer, ...], axis_name: str | None = None) -> Apply:
    """The linen model of `layers`, as a pure function of weights, state and batch.

    It returns ``(outputs, new state)``. It is cached: the same layers give the same function, which
    jit compiles once.

    Args:
      layers: the model's layers.
      axis_name: the axis over which training batch normalization averages, or None.
    """
    module = _Model(layers, axis_name)

    def apply(weights: Weights, state: Weights, batch: Batch) -> tuple[jax.Array, Weights]:
        variables = {"params": weights, "batch_stats": state}
        with STANDARD_PROMOTION():
            pair: PyTree = module.apply(
                variables, batch["features"], batch, mutable=["batch_stats"]
            )
        outputs, changed = pair
        return outputs, changed.get("batch_stats", {})

    return apply


class _Model(nn.Module):
    layers: tuple[Layer, ...]
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, batch: Batch) -> jax.Array:
        return _run(self.layers, x, batch, made={}, axis_name=self.axis_name)


class _Scanned(nn.Module):
    layers: tuple[Layer, ...]

    @nn.compact
    def __call__(self, x: jax.Array, batch: Batch) -> tuple[jax.Array, None]:
        return _run(self.layers, x, batch, made={}, axis_name=None), None


def _run(
    layers: tuple[Layer, ...],
    x: jax.Array,
    batch: Batch,
    *,
    made: dict[str, Any],
    axis_name: str | None,
) -> jax.Array:
    for layer in layers:
        match layer.kind:
            case "embedding":
                made[layer.name] = _make(layer, axis_name)
                x = made[layer.name](batch["tokens"])
            case "decode":
                x = made[layer.name].attend(x)
            case "attention":
                x = _make(layer, axis_name)(x, mask=may_attend(batch["mask"]), deterministic=True)
            case "activation":
                x = ACTIVATIONS[layer.choice](x)
            case "dropout":
                x = dropout(x, batch["keep"][:, layer.size])
            case "pooling":
                x = pool(x, batch["mask"], layer.choice)
            case "residual":
                x = x + _run(layer.layers, x, batch, made=made, axis_name=axis_name)
            case "scan":
                x, _ = _scan(layer)(x, batch)
            case _:
                # A name seen before is the same module: linen refuses a second one with its name.
                module = made[layer.name] if layer.name in made else _make(layer, axis_name)
                x = made.setdefault(layer.name, module)(x)
    return x


def _make(layer: Layer, axis_name: str | None) -> Any:
    match layer.kind:
        case "dense":
            return nn.Dense(layer.size, name=layer.name)
        case "convolution":
            return nn.Conv(layer.size, kernel_size=(3,), name=layer.name)
        case "embedding":
            return nn.Embed(CLASSES, layer.size, name=layer.name)
        case "attention":
            return nn.MultiHeadDotProductAttention(layer.size, name=layer.name)
        case "layer_norm":
            return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=layer.name)
        case "rms_norm":
            return nn.RMSNorm(epsilon=1e-5, name=layer.name)
        case "group_norm":
            return nn.GroupNorm(layer.size, epsilon=1e-5, use_fast_variance=False, name=layer.name)
        case "batch_norm":
            running = layer.choice == "eval"
            options: dict[str, Any] = {
                "axis_name": axis_name,
                "momentum": 0.9,
                "use_fast_variance": False,
            }
            return nn.BatchNorm(use_running_average=running, name=layer.name, **options)
    raise ValueError(f"no layer of kind {layer.kind!r}")


def _scan(layer: Layer) -> Any:
    body = nn.remat(_Scanned) if layer.choice == "checkpoint" else _Scanned
    axes: dict[str, Any] = {"variable_axes": {"params": 0}, "in_axes": nn.broadcast}
    return nn.scan(body, length=layer.size, split_rngs={"params": True}, **axes)(
        layer.layers, name=layer.name
    )


def may_attend(mask: jax.Array) -> jax.Array:
    """Each token sees the unmasked tokens and itself, so that no example is divided by 0."""
    itself = jnp.eye(mask.shape[1], dtype=bool)
    return mask[:, None, None, :] | itself[None, None]


def dropout(x: jax.Array, keep: jax.Array) -> jax.Array:
    """Rate 1/2 with a given mask of shape (batch_size, features)."""
    return jnp.where(keep[:, None, :], 2 * x, jnp.zeros_like(x))


def pool(x: jax.Array, mask: jax.Array, choice: str) -> jax.Array:
    """Mean over the unmasked length, or maximum over all of it; the length becomes 1."""
    if choice == "max":
        # By index: the derivative of jnp.max looks for the maximum among values that XLA may have
        # computed again, with other last digits, and then loses it
        # (https://github.com/jax-ml/jax/issues/40564; seen on CPU, in a scan).
        return jnp.take_along_axis(x, jnp.argmax(x, axis=1, keepdims=True), axis=1)
    total = jnp.sum(jnp.where(mask[..., None], x, jnp.zeros_like(x)), axis=1, keepdims=True)
    return total / jnp.maximum(jnp.sum(mask, axis=1)[:, None, None], 1).astype(x.dtype)
