"""JAX's own gradients, compiled as one program: without `jax.jit` each primitive is one of its own,
and the oracle takes longer than what it judges.

A function that several tests differentiate is compiled once for them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

_KEPT = 64
"""How many functions are remembered."""


@functools.lru_cache(_KEPT)
def value_and_grad(fun: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """``jax.jit(jax.value_and_grad(fun))``."""
    return jax.jit(jax.value_and_grad(fun, *args, **options))


@functools.lru_cache(_KEPT)
def grad(fun: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """``jax.jit(jax.grad(fun))``."""
    return jax.jit(jax.grad(fun, *args, **options))
