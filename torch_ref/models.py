"""Builds the model language in PyTorch, and moves weights between its layout and PyTorch's.

A layer is anything with `.kind, .name, .size, .choice, .layers`; weights are nested dicts of arrays
laid out as inputs before outputs, features last. A name that appears twice is one module applied
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 5

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Model(nn.Module):
    """The named modules of `layers`; called with a batch of tensors it returns the last layer's
    output."""

    def __init__(self, layers: Sequence[Any], width: int):
        super().__init__()
        self.layers = tuple(layers)
        self.named = nn.ModuleDict()
        for layer in flatten(layers):
            if layer.name and layer.name not in self.named:
                self.named[layer.name] = _make(layer, width)
            if layer.kind in ("dense", "convolution", "embedding"):
                width = layer.size

    def forward(self, batch: dict[str, Tensor], x: Tensor | None = None) -> Tensor:
        """Runs the layers on `x`, by default `batch["features"]`."""
        return self._run(self.layers, batch["features"] if x is None else x, batch)

    def _run(self, layers: Sequence[Any], x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        for layer in layers:
            module: Any = self.named[layer.name] if layer.name else None
            match layer.kind:
                case "embedding":
                    x = module(batch["tokens"])
                case "decode":
                    x = x @ module.weight.T
                case "attention":
                    x = _attend(module, x, batch["mask"])
                case "activation":
                    x = ACTIVATIONS[layer.choice](x)
                case "dropout":
                    x = torch.where(batch["keep"][:, None, layer.size], 2 * x, 0.0)
                case "pooling":
                    x = _pool(x, batch["mask"], layer.choice)
                case "residual":
                    x = x + self._run(layer.layers, x, batch)
                case "scan":
                    for copy in module:
                        x = copy(batch, x)
                case "convolution" | "group_norm" | "batch_norm":
                    x = module(x.transpose(1, 2)).transpose(
                        1, 2
                    )  # PyTorch keeps features in front of the length
                case _:
                    x = module(x)
        return x


def build(model: Any) -> Model:
    """The float64 PyTorch model of anything with `.layers, .width, .weights, .state`."""
    built = Model(model.layers, model.width).double()
    load(built, model.weights)
    for name, running in model.state.items():
        norm: Any = built.named[name]
        norm.running_mean.copy_(tensor(running["mean"]))
        norm.running_var.copy_(tensor(running["var"]))
    return built


def load(model: Model, weights: dict[str, Any]) -> None:
    """Copies nested dicts of arrays into the parameters."""
    for name, module in model.named.items():
        if isinstance(module, nn.ModuleList):
            copies: Any = module  # torch's types do not say of what a list is
            for index, copy in enumerate(copies):
                load(copy, map_tree(lambda leaf, index=index: leaf[index], weights[name]))
        else:
            _copy(views(module, lambda parameter: parameter.data), weights[name])


def read(model: Model, of: Callable[[Any], Tensor]) -> dict[str, Any]:
    """Nested dicts of float64 arrays, in the language's layout, of what `of` finds for each
    parameter.

    `read(model, lambda p: p.data)` are the weights and `read(model, gradient)` their gradients.
    """
    values = {}
    for name, module in model.named.items():
        if isinstance(module, nn.ModuleList):
            copies: Any = module  # torch's types do not say of what a list is
            values[name] = _stack([read(copy, of) for copy in copies])
        else:
            values[name] = map_tree(
                lambda leaf: leaf.detach().double().numpy().copy(), views(module, of)
            )
    return values


def gradient(parameter: Tensor) -> Tensor:
    """The accumulated gradient; zero where backward never came by."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def views(module: nn.Module, of: Callable[[Any], Tensor]) -> dict[str, Any]:
    """The module's tensors as views in the language's layout: written to, they change the
    module."""
    match module:
        case nn.Linear():
            return {"kernel": of(module.weight).T, "bias": of(module.bias)}
        case nn.Conv1d():
            assert module.bias is not None
            return {"kernel": of(module.weight).permute(2, 1, 0), "bias": of(module.bias)}
        case nn.Embedding():
            return {"embedding": of(module.weight)}
        case nn.MultiheadAttention():
            return _attention_views(module, of)
        case nn.RMSNorm():
            return {"scale": of(module.weight)}
        case norm:
            return {"scale": of(norm.weight), "bias": of(norm.bias)}


def running(model: Model) -> dict[str, Any]:
    """The running statistics of every batch normalization, as arrays."""
    norms = {
        name: module for name, module in model.named.items() if isinstance(module, nn.BatchNorm1d)
    }
    number: Callable[[Any], Any] = lambda buffer: buffer.numpy().copy()
    return {
        name: {"mean": number(module.running_mean), "var": number(module.running_var)}
        for name, module in norms.items()
    }


def tensor(array: Any) -> Tensor:
    """An array as a tensor: float64, int64 or bool."""
    array = np.asarray(array)
    kind = {"i": np.int64, "b": np.bool_}.get(array.dtype.kind, np.float64)
    return torch.from_numpy(array.astype(kind))


def map_tree(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Applies `fn` to every leaf of nested dicts."""
    return (
        {key: map_tree(fn, value) for key, value in tree.items()}
        if isinstance(tree, dict)
        else fn(tree)
    )


def flatten(layers: Sequence[Any]) -> list[Any]:
    """The layers, with those of residual blocks in their place."""
    return [
        inner
        for layer in layers
        for inner in (flatten(layer.layers) if layer.kind == "residual" else [layer])
    ]


def _make(layer: Any, width: int) -> nn.Module:
    match layer.kind:
        case "dense":
            return nn.Linear(width, layer.size)
        case "convolution":
            return nn.Conv1d(width, layer.size, kernel_size=3, padding=1)
        case "embedding":
            return nn.Embedding(VOCABULARY, layer.size)
        case "attention":
            return nn.MultiheadAttention(width, layer.size, batch_first=True)
        case "layer_norm":
            return nn.LayerNorm(width, eps=1e-5)
        case "rms_norm":
            return nn.RMSNorm(width, eps=1e-5)
        case "group_norm":
            return nn.GroupNorm(layer.size, width, eps=1e-5)
        case "batch_norm":
            return nn.BatchNorm1d(width, eps=1e-5, momentum=0.1).train(layer.choice == "train")
        case "scan":
            return nn.ModuleList(Model(layer.layers, width) for _ in range(layer.size))
    raise ValueError(f"no layer of kind {layer.kind!r}")


def _attend(module: nn.MultiheadAttention, x: Tensor, mask: Tensor) -> Tensor:
    forbidden = ~(mask[:, None, :] | torch.eye(mask.shape[1], dtype=torch.bool))
    outputs, _ = module(
        x, x, x, attn_mask=forbidden.repeat_interleave(module.num_heads, dim=0), need_weights=False
    )
    return outputs


def _pool(x: Tensor, mask: Tensor, choice: str) -> Tensor:
    if choice == "max":
        return x.amax(dim=1, keepdim=True)
    count = mask.sum(dim=1).clamp(min=1)
    return torch.where(mask[..., None], x, 0.0).sum(dim=1, keepdim=True) / count[:, None, None]


def _attention_views(module: nn.MultiheadAttention, of: Callable[[Any], Tensor]) -> dict[str, Any]:
    heads = (module.num_heads, module.head_dim)
    assert module.in_proj_weight is not None
    assert module.in_proj_bias is not None
    kernels = (kernel.T.unflatten(1, heads) for kernel in of(module.in_proj_weight).chunk(3))
    biases = (bias.unflatten(0, heads) for bias in of(module.in_proj_bias).chunk(3))
    pairs = zip(("query", "key", "value"), kernels, biases, strict=True)
    projections = {name: {"kernel": kernel, "bias": bias} for name, kernel, bias in pairs}
    out = module.out_proj
    return projections | {
        "out": {"kernel": of(out.weight).T.unflatten(0, heads), "bias": of(out.bias)}
    }


def _copy(into: Any, values: Any) -> None:
    for key, target in into.items():
        if isinstance(target, dict):
            _copy(target, values[key])
        else:
            target.copy_(tensor(values[key]))


def _stack(trees: list[Any]) -> Any:
    first = trees[0]
    return (
        {key: _stack([tree[key] for tree in trees]) for key in first}
        if isinstance(first, dict)
        else np.stack(trees)
    )
