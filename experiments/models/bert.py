"""BERT for masked-language modelling in Flax, layer for layer that of Hugging Face.

Post-layer-norm encoder, exact gelu, an attention mask, token types, and a decoder tied to the word
embeddings. Parameters keep Hugging Face's names, so that weights move by a rule and not by a table:
`from_torch` and `to_torch` are each other's inverse.

Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers,
https://arxiv.org/abs/1810.04805.
"""

# ruff: noqa: D102 (the docstring of a Flax module is that of its call)

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

Rate = float | jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a BERT, under Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0


class BertForMaskedLM(nn.Module):
    """Scores (examples, length, vocabulary) from `ids` and `attention`, both (examples, length)
    integers.

    `dropout` is the rate, of hidden states and attention alike; other than 0.0 it needs the
    `dropout` key.
    """

    config: Config

    def setup(self) -> None:
        self.bert = Bert(self.config)
        self.cls = Head(self.config)

    def __call__(
        self,
        ids: jax.Array,
        attention: jax.Array,
        *,
        token_types: jax.Array | None = None,
        dropout: Rate = 0.0,
    ) -> jax.Array:
        x = self.bert(ids, attention, token_types=token_types, dropout=dropout)
        return self.cls(x, self.bert.embeddings.word_embeddings.embedding)


class Bert(nn.Module):
    """The encoder: last hidden states (examples, length, width)."""

    config: Config

    def setup(self) -> None:
        self.embeddings = Embeddings(self.config)
        self.layers = [
            Layer(self.config, name=f"layer_{i}") for i in range(self.config.num_hidden_layers)
        ]

    def __call__(
        self,
        ids: jax.Array,
        attention: jax.Array,
        *,
        token_types: jax.Array | None = None,
        dropout: Rate = 0.0,
    ) -> jax.Array:
        x = self.embeddings(ids, token_types=token_types, dropout=dropout)
        for layer in self.layers:
            x = layer(x, attention, dropout=dropout)
        return x


class Embeddings(nn.Module):
    """The sum of word, position and token-type embeddings, normalized."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.word_embeddings = _embed(c.vocab_size, c)
        self.position_embeddings = _embed(c.max_position_embeddings, c)
        self.token_type_embeddings = _embed(c.type_vocab_size, c)
        self.LayerNorm = LayerNorm(c.layer_norm_eps)
        self.dropout = Dropout()

    def __call__(
        self, ids: jax.Array, *, token_types: jax.Array | None, dropout: Rate
    ) -> jax.Array:
        types = jnp.zeros_like(ids) if token_types is None else token_types
        words = self.word_embeddings(ids)
        # As torch's padding_idx: the row of the padding token gets no gradient from its look-ups.
        words = jnp.where(
            (ids == self.config.pad_token_id)[..., None], jax.lax.stop_gradient(words), words
        )
        positions = self.position_embeddings(jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape))
        x = self.LayerNorm(words + self.token_type_embeddings(types) + positions)
        return self.dropout(x, rate=dropout)


class Layer(nn.Module):
    """Self-attention and a two-layer perceptron, each added to its input and normalized."""

    config: Config

    def setup(self) -> None:
        self.attention = SelfAttention(self.config)
        self.attention_output = Output(self.config)
        self.intermediate = _dense(self.config.intermediate_size)
        self.output = Output(self.config)

    def __call__(self, x: jax.Array, attention: jax.Array, *, dropout: Rate) -> jax.Array:
        x = self.attention_output(self.attention(x, attention, dropout=dropout), x, dropout=dropout)
        return self.output(nn.gelu(self.intermediate(x), approximate=False), x, dropout=dropout)


class SelfAttention(nn.Module):
    """Scaled dot-product attention of every head over the tokens that `attention` admits."""

    config: Config

    def setup(self) -> None:
        self.query, self.key, self.value = (_dense(self.config.hidden_size) for _ in range(3))
        self.dropout = Dropout()

    def __call__(self, x: jax.Array, attention: jax.Array, *, dropout: Rate) -> jax.Array:
        heads = self.config.num_attention_heads
        q, k, v = (
            f(x).reshape(*x.shape[:-1], heads, -1) for f in (self.query, self.key, self.value)
        )
        scores = jnp.einsum("eqhd,ekhd->ehqk", q, k) * q.shape[-1] ** -0.5
        # The lowest finite number, not −inf: an example of padding alone attends everywhere instead
        # of nowhere.
        scores = jnp.where(attention[:, None, None, :] > 0, scores, jnp.finfo(scores.dtype).min)
        probs = self.dropout(nn.softmax(scores), rate=dropout)
        return jnp.einsum("ehqk,ekhd->eqhd", probs, v).reshape(x.shape)


class Output(nn.Module):
    """An affine map, dropout, the residual, the norm: how both halves of a layer end."""

    config: Config

    def setup(self) -> None:
        self.dense = _dense(self.config.hidden_size)
        self.LayerNorm = LayerNorm(self.config.layer_norm_eps)
        self.dropout = Dropout()

    def __call__(self, x: jax.Array, residual: jax.Array, *, dropout: Rate) -> jax.Array:
        return self.LayerNorm(self.dropout(self.dense(x), rate=dropout) + residual)


class Head(nn.Module):
    """The decoder: a transform, then a score for each row of the word embeddings, and a bias."""

    config: Config

    def setup(self) -> None:
        self.dense = _dense(self.config.hidden_size)
        self.LayerNorm = LayerNorm(self.config.layer_norm_eps)
        self.bias = self.param(
            "bias", nn.initializers.zeros, (self.config.vocab_size,), jnp.float32
        )

    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        scores = self.LayerNorm(nn.gelu(self.dense(x), approximate=False)) @ embedding.T
        return scores + jnp.broadcast_to(self.bias, scores.shape)


class Dropout(nn.Module):
    """Dropout whose rate may be an input of the compiled program, so that one program runs with and
    without it."""

    @nn.compact
    def __call__(self, x: jax.Array, *, rate: Rate) -> jax.Array:
        if isinstance(rate, float) and rate == 0.0:
            return x
        # Drawn in float32 whatever x is, so that float32 and float64 runs drop the same entries.
        keep = jnp.asarray(1.0 - rate, jnp.float32)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, x.shape)
        return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros_like(x))


class LayerNorm(nn.Module):
    """Zero mean and unit variance over the width, in the input's own dtype (Flax's mixes in
    float32)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        unit = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.eps)
        return unit * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


def from_torch(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Flax parameters of Hugging Face's weights, a dict of numpy arrays by name."""
    leaves = {
        _path(name): weight.T if _is_kernel(name) else weight for name, weight in weights.items()
    }
    return {"params": flax.traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, leaves))}


def to_torch(params: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters or their gradients as numpy arrays under Hugging Face's `names`."""
    leaves = flax.traverse_util.flatten_dict(params["params"])
    arrays = {name: np.asarray(leaves.pop(_path(name))) for name in names}
    if leaves:
        raise ValueError(
            f"parameters without a name in Hugging Face's BERT: {sorted(map('/'.join, leaves))}"
        )
    return {name: array.T if _is_kernel(name) else array for name, array in arrays.items()}


def _path(name: str) -> tuple[str, ...]:
    # Hugging Face nests a few modules more than there are ideas; the rest keeps its name.
    shorter = {
        "encoder.layer.": "layer_",
        "attention.self.": "attention.",
        "attention.output.": "attention_output.",
        "intermediate.dense.": "intermediate.",
        "predictions.transform.": "",
        "predictions.": "",
    }
    path = name
    for long, short in shorter.items():
        path = path.replace(long, short)
    *modules, leaf = path.split(".")
    if leaf == "weight":
        leaf = (
            "kernel" if _is_kernel(name) else "scale" if modules[-1] == "LayerNorm" else "embedding"
        )
    return (*modules, leaf)


def _is_kernel(name: str) -> bool:
    return name.endswith(".weight") and "LayerNorm" not in name and "embeddings" not in name


def _dense(width: int) -> nn.Dense:
    return nn.Dense(width, kernel_init=nn.initializers.normal(0.02))


def _embed(rows: int, config: Config) -> nn.Embed:
    return nn.Embed(rows, config.hidden_size, embedding_init=nn.initializers.normal(0.02))
