"""Arithmetic on arrays and pytrees: names of leaves, dtypes of sums, and the one division."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxaccum._base.types import Array, KeyPath, PyTree

T = TypeVar("T")


def safe_map(fn: Callable[..., T], *lists: Iterable[Any]) -> list[T]:
    """``fn`` of the first entry of every list, of the second, …; the lists have one length."""
    return [fn(*own) for own in zip(*lists, strict=True)]


def is_array(x: object) -> bool:
    """Whether `x` is an array for JAX; Python scalars are not, so that they stay what they are for
    `fun`."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def is_inexact(x: object) -> bool:
    """Whether `x` is real or complex floating, that is, can be differentiated."""
    return jnp.issubdtype(dtype_of(x), jnp.inexact)


def dtype_of(x: Any) -> np.dtype:
    """The dtype of an array, a tracer, a shape, or a Python scalar."""
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def is_key(x: Any) -> bool:
    """Whether it is one PRNG key: typed of shape (), or legacy, uint32 of one axis."""
    if jnp.issubdtype(dtype_of(x), jax.dtypes.prng_key):
        return jnp.shape(x) == ()
    return is_array(x) and dtype_of(x) == jnp.uint32 and len(jnp.shape(x)) == 1


def key_impl(x: Any) -> Hashable | None:
    """The implementation of a typed PRNG key, and None of what is no key."""
    return jax.random.key_impl(x) if jnp.issubdtype(dtype_of(x), jax.dtypes.prng_key) else None


def key_data(x: Array) -> Array:
    """The integers that a typed PRNG key is made of; any other array as it is."""
    return x if key_impl(x) is None else jax.random.key_data(x)


def as_key(data: Array, like: Any) -> Array:
    """`data` as a key of the kind of `like`; as it is where `like` is not a key."""
    impl = key_impl(like)
    return data if impl is None else jax.random.wrap_key_data(data, impl=impl)


def leaf_name(name: str, path: KeyPath) -> str:
    """``argument 1['x'][0]``: how errors call a leaf."""
    return name + jax.tree_util.keystr(path)


def widen(dtype: DTypeLike) -> np.dtype:
    """The dtype in which values of `dtype` are summed: float32 for lower precision, else itself.

    Integers and booleans are summed in the widest integers there are, as `jnp.sum` does: 64 bits
    under x64, else 32.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer):
        widest = jnp.uint64 if jnp.issubdtype(dtype, jnp.unsignedinteger) else jnp.int64
        return jax.dtypes.canonicalize_dtype(widest)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)
    return dtype


def promote(*values: Any) -> np.dtype:
    """The dtype that standard promotion gives, also where the user runs JAX with strict promotion.

    JAX promotes no integers of 4 bits and no floats of 8: they count as the dtype of their sums.
    """
    with jax.numpy_dtype_promotion("standard"):
        try:
            return jnp.result_type(*values)
        except jax.dtypes.TypePromotionError:
            return jnp.result_type(*map(widen, map(dtype_of, values)))


def floating(dtype: DTypeLike) -> np.dtype:
    """The dtype of a quotient of values of `dtype`."""
    return jnp.dtype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else promote(dtype, 1.0)


def cast(x: Any, dtype: DTypeLike) -> Array:
    """`x` as an array of exactly `dtype`, no longer weakly typed."""
    return jax.lax.convert_element_type(x, jnp.dtype(dtype))


def ratio(total: Array, weight: Array) -> Array:
    """``total / weight``, and 0 where the weight is 0; the divisor is selected too, so that
    gradients are 0 as well."""
    weight = cast(weight, total.dtype)
    empty = weight == 0
    quotient = total / jnp.where(empty, jnp.ones_like(weight), weight)
    return jnp.where(empty, jnp.zeros_like(quotient), quotient)


def total_of(scalars: list[Array]) -> Array:
    """The sum of scalars that may differ in dtype."""
    dtype = promote(*scalars)
    result = cast(scalars[0], dtype)
    for scalar in scalars[1:]:
        result = result + cast(scalar, dtype)
    return result


def leaves_with_names(
    tree: PyTree, name: str, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """The leaves of `tree`, each with the name that errors give it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(leaf_name(name, path), leaf) for path, leaf in leaves]
