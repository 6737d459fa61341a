"""`dynamic_loss_scale` keeps float16 gradients in range by one scale per optimizer step.

Micikevicius et al., *Mixed Precision Training* (arXiv 1710.03740), section 3.2. The scale lives in
the state of the optimizer, the innermost place that sees whole batches: inside `MultiSteps` it is
checked once per window, after `value_and_grad` once a batch, and it is saved and restored with the
state.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxaccum._base.trees import cast, dtype_of, is_inexact, widen
from jaxaccum._base.types import Array, PyTree
from jaxaccum._host_loop.step_if import as_dtype, is_float0, step_if


class LossScaleState(NamedTuple):
    """The state of `dynamic_loss_scale`."""

    scale: Array
    """float32: what the loss of the next batch is to be multiplied with."""
    good_steps: Array
    """int32: the steps since the scale last moved."""
    num_skipped: Array
    """int32: the batches whose gradient was not finite."""
    inner_opt_state: PyTree


def dynamic_loss_scale(
    opt: optax.GradientTransformation,
    *,
    initial: float = 2.0**15,
    growth_interval: int = 2000,
    factor: float = 2.0,
) -> optax.GradientTransformationExtraArgs:
    """`opt` for the gradient of ``scale · loss``.

    The gradient is divided by the scale, and left out where it is not finite. The loss is
    multiplied by ``state.scale`` before it is differentiated, with one scale for all microbatches
    of a batch. It equals::

        def update(grads, state, params):
            grads = grads / state.scale  # in float32
            if not isfinite(grads):
                return zeros, state(scale=state.scale / factor)
            updates = opt.update(grads, …)  # all in float32, the parameters and states too
            return updates, state(scale=state.scale * factor if growth_interval good steps)

    Args:
        opt: the optimizer.
        initial: the first scale, a power of 2, so that it costs no rounding.
        growth_interval: after so many steps in a row whose gradient is finite, the scale grows.
        factor: by which it grows and shrinks; it stays between 1 and 2**24.

    Returns:
        A gradient transformation; `opt` does not run for a batch that is left out, and its state
        stays. `opt` sees gradients, parameters and states in float32, so that it sees gradients
        below the range of float16. States are kept in their own dtypes. Updates have the dtype that
        `opt` alone returns for gradients in the dtype of their parameters.

    Example:
        >>> import jax.numpy as jnp, optax, jaxaccum
        >>> opt = jaxaccum.dynamic_loss_scale(optax.sgd(1.0))
        >>> w, x = jnp.ones(2, jnp.float16), jnp.full((4, 2), 2.0**-14, jnp.float16)
        >>> def loss(w, x, scale):  # its own gradient, 2**-28, is 0 in float16
        ...     return scale * jaxaccum.Mean(jnp.sum((x * x * w[None]).astype(jnp.float32)), len(x))
        >>> state = opt.init(w)
        >>> step = jaxaccum.grad(loss, microbatch_size=1, in_axes=(None, 0, None))
        >>> grads = step(w, x, state.scale)
        >>> updates, state = opt.update(grads, state, w)
        >>> float(jnp.max(jnp.abs(updates))) <= 2.0**-24, float(state.scale)
        (True, 32768.0)
    """
    inner = optax.with_extra_args_support(opt)
    if growth_interval < 1 or factor <= 1 or not 1 <= initial <= 2.0**24:
        raise ValueError(
            "a loss scale starts between 1 and 2**24 and moves by a factor above 1 after at least "
            f"1 step; got initial={initial}, growth_interval={growth_interval}, factor={factor}."
        )

    def init(params: PyTree) -> LossScaleState:
        return LossScaleState(jnp.float32(initial), jnp.int32(0), jnp.int32(0), inner.init(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: object
    ) -> tuple[PyTree, LossScaleState]:
        def unscaled(grad: Array) -> Array:
            wide = _wide(grad)
            return wide if is_float0(wide) else wide / cast(state.scale, wide.dtype)

        grads = jax.tree.map(unscaled, updates)
        finite = _all_finite(grads)
        like = _in_dtypes_of(params, updates)
        old = state.inner_opt_state
        dtypes, _ = jax.eval_shape(lambda: _update(inner, like, old, params, extra_args))

        def step() -> tuple[PyTree, PyTree]:
            new, held = _update_in_float32(inner, grads, old, params, extra_args)
            return jax.tree.map(as_dtype, new, dtypes), held

        new, _, held = step_if(finite, step, grads, old)
        good = jnp.where(finite, state.good_steps + 1, jnp.zeros_like(state.good_steps))
        grows = good >= growth_interval
        after_good = jnp.where(grows, state.scale * factor, state.scale)
        scale = jnp.where(finite, after_good, state.scale / factor)
        return new, LossScaleState(
            scale=jnp.clip(scale, _as(1.0, scale), _as(2.0**24, scale)),
            good_steps=jnp.where(grows, jnp.zeros_like(good), good),
            num_skipped=state.num_skipped + jnp.where(finite, jnp.int32(0), jnp.int32(1)),
            inner_opt_state=held,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _update(
    opt: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra_args: dict[str, object],
) -> tuple[PyTree, PyTree]:
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on its own
        return opt.update(grads, state, params, **extra_args)


def _update_in_float32(
    opt: optax.GradientTransformationExtraArgs,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra_args: dict[str, object],
) -> tuple[PyTree, PyTree]:
    """A step in which parameters and states are as wide as `grads`, as a `cond` in `opt` requires.

    The states have the dtypes that `opt` makes for such parameters, so that one with ``mu_dtype``
    keeps it.
    """
    wide = None if params is None else jax.tree.map(_wide, params)
    own = jax.eval_shape(opt.init, grads if params is None else wide)
    return _update(opt, grads, jax.tree.map(as_dtype, state, own), wide, extra_args)


def _wide(x: Array) -> Array:
    return cast(x, widen(dtype_of(x))) if is_inexact(x) else x


def _in_dtypes_of(params: PyTree, grads: PyTree) -> PyTree:
    """Gradients in the dtypes of the parameters; as they are for an optimizer whose parameters are
    another tree, as those of ``optax.lookahead`` are."""
    if jax.tree.structure(params) != jax.tree.structure(grads):
        return grads
    return jax.tree.map(_not_narrower, grads, params)


def _not_narrower(grad: Array, parameter: Array) -> Array:
    """The gradient in its parameter's dtype, or in its own where that is wider."""
    wider = dtype_of(grad).itemsize > dtype_of(parameter).itemsize
    return grad if wider or not is_inexact(grad) else cast(grad, dtype_of(parameter))


def _all_finite(grads: PyTree) -> Array:
    finite = [jnp.all(jnp.isfinite(grad)) for grad in jax.tree.leaves(grads) if not is_float0(grad)]
    return jnp.all(jnp.stack([jnp.array(True), *finite]))


def _as(x: ArrayLike, like: Array) -> Array:
    return jnp.asarray(x, like.dtype)
