"""Compensated sums: what each addition rounds away is kept, so that the error does not grow with
the number of them.

Neumaier, *Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen* (1974); the error
of an addition is that of Knuth's TwoSum. A sum is the unevaluated pair ``high + low``, made
disjoint after each addition: Neumaier's own second number is a plain sum, and in bfloat16 it stalls
as the first does.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._base.trees import cast, ratio, widen
from jaxaccum._base.types import Array, PyTree
from jaxaccum.accumulators._record import Accumulator, weightless


class Pair(NamedTuple):
    """The sum ``high + low``, in two arrays of one dtype that share no digits."""

    high: Array
    low: Array


State = tuple[PyTree, Pair]
"""The sum of each parameter's weighted gradients, a pair for each, and the sum of the weights."""


def compensated(dtype: DTypeLike | None = None) -> Accumulator:
    """Sum gradients with Neumaier's compensation: as if in twice the digits, at twice the memory of
    the sum.

    The error of ``Σ wᵢ gᵢ / Σ wᵢ`` is that of the terms, whatever their number: of order ``u + n
    u²`` and not ``n u``. It equals::

        high = low = 0.0
        for x in terms:
            total = high + x
            low += error_of(high + x)  # exact: TwoSum
            high, low = total + low, error_of(total + low)

    Args:
        dtype: of both arrays. None is the parameter's own, with float32 for float16, whose range a
            sum leaves: a bfloat16 parameter has two bfloat16 arrays, the bytes of one float32 sum.

    Returns:
        An accumulator. Gradients have the parameter's dtype; where `dtype` is given, that of the
        whole sum: `dtype`, or float32 for two arrays of lower precision.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> fun = lambda w, x: jaxaccum.Mean(jnp.sum(w * x), x.size)
        >>> # Each of them is too small to change a float32 sum of 1.
        >>> x = jnp.array([1.0] + [2.0**-25] * 4095, jnp.float32)
        >>> sums = jaxaccum.accumulators.compensated()
        >>> grad = jaxaccum.grad(fun, microbatch_size=1, accumulator=sums)(jnp.float32(0), x)
        >>> round(grad.item() * 4096, 6)
        1.000122
    """

    def kept_in(parameter: ArrayLike) -> np.dtype:
        own = jnp.asarray(parameter).dtype
        if jnp.issubdtype(own, jnp.complexfloating):
            return own
        if dtype is not None:
            return jnp.dtype(dtype)
        return jnp.dtype(jnp.float32 if own == jnp.float16 else own)

    def init(params: PyTree) -> State:
        zero = weightless(params)
        pairs = jax.tree.map(lambda p: Pair(*[jnp.zeros(jnp.shape(p), kept_in(p))] * 2), params)
        return pairs, Pair(zero, zero)

    def update(state: State, mean_grads: PyTree, weight: Array, index: Array) -> State:
        del index
        pairs, total = state

        def added(g: Array, pair: Pair) -> Pair:
            return add(pair, cast(g, widen(g.dtype)) * cast(weight, widen(g.dtype)))

        return jax.tree.map(added, mean_grads, pairs), add(total, cast(weight, total.high.dtype))

    def finalize(state: State) -> tuple[PyTree, None]:
        pairs, total = state
        is_pair = lambda x: isinstance(x, Pair)
        mean = lambda pair: ratio(value(pair), value(total))
        return jax.tree.map(mean, pairs, is_leaf=is_pair), None

    return Accumulator(init, update, finalize, dtype=dtype, linear=True)


def value(pair: Pair) -> Array:
    """The sum in one array: float32 for a pair of lower precision."""
    wide = widen(pair.high.dtype)
    return cast(pair.high, wide) + cast(pair.low, wide)


def add(pair: Pair, x: Array) -> Pair:
    """The pair with one more term."""
    dtype = pair.high.dtype
    if widen(dtype) != dtype:
        # float32 holds the sum of such a pair and its term, so the two halves are cut from it.
        total = value(pair) + cast(x, widen(dtype))
        # A plain cast there and back is taken out by XLA, which may keep more precision than it is
        # asked for.
        high = lax.reduce_precision(total, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)
        return Pair(cast(high, dtype), cast(total - high, dtype))
    x = cast(x, dtype)
    total = pair.high + x
    moved = total - pair.high
    low = pair.low + ((pair.high - (total - moved)) + (x - moved))
    high = total + low
    return Pair(high, low - (high - total))
