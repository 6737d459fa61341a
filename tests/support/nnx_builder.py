"""Builds the model language in Flax nnx."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxaccum.testing.language import CLASSES, Layer
from jaxaccum.testing.linen_models import (
    ACTIVATIONS,
    STANDARD_PROMOTION,
    Apply,
    dropout,
    may_attend,
    pool,
)


class NnxModel(nnx.Module):
    """A module that holds each named layer once, as an attribute of that name."""

    def __init__(self, layers: tuple[Layer, ...], width: int, **options: Any):
        for layer in layers:
            if layer.name and not hasattr(self, layer.name):
                setattr(self, layer.name, _make(layer, width, **options))
            if layer.kind in ("dense", "convolution", "embedding"):
                width = layer.size


@functools.cache
def nnx_model(
    layers: tuple[Layer, ...], width: int, *, dtype: Any = jnp.float64, axis_name: str | None = None
) -> Apply:
    """The nnx model of `layers`, as a pure function `(weights, state, batch) -> (outputs, new
    state)`.

    Cached, so that the same layers give the same function and jit compiles it once.

    Args:
      layers: the model's layers.
      width: features of `batch["features"]`; nnx, unlike linen, must know it beforehand.
      dtype: of the weights; `nnx.Embed` and `nnx.BatchNorm`, alone among the layers, do not follow
          them.
      axis_name: the axis over which training batch normalization averages, or None.
    """
    module = NnxModel(flatten(layers), width, dtype=dtype, axis_name=axis_name, rngs=nnx.Rngs(0))
    graphdef, params, statistics, rest = nnx.split(module, nnx.Param, nnx.BatchStat, ...)

    def apply(weights: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graphdef, _filled(params, weights), _filled(statistics, state), rest)
        with STANDARD_PROMOTION():
            outputs = _run(layers, batch["features"], batch, model=model)
        return outputs, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return apply


def flatten(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers with those of residual blocks in their place: residuals do not make a scope of
    names."""
    return tuple(
        inner
        for layer in layers
        for inner in (flatten(layer.layers) if layer.kind == "residual" else (layer,))
    )


def _filled(state: Any, values: Any) -> Any:
    """A copy of `state` that holds `values`, as jax arrays: nnx would update the caller's numpy
    arrays in place."""
    filled = nnx.clone(state)
    nnx.replace_by_pure_dict(filled, jax.tree.map(jnp.asarray, values))
    return filled


def _run(layers: tuple[Layer, ...], x: jax.Array, batch: Any, *, model: Any) -> jax.Array:
    for layer in layers:
        module: Any = getattr(model, layer.name) if layer.name else None
        match layer.kind:
            case "embedding":
                x = module(batch["tokens"])
            case "decode":
                x = module.attend(x)
            case "attention":
                x = module(x, mask=may_attend(batch["mask"]), deterministic=True)
            case "activation":
                x = ACTIVATIONS[layer.choice](x)
            case "dropout":
                x = dropout(x, batch["keep"][:, layer.size])
            case "pooling":
                x = pool(x, batch["mask"], layer.choice)
            case "residual":
                x = x + _run(layer.layers, x, batch, model=model)
            case "scan":
                x = _scan(layer, module, x, batch)
            case _:
                x = module(x)
    return x


def _scan(layer: Layer, module: Any, x: jax.Array, batch: Any) -> jax.Array:
    def body(x: jax.Array, one: Any) -> jax.Array:
        return _run(layer.layers, x, batch, model=one)

    if layer.choice == "checkpoint":
        body = nnx.remat(body)
    return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, module)


def _attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, mask: jax.Array, **_: Any
) -> jax.Array:
    """Written out, because the one that nnx calls takes its softmax in float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _make(layer: Layer, width: int, *, dtype: Any, axis_name: str | None, rngs: nnx.Rngs) -> Any:
    match layer.kind:
        case "dense":
            return nnx.Linear(width, layer.size, rngs=rngs)
        case "convolution":
            return nnx.Conv(width, layer.size, kernel_size=(3,), rngs=rngs)
        case "embedding":
            return nnx.Embed(CLASSES, layer.size, param_dtype=dtype, rngs=rngs)
        case "attention":
            return nnx.MultiHeadAttention(
                layer.size, width, decode=False, attention_fn=_attention, rngs=rngs
            )
        case "layer_norm":
            return nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        case "rms_norm":
            return nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs)
        case "group_norm":
            return nnx.GroupNorm(
                width, layer.size, epsilon=1e-5, use_fast_variance=False, rngs=rngs
            )
        case "batch_norm":
            running = layer.choice == "eval"
            options: dict[str, Any] = {
                "axis_name": axis_name,
                "momentum": 0.9,
                "use_fast_variance": False,
            }
            return nnx.BatchNorm(
                width, use_running_average=running, dtype=dtype, rngs=rngs, **options
            )
        case "scan":
            inner = functools.partial(
                NnxModel, flatten(layer.layers), width, dtype=dtype, axis_name=axis_name
            )
            return nnx.vmap(lambda rngs: inner(rngs=rngs))(rngs.split(layer.size))
    raise ValueError(f"no layer of kind {layer.kind!r}")
