"""How gradients combine over microbatches: the record of an accumulator, and the two that are a
plain sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxaccum._base.trees import cast, ratio, widen
from jaxaccum._base.types import Array, PyTree
from jaxaccum._devices import varying
from jaxaccum._program.tags import Stack


class Accumulator(NamedTuple):
    """How gradients combine: a record of pure functions that take each microbatch's mean gradient
    and its weight.

    A microbatch of weight 0 that has a gradient all the same, as one without positives has in a
    loss that is divided by their number, has no mean gradient: it comes as infinity, so that it is
    not lost in silence. A `linear` accumulator has no such case.

    ``value_and_grad(accumulator=…)`` takes any object with `init`, `update` and `finalize`. It
    equals::

        state = init(params)
        for index, (mean_grads, weight) in enumerate(microbatches):
            state = update(state, mean_grads, weight, index)
        grads, report = finalize(state)  # the mean: Σ w g / Σ w

    Args:
        init: ``init(params) -> state``, a pytree of arrays.
        update: ``update(state, mean_grads, weight, index) -> state``, of the same structure, shapes
            and dtypes. `mean_grads` are like the parameters, float32 where they are of lower
            precision; `weight` is the denominator of the microbatch's `Mean`, a floating scalar;
            `index` is int32. A leaf of the state that is tagged ``Stack`` reaches `finalize` with
            one entry per microbatch.
        finalize: ``finalize(state) -> (grads, report)``: gradients like the parameters, and None or
            a pytree that `value_and_grad` returns last.
        accepts: ``accepts(mean_grads, weight) -> bool``, or None. A microbatch that is not accepted
            does not count in the value, in `Mean`, `Sum`, `Max`, `Min`, `Last` or in the carried
            state. `update` is still called for it, and must ignore it itself. If the loss is not
            finite, `weight` is NaN.
        dtype: None if gradients are returned in the dtype of their parameters, as ``jax.grad``
            does. Any other value says that `finalize` returns gradients in the dtype that the
            caller receives.
        linear: whether `finalize` returns ``Σ w g / Σ w`` of all microbatches, as `compensated`
            does. They then come with weight 1, and in the place of its mean gradient each has its
            share of the batch's gradient times their number, which has the same mean.

    Example:
        The median over microbatches, entry by entry:

        >>> import jax, jax.numpy as jnp, jaxaccum
        >>> median = jaxaccum.accumulators.Accumulator(
        ...     init=lambda params: jax.tree.map(jaxaccum.Stack, params),
        ...     update=lambda state, grads, weight, index: jax.tree.map(jaxaccum.Stack, grads),
        ...     finalize=lambda state: (jax.tree.map(lambda g: jnp.median(g, axis=0), state), None),
        ... )
        >>> fun = lambda w, x: jnp.mean(w * x)
        >>> step = jaxaccum.grad(fun, microbatch_size=1, accumulator=median)
        >>> step(0.0, jnp.array([1.0, 2.0, 9.0])).item()
        2.0
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, Array, Array], PyTree]
    finalize: Callable[[PyTree], tuple[PyTree, PyTree]]
    accepts: Callable[[PyTree, Array], Array] | None = None
    dtype: DTypeLike | None = None
    linear: bool = False


class Record(Protocol):
    """Any object with the three functions of an `Accumulator`, as methods."""

    @property
    def init(self) -> Callable[[PyTree], PyTree]:
        """``init(params) -> state``."""
        ...

    @property
    def update(self) -> Callable[[PyTree, PyTree, Array, Array], PyTree]:
        """``update(state, mean_grads, weight, index) -> state``."""
        ...

    @property
    def finalize(self) -> Callable[[PyTree], tuple[PyTree, PyTree]]:
        """``finalize(state) -> (grads, report)``."""
        ...


AccumulatorLike = Accumulator | Record
"""What ``value_and_grad(accumulator=…)`` takes."""


@dataclasses.dataclass(frozen=True)
class GradientSum:
    """The sum of weighted gradients, added by the backward pass itself or as a whole tree after it.

    `in_place` and `tree` make it. `dtype` is that of the sums; None is the parameter's, or float32
    where that is lower.
    """

    in_place: bool
    dtype: DTypeLike | None = None

    def dtype_for(self, parameter: Array) -> np.dtype:
        """The dtype in which the gradient of `parameter` is summed."""
        if self.dtype is None or jnp.issubdtype(parameter.dtype, jnp.complexfloating):
            return widen(parameter.dtype)
        return jnp.dtype(self.dtype)

    def zeros(self, parameter: Array) -> Array:
        """The sum before the first microbatch, laid out over the mesh and varying as the
        parameter."""
        return varying.zeros(jax.typeof(parameter), self.dtype_for(parameter))

    # As a record, inside another accumulator, which sees every gradient as a value: both kinds are
    # a plain sum.

    def init(self, params: PyTree) -> tuple[PyTree, Array]:
        """No gradient yet, and no weight."""
        return jax.tree.map(lambda p: self.zeros(jnp.asarray(p)), params), weightless(params)

    def update(
        self, state: tuple[PyTree, Array], mean_grads: PyTree, weight: Array, index: Array
    ) -> tuple[PyTree, Array]:
        """Add ``w g`` and ``w``; in low precision, whose range ``w g`` may leave, keep the mean."""
        del index
        sums, total = state
        whole = total + cast(weight, total.dtype)

        def added(x: Array, g: Array) -> Array:
            wide = widen(x.dtype)
            if wide == x.dtype:
                return x + cast(g, x.dtype) * cast(weight, x.dtype)
            mean, share = cast(x, wide), cast(ratio(weight, cast(whole, weight.dtype)), wide)
            return cast(mean + (cast(g, wide) - mean) * share, x.dtype)

        return jax.tree.map(added, sums, mean_grads), whole

    def finalize(self, state: tuple[PyTree, Array]) -> tuple[PyTree, None]:
        """``Σ w g / Σ w``."""
        sums, total = state
        is_mean = lambda x: widen(x.dtype) != x.dtype
        return jax.tree.map(lambda x: x if is_mean(x) else ratio(x, total), sums), None


def returned(accumulator: AccumulatorLike, grad: Array, parameter: Array) -> Array:
    """A gradient in the dtype that the caller receives: an explicit one of the accumulator's, or
    the parameter's."""
    explicit = getattr(accumulator, "dtype", None) is not None
    return grad if explicit else cast(grad, parameter.dtype)


def weightless(params: PyTree) -> Array:
    """A total weight of 0: float32, or float64 where any parameter is."""
    dtypes = [jnp.finfo(jnp.asarray(p).dtype).dtype for p in jax.tree.leaves(params)]
    return jnp.zeros((), jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32)


def unless(accepted: Array, new: PyTree, old: PyTree) -> PyTree:
    """The new state where the microbatch is accepted, else the old one; what is written down is
    written in any case."""

    def choose(new: PyTree, old: PyTree) -> PyTree:
        return new if isinstance(new, Stack) else jnp.where(accepted, new, old)

    return jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, Stack))


def accepted_by(accumulator: AccumulatorLike, mean_grads: PyTree, weight: Array) -> Array:
    """Whether the accumulator takes in this microbatch."""
    accepts = getattr(accumulator, "accepts", None)
    return jnp.array(True) if accepts is None else accepts(mean_grads, weight)


def in_place(dtype: DTypeLike | None = None) -> GradientSum:
    """Sum gradients in place: the backward pass adds to the one sum that the optimizer then reads.

    A parameter that a scan reads layer by layer needs no second copy of its gradient: each layer's
    gradient is added when the layer is done.

    Guarantees:
        ``Σ wᵢ gᵢ / Σ wᵢ``, summed in `dtype`. Differentiable any number of times, in either
    mode.

    Args:
        dtype: of the sums and of the gradients that are returned. None sums in float32 where the
            parameter has a lower precision, and returns the parameter's dtype, as ``jax.grad``
            does.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> fun = lambda w, x: jnp.mean((w * x) ** 2)
        >>> sums = jaxaccum.accumulators.in_place()
        >>> step = jaxaccum.grad(fun, num_microbatches=2, accumulator=sums)
        >>> step(1.0, jnp.array([1.0, 3.0])).item()
        10.0
    """
    return GradientSum(in_place=True, dtype=dtype)


def tree(dtype: DTypeLike | None = None) -> GradientSum:
    """Sum gradients as trees: each microbatch returns a whole tree, which is added to the sum. It
    needs one more tree.

    It gives what `in_place` gives, by the plainest means: to compare with.

    Args:
        dtype: of the sums and of the gradients that are returned. None sums in float32 where the
            parameter has a lower precision, and returns the parameter's dtype, as ``jax.grad``
            does.

    Example:
        >>> import jax, jax.numpy as jnp, jaxaccum
        >>> fun = lambda w, x: jnp.mean((w * x) ** 2)
        >>> grad = jaxaccum.grad(fun, num_microbatches=2, accumulator=jaxaccum.accumulators.tree())
        >>> jax.jacfwd(grad)(1.0, jnp.array([1.0, 3.0])).item()
        10.0
    """
    return GradientSum(in_place=False, dtype=dtype)
