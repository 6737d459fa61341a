"""Losses of the model language, written with tags: each term a `Mean` over its own weights.

| term | over | weight |
|---|---|---|
| `squared_error` | examples | `batch["weight"]` |
| `example_cross_entropy`: the mean over an example's tokens | examples | 1; 0 if masked |
| `token_cross_entropy`, with class weights and label smoothing | tokens | the class's weight |
| `z`: the squared log-partition, an auxiliary term | examples | 1 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st

import jaxaccum
from jaxaccum.testing.linen_models import Apply

Term = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Loss:
    """The names of the terms, class weights (empty for none) and label smoothing of the
    cross-entropy."""

    terms: tuple[str, ...]
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0


LOSSES = (
    Loss(("squared_error",)),
    Loss(("example_cross_entropy",), label_smoothing=0.25),
    Loss(("token_cross_entropy",)),
    Loss(("token_cross_entropy",), class_weights=(1, 0.5, 2, 1, 4), label_smoothing=0.125),
    Loss(("token_cross_entropy", "z")),
    Loss(
        ("squared_error", "example_cross_entropy", "token_cross_entropy", "z"),
        class_weights=(1, 0.25, 2, 1, 4),
    ),
)


def losses() -> st.SearchStrategy[Loss]:
    """Losses with one term and with several, with and without class weights and label smoothing."""
    return st.sampled_from(LOSSES)


def loss_fun(apply: Apply, loss: Loss, *, has_aux: bool = False) -> Callable[..., Any]:
    """The loss `fun(weights, state, batch)` of a model: one `Mean`, or a dict of them where it has
    several terms.

    With `has_aux` it returns `(loss, new state)`, the state tagged `Carry`.
    """

    def fun(weights: Any, state: Any, batch: Any) -> Any:
        outputs, new = apply(weights, state, batch)
        means = {
            name: jaxaccum.Mean(*term) for name, term in loss_terms(loss, outputs, batch).items()
        }
        value = means if len(means) > 1 else means[loss.terms[0]]
        return (value, jaxaccum.Carry(new)) if has_aux else value

    return fun


def loss_terms(loss: Loss, outputs: jax.Array, batch: Any) -> dict[str, Term]:
    """`{name: (total, weight)}` of outputs of shape (batch_size, length or 1, classes)."""
    return {name: TERMS[name](loss, outputs, batch) for name in loss.terms}


def squared_error(_: Loss, outputs: jax.Array, batch: Any) -> Term:
    """Σᵢ wᵢ mean(outputsᵢ − targetsᵢ)² over Σᵢ wᵢ."""
    errors = jnp.mean((outputs - batch["targets"][:, : outputs.shape[1]]) ** 2, axis=(1, 2))
    weight = batch["weight"]
    return jnp.sum(jnp.where(weight > 0, weight * errors, jnp.zeros_like(errors))), jnp.sum(weight)


def example_cross_entropy(loss: Loss, outputs: jax.Array, batch: Any) -> Term:
    """The mean over examples of the mean over an example's tokens."""
    mask = _mask(outputs, batch)
    errors = _select(
        mask, _cross_entropy(Loss((), label_smoothing=loss.label_smoothing), outputs, batch)
    )
    count = jnp.sum(mask, axis=1)
    means = jnp.sum(errors, axis=1) / jnp.maximum(count, 1).astype(errors.dtype)
    return jnp.sum(means), jnp.sum(count > 0).astype(errors.dtype)


def token_cross_entropy(loss: Loss, outputs: jax.Array, batch: Any) -> Term:
    """The mean over all unmasked tokens, each weighted by its label's class."""
    mask, labels = _mask(outputs, batch), batch["labels"][:, : outputs.shape[1]]
    weight = _class_weights(loss, outputs)[labels]
    return jnp.sum(_select(mask, _cross_entropy(loss, outputs, batch))), jnp.sum(
        _select(mask, weight)
    )


def z(_: Loss, outputs: jax.Array, batch: Any) -> Term:
    """The mean over examples of the squared logsumexp."""
    squares = jnp.mean(jax.nn.logsumexp(outputs, axis=-1) ** 2, axis=1)
    return jnp.sum(squares), jnp.asarray(squares.size, squares.dtype)


TERMS: Mapping[str, Callable[[Loss, jax.Array, Any], Term]] = {
    "squared_error": squared_error,
    "example_cross_entropy": example_cross_entropy,
    "token_cross_entropy": token_cross_entropy,
    "z": z,
}


def _cross_entropy(loss: Loss, outputs: jax.Array, batch: Any) -> jax.Array:
    """−(1 − s) c[y] log p[y] − s/C Σⱼ c[j] log p[j], as torch.nn.functional.cross_entropy defines
    it."""
    labels = batch["labels"][:, : outputs.shape[1]]
    weighted = jax.nn.log_softmax(outputs) * _class_weights(loss, outputs)[None, None]
    own = jnp.take_along_axis(weighted, labels[..., None], axis=-1)[..., 0]
    return -(1 - loss.label_smoothing) * own - loss.label_smoothing * jnp.mean(weighted, axis=-1)


def _class_weights(loss: Loss, outputs: jax.Array) -> jax.Array:
    return jnp.asarray(loss.class_weights or (1.0,) * outputs.shape[-1], outputs.dtype)


def _mask(outputs: jax.Array, batch: Any) -> jax.Array:
    """The mask of the outputs' length; a pooled example counts where any of its tokens does."""
    mask = batch["mask"]
    return mask if outputs.shape[1] == mask.shape[1] else jnp.any(mask, axis=1, keepdims=True)


def _select(mask: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.where(mask, values, jnp.zeros_like(values))
