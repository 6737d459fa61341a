"""An optimizer's step that runs or waits: its updates share their memory with what is kept."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxaccum._base.trees import cast, dtype_of, is_inexact, promote
from jaxaccum._base.types import Array, PyTree
from jaxaccum._devices import varying


def step_if(
    run: ArrayLike, update: Callable[[], tuple[PyTree, PyTree]], kept: PyTree, state: PyTree
) -> tuple[PyTree, PyTree, PyTree]:
    """``(updates, zeros, new state)`` of `update` where `run`, else ``(zeros, kept, state)``.

    `update` does not run where `run` is false. A branch of `lax.cond` that returned both the
    updates and what is kept would write zeros for one of them. Here it returns one array per leaf,
    in the memory of the leaf of `kept`. The zeros are selected outside, where XLA fuses them with
    what reads them. For AdamW on 100 leaves that takes 0.06 times the parameters' memory in place
    of 2.07, and copies no leaf in place of 100.

    Args:
        run: a boolean scalar. Where its value is known, only one of the two is traced.
        update: returns the updates and the new state, which is cast to the dtypes of `state`.
        kept: a pytree of arrays.
        state: the optimizer's.
    """
    like, _ = jax.eval_shape(update)
    shared = _fit(like, jax.eval_shape(lambda: kept))
    common = jax.tree.map(_both, like, kept) if shared else like

    def step() -> tuple[PyTree, PyTree]:
        updates, new = update()
        updates = jax.tree.map(_as, updates, like)
        new = jax.tree.map(_as, _of_one_structure(new, state), state)
        return jax.tree.map(as_dtype, updates, common), new

    def wait() -> tuple[PyTree, PyTree]:
        if shared:
            return jax.tree.map(as_dtype, kept, common), state
        return jax.tree.map(_zeros, like), state

    held, after = _cond(run, step, wait)
    updates = jax.tree.map(as_dtype, held, like)
    if shared:
        updates = jax.tree.map(lambda x: _where(run, x, jnp.zeros_like(x)), updates)
        kept = jax.tree.map(as_dtype, held, kept)
    return updates, jax.tree.map(lambda x: _where(run, jnp.zeros_like(x), x), kept), after


def _of_one_structure(new: PyTree, state: PyTree) -> PyTree:
    if jax.tree.structure(new) != jax.tree.structure(state):
        raise TypeError(
            f"the optimizer was given a state of {jax.tree.structure(state)} and returned one of "
            f"{jax.tree.structure(new)}; a step that runs at the end of a window alone needs one "
            "structure: use an optimizer that makes its whole state in init."
        )
    return new


def is_float0(x: ArrayLike | jax.ShapeDtypeStruct) -> bool:
    """Whether `x` is what JAX gives for the gradient of an integer: nothing, in its shape."""
    return dtype_of(x) == jax.dtypes.float0


def as_dtype(x: Array, like: Array) -> Array:
    """`x` in the dtype of `like`. PRNG keys and float0, which cannot be cast, have it already."""
    return x if getattr(x, "dtype", None) == dtype_of(like) else cast(x, dtype_of(like))


def _fit(like: PyTree, kept: PyTree) -> bool:
    """Whether each update has the type of its leaf in `kept`, but for the precision."""
    if jax.tree.structure(like) != jax.tree.structure(kept):
        return False
    kinds, others = map(_kind, jax.tree.leaves(like)), map(_kind, jax.tree.leaves(kept))
    return list(kinds) == list(others)


def _kind(x: jax.ShapeDtypeStruct) -> tuple[object, ...]:
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return x.shape, x.sharding, varying.varying_axes(x), is_inexact(x), is_complex


def _both(x: Array, other: Array) -> jax.ShapeDtypeStruct:
    """A dtype that holds both exactly."""
    return jax.ShapeDtypeStruct(jnp.shape(other), promote(dtype_of(x), dtype_of(other)))


def _cond(run: ArrayLike, yes: Callable[[], PyTree], no: Callable[[], PyTree]) -> PyTree:
    """``lax.cond``, decided here where `run` is known: without jit no branch is compiled."""
    if isinstance(run, jax.core.Tracer):
        return lax.cond(run, yes, no)
    return yes() if run else no()


def _where(run: ArrayLike, yes: Array, no: Array) -> Array:
    if isinstance(run, jax.core.Tracer):
        return jnp.where(run, yes, no)
    return yes if run else no


def _as(x: Array, like: Array) -> Array:
    """`x` with the dtype of `like`, varying over the mesh axes that `like` varies over."""
    return varying.vary(as_dtype(x, like), varying.varying_axes(like))


def _zeros(like: jax.ShapeDtypeStruct) -> Array | np.ndarray:
    return np.zeros(like.shape, like.dtype) if is_float0(like) else varying.zeros(like)
