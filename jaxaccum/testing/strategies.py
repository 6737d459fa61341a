"""Hypothesis strategies: batches, masks, weights, partitions and models.

Arrays are drawn through a seed. So hypothesis shrinks sizes and choices, which explain a failure,
instead of entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxaccum._base.types import PyTree
from jaxaccum.testing.language import (
    BLOCKS,
    CLASSES,
    LENGTH,
    MASKS,
    Layer,
    Model,
    block,
    build_model,
)

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the strategies of jaxaccum.testing draw with hypothesis, which is not installed: "
        "pip install 'jaxaccum[testing]', or pip install hypothesis."
    ) from error

__all__ = [
    "batches",
    "compose",
    "masks",
    "model_batches",
    "models",
    "partitions",
    "weights",
]

SEEDS = st.integers(0, 2**16)


def batches(example: PyTree, *, min_size: int = 1, max_size: int = 6) -> st.SearchStrategy[PyTree]:
    """Batches whose examples look like `example`.

    Floating leaves are standard normal, booleans fair coins, integers at least 0 and below 10.
    Where that is not what a loss needs, put a function `(rng, batch_size) -> array` in the leaf's
    place.

    Args:
      example: pytree of one example: arrays or `jax.ShapeDtypeStruct`s *without* the batch axis, or
          functions.
      min_size: smallest batch size.
      max_size: largest batch size.

    Returns:
      A strategy of pytrees of numpy arrays with the batch axis in front.

    >>> from hypothesis import given
    >>> labels = lambda rng, n: rng.integers(0, 2, n)
    >>> @given(batches({"x": np.zeros(3, np.float32), "label": labels}))
    ... def check(batch):
    ...     assert batch["x"].shape == (len(batch["label"]), 3)
    >>> check()
    """

    def build(size: int, seed: int) -> PyTree:
        rng = np.random.default_rng(seed)
        own = lambda leaf: leaf(rng, size) if callable(leaf) else _like(leaf, rng, size)
        return jax.tree.map(own, example)

    return st.builds(build, st.integers(min_size, max_size), SEEDS)


def masks(batch_size: int, *shape: int) -> st.SearchStrategy[np.ndarray]:
    """Boolean masks of shape (batch_size, *shape), at least one entry true.

    Some are full, some random, some hide whole examples, some the batch's first or last examples
    and so whole microbatches, and some show one entry alone.

    >>> from hypothesis import given
    >>> @given(masks(4, 3))
    ... def check(mask):
    ...     assert mask.shape == (4, 3) and mask.any()
    >>> check()
    """

    def build(kind: str, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        mask = _MASKS[kind](rng, (batch_size, *shape))
        mask.flat[rng.integers(mask.size)] = True
        return mask

    return st.builds(build, st.sampled_from(sorted(_MASKS)), SEEDS)


def weights(batch_size: int, dtype: DTypeLike = np.float32) -> st.SearchStrategy[np.ndarray]:
    """Weights of shape (batch_size,): quarters from 0 to 2, at least one of them positive.

    >>> from hypothesis import given
    >>> @given(weights(3))
    ... def check(weight):
    ...     assert weight.shape == (3,) and weight.sum() > 0
    >>> check()
    """
    quarters = st.lists(st.integers(0, 8), min_size=batch_size, max_size=batch_size).filter(any)
    return quarters.map(lambda drawn: (np.asarray(drawn) / 4).astype(dtype))


def partitions(batch_size: int, *, equal: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments that partition a batch: a size, a number, or a strided split.

    Args:
      batch_size: of the batch to divide.
      equal: whether all microbatches must have one size, as coupled losses need.

    Returns:
      A strategy of dicts to pass on to `value_and_grad`, `microbatch` and `partition`.

    >>> from hypothesis import given
    >>> @given(partitions(6, equal=True))
    ... def check(options):
    ...     assert 6 % options.get("microbatch_size", 1) == 0
    >>> check()
    """
    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    sizes = st.sampled_from(divisors if equal else range(1, batch_size + 1))
    strided = st.fixed_dictionaries(
        {"num_microbatches": st.sampled_from(divisors), "split": st.just("strided")}
    )
    return (
        st.fixed_dictionaries({"microbatch_size": sizes})
        | st.fixed_dictionaries({"num_microbatches": sizes})
        | strided
    )


@st.composite
def models(
    draw: st.DrawFn,
    *,
    max_blocks: int = 2,
    kinds: Sequence[str] = tuple(BLOCKS),
    widths: Sequence[int] = (4, 6),
) -> Model:
    """Models of the model language with float64 weights: a stem, blocks, pooling, and a head.

    Args:
      draw: supplied by hypothesis.
      max_blocks: most blocks between stem and head.
      kinds: the blocks to draw from, keys of `jaxaccum.testing.language.BLOCKS`.
      widths: the widths to draw from; even, for heads and groups.

    >>> from hypothesis import given
    >>> @given(models(max_blocks=1))
    ... def check(model):
    ...     assert model.layers[-1].kind in ("dense", "decode")
    >>> check()
    """
    width = draw(st.sampled_from(widths))
    layers = compose(
        lambda options: draw(st.sampled_from(options)), width, max_blocks=max_blocks, kinds=kinds
    )
    return build_model(layers, width, seed=draw(SEEDS))


def compose(
    choose: Callable[[Sequence[Any]], Any],
    width: int,
    *,
    max_blocks: int = 2,
    kinds: Sequence[str] = tuple(BLOCKS),
) -> tuple[Layer, ...]:
    """A stem, blocks, pooling, and a head; `choose` picks one of the options it is given.

    >>> [layer.kind for layer in compose(lambda options: options[0], 4)]
    ['dense']
    """
    stem = choose([(), (Layer("embedding", "embedding", size=width),)])
    blocks: list[Layer] = []
    for index in range(choose(range(max_blocks + 1))):
        blocks += block(choose(kinds), index, width)
    pooling = choose([(), (Layer("pooling", choice="mean"),), (Layer("pooling", choice="max"),)])
    tied = bool(stem) and choose([False, True])
    head = Layer("decode", "embedding") if tied else Layer("dense", "head", size=CLASSES)
    return (*stem, *blocks, *pooling, head)


@st.composite
def model_batches(
    draw: st.DrawFn, width: int, *, sizes: Sequence[int] = (1, 4, 5), dtype: DTypeLike = np.float64
) -> dict[str, np.ndarray]:
    """Batches that every model of the model language reads; floating entries are of `dtype`.

    >>> from hypothesis import given
    >>> @given(model_batches(4))
    ... def check(batch):
    ...     assert batch["features"].shape[2] == 4
    >>> check()
    """
    size = draw(st.sampled_from(sizes))
    rng = np.random.default_rng(draw(SEEDS))
    return {
        "features": rng.normal(size=(size, LENGTH, width)).astype(dtype),
        "tokens": rng.integers(0, CLASSES, (size, LENGTH), dtype=np.int32),
        "mask": draw(masks(size, LENGTH)),
        "keep": rng.random((size, MASKS, width)) < 0.5,
        "labels": rng.integers(0, CLASSES, (size, LENGTH), dtype=np.int32),
        "targets": rng.normal(size=(size, LENGTH, CLASSES)).astype(dtype),
        "weight": draw(weights(size, dtype)),
    }


def _like(leaf: PyTree, rng: np.random.Generator, size: int) -> np.ndarray:
    shape = (size, *np.shape(leaf))
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.bool_):
        return rng.random(shape) < 0.5
    if jnp.issubdtype(dtype, jnp.integer):
        return rng.integers(0, 10, shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


def _hide(mask: np.ndarray, where: np.ndarray | slice) -> np.ndarray:
    mask[where] = False
    return mask


_MASKS: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "full": lambda rng, shape: np.ones(shape, bool),
    "random": lambda rng, shape: rng.random(shape) < 0.6,
    "examples": lambda rng, shape: _hide(rng.random(shape) < 0.8, rng.random(shape[0]) < 0.5),
    "first": lambda rng, shape: _hide(np.ones(shape, bool), slice(0, (shape[0] + 1) // 2)),
    "last": lambda rng, shape: _hide(np.ones(shape, bool), slice(shape[0] // 2, None)),
    "one": lambda rng, shape: np.zeros(shape, bool),
}
