"""A decoder of a billion parameters whose layers are one scan.

Rotary attention, a gated perceptron, tied embeddings.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes; these give 1.01 billion parameters."""

    vocabulary: int = 32768
    width: int = 2048
    hidden: int = 5632
    heads: int = 16
    layers: int = 18


def shapes(config: Config, dtype: Any) -> Params:
    """The parameters as shapes; those of the layers are stacked."""
    w, h, n = config.width, config.hidden, config.layers
    layer = {
        "qkv": (w, 3 * w),
        "out": (w, w),
        "up": (w, 2 * h),
        "down": (h, w),
        "norm1": (w,),
        "norm2": (w,),
    }
    stacked = {name: jax.ShapeDtypeStruct((n, *shape), dtype) for name, shape in layer.items()}
    return {"embedding": jax.ShapeDtypeStruct((config.vocabulary, w), dtype), "layers": stacked}


def loss(config: Config, params: Params, ids: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next token; `ids` are (examples, length), each layer's
    activations recomputed."""
    x = params["embedding"][ids[:, :-1]]
    x, _ = lax.scan(
        jax.checkpoint(lambda x, layer: (_layer(config, x, layer), None)), x, params["layers"]
    )
    logits = jnp.einsum(
        "elw,vw->elv", _norm(x), params["embedding"], preferred_element_type=jnp.float32
    )
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def _layer(config: Config, x: jax.Array, layer: Params) -> jax.Array:
    examples, length, width = x.shape
    q, k, v = jnp.split(_norm(x) * layer["norm1"] @ layer["qkv"], 3, axis=-1)
    q, k, v = (y.reshape(examples, length, config.heads, -1) for y in (q, k, v))
    attended = jax.nn.dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True)
    x = x + attended.reshape(examples, length, width) @ layer["out"]
    gate, up = jnp.split(_norm(x) * layer["norm2"] @ layer["up"], 2, axis=-1)
    return x + (jax.nn.silu(gate) * up) @ layer["down"]


def _norm(x: jax.Array) -> jax.Array:
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return (x * lax.rsqrt(square + 1e-6)).astype(x.dtype)


def _rotated(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 1e-4 ** (jnp.arange(half) / half)
    cos, sin = (
        jnp.cos(angle)[None, :, None].astype(x.dtype),
        jnp.sin(angle)[None, :, None].astype(x.dtype),
    )
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
