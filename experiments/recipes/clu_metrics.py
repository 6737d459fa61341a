"""Metrics of clu: one `Sum` adds them, and a masked accuracy is the whole batch's.

Command   python -m experiments.recipes.clu_metrics
"""

import jax
import jax.numpy as jnp
import optax
from clu import metrics

import jaxaccum
from experiments.recipes import _check, _texts
from experiments.recipes._language import logits_and_labels, parameters


def metrics_of(logits, labels, ce, mask):
    """What is reported. (A `Collection` would also count how often it was merged.)"""
    return {
        "accuracy": metrics.Accuracy.from_model_output(logits=logits, labels=labels, mask=mask > 0),
        "loss": metrics.Average.from_model_output(ce, mask=mask > 0),
    }


def plain(params, batch):
    """The training step as anybody would write it."""

    def loss_fn(params, batch):
        logits, labels, mask = logits_and_labels(params, batch)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        seen = metrics_of(logits, labels, ce, mask)
        return jnp.sum(ce * mask) / jnp.sum(mask), seen

    grads, seen = jax.grad(loss_fn, has_aux=True)(params, batch)
    return grads, {name: metric.compute() for name, metric in seen.items()}


def accumulated(params, batch):
    """The same step in 4 microbatches."""

    def loss_fn(params, batch):
        logits, labels, mask = logits_and_labels(params, batch)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        seen = metrics_of(logits, labels, ce, mask)
        return jaxaccum.Mean(jnp.sum(ce * mask), jnp.sum(mask)), jaxaccum.Sum(seen)

    grads, seen = jaxaccum.grad(loss_fn, has_aux=True, num_microbatches=4)(params, batch)
    return grads, {name: metric.compute() for name, metric in seen.items()}


def usual(params, batch):
    """The usual loop: gradients and metrics of the microbatches are averaged."""
    return _check.mean([plain(params, part) for part in _check.parts(batch, 4)])


def check() -> _check.Errors:
    """One step on 16 texts: the metrics."""
    args = parameters(), _texts.tokens(16, 48)
    full, ours, other = (jax.jit(step)(*args)[1] for step in (plain, accumulated, usual))
    return _check.errors(start=_check.zeros(full), full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
