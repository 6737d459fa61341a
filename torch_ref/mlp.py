"""A multi-layer perceptron with one weight per example: the smallest model with a denominator."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from torch_ref.accumulate import Tensors, Term


def weights(widths: Sequence[int], *, seed: int, dtype: type = np.float64) -> dict[str, np.ndarray]:
    """Random numpy weights `w0, b0, w1, …` for layers of the given widths, input first."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
        arrays[f"w{i}"] = (rng.normal(size=(fan_in, fan_out)) / np.sqrt(fan_in)).astype(dtype)
        arrays[f"b{i}"] = (0.1 * rng.normal(size=fan_out)).astype(dtype)
    return arrays


def loss(weights: Tensors, batch: Tensors) -> Term:
    """The weighted squared error of `y`, weights `weight`, and the sum of the weights."""
    error = ((forward(weights, batch["x"]) - batch["y"]) ** 2).sum(-1)
    return (batch["weight"] * error).sum(), batch["weight"].sum()


def forward(weights: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Affine layers with tanh between them."""
    layers = len(weights) // 2
    for i in range(layers):
        x = x @ weights[f"w{i}"] + weights[f"b{i}"]
        x = torch.tanh(x) if i + 1 < layers else x
    return x
