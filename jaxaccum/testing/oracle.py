"""The full-batch oracle of a loss: value, gradient and aux in one pass, in float64 where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxaccum

__all__ = ["has_key", "oracle"]


def oracle(
    fun: Callable[..., Any], *args: Any, in_axes: Any = (None, 0), has_aux: bool = False, float64: bool = True
) -> dict[str, Any]:
    """`{"value", "gradient"}`, and `"aux"` as `fun` returns it under `"kept"`, of the whole batch in one pass.

    In float64 unless `in_axes` holds a key: `jax.random` draws other numbers in other dtypes.
    """
    total = _total(jaxaccum.full_batch(fun, in_axes=in_axes), has_aux)
    if not float64 or has_key(in_axes):
        return _evaluate(total, args)
    with jax.enable_x64(True):
        return _evaluate(total, jax.tree.map(_to_float64, args))


def has_key(in_axes: Any) -> bool:
    """Whether some argument is a key that is folded for each microbatch or example."""
    entries = in_axes if isinstance(in_axes, tuple | list) else (in_axes,)
    return any(entry in (jaxaccum.KEY, jaxaccum.EXAMPLE_KEY) for entry in entries)


def _total(full: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The loss as one number: the sum of its terms."""

    def total(*args: Any) -> Any:
        loss, aux = full(*args) if has_aux else (full(*args), None)
        first, *rest = jax.tree.leaves(loss)
        return sum(rest, start=first), aux

    return total


def _evaluate(total: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    (value, aux), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(*args)
    return {"value": value, "gradient": gradient} | ({} if aux is None else {"aux": aux["kept"]})


def _to_float64(leaf: Any) -> Any:
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return leaf.astype(jnp.complex128)
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
