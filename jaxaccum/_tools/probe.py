"""The numeric probe: an independent check of the audit, by gradients in float64 on an unequal
split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._audit.report import Probe
from jaxaccum._base.types import Fun, PyTree
from jaxaccum._host_loop.partition import partition
from jaxaccum._program import output_parts
from jaxaccum._transforms.microbatch import full_batch
from jaxaccum._transforms.value_and_grad import value_and_grad

TOLERANCE = float(np.sqrt(np.finfo(np.float64).eps))
"""Half of the digits: rounding leaves ten or more, and a wrong rule is wrong in the first."""


def probe(
    fun: Fun, args: Sequence[Any], *, in_axes: Any, has_aux: bool, axis_name: str, equal: int | None
) -> Probe:
    """Compare on a split into unequal parts; into `equal` parts where the loss has collectives."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tuple(args))):
        raise ValueError(
            "probe=True computes gradients, and an argument holds shapes without values; pass "
            "arrays."
        )
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        wide = jax.tree.map(_wide, tuple(args))
        try:
            return _compared(
                _loss(fun, has_aux), wide, in_axes=in_axes, axis_name=axis_name, equal=equal
            )
        except (NotImplementedError, TypeError, ValueError) as error:
            return Probe(None, note=f"{type(error).__name__}: {str(error).splitlines()[0]}")


def _compared(
    fun: Fun, args: tuple[Any, ...], *, in_axes: Any, axis_name: str, equal: int | None
) -> Probe:
    count = len(partition(*args, in_axes=in_axes, microbatch_size=1))
    options: dict[str, Any] = (
        {"num_microbatches": equal} if equal else {"microbatch_size": count // 2 + 1}
    )
    parts = partition(*args, in_axes=in_axes, **options)
    sizes = [
        len(partition(*part, in_axes=_whole_keys(in_axes), microbatch_size=1)) for part in parts
    ]
    whole = jax.value_and_grad(_total(full_batch(fun, in_axes=in_axes, axis_name=axis_name)))
    expected = _named(whole(*args))
    actual = _named(
        value_and_grad(fun, in_axes=in_axes, axis_name=axis_name, audit=None, **options)(*args)
    )
    errors = _errors(actual, expected)
    rule = _rule(fun, parts, sizes, in_axes=in_axes, axis_name=axis_name, expected=expected)
    return Probe(max(errors.values()) <= TOLERANCE, rule, errors, tuple(sizes))


def _rule(
    fun: Fun, parts: list[Any], sizes: list[int], *, in_axes: Any, axis_name: str, expected: PyTree
) -> str | None:
    alone = jax.value_and_grad(
        _total(full_batch(fun, in_axes=_whole_keys(in_axes), axis_name=axis_name))
    )
    values = [_named(alone(*part)) for part in parts]
    for name, weights in (
        ("MEAN", [size / sum(sizes) for size in sizes]),
        ("SUM", [1.0] * len(sizes)),
    ):
        combined = jax.tree.map(
            lambda *leaves, w=weights: sum(a * b for a, b in zip(w, leaves, strict=True)), *values
        )
        if max(_errors(combined, expected).values()) <= TOLERANCE:
            return name
    return None


def _whole_keys(in_axes: Any) -> Any:
    """The in_axes of one part of a partition, whose keys are folded already."""
    from jaxaccum._base.types import EXAMPLE_KEY, KEY

    return tuple(0 if axes is EXAMPLE_KEY else None if axes is KEY else axes for axes in in_axes)


def _loss(fun: Fun, has_aux: bool) -> Fun:
    return lambda *args: output_parts.loss_and_aux(fun(*args), has_aux)[0]


def _total(full: Fun) -> Fun:
    return lambda *args: output_parts.value(full(*args))


def _named(result: Any) -> PyTree:
    return {"value": result[0], "gradient": result[1]}


def _errors(actual: PyTree, expected: PyTree) -> dict[str, float]:
    scale = max(float(np.max(np.abs(x), initial=0.0)) for x in jax.tree.leaves(expected)) or 1.0
    each = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)), initial=0.0)) / scale,
        actual,
        expected,
    )
    named = jax.tree_util.tree_leaves_with_path(each)
    return {
        jax.tree_util.keystr(path): error if np.isfinite(error) else float("inf")
        for path, error in named
    }


def _wide(x: Any) -> Any:
    if not hasattr(x, "dtype") or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.asarray(x, jnp.complex128)
    return jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
