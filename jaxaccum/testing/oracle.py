"""The full-batch oracle of a loss: value, gradient and aux in one pass, in float64 where that is
possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxaccum

__all__ = ["draws_random_numbers", "oracle"]


def oracle(
    fun: Callable[..., Any],
    *args: Any,
    in_axes: Any = (None, 0),
    has_aux: bool = False,
    float64: bool = True,
) -> dict[str, Any]:
    """`{"value", "gradient"}`, and `"aux"` as `fun` returns it under `"kept"`, of the whole batch
    in one pass."""
    total = _total(jaxaccum.full_batch(fun, in_axes=in_axes), has_aux)
    if not float64:
        return _evaluate(total, args)
    # Constants that fun closes over keep their dtype, and meet float64 arguments here.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return _evaluate(total, jax.tree.map(_to_float64, args))


def draws_random_numbers(fun: Callable[..., Any], *args: Any, in_axes: Any) -> bool:
    """Whether `fun` draws from `jax.random`, whose numbers depend on the dtype that is asked
    for."""
    return "random_bits" in str(jax.make_jaxpr(jaxaccum.full_batch(fun, in_axes=in_axes))(*args))


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
