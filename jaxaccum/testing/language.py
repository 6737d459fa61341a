"""The model language: layers as plain data, with numpy weights, for any framework to build from.

A model maps a batch to an array of shape (batch_size, length, features). Its first layer reads the
batch, every other one the layer before. **A name that appears twice is one layer applied twice**:
this is how weights are tied.

| kind | size | choice |
|---|---|---|
| `dense` | features | |
| `convolution` (window 3, zero padding) | features | |
| `embedding` of `batch["tokens"]` | features | |
| `decode`: the transpose of the embedding of the same name | | |
| `attention` over `batch["mask"]` and the token itself | heads | |
| `layer_norm`, `rms_norm` | | |
| `group_norm` | groups | |
| `batch_norm` | | `train`, `eval` |
| `activation` | | `relu`, `tanh`, `gelu`, `silu` |
| `dropout` by the given mask `batch["keep"][:, size]`, rate 1/2 | index | |
| `pooling` over the length, which becomes 1 | | `mean` (of `batch["mask"]`), `max` |
| `residual` around `layers` | | |
| `scan` over `size` copies of `layers`, weights stacked in front | length | `""`, `checkpoint` |

Weights are laid out as Flax lays them out: inputs before outputs, features last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxaccum._base.types import PyTree

__all__ = ["BLOCKS", "CLASSES", "LENGTH", "MASKS", "Layer", "Model", "block", "build_model"]

CLASSES = 5
"""Labels and tokens share one vocabulary, so that an embedding can be tied to the decoder."""
LENGTH = 3
MASKS = 2
"""The dropout masks that each example brings along."""

Batch = Mapping[str, jax.Array]
Shape = tuple[int, ...]
Weights = dict[str, PyTree]


@dataclass(frozen=True)
class Layer:
    """One layer, as the table above says: kind, name, size or choice, and the layers inside it."""

    kind: str
    name: str = ""
    size: int = 0
    choice: str = ""
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class Model:
    """Layers, the width of `batch["features"]`, and nested dicts of weights and statistics."""

    layers: tuple[Layer, ...]
    width: int
    weights: Weights
    state: Weights

    @property
    def coupled(self) -> bool:
        """Whether one example's output depends on the others: batch normalization in training."""
        return any(layer.kind == "batch_norm" and layer.choice == "train" for layer in self.layers)

    def astype(self, dtype: DTypeLike) -> Model:
        """The model with weights of `dtype`; statistics too, but at least in float32."""
        kept = dtype if np.dtype(dtype).itemsize >= 4 else np.float32
        weights = _map(lambda leaf: leaf.astype(dtype), self.weights)
        state = _map(lambda leaf: leaf.astype(kept), self.state)
        return Model(self.layers, self.width, weights, state)


def build_model(layers: tuple[Layer, ...], width: int, *, seed: int) -> Model:
    """A model with float64 weights, drawn from `seed`.

    >>> build_model((Layer("dense", "head", size=2),), 4, seed=0).weights["head"]["kernel"].shape
    (4, 2)
    """
    rng = np.random.default_rng(seed)
    weights = _map(lambda path: _draw(rng, *path), weight_shapes(layers, width))
    normed = {layer.name for layer in layers if layer.kind == "batch_norm"}
    state = {}
    for name in weights:
        if name not in normed:
            continue
        shape = weights[name]["scale"].shape
        state[name] = {"mean": rng.normal(size=shape), "var": rng.uniform(0.5, 2, size=shape)}
    return Model(layers, width, weights, state)


def weight_shapes(layers: tuple[Layer, ...], width: int) -> Weights:
    """Nested dict of `(leaf name, shape)` that `layers` need over features of `width`."""
    shapes: Weights = {}
    for layer in layers:
        if layer.kind == "residual":
            shapes |= weight_shapes(layer.layers, width)
        elif layer.kind == "scan":
            stack = lambda leaf, n=layer.size: (leaf[0], (n, *leaf[1]))
            shapes[layer.name] = _map(stack, weight_shapes(layer.layers, width))
        elif layer.kind in _SHAPES:
            named = _SHAPES[layer.kind](width, layer.size)
            shapes.setdefault(layer.name, _leaf("", named))
        if layer.kind in ("dense", "convolution", "embedding"):
            width = layer.size
    return shapes


def block(kind: str, index: int, width: int) -> tuple[Layer, ...]:
    """A few layers that keep the width; `index` makes their names unique.

    >>> [layer.kind for layer in block("dense", 0, 4)]
    ['dense', 'activation']
    """
    return BLOCKS[kind](f"_{index}", width)


BLOCKS: Mapping[str, Callable[[str, int], tuple[Layer, ...]]] = {
    "dense": lambda i, w: (Layer("dense", "dense" + i, size=w), Layer("activation", choice="tanh")),
    "convolution": lambda i, w: (
        Layer("convolution", "conv" + i, size=w),
        Layer("activation", choice="relu"),
    ),
    "group_norm": lambda i, w: (
        Layer("group_norm", "group_norm" + i, size=2),
        Layer("activation", choice="silu"),
    ),
    "batch_norm": lambda i, w: (Layer("batch_norm", "batch_norm" + i, choice="eval"),),
    "attention": lambda i, w: (
        Layer(
            "residual",
            layers=(Layer("layer_norm", "norm" + i), Layer("attention", "attention" + i, size=2)),
        ),
    ),
    "feed_forward": lambda i, w: (
        Layer(
            "residual",
            layers=(
                Layer("rms_norm", "norm" + i),
                Layer("dense", "dense" + i, size=w),
                Layer("activation", choice="gelu"),
                Layer("dropout", size=int(i[1:]) % MASKS),
            ),
        ),
    ),
    "tied": lambda i, w: (
        Layer("dense", "tied" + i, size=w),
        Layer("activation", choice="silu"),
        Layer("dense", "tied" + i, size=w),
    ),
    "scan": lambda i, w: (Layer("scan", "scan" + i, size=2, layers=_scanned(w)),),
    "checkpoint": lambda i, w: (
        Layer("scan", "scan" + i, size=2, choice="checkpoint", layers=_scanned(w)),
    ),
}


def _scanned(width: int) -> tuple[Layer, ...]:
    inner = (
        Layer("layer_norm", "norm"),
        Layer("dense", "dense", size=width),
        Layer("activation", choice="gelu"),
    )
    return (Layer("residual", layers=inner),)


def _affine(*kernel: int) -> dict[str, Shape]:
    return {"kernel": kernel, "bias": kernel[-1:]}


def _attention(width: int, heads: int) -> Weights:
    into = {"kernel": (width, heads, width // heads), "bias": (heads, width // heads)}
    out = {"kernel": (heads, width // heads, width), "bias": (width,)}
    return {"query": into, "key": into, "value": into, "out": out}


def _norm(width: int, _: int) -> dict[str, Shape]:
    return {"scale": (width,), "bias": (width,)}


_SHAPES: Mapping[str, Callable[[int, int], Weights]] = {
    "dense": lambda width, size: _affine(width, size),
    "convolution": lambda width, size: _affine(3, width, size),
    "embedding": lambda width, size: {"embedding": (CLASSES, size)},
    "attention": _attention,
    "layer_norm": _norm,
    "group_norm": _norm,
    "batch_norm": _norm,
    "rms_norm": lambda width, size: {"scale": (width,)},
}


def _leaf(name: str, shape: PyTree) -> PyTree:
    """Each shape together with the name of its leaf, which says how to draw it."""
    if not isinstance(shape, dict):
        return name, shape
    return {key: _leaf(key, value) for key, value in shape.items()}


def _draw(rng: np.random.Generator, name: str, shape: Shape) -> np.ndarray:
    """Scales around 1, the rest around 0, wide enough that no leaf's gradient drowns."""
    return (name == "scale") + 0.4 * rng.normal(size=shape)


def _map(fn: Callable[[PyTree], PyTree], tree: PyTree) -> PyTree:
    """`fn` of every leaf of nested dicts, in their own order, in which random numbers are drawn."""
    if not isinstance(tree, dict):
        return fn(tree)
    return {key: _map(fn, value) for key, value in tree.items()}
