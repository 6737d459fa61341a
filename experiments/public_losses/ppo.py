"""PPO on text: a clipped objective under normalized advantages, over the tokens that count.

Schulman et al., https://arxiv.org/abs/1707.06347, as fine-tuning from feedback uses it
(https://arxiv.org/abs/2203.02155): an actor and a critic read the same hidden states, and the
advantages are whitened over the tokens at hand. The actor of the start samples all rollouts;
training then makes several epochs over them.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import _text
from experiments.models.language import Decoder
from experiments.public_losses import (
    PublicLoss,
    _texts,
    cross_entropy,
    initial,
    masked_mean,
    mean_of_batch,
    stateless,
)

PROMPT, ROLLOUTS = 8, 192
CLIP, VALUE_SHARE = 0.2, 0.1
SMOOTHING = 0.95  # λ of the advantages; the discount γ is 1
Total = Callable[[Any], Any]


class ActorCritic(nn.Module):
    """Of each token the scores of the next one, and the value of the text so far."""

    layers: int = 2

    @nn.compact
    def __call__(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scores (examples, length, vocabulary) and values (examples, length)."""
        actor = Decoder(_texts.VOCABULARY, layers=self.layers)
        hidden, _ = actor(ids)
        return actor.read_out(hidden), nn.Dense(1)(hidden)[..., 0]


MODEL = ActorCritic()


def plain(params: Any, batch: _texts.Batch) -> jax.Array:
    """Advantages whitened over the tokens at hand, and the means over these."""
    mask = batch["mask"]
    policy, value = per_token(params, batch, whitened(batch["advantage"], mask))
    return masked_mean(policy, mask) + VALUE_SHARE * masked_mean(value, mask)


def tagged(params: Any, batch: _texts.Batch) -> dict[str, Any]:
    """Both over the tokens of the whole batch."""
    mask, over_batch = batch["mask"], lambda sums: lax.psum(sums, "microbatch")
    policy, value = per_token(params, batch, whitened(batch["advantage"], mask, over_batch))
    return {
        "policy": mean_of_batch(policy, mask),
        "value": VALUE_SHARE * mean_of_batch(value, mask),
    }


def per_token(
    params: Any, batch: _texts.Batch, advantage: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The clipped objective of the actor, and that of the critic."""
    scores, values = MODEL.apply(params, batch["ids"])
    ratio = jnp.exp(batch["error"] - cross_entropy(scores, batch["targets"]))
    near = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    policy = jnp.maximum(-advantage * ratio, -advantage * near)
    close = batch["value"] + jnp.clip(values - batch["value"], -CLIP, CLIP)
    value = jnp.maximum((values - batch["return"]) ** 2, (close - batch["return"]) ** 2) / 2
    return policy, value


def whitened(x: jax.Array, mask: jax.Array, total: Total = lambda sums: sums) -> jax.Array:
    """Mean 0 and variance 1 over what counts."""
    count = total(jnp.sum(mask))
    mean = total(jnp.sum(x * mask)) / count
    variance = total(jnp.sum((x - mean) ** 2 * mask)) / count
    return (x - mean) * lax.rsqrt(variance + 1e-8)


def rollouts(params: Any, texts: np.ndarray) -> _texts.Batch:
    """Each text's beginning, which the actor continues to the text's own length."""
    read = jax.jit(lambda ids: MODEL.apply(params, ids))
    random = np.random.default_rng(3)
    ids = np.where(np.arange(texts.shape[1]) < PROMPT, texts, _text.PAD)
    for t in range(PROMPT, ids.shape[1]):
        scores = np.asarray(read(ids)[0][:, t - 1])
        ids[:, t] = np.argmax(scores + random.gumbel(size=scores.shape), axis=1)  # of softmax
    scores, values = read(ids)
    batch = _texts.next_tokens(ids)
    said = (np.arange(ids.shape[1]) >= PROMPT) & (texts != _text.PAD)
    mask, value = said[:, 1:].astype(float), np.asarray(values)[:, :-1]
    error = np.asarray(cross_entropy(scores[:, :-1], jnp.asarray(batch["targets"])))
    advantage = advantages(rewards(batch["targets"], texts) * mask, value * mask)
    known = {"value": value, "return": advantage + value, "advantage": advantage}
    return batch | known | {"mask": mask, "error": error}


def rewards(tokens: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """1 for a token that the text itself goes on to use."""
    own = np.where(texts == _text.PAD, -1, texts)[:, PROMPT:]
    return np.any(tokens[:, :, None] == own[:, None], axis=2).astype(float)


def advantages(reward: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Generalized advantage estimation (https://arxiv.org/abs/1506.02438), from the last token."""
    found, after, next_value = np.zeros_like(reward), 0.0, 0.0
    for t in reversed(range(reward.shape[1])):
        after = reward[:, t] + next_value - value[:, t] + SMOOTHING * after
        found[:, t], next_value = after, value[:, t]
    return found


def task(steps: int) -> PublicLoss:
    """8 rollouts in 4 microbatches; evaluated on all 192, whose objective it is."""
    texts = _texts.training()
    texts = texts[np.sum(texts != _text.PAD, axis=1) > PROMPT + 1][:ROLLOUTS]
    params = initial(MODEL.init, texts[:2])
    made = rollouts(params, texts)
    chosen = lambda rows: jax.tree.map(lambda leaf: leaf[rows], made)
    return stateless(
        plain,
        tagged,
        num_microbatches=_texts.MICROBATCHES,
        evaluate=lambda params: plain(params, made),
        published="PPO, arXiv 1707.06347; InstructGPT, arXiv 2203.02155; TRL",
        alone="whitens its own advantages, and divides by the number of its own tokens",
        params=params,
        batches=[chosen(rows) for rows in _texts.shuffled(np.arange(ROLLOUTS), steps=steps)],
    )
