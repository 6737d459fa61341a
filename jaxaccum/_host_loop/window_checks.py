"""What a window of `MultiSteps` refuses, and what its error says to pass instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import KeyPath
from jax.typing import ArrayLike

from jaxaccum._base.trees import cast, dtype_of, is_inexact, leaf_name, leaves_with_names
from jaxaccum._base.types import Array, PyTree
from jaxaccum._host_loop.step_if import is_float0
from jaxaccum._host_loop.traced_check import checked


def taught(update: Callable[[], PyTree], like: PyTree) -> Callable[[], PyTree]:
    """`update`, with an error that teaches where it computes with the gradient of an integer."""

    def taught() -> PyTree:
        try:
            return update()
        except TypeError as error:
            leaves = leaves_with_names(like, "updates")
            integers = [name for name, x in leaves if not is_inexact(x)]
            if not integers:
                raise
            raise TypeError(
                f"the optimizer cannot take {integers[0]}, the gradient of an integer, which has "
                "dtype float0; leave such leaves out of it, as in optax.masked(opt, mask) or "
                f"optax.partition. It said: {error}"
            ) from error

    return taught


def check_tree(
    updates: PyTree, acc_grads: PyTree, name: str = "updates", *, integers: bool = False
) -> None:
    """An error where `updates` cannot be added to `acc_grads`; `integers` allows integer leaves."""
    if jax.tree.structure(updates) != jax.tree.structure(acc_grads):
        raise ValueError(
            f"{name} have the structure {jax.tree.structure(updates)}, and the open window holds "
            f"gradients of {jax.tree.structure(acc_grads)}; pass gradients of the parameters that "
            "init saw, or init again."
        )

    def check(path: KeyPath, x: Array, acc: Array) -> None:
        _check_leaf(leaf_name(name, path), x, acc, integers=integers)

    jax.tree_util.tree_map_with_path(check, updates, acc_grads)


def _check_leaf(leaf: str, x: Array, acc: Array, *, integers: bool) -> None:
    if jnp.shape(x) != jnp.shape(acc):
        raise ValueError(
            f"{leaf} has shape {list(jnp.shape(x))}, and the open window holds a gradient of "
            f"shape {list(jnp.shape(acc))}; pass gradients of the parameters that init saw, or "
            "init again."
        )
    if is_float0(x) or (integers and not is_inexact(x)):
        return
    if not is_inexact(x) or (jnp.iscomplexobj(x) and not jnp.iscomplexobj(acc)):
        raise TypeError(
            f"{leaf} has dtype {dtype_of(x)}, and its parameter's gradient is summed in "
            f"{acc.dtype}; pass a gradient of the parameter's kind."
        )


def check_skip(skip: ArrayLike) -> None:
    """An error where the answer of `should_skip_update_fn` is not one boolean."""
    if jnp.shape(skip) != () or dtype_of(skip) != jnp.bool_:
        raise ValueError(
            "should_skip_update_fn must return a boolean scalar and a pytree; the first is "
            f"{dtype_of(skip)}{list(jnp.shape(skip))}."
        )


def checked_k(k: Any) -> Any:
    """The number of microbatches of the window, checked to be one positive integer."""
    if jnp.shape(k) != () or not jnp.issubdtype(dtype_of(k), jnp.integer):
        raise TypeError(
            f"every_k_schedule returned {dtype_of(k)}{list(jnp.shape(k))}; it must return a single "
            "integer, the number of microbatches of the window: cast it, as in .astype(int)."
        )
    if isinstance(k, jax.core.Tracer):
        return checked(k, _is_positive, "every_k_schedule returned {x}; it must be at least 1")
    if k < 1:
        raise ValueError(
            f"every_k_schedule returned {int(k)}; a window holds at least 1 microbatch."
        )
    return k


def checked_weight(weight: Any, total: Array) -> Array:
    """The weight of a microbatch in the dtype of the `total`; 1 where none is given."""
    if weight is None:
        return jnp.ones_like(total)
    is_number = isinstance(weight, int | float) or hasattr(weight, "dtype")
    if not is_number or jnp.issubdtype(dtype_of(weight), jnp.complexfloating):
        raise TypeError(f"weight must be a real number; got {weight!r}.")
    if jnp.shape(weight) != ():
        raise ValueError(
            f"weight has shape {list(jnp.shape(weight))}; pass one scalar per microbatch: its "
            "number of examples or tokens, as jnp.sum(mask)."
        )
    if isinstance(weight, jax.core.Tracer):
        w = cast(weight, dtype_of(total))
        return checked(w, _is_weight, "weight must be finite and not negative; got {x}")
    if not 0 <= float(weight) < np.inf:
        raise ValueError(f"weight must be finite and not negative; got {float(weight)}.")
    return cast(weight, dtype_of(total))


def _is_positive(k: Array) -> Array:
    return jnp.greater_equal(k, 1)


def _is_weight(w: Array) -> Array:
    return jnp.logical_and(w >= 0, jnp.isfinite(w))
