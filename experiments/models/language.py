"""A small causal language model in Flax, with experts where they are asked for.

It has no position embeddings, because a causal decoder learns order without them
(https://arxiv.org/abs/2305.19466). So a packed text reads the same wherever in its row it begins.
"""

# ruff: noqa: D102 (the docstring of a Flax module is that of its call)

import flax.linen as nn
import jax
import jax.numpy as jnp


class Decoder(nn.Module):
    """Hidden states (examples, length, width) of `ids`, and the routing of each block with experts.

    A token sees itself and the tokens before it that have its number in `segments`; without
    segments, all before it.
    """

    vocabulary: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    experts: int = 0

    def setup(self) -> None:
        self.embedding = nn.Embed(self.vocabulary, self.width)
        self.blocks = [Block(self.heads, self.experts) for _ in range(self.layers)]
        self.norm = nn.LayerNorm()

    def __call__(
        self, ids: jax.Array, segments: jax.Array | None = None
    ) -> tuple[jax.Array, list[jax.Array]]:
        segments = jnp.ones_like(ids) if segments is None else segments
        same = nn.make_attention_mask(segments, segments, jnp.equal)
        mask = nn.combine_masks(nn.make_causal_mask(ids), same)
        x, routing = self.embedding(ids), []
        for block in self.blocks:
            x, probs = block(x, mask)
            routing += [] if probs is None else [probs]
        return self.norm(x), routing

    def scores(self, ids: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """The scores of the next token, for every token of the vocabulary."""
        hidden, _ = self(ids, segments)
        return self.read_out(hidden)

    def read_out(self, hidden: jax.Array) -> jax.Array:
        """The scores that the embeddings give to hidden states."""
        return self.embedding.attend(hidden)


class Block(nn.Module):
    """Attention, then a perceptron or experts, each added to what enters it."""

    heads: int
    experts: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        width = x.shape[-1]
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        y = nn.LayerNorm()(x)
        if self.experts:
            y, probs = Experts(self.experts)(y)
            return x + y, probs
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y))), None


class Experts(nn.Module):
    """Each token's one expert, times the router's probability of it; and all probabilities.

    Switch Transformers, https://arxiv.org/abs/2101.03961, without a capacity: every token is read.
    """

    experts: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        width, normal = x.shape[-1], nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", normal, (self.experts, width, 2 * width))
        down = self.param("down", normal, (self.experts, 2 * width, width))
        probs = nn.softmax(nn.Dense(self.experts, use_bias=False)(x))
        chosen = jax.nn.one_hot(jnp.argmax(probs, axis=-1), self.experts, dtype=probs.dtype)
        hidden = nn.relu(jnp.einsum("...w,xwh->...xh", x, up))
        gated = hidden * (probs * chosen)[..., None]
        return jnp.einsum("...xh,xhw->...w", gated, down), probs
