"""`noise_scale`: how much the gradients of microbatches differ, and so how large a batch is worth
its cost.

McCandlish et al., *An Empirical Model of Large-Batch Training* (arXiv 1812.06162), appendix A.1;
here for microbatches of any weights.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxaccum._base.trees import cast, widen
from jaxaccum._base.types import Array, PyTree
from jaxaccum._program.tags import Stack
from jaxaccum.accumulators._record import (
    Accumulator,
    AccumulatorLike,
    accepted_by,
    in_place,
    unless,
    weightless,
)


class NoiseScale(NamedTuple):
    """What `noise_scale` reports. Over steps, average `trace` and `squared_norm`, and divide the
    averages."""

    trace: Array
    """S: the trace of the covariance of one example's gradient (of one unit of weight),
    unbiased."""
    squared_norm: Array
    """|G|² of the true gradient, unbiased; it may be negative."""
    noise_scale: Array
    """S / |G|², in examples (in units of weight)."""
    norms: Array
    """The norm of each microbatch's mean gradient, one entry per microbatch."""
    inner: PyTree = None
    """The report of the inner accumulator."""


class _State(NamedTuple):
    inner: PyTree
    squares: Array
    weight: Array
    num_microbatches: Array
    norms: Stack


def noise_scale(inner: AccumulatorLike | None = None) -> Accumulator:
    """Measure the gradient noise scale with the gradient: two numbers more in the loop, and one
    norm per microbatch.

    With the mean gradients gᵢ of n microbatches of weights wᵢ, W = Σ wᵢ and ḡ = Σ wᵢ gᵢ / W::

        S    = (Σ wᵢ |gᵢ|² - W |ḡ|²) / (n - 1)
        |G|² = |ḡ|² - S / W

    For examples drawn independently both are unbiased, whatever the weights; for equal ones they
    are the paper's ``(|g_b|² - |g_B|²) / (1/b - 1/B)``. It equals::

        def trace(grads, weights):
            mean = average(grads, weights)
            return sum(w * norm(g - mean) ** 2 for w, g in zip(weights, grads)) / (len(grads) - 1)

    Args:
        inner: the accumulator of the gradient, a weighted mean; None is ``in_place()``. S is a
            small difference of large numbers, and a sum in bfloat16 or float16 is too coarse for
            it: use ``compensated(jnp.bfloat16)``.

    Returns:
        An accumulator whose report is a `NoiseScale`; with fewer than two microbatches it is NaN.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> noise = jaxaccum.accumulators.noise_scale()
        >>> loss = lambda w, x: jnp.mean(w * x)
        >>> step = jaxaccum.value_and_grad(loss, microbatch_size=1, accumulator=noise)
        >>> (value, report), grad = step(0.0, jnp.array([1.0, 2.0, 6.0]))
        >>> float(grad), float(report.trace), report.norms.tolist()  # the variance of 1, 2, 6
        (3.0, 7.0, [1.0, 2.0, 6.0])
    """
    held = in_place() if inner is None else inner

    def init(params: PyTree) -> _State:
        zero = weightless(params)
        return _State(held.init(params), zero, zero, jnp.int32(0), Stack(zero))

    def update(state: _State, mean_grads: PyTree, weight: Array, index: Array) -> _State:
        w = cast(weight, state.weight.dtype)
        square = squared(mean_grads, w.dtype)
        new = _State(
            inner=held.update(state.inner, mean_grads, weight, index),
            squares=state.squares + w * square,
            weight=state.weight + w,
            num_microbatches=state.num_microbatches + jnp.where(w > 0, jnp.int32(1), jnp.int32(0)),
            norms=Stack(jnp.sqrt(square)),
        )
        return unless(accepted_by(held, mean_grads, weight), new, state)

    def finalize(state: _State) -> tuple[PyTree, NoiseScale]:
        grads, report = held.finalize(state.inner)
        square = squared(grads, state.weight.dtype)
        many = state.num_microbatches > 1
        degrees = jnp.where(
            many, cast(state.num_microbatches, square.dtype) - 1, jnp.ones_like(square)
        )
        trace = jnp.where(
            many, (state.squares - state.weight * square) / degrees, jnp.full_like(square, jnp.nan)
        )
        norm = square - trace / jnp.where(many, state.weight, jnp.ones_like(square))
        return grads, NoiseScale(trace, norm, trace / norm, state.norms.x, report)

    return Accumulator(
        init, update, finalize, getattr(held, "accepts", None), getattr(held, "dtype", None)
    )


def _wide(x: Array) -> Array:
    return cast(x, widen(x.dtype))


def squared(tree: PyTree, dtype: DTypeLike) -> Array:
    """The squared norm over all leaves."""
    return sum(
        (cast(jnp.sum(jnp.square(jnp.abs(_wide(x)))), dtype) for x in jax.tree.leaves(tree)),
        jnp.zeros((), dtype),
    )
