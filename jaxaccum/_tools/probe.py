"""The numeric probe: an independent check of the audit, by gradients in float64 if possible."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxaccum._audit.report import Probe
from jaxaccum._base.trees import leaves_with_names
from jaxaccum._base.types import BATCH_KEY, CARRY, Axes, Fun, PyTree
from jaxaccum._host_loop.partition import in_axes_of_parts, num_examples, partition
from jaxaccum._jaxpr.equations import equations_inside
from jaxaccum._program import output_parts, validate
from jaxaccum._transforms.microbatch import full_batch
from jaxaccum._transforms.value_and_grad import value_and_grad


class _Cut(TypedDict):
    """One of them says how the batch is cut."""

    num_microbatches: int | None
    microbatch_size: int | None


class _Loss(NamedTuple):
    """A loss, and how its arguments are cut."""

    fun: Fun
    in_axes: Sequence[Axes]
    has_aux: bool
    axis_name: str

    def value(self, *args: PyTree) -> PyTree:
        """The value of all examples at once."""
        full = full_batch(self.fun, in_axes=self.in_axes, axis_name=self.axis_name)
        return output_parts.value(output_parts.loss_and_aux(full(*args), self.has_aux)[0])

    def in_one_pass(self, *args: PyTree) -> PyTree:
        """Value and gradient of all examples at once."""
        return _named(*jax.value_and_grad(self.value)(*args))

    def accumulated(self, *args: PyTree, **options: Any) -> PyTree:
        """Value and gradient over microbatches."""
        step = value_and_grad(
            self.fun, has_aux=self.has_aux, in_axes=self.in_axes, axis_name=self.axis_name,
            audit=None, **options,
        )  # fmt: skip
        value, gradient = step(*args)
        return _named(value[0] if self.has_aux else value, gradient)

    def of_parts(self) -> _Loss:
        """The same loss for what `partition` returns."""
        return self._replace(in_axes=in_axes_of_parts(self.in_axes))

    def runs_apart(self) -> bool:
        """Whether the loss of a microbatch can be computed without the other microbatches."""
        entries = jax.tree.leaves(list(self.in_axes))
        return not any(entry is of_batch for entry in entries for of_batch in (BATCH_KEY, CARRY))


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
    with_values(args, "probe=True")
    loss = _Loss(fun, in_axes, has_aux, axis_name)
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


def with_values(args: Sequence[PyTree], what: str) -> None:
    """An error where an argument holds shapes alone."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tuple(args))):
        raise ValueError(
            f"{what} computes gradients, and an argument holds shapes without values; pass arrays."
        )


def _compared(loss: _Loss, args: tuple[PyTree, ...], equal: int | None) -> Probe:
    count = num_examples(args, loss.in_axes)
    options: _Cut = {
        "num_microbatches": equal or None,
        "microbatch_size": None if equal else _unequal(count),
    }
    cut = validate.partition(count, **options, split="contiguous")
    sizes = [size for group in cut.groups for size in [group.size] * group.count]
    if len(sizes) == 1:
        return Probe(None, note="one microbatch is the whole batch: there is nothing to compare")
    expected = loss.in_one_pass(*args)
    errors = _errors(loss.accumulated(*args, **options), expected)
    of_first = jax.make_jaxpr(lambda first: loss.value(first, *args[1:]))(args[0])
    narrowest = narrowest_dtype(of_first.jaxpr)
    tolerance = _tolerance(narrowest)
    found = Probe(
        max(errors.values()) <= tolerance, None, errors, tuple(sizes), dtype=narrowest.name
    )
    if not loss.runs_apart():
        return dataclasses.replace(found, note="a microbatch's own loss needs the others")
    parts = partition(*args, in_axes=loss.in_axes, **options)
    values = [loss.of_parts().in_one_pass(*part) for part in parts]
    return dataclasses.replace(found, rule=_rule(values, sizes, expected, tolerance))


def _tolerance(dtype: jnp.dtype) -> float:
    """Half of the digits: rounding leaves so many, and a wrong rule is wrong in the first. Of few
    digits, as bfloat16's, it is what a wrong rule seldom keeps below."""
    eps = float(jnp.finfo(dtype).eps)
    return min(eps**0.5, max(eps, 1 / 32))


def _unequal(count: int) -> int:
    """The size of the larger of two microbatches, which are unequal where `count` is above 2."""
    return max(1, min(count // 2 + 1, count - 1))


def narrowest_dtype(jaxpr: jex.Jaxpr) -> jnp.dtype:
    """The floating dtype with the fewest digits that a program computes in, or float64."""
    atoms = [v for eqn in equations_inside(jaxpr) for v in (*eqn.invars, *eqn.outvars)]
    dtypes = {getattr(v.aval, "dtype", jnp.dtype(bool)) for v in atoms}
    floating = [jnp.finfo(dtype) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return max([jnp.finfo(jnp.float64), *floating], key=lambda info: float(info.eps)).dtype


def _rule(
    values: Sequence[PyTree], sizes: Sequence[int], expected: PyTree, tolerance: float
) -> str | None:
    """By which rule the parts' own values and gradients give those of the batch, if by any."""
    means = weighted_sum(values, [size / sum(sizes) for size in sizes])
    for name, combined in ("MEAN", means), ("SUM", weighted_sum(values, [1.0] * len(sizes))):
        if max(_errors(combined, expected).values()) <= tolerance:
            return name
    return None


def weighted_sum(trees: Sequence[PyTree], weights: Sequence[float]) -> PyTree:
    """The sum of the trees, each times its weight."""
    return jax.tree.map(lambda *leaves: sum(map(operator.mul, weights, leaves)), *trees)


def _named(value: PyTree, gradient: PyTree) -> PyTree:
    return {"value": value, "gradient": gradient}


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
