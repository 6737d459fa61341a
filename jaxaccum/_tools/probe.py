"""The numeric probe: an independent check of the audit, by gradients in float64."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._audit.report import Probe
from jaxaccum._base.trees import leaves_with_names
from jaxaccum._base.types import Axes, Fun, PyTree
from jaxaccum._host_loop.partition import in_axes_of_parts, num_examples, partition
from jaxaccum._program import output_parts
from jaxaccum._transforms.microbatch import full_batch
from jaxaccum._transforms.value_and_grad import value_and_grad

TOLERANCE = float(np.sqrt(np.finfo(np.float64).eps))
"""Half of the digits: rounding leaves ten or more, and a wrong rule is wrong in the first."""


class _Loss(NamedTuple):
    """A loss without aux, and how its arguments are cut."""

    fun: Fun
    in_axes: Sequence[Axes]
    axis_name: str

    def in_one_pass(self, *args: PyTree) -> PyTree:
        """Value and gradient of all examples at once."""
        full = full_batch(self.fun, in_axes=self.in_axes, axis_name=self.axis_name)
        total = lambda *args: output_parts.value(full(*args))
        return _named(jax.value_and_grad(total)(*args))

    def of_parts(self) -> _Loss:
        """The same loss for what `partition` returns."""
        return self._replace(in_axes=in_axes_of_parts(self.in_axes))


def probe(
    fun: Fun,
    args: Sequence[PyTree],
    *,
    in_axes: Sequence[Axes],
    has_aux: bool,
    axis_name: str,
    equal: int | None,
) -> Probe:
    """Compare on a split into unequal parts; into `equal` parts where the loss has collectives."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tuple(args))):
        raise ValueError(
            "probe=True computes gradients, and an argument holds shapes without values; pass "
            "arrays."
        )
    without_aux = lambda *args: output_parts.loss_and_aux(fun(*args), has_aux)[0]
    loss = _Loss(without_aux, in_axes, axis_name)
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        wide = jax.tree.map(_wide, tuple(args))
        try:
            return _compared(loss, wide, equal)
        except (NotImplementedError, TypeError, ValueError) as error:
            return Probe(None, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _compared(loss: _Loss, args: tuple[PyTree, ...], equal: int | None) -> Probe:
    count = num_examples(args, loss.in_axes)
    options: dict[str, Any] = {"num_microbatches": equal}
    if not equal:
        options = {"microbatch_size": count // 2 + 1}
    parts = partition(*args, in_axes=loss.in_axes, **options)
    own = loss.of_parts()
    sizes = [num_examples(part, own.in_axes) for part in parts]
    expected = loss.in_one_pass(*args)
    accumulated = value_and_grad(
        loss.fun, in_axes=loss.in_axes, axis_name=loss.axis_name, audit=None, **options
    )
    errors = _errors(_named(accumulated(*args)), expected)
    values = [own.in_one_pass(*part) for part in parts]
    exact = max(errors.values()) <= TOLERANCE
    return Probe(exact, _rule(values, sizes, expected), errors, tuple(sizes))


def _rule(values: Sequence[PyTree], sizes: Sequence[int], expected: PyTree) -> str | None:
    """By which rule the parts' own values and gradients give those of the batch, if by any."""
    means = weighted_sum(values, [size / sum(sizes) for size in sizes])
    for name, combined in ("MEAN", means), ("SUM", weighted_sum(values, [1.0] * len(sizes))):
        if max(_errors(combined, expected).values()) <= TOLERANCE:
            return name
    return None


def weighted_sum(trees: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """The sum of the trees, each times its weight."""
    return jax.tree.map(lambda *leaves: sum(map(operator.mul, weights, leaves)), *trees)


def _named(result: tuple[PyTree, PyTree]) -> PyTree:
    return {"value": result[0], "gradient": result[1]}


def _errors(actual: PyTree, expected: PyTree) -> dict[str, float]:
    """The largest difference of each leaf, relative to the largest expected entry of all leaves."""
    scale = max(float(np.max(np.abs(x), initial=0.0)) for x in jax.tree.leaves(expected)) or 1.0

    def error(a: PyTree, b: PyTree) -> float:
        largest = np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0.0)
        return float(largest) / scale if np.isfinite(largest) else float("inf")

    return dict(leaves_with_names(jax.tree.map(error, actual, expected), ""))


def _wide(x: PyTree) -> PyTree:
    if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.asarray(x, jnp.complex128)
    return jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
