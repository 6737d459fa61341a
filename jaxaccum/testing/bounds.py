"""How far rounding alone may take a sum, and how far two pytrees are apart."""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._base.trees import leaf_name, leaves_with_names
from jaxaccum._base.types import PyTree

__all__ = ["normwise", "sum_bound"]


Magnitude = TypeVar("Magnitude", float, np.ndarray, jax.Array)


def sum_bound(
    num_terms: int, magnitude: Magnitude, *, dtype: DTypeLike, factor: float = 1.0
) -> Magnitude:
    """The rounding that a sum of given terms cannot exceed, whatever the order of the additions.

        bound = factor · n · eps(dtype) · Σ|xᵢ|

    Each of the n − 1 additions rounds a partial sum, itself at most Σ|xᵢ|, by half an eps (Higham,
    *Accuracy and Stability of Numerical Algorithms*, 4.2); the factor of 2 that remains covers
    terms of higher order and the rounding of the terms themselves. It holds while n · eps < 1/2.

        def sum_bound(xs, dtype):
            bound = 0.0
            for x in xs:
                bound += len(xs) * eps(dtype) * abs(x)
            return bound

    Args:
      num_terms: n, the number of terms.
      magnitude: Σ|xᵢ|, computed in higher precision; a number or an array of any shape.
      dtype: the floating dtype in which the sum is accumulated.
      factor: more than 1 where each term carries some rounding of its own.

    Returns:
      The bound on |computed − true|, of `magnitude`'s shape.

    >>> sum_bound(4, 1.0, dtype="float32") == 4 * 2.0**-23
    True
    """
    return factor * num_terms * float(jnp.finfo(dtype).eps) * magnitude


def normwise(actual: PyTree, expected: PyTree) -> float:
    """How far two pytrees are apart: the largest difference over the largest expected entry.

        error = max |actual − expected| / max |expected|

    Both maxima are over all leaves. Leaves are not compared one by one, because a leaf's true
    gradient can be 0.

        def normwise(actual, expected):
            pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected))
            difference = max(abs(a - e).max() for a, e in pairs)
            scale = max(abs(e).max() for e in jax.tree.leaves(expected))
            return difference / scale

    Args:
      actual: pytree of arrays of any dtype; compared in float64.
      expected: pytree of the same structure and shapes.

    Returns:
      0 where both are equal, infinity where a difference is not finite or all of `expected` is 0.

    Raises:
      ValueError: structures or shapes differ.

    >>> normwise({"a": np.ones(2), "b": np.zeros(2)}, {"a": np.ones(2), "b": np.full(2, 4.0)})
    1.0
    """
    difference = max(leaf_differences(actual, expected).values(), default=0.0)
    if difference == 0 or not np.isfinite(difference):
        return float(difference)
    largest = jax.tree.map(lambda leaf: float(np.max(np.abs(wide(leaf)), initial=0.0)), expected)
    scale = max(jax.tree.leaves(largest))
    return difference / scale if scale > 0 else float("inf")


def leaf_differences(actual: PyTree, expected: PyTree) -> dict[str, float]:
    """The largest |difference| of each leaf by its path; infinity where one is not finite."""
    differences = jax.tree_util.tree_map_with_path(_difference, expected, actual)
    return dict(leaves_with_names(differences, ""))


def wide(leaf: ArrayLike) -> np.ndarray:
    """The leaf in float64 or complex128."""
    array = np.asarray(leaf)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _difference(path: KeyPath, expected: ArrayLike, actual: ArrayLike) -> float:
    if np.shape(actual) != np.shape(expected):
        raise ValueError(
            f"leaf {leaf_name('', path)} has shape {np.shape(actual)}, but "
            f"{np.shape(expected)} is expected"
        )
    with np.errstate(invalid="ignore"):  # inf − inf is not finite, which is the answer
        difference = np.max(np.abs(wide(actual) - wide(expected)), initial=0.0)
    return float(difference) if np.isfinite(difference) else float("inf")
