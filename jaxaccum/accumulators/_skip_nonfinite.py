"""`skip_nonfinite`: a microbatch with NaN or infinity is as if it had never been in the batch."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._base.trees import leaves_with_names
from jaxaccum._base.types import Array, PyTree
from jaxaccum._program.tags import Stack
from jaxaccum.accumulators._record import (
    Accumulator,
    AccumulatorLike,
    accepted_by,
    in_place,
    unless,
)


class Skipped(NamedTuple):
    """What `skip_nonfinite` reports: which microbatches it left out, and what in them was not
    finite."""

    num_skipped: Array
    """int32: how many microbatches were left out."""
    microbatches: Array
    """bool, one entry per microbatch: whether it was left out."""
    leaves: PyTree
    """Like the gradients; for each leaf one entry per microbatch: whether its gradient was not
    finite."""
    loss: Array
    """bool, one entry per microbatch: whether the loss was not finite."""
    inner: PyTree = None
    """The report of the inner accumulator."""

    def describe(self) -> list[str]:
        """One line for each microbatch left out, with its index and its leaves; of concrete reports
        only."""
        named = [*leaves_with_names(self.leaves, "gradient"), ("loss", self.loss)]
        lines = []
        for i in np.flatnonzero(self.microbatches):
            names = [name for name, bad in named if np.asarray(bad)[i]]
            lines.append(f"microbatch {i}: {', '.join(names) or 'refused'}")
        return lines


class _State(NamedTuple):
    inner: PyTree
    num_skipped: Array
    microbatches: Stack
    leaves: PyTree
    loss: Stack


def skip_nonfinite(inner: AccumulatorLike | None = None) -> Accumulator:
    """Leave out every microbatch whose gradient or loss is not finite, and report its index and
    leaf.

    With F the microbatches that are finite, the gradient is ``Σ_F wᵢ gᵢ / Σ_F wᵢ``. It equals::

        def batch_without(microbatches):
            finite = [m for m in microbatches if all(isfinite(grad(m))) and isfinite(loss(m))]
            return inner(finite)

    The value, every `Mean`, `Sum`, `Max`, `Min` and `Last` and the carried state are those of the
    batch without it too; rows of `Concat` and entries of `Stack` stay, as they are.

    Args:
        inner: the accumulator of what remains; None is ``in_place()``.

    Returns:
        An accumulator whose report is a `Skipped`. Where nothing remains, value and gradient are 0.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> skip = jaxaccum.accumulators.skip_nonfinite()
        >>> loss = lambda w, x: jnp.mean(w * x)
        >>> step = jaxaccum.value_and_grad(loss, microbatch_size=2, accumulator=skip)
        >>> (value, report), grad = step(2.0, jnp.array([1.0, 3.0, jnp.nan, 1.0, 5.0]))
        >>> float(value), float(grad), report.describe()
        (6.0, 3.0, ['microbatch 1: gradient, loss'])
    """
    held = in_place() if inner is None else inner

    def accepts(mean_grads: PyTree, weight: Array) -> Array:
        finite = [jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(mean_grads)]
        return jnp.all(
            jnp.stack([*finite, jnp.isfinite(weight), accepted_by(held, mean_grads, weight)])
        )

    def init(params: PyTree) -> _State:
        no = jnp.array(False)
        return _State(
            held.init(params),
            jnp.int32(0),
            Stack(no),
            jax.tree.map(lambda _: Stack(no), params),
            Stack(no),
        )

    def update(state: _State, mean_grads: PyTree, weight: Array, index: Array) -> _State:
        ok = accepts(mean_grads, weight)
        return _State(
            inner=unless(ok, held.update(state.inner, mean_grads, weight, index), state.inner),
            num_skipped=state.num_skipped + jnp.where(ok, jnp.int32(0), jnp.int32(1)),
            microbatches=Stack(~ok),
            leaves=jax.tree.map(lambda g: Stack(~jnp.all(jnp.isfinite(g))), mean_grads),
            loss=Stack(~jnp.isfinite(weight)),
        )

    def finalize(state: _State) -> tuple[PyTree, Skipped]:
        grads, report = held.finalize(state.inner)
        leaves = jax.tree.map(
            lambda stack: stack.x, state.leaves, is_leaf=lambda x: isinstance(x, Stack)
        )
        return grads, Skipped(state.num_skipped, state.microbatches.x, leaves, state.loss.x, report)

    return Accumulator(init, update, finalize, accepts, getattr(held, "dtype", None))
