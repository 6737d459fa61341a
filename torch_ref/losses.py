"""Losses of the model language in PyTorch: in one pass, or as totals and weights.

A loss is anything with `.terms, .class_weights, .label_smoothing`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_ref import models

IGNORED = -100

Batch = dict[str, Tensor]


def full_batch(loss: Any, outputs: Tensor, batch: Batch) -> Tensor:
    """The loss of the whole batch: the sum of its terms, each a mean as PyTorch computes it."""
    return torch.stack([MEANS[name](loss, outputs, batch) for name in loss.terms]).sum()


def terms(loss: Any, outputs: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """`{name: (total, weight)}`: what a loop over microbatches adds up."""
    return {name: TOTALS[name](loss, outputs, batch) for name in loss.terms}


def value_and_gradient(
    model: Any, loss: Any, batch: dict[str, Any]
) -> tuple[float, dict[str, Any]]:
    """Value and gradient, in float64, of a whole batch of arrays by one `backward`."""
    built, tensors = (
        models.build(model),
        {name: models.tensor(entry) for name, entry in batch.items()},
    )
    value = full_batch(loss, built(tensors), tensors)
    value.backward()
    return value.item(), models.read(built, models.gradient)


def loop(
    built: models.Model,
    loss: Any,
    microbatches: Sequence[dict[str, Any]],
    rule: Callable[..., Tensor],
) -> tuple[float, dict[str, Any]]:
    """Value and gradient that a loop of `rule(terms, index).backward()` over microbatches adds up
    in `built`.

    `rule` is given a microbatch's `{name: (total, weight)}` and its index, and returns what is
    back-propagated.
    """
    value = 0.0
    for index, microbatch in enumerate(microbatches):
        tensors = {name: models.tensor(entry) for name, entry in microbatch.items()}
        part = rule(terms(loss, built(tensors), tensors), index)
        part.backward()
        value += part.item()
    return value, models.read(built, models.gradient)


def over_totals(
    built: models.Model, loss: Any, microbatches: Sequence[dict[str, Any]]
) -> tuple[float, dict[str, Any]]:
    """The right loop: each term's weights are added up first, and every total is divided by the
    whole weight."""
    counted = weights(built, loss, microbatches)
    whole = {name: sum(each[name] for each in counted) for name in loss.terms}
    return loop(built, loss, microbatches, lambda terms, _: _over(terms, whole))


def _over(terms: dict[str, tuple[Tensor, Tensor]], whole: dict[str, float]) -> Tensor:
    return torch.stack([total / whole[name] for name, (total, _) in terms.items()]).sum()


@torch.no_grad()
def weights(
    built: models.Model, loss: Any, microbatches: Sequence[dict[str, Any]]
) -> list[dict[str, float]]:
    """Each microbatch's weight by term; no running statistic moves."""
    found = []
    for microbatch in microbatches:
        tensors = {name: models.tensor(entry) for name, entry in microbatch.items()}
        counted = terms(loss, copy.deepcopy(built)(tensors), tensors)
        found.append({name: weight.item() for name, (_, weight) in counted.items()})
    return found


def _squared_errors(outputs: Tensor, batch: Batch) -> Tensor:
    targets = batch["targets"][:, : outputs.shape[1]]
    return F.mse_loss(outputs, targets, reduction="none").mean(dim=(1, 2))


def _squared_error(_: Any, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    return _squared_errors(outputs, batch) @ batch["weight"], batch["weight"].sum()


def _squared_error_mean(_: Any, outputs: Tensor, batch: Batch) -> Tensor:
    return torch.dot(_squared_errors(outputs, batch), batch["weight"] / batch["weight"].sum())


def _labels(outputs: Tensor, batch: Batch) -> Tensor:
    """Labels with `IGNORED` where masked; a pooled example counts where any of its tokens does."""
    mask = (
        batch["mask"]
        if outputs.shape[1] == batch["mask"].shape[1]
        else batch["mask"].any(1, keepdim=True)
    )
    return torch.where(mask, batch["labels"][:, : outputs.shape[1]], IGNORED)


def _cross_entropy(loss: Any, outputs: Tensor, batch: Batch, reduction: str) -> Tensor:
    labels = _labels(outputs, batch).flatten()
    options: dict[str, Any] = {"label_smoothing": loss.label_smoothing, "ignore_index": IGNORED}
    return F.cross_entropy(
        outputs.flatten(0, 1),
        labels,
        weight=_class_weights(loss, outputs),
        reduction=reduction,
        **options,
    )


def _class_weights(loss: Any, outputs: Tensor) -> Tensor:
    return outputs.new_tensor(loss.class_weights or (1.0,) * outputs.shape[-1])


def _token_cross_entropy(loss: Any, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    labels = _labels(outputs, batch)
    weight = _class_weights(loss, outputs)[labels[labels != IGNORED]].sum()
    return _cross_entropy(loss, outputs, batch, "sum"), weight


def _example_means(loss: Any, outputs: Tensor, batch: Batch) -> Tensor:
    """One entry for each example that has a token: PyTorch's own mean over that example alone."""
    labels = _labels(outputs, batch)
    options: dict[str, Any] = {"label_smoothing": loss.label_smoothing, "ignore_index": IGNORED}
    pairs = zip(outputs, labels, strict=True)
    means = [
        F.cross_entropy(row, label, **options) for row, label in pairs if (label != IGNORED).any()
    ]
    return torch.stack(means) if means else outputs.new_zeros(0)


def _example_cross_entropy(loss: Any, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    means = _example_means(loss, outputs, batch)
    return means.sum() + 0 * outputs.sum(), outputs.new_tensor(means.numel())


def _z(_: Any, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    squares = outputs.logsumexp(dim=-1).square().mean(dim=1)
    return squares.sum(), outputs.new_tensor(squares.numel())


TOTALS: dict[str, Callable[[Any, Tensor, Batch], tuple[Tensor, Tensor]]] = {
    "squared_error": _squared_error,
    "example_cross_entropy": _example_cross_entropy,
    "token_cross_entropy": _token_cross_entropy,
    "z": _z,
}

MEANS: dict[str, Callable[[Any, Tensor, Batch], Tensor]] = {
    "squared_error": _squared_error_mean,
    "example_cross_entropy": lambda loss, outputs, batch: _example_means(
        loss, outputs, batch
    ).mean(),
    "token_cross_entropy": lambda loss, outputs, batch: _cross_entropy(
        loss, outputs, batch, "mean"
    ),
    "z": lambda loss, outputs, batch: outputs.logsumexp(dim=-1).square().mean(),
}
