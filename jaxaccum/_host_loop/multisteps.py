"""`MultiSteps` accumulates in a host loop, one microbatch per call, around any optax optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._base.trees import cast, dtype_of, is_inexact, promote, widen
from jaxaccum._base.types import Array, PyTree
from jaxaccum._host_loop.step_if import is_float0, step_if
from jaxaccum._host_loop.window_checks import (
    check_skip,
    check_tree,
    checked_k,
    checked_weight,
    taught,
)
from jaxaccum._program import validate


class MultiStepsState(NamedTuple):
    """The state of `MultiSteps`: that of ``optax.MultiSteps``, then our two fields.

    A state of optax, of a running job or an old checkpoint, is taken as it is, and a window that is
    open goes on.
    """

    mini_step: ArrayLike
    """int32: the microbatches of the open window."""
    gradient_step: ArrayLike
    """int32: the optimizer steps so far."""
    inner_opt_state: PyTree
    acc_grads: PyTree
    """The mean of the open window so far, ``Σ w g / Σ w``; with ``use_grad_mean=False`` the sum ``Σ
    w g``."""
    skip_state: PyTree = ()
    total_weight: Any = None
    """``Σ w`` of the open window; a microbatch without a weight counts 1."""
    updated: Any = None
    """bool: whether the call that returned this state ran the optimizer."""


class MultiSteps(optax.MultiSteps):
    """Accumulates a window of k microbatches and then runs `opt`, once, on their mean gradient.

    Of the microbatches i of a window, with weights wᵢ (1 where none is given), `opt` sees ``Σ wᵢ gᵢ
    / Σ wᵢ``. It equals::

        def window(grads, weights, opt_state, params):
            mean = sum(w * g for w, g in zip(weights, grads)) / sum(weights)
            updates, opt_state = opt.update(mean, opt_state, params)
            return updates, opt_state  # the k - 1 calls before returned zeros

    A drop-in replacement for ``optax.MultiSteps`` that also takes its state, without its defects:
    `opt` runs only at the end of a window, also under ``jit``, ``scan`` and ``shard_map``;
    nothing is masked by multiplication, so a window with NaN ends with itself; extra arguments pass
    through ``optax.chain``. Gradients are summed in float32, and `opt` sees their mean in the dtype
    that they came in.

    Args:
        opt: the optimizer.
        every_k_schedule: k, or a function of the number of optimizer steps so far that returns it
            as an integer.
        use_grad_mean: whether `opt` sees the mean; False is the sum ``Σ wᵢ gᵢ``.
        should_skip_update_fn: as for ``optax.MultiSteps``: ``(updates, gradient_step, params) ->
            (skip, skip_state)``. A microbatch that it skips is as if it had not been there.
        accumulator_dtype: of the sums; it widens and never narrows, so float64 and complex
            gradients stay what they are. None is the parameter's own.

    Guarantees:
        Equal to one call of `opt` on the window's mean, in exact arithmetic. Updates have the dtype
        that `opt` itself returns for these gradients and parameters; the states of `opt` keep
        theirs, so that it can be scanned. The sums of gradients are sharded as the parameters that
        `init` sees.

    Raises:
        ValueError, TypeError: for a bad `every_k_schedule`, weight, or tree, at trace time or where
            the value is concrete; traced values are checked under ``checkify``.

    Example:
        >>> import jax.numpy as jnp, optax, jaxaccum
        >>> opt = jaxaccum.MultiSteps(optax.sgd(1.0), every_k_schedule=3)
        >>> params = jnp.float32(0.0)
        >>> state = opt.init(params)
        >>> for grad, tokens in [(1.0, 6), (5.0, 2)]:
        ...     updates, state = opt.update(jnp.float32(grad), state, params, weight=tokens)
        >>> # The data ended after 2 of 3: (6 · 1 + 2 · 5) / 8.
        >>> updates, state = opt.flush(state, params)
        >>> float(updates), bool(opt.has_updated(state))
        (-2.0, True)
    """

    def __init__(
        self,
        opt: optax.GradientTransformation,
        every_k_schedule: int | Callable[[Any], Any],
        use_grad_mean: bool = True,
        should_skip_update_fn: Any = None,
        accumulator_dtype: DTypeLike | None = jnp.float32,
    ):
        if not hasattr(opt, "init") or not hasattr(opt, "update"):
            raise TypeError(f"opt must be an optax.GradientTransformation; got {opt!r}.")
        if not callable(every_k_schedule):
            every_k_schedule = validate.size(every_k_schedule, "every_k_schedule")
        if accumulator_dtype is not None and not jnp.issubdtype(accumulator_dtype, jnp.inexact):
            raise TypeError(
                f"accumulator_dtype must be a floating dtype; got {accumulator_dtype!r}."
            )
        dtype: Any = accumulator_dtype  # optax takes None, and its types do not say so
        super().__init__(opt, every_k_schedule, use_grad_mean, should_skip_update_fn, dtype)

    # The state has two fields more than optax's, and `weight` is ours: optax's types allow for
    # neither.
    def init(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, params: PyTree
    ) -> MultiStepsState:
        """The state before the first microbatch."""
        state = super().init(params)
        acc_grads = jax.tree.map(self._zeros, params)
        zero = jnp.zeros((), _weight_dtype(acc_grads))
        return MultiStepsState(
            *state._replace(acc_grads=acc_grads), total_weight=zero, updated=jnp.array(False)
        )

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        weight: ArrayLike | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, MultiStepsState]:
        """Take in one microbatch's gradient; at the end of a window, run `opt` on the mean.

        Args:
            updates: the *mean* gradient of the microbatch, a pytree like the parameters. That of an
                integer parameter is float0, as ``jax.grad(…, allow_int=True)`` gives it.
            state: of `init` or of the call before; a state of ``optax.MultiSteps`` is taken too.
            params: the parameters, if `opt` reads them.
            weight: the weight of the microbatch, a non-negative scalar: its number of examples or
                tokens. A microbatch of weight 0 counts towards k and leaves the mean as it is,
                whatever its gradient.
            **extra_args: passed to `opt`.

        Returns:
            ``(updates, state)``; updates are zeros until the window ends.
        """
        state = _extended(state)
        check_tree(updates, state.acc_grads)
        k = checked_k(self._every_k_schedule(state.gradient_step))
        step, grads = state.gradient_step, jax.tree.map(_looked_at, updates, state.acc_grads)
        skip, skip_state = self._should_skip_update_fn(grads, step, params)
        check_skip(skip)
        window = _Window.of(state)
        added = self._added(window, updates, checked_weight(weight, window.total_weight))
        window = jax.tree.map(lambda old, new: jnp.where(skip, old, new), window, added)
        emit = jnp.logical_and(jnp.logical_not(skip), window.mini_step >= k)
        state = state._replace(skip_state=skip_state, **window._asdict())
        return self._step(emit, state, params, like=updates, extra_args=extra_args)

    def flush(
        self, state: PyTree, params: PyTree = None, **extra_args: object
    ) -> tuple[PyTree, MultiStepsState]:
        """Apply the open window as it is, with its true weight: 3 microbatches of 4 count as 3.

        One line for the state that Flax holds, in a ``TrainState`` or in an ``nnx.Optimizer``::

            updates, opt_state = opt.flush(train_state.opt_state, train_state.params)
            updates, opt_state = opt.flush(optimizer.opt_state, nnx.state(model, nnx.Param))

        The second gives arrays without variables. They go back by ``nnx.update(optimizer.opt_state,
        nnx.state(opt_state))``, and the parameters by ``nnx.update(model, optax.apply_updates(
        nnx.as_pure(nnx.state(model, nnx.Param)), updates))``.

        Args:
            state: as for `update`.
            params: the parameters; `opt` sees a gradient of their dtypes, else of the sums' dtypes.
            **extra_args: passed to `opt`.

        Returns:
            ``(updates, state)``, as at the end of a full window. Where no window is open, updates
            are zeros and the state is as it was, but `has_updated` is false for it: no step ran.
        """
        state, params = _plain(state, params)
        state = _extended(state)
        like = state.acc_grads if params is None else params
        check_tree(like, state.acc_grads, "params", integers=True)
        emit = jnp.greater(state.mini_step, 0)
        return self._step(emit, state, params, like=like, extra_args=extra_args)

    def has_updated(self, state: PyTree) -> Array:
        """Whether the call that returned `state` ran the optimizer.

        It is false for the state of `init`, after a microbatch that was skipped, and after a flush
        that found no window open.
        """
        state, _ = _plain(state)
        return jnp.asarray(_extended(state).updated)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        """The pair ``(init, update)`` for ``optax.chain``, which passes `weight` on."""
        return optax.GradientTransformationExtraArgs(self.init, self.update)

    def _zeros(self, parameter: ArrayLike) -> Array:
        wide = dtype_of(parameter) if is_inexact(parameter) else jnp.float32
        if self._accumulator_dtype is not None:
            wide = promote(wide, jnp.dtype(self._accumulator_dtype))
        return jnp.zeros_like(parameter, dtype=wide)  # like it: sharded as the parameter is

    def _added(self, window: _Window, grads: PyTree, weight: Array) -> _Window:
        """The window with one more microbatch: Welford's running mean, or the sum."""
        total = window.total_weight + weight
        divisor = jnp.where(total > 0, total, jnp.ones_like(total))

        def added(acc: Array, grad: Array) -> Array:
            if is_float0(grad):
                return acc
            wide = widen(acc.dtype)  # a weight can be past the range of float16
            old, grad = cast(acc, wide), cast(grad, wide)
            w = cast(weight, jnp.finfo(wide).dtype)
            if self._use_grad_mean:
                new = old + (grad - old) * w / cast(divisor, w.dtype)
            else:
                new = old + grad * w
            return jnp.where(w == 0, acc, cast(new, acc.dtype))  # a choice: 0 · NaN is NaN

        acc_grads = jax.tree.map(added, window.acc_grads, grads)
        return _Window(jnp.add(window.mini_step, 1), acc_grads, total)

    def _step(
        self,
        emit: Array,
        state: MultiStepsState,
        params: PyTree,
        *,
        like: PyTree,
        extra_args: dict[str, object],
    ) -> tuple[PyTree, MultiStepsState]:
        """The optimizer's step and an empty window where `emit`, else zeros and the state as it is.

        `like` has the dtypes of the gradient that the optimizer sees.
        """
        acc, inner = state.acc_grads, state.inner_opt_state

        def update() -> tuple[PyTree, PyTree]:
            grads = jax.tree.map(_gradient, acc, like)
            # Gradients may be wider than parameters and states, and optax mixes dtypes on its own.
            with jax.numpy_dtype_promotion("standard"):
                return self._opt.update(grads, inner, params, **extra_args)

        updates, acc, inner = step_if(emit, taught(update, like), acc, inner)
        count = state.gradient_step
        emptied = lambda count: jnp.where(emit, jnp.zeros_like(count), count)
        return updates, state._replace(
            mini_step=emptied(state.mini_step),
            gradient_step=jnp.where(emit, optax.safe_increment(count), count),
            inner_opt_state=inner,
            acc_grads=acc,
            total_weight=emptied(state.total_weight),
            updated=emit,
        )


class _Window(NamedTuple):
    """The fields of the state that one window fills and the next finds empty."""

    mini_step: ArrayLike
    acc_grads: PyTree
    total_weight: Array

    @classmethod
    def of(cls, state: MultiStepsState) -> _Window:
        return cls(state.mini_step, state.acc_grads, state.total_weight)


def _extended(state: PyTree) -> MultiStepsState:
    """The state with our fields; in one of optax each microbatch has counted 1."""
    if getattr(state, "total_weight", None) is not None:
        return state
    weight = cast(state.mini_step, _weight_dtype(state.acc_grads))
    updated = jnp.logical_and(jnp.equal(state.mini_step, 0), jnp.greater(state.gradient_step, 0))
    return MultiStepsState(*state[:5], total_weight=weight, updated=updated)


def _weight_dtype(acc_grads: PyTree) -> np.dtype:
    """float32, or float64 where any gradient is summed in it."""
    real = jax.tree.map(lambda acc: jnp.finfo(acc.dtype).dtype, acc_grads)
    return promote(jnp.float32, *jax.tree.leaves(real))


def _gradient(acc: Array, like: ArrayLike) -> Array | np.ndarray:
    """The window's gradient, in the dtype of one microbatch's or for a parameter `like` this."""
    if not is_inexact(like):
        return np.zeros(jnp.shape(acc), jax.dtypes.float0)
    return cast(acc, dtype_of(like))


def _looked_at(grad: Array, acc: Array) -> Array:
    """A gradient as `should_skip_update_fn` sees it: that of integers is integers, as in `init`."""
    return jnp.zeros_like(acc, jnp.int32) if is_float0(grad) else grad


def _plain(state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
    """Both as plain arrays, where `state` is that of an ``nnx.Optimizer``, all of variables."""
    nnx = sys.modules.get("flax.nnx")  # who holds such a state has imported it
    if nnx is None or not isinstance(state.mini_step, nnx.Variable):
        return state, params
    return nnx.as_pure((state, params))
