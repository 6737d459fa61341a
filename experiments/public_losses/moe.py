"""Experts with a load-balancing loss that counts the tokens of the whole batch.

Switch Transformers, https://arxiv.org/abs/2101.03961: E · Σₑ fₑ Pₑ, where fₑ is the share of tokens
that went to expert e and Pₑ the router's mean probability of it. A product of two means over the
batch is not the mean of the microbatches' products.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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

MODEL = Decoder(_texts.VOCABULARY, experts=4)
SHARE = 0.01  # of the balance in the loss, as published


def plain(params: Any, batch: _texts.Batch) -> jax.Array:
    """The mean over tokens, and the balance, of the tokens at hand."""
    errors, routing = per_token(params, batch)
    return masked_mean(errors, batch["mask"]) + SHARE * balance(routing, batch["mask"])


def tagged(params: Any, batch: _texts.Batch) -> dict[str, Any]:
    """Both of the whole batch: the balance sums over microbatches as it would over devices."""
    errors, routing = per_token(params, batch)
    over_batch = lambda sums: lax.psum(sums, "microbatch")
    return {
        "tokens": mean_of_batch(errors, batch["mask"]),
        "balance": SHARE * balance(routing, batch["mask"], over_batch),
    }


def per_token(params: Any, batch: _texts.Batch) -> tuple[jax.Array, list[jax.Array]]:
    """Each token's cross entropy, and each layer's routing."""
    model = MODEL.bind(params)
    hidden, routing = model(batch["ids"])
    return cross_entropy(model.read_out(hidden), batch["targets"]), routing


def balance(
    routing: list[jax.Array], mask: jax.Array, total: Callable[[Any], Any] = lambda sums: sums
) -> jax.Array:
    """The load-balancing loss, a mean over layers: 1 where every expert has its share."""
    layers = []
    for probs in routing:
        experts = probs.shape[-1]
        chosen = jax.nn.one_hot(jnp.argmax(probs, axis=-1), experts, dtype=probs.dtype)
        sums = jnp.sum(mask), over_tokens(chosen, mask), over_tokens(probs, mask)
        count, routed, likely = total(sums)
        layers.append(experts * jnp.sum(routed / count * likely / count))
    return jnp.mean(jnp.stack(layers))


def over_tokens(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The sum over the tokens that count, for each expert."""
    return jnp.einsum("elx,el->x", values, mask)


def task(steps: int) -> PublicLoss:
    """8 texts in 4 microbatches."""
    texts = _texts.shuffled(_texts.training(), steps=steps)
    batches = [_texts.next_tokens(ids) for ids in texts]
    evaluated = _texts.next_tokens(_texts.held_out())
    return stateless(
        plain,
        tagged,
        num_microbatches=_texts.MICROBATCHES,
        evaluate=lambda params: plain(params, evaluated),
        published="Switch Transformers, arXiv 2101.03961",
        alone="balances its own tokens, and divides by their number",
        params=initial(MODEL.init, batches[0]["ids"]),
        batches=batches,
    )
