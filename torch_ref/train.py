"""Training in PyTorch: AdamW on clipped gradients of the full batch or of either loop."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from torch_ref.accumulate import (
    Arrays,
    Loss,
    Tensors,
    as_leaves,
    as_tensors,
    backward_exact,
    backward_full_batch,
    backward_naive,
    split,
)

Way = Literal["full batch", "naive", "exact"]


def train(
    fun: Loss,
    weights: Arrays,
    batches: Sequence[Arrays],
    *,
    way: Way,
    sizes: Sequence[int],
    learning_rates: Sequence[float],
    weight_decay: float,
    max_norm: float,
    eps: float,
) -> Iterator[Tensors]:
    """One optimizer step a batch; yields the weights before the first step and after each, the same
    tensors every time.

    The naive way clips each microbatch's gradient before it is added, the others the batch's.
    """
    leaves = as_leaves(weights)
    optimizer = torch.optim.AdamW(list(leaves.values()), eps=eps, weight_decay=weight_decay)
    yield leaves
    for batch, learning_rate in zip(map(as_tensors, batches), learning_rates, strict=True):
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        backward(fun, leaves, batch, way=way, sizes=sizes, max_norm=max_norm)
        clip(leaves, max_norm)
        optimizer.step()
        yield leaves


def backward(
    fun: Loss, leaves: Tensors, batch: Tensors, *, way: Way, sizes: Sequence[int], max_norm: float
) -> None:
    """Fill `leaves[…].grad` with the batch's gradient."""
    if way == "full batch":
        backward_full_batch(fun, leaves, batch)
    elif way == "exact":
        backward_exact(fun, leaves, split(batch, sizes))
    else:
        _backward_clipping_each(fun, leaves, split(batch, sizes), max_norm=max_norm)


def clip(leaves: Tensors, max_norm: float) -> None:
    """Scale all gradients so that their joint norm is at most `max_norm`; torch's own adds 1e-6 to
    the norm."""
    grads = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    scale = 1 / torch.clamp(norm / max_norm, min=1)
    for grad in grads:
        grad.mul_(scale)


def evaluate(fun: Loss, leaves: Tensors, batch: Arrays) -> float:
    """The batch's mean loss, without a gradient."""
    with torch.no_grad():
        loss = fun(leaves, as_tensors(batch))
    if isinstance(loss, dict):
        return sum((total / weight).item() for total, weight in loss.values())
    return (loss[0] / loss[1]).item()


def _backward_clipping_each(
    fun: Loss, leaves: Tensors, microbatches: Sequence[Tensors], *, max_norm: float
) -> None:
    sums = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for microbatch in microbatches:
        for leaf in leaves.values():
            leaf.grad = None
        backward_naive(fun, leaves, [microbatch])
        clip(leaves, max_norm)
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                sums[name] += leaf.grad / len(microbatches)
    for name, leaf in leaves.items():
        leaf.grad = sums[name]
