"""The seed's model: one weight, ŷ = w·x, squared error, and what its loop prints."""

from typing import NamedTuple

import numpy as np
import torch

from torch_ref.accumulate import Tensors, Term


class Row(NamedTuple):
    """What is printed: the accumulated gradient and the weight."""

    grad: np.ndarray
    weight: np.ndarray


def loss(weights: Tensors, batch: Tensors) -> Term:
    """The total of (y − w·x)² and the number of examples."""
    x = batch["x"]
    return ((2 * x - weights["w"] * x) ** 2).sum(), torch.tensor(len(x), dtype=x.dtype)


def run(x: np.ndarray, *, batches: int, learning_rate: float) -> list[Row]:
    """The seed's loop: a row after each batch's `.backward()`, and one after the optimizer step."""
    w = torch.ones(1, dtype=torch.tensor(x).dtype, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=learning_rate)
    rows = []
    for part in torch.split(torch.tensor(x), len(x) // batches):
        total, weight = loss({"w": w}, {"x": part})
        (total / weight / batches).backward()
        rows.append(_row(w))
    optimizer.step()
    return [*rows, _row(w)]


def _row(w: torch.Tensor) -> Row:
    assert w.grad is not None
    return Row(w.grad.numpy().copy(), w.detach().numpy().copy())
