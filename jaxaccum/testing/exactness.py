"""`assert_exact`: is the accumulated gradient of a loss the full batch's? If not, where and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxaccum
from jaxaccum._base.trees import leaves_with_names
from jaxaccum._base.types import Fun, InAxes, PyTree
from jaxaccum._host_loop.partition import num_examples
from jaxaccum._program.axes_by_name import by_position, check_keywords
from jaxaccum._program.entries_of_call import assigned
from jaxaccum._program.tags import is_tag
from jaxaccum._tools.probe import narrowest_dtype, with_values
from jaxaccum.testing.bounds import leaf_differences, normwise
from jaxaccum.testing.causes import likely_cause
from jaxaccum.testing.oracle import LossCall, Result, draws_random_numbers, oracle

__all__ = ["assert_exact"]

FLOAT32 = float(np.finfo(np.float32).eps)  # of the accumulator, where parameters are narrower


def assert_exact(
    fun: Fun,
    *args: PyTree,
    in_axes: InAxes = (None, 0),
    has_aux: bool = False,
    axis_name: str = "microbatch",
    partitions: Iterable[int | Mapping[str, Any]] | None = None,
    audit: bool = False,
    **kwargs: PyTree,
) -> None:
    """Asserts that accumulating `fun` over microbatches gives the full batch's value and gradient.

        max |value_and_grad(fun, partition)(*args) − full| ≤ bound · max |full|

    where full is ``full_batch(fun)(*args)`` in float64.

    The bound is 16 times the error of the full batch itself in the dtypes of `args`, or the eps of
    the narrowest dtype that `fun` computes in if that is more, plus 256 eps, and at most 1/4: a
    network's own rounding is allowed, a wrong rule is not. Each leaf of aux is compared by itself.

        expected = jax.value_and_grad(jaxaccum.full_batch(fun))(*float64(args))
        for partition in partitions:
            actual = jaxaccum.value_and_grad(fun, **partition)(*args)
            assert normwise(actual, expected) <= bound

    Args:
      fun: a loss as `jaxaccum.value_and_grad` takes it: `fun(params, batch)`, tagged or not.
      *args: its arguments, the whole batch included; the gradient is that of the first.
      in_axes: as in `jaxaccum.value_and_grad`. Where `fun` draws random numbers, the oracle keeps
        the dtypes of `args`, because `jax.random` draws others in float64.
      has_aux: whether `fun` returns `(loss, aux)`; aux is compared too, except what is tagged
        `Stack`, `Last` or `Carry`, which depends on the partition by its meaning.
      axis_name: the name of the loop's axis, as in `jaxaccum.value_and_grad`.
      partitions: microbatch sizes, or dicts of keyword arguments of `jaxaccum.value_and_grad`, such
        as `num_microbatches`, `split`, `memory` and `accumulator`. By default 1, 2, half, all but
        one, and all of the batch. Coupled losses need sizes that divide the batch.
      audit: whether to let `jaxaccum.audit` read the loss first.
      **kwargs: the keyword arguments of `fun`.

    Raises:
      AssertionError: naming the leaf, the partition, the error, the bound and the likely cause.
      ValueError: `partitions` is empty, or one of them has an option that is not the partition's;
        an argument holds shapes without values, or the first one no array.

    >>> def loss(params, batch):
    ...     errors = (batch["x"] @ params - batch["y"]) ** 2
    ...     return jaxaccum.Mean(jnp.sum(errors * batch["weight"]), jnp.sum(batch["weight"]))
    >>> batch = {"x": jnp.eye(3), "y": jnp.arange(3.0), "weight": jnp.array([1.0, 0.0, 2.0])}
    >>> assert_exact(loss, jnp.ones(3), batch)
    """
    check_keywords(kwargs, in_axes, "testing.assert_exact", fun)
    with_values(args, "assert_exact")
    fun, args, own = by_position(fun, args, kwargs, assigned(in_axes, args, kwargs, fun))
    if audit:
        report = jaxaccum.audit(fun, *args, in_axes=own, has_aux=has_aux, axis_name=axis_name)
        report.raise_if_inexact()
    batch_size = num_examples(args, own)
    given = default_sizes(batch_size) if partitions is None else partitions
    chosen = list(map(_as_options, given))
    if not chosen:
        raise ValueError(
            "partitions is empty: assert_exact would compare nothing; pass microbatch sizes, such "
            "as [1, 2]"
        )
    loss = LossCall(_comparable(fun) if has_aux else fun, args, own, has_aux, axis_name)
    random = draws_random_numbers(loss)
    expected = _apart(oracle(loss, float64=not random))
    bounds = _bounds(loss, expected, random=random)
    for options in chosen:
        actual = _apart(_accumulated(loss, options))
        for part, bound in bounds.items():
            error = normwise(actual[part], expected[part])
            if error > bound:
                of_aux = part not in ("value", "gradient")
                cause = _OF_AUX if of_aux else likely_cause(loss, actual, expected, options)
                leaf = part + _worst_leaf(actual[part], expected[part])
                raise AssertionError(
                    _message(leaf, options, batch_size, error=error, bound=bound, cause=cause)
                )


_OF_AUX = (
    "the tag of this leaf does not fit it: a mean is Mean(total, weight) and not Sum(mean), and no "
    "tag fits a statistic of one microbatch"
)


def _apart(result: Result) -> Result:
    """The same, with each leaf of aux by itself: one may be a count, and another a label."""
    aux = leaves_with_names(result.get("aux"), "aux")
    parts = {name: result[name] for name in ("value", "gradient")}
    return parts | dict(aux)


def _accumulated(loss: LossCall, options: Mapping[str, Any]) -> Result:
    """What `value_and_grad` gives under one partition."""
    transformed = jaxaccum.value_and_grad(
        loss.fun, has_aux=loss.has_aux, in_axes=loss.in_axes, axis_name=loss.axis_name, audit=None,
        **options,
    )  # fmt: skip
    value, gradient = jax.jit(transformed)(*loss.args)
    return loss.named(_without_report(value, has_aux=loss.has_aux), gradient)


def _without_report(value: PyTree, *, has_aux: bool) -> PyTree:
    """The value and its aux, without what the accumulator reports after them."""
    if not isinstance(value, tuple):
        return value
    return value[:2] if has_aux else value[0]


def _bounds(loss: LossCall, expected: Result, *, random: bool) -> dict[str, float]:
    """For value, gradient and aux: the rounding that is allowed."""
    eps = _eps(loss)
    summed = 256 * min(eps, FLOAT32)
    returned = eps if eps > FLOAT32 else 0.0  # the sum is rounded to the parameters' dtype
    if random:
        own = dict.fromkeys(expected, eps)
    else:
        full = _apart(oracle(loss, float64=False))
        # A loss that computes in bfloat16 rounds alike in both, whatever the dtypes of `args`.
        own = {part: max(eps, normwise(full[part], wanted)) for part, wanted in expected.items()}
    bounds = {part: 16 * rounding + summed + returned for part, rounding in own.items()}
    # A leaf of aux alone may be 0 but for rounding, which then is all of it.
    most = {"value": 0.25, "gradient": 0.25}
    return {part: min(bound, most.get(part, bound)) for part, bound in bounds.items()}


def default_sizes(batch_size: int) -> list[int]:
    """1, 2, half, all but one, and all: divisors and not."""
    return sorted(
        {1, min(2, batch_size), (batch_size + 1) // 2, max(batch_size - 1, 1), batch_size}
    )


def _as_options(partition: int | Mapping[str, Any]) -> dict[str, Any]:
    """The partition as options of `value_and_grad`."""
    if not isinstance(partition, Mapping):
        return {"microbatch_size": partition}
    for name in partition:
        if name in _OF_ALL:
            raise ValueError(f"partitions has {dict(partition)!r}: {_OF_ALL[name]}")
    return dict(partition)


_PASS = "pass {} to assert_exact itself, for all partitions"
_OF_ALL = {name: _PASS.format(name) for name in ("in_axes", "has_aux", "axis_name", "audit")}
_OF_ALL["argnums"] = (
    "the gradient is that of the first argument; make the one to differentiate the first"
)
"""Options of `value_and_grad` that no partition has for itself, and what to do."""


def _comparable(fun: Fun) -> Fun:
    """`fun` whose aux has the carried state apart, and lacks what depends on the partition."""

    def compared(*args: PyTree, **kwargs: PyTree) -> tuple[PyTree, dict[str, PyTree]]:
        loss, aux = fun(*args, **kwargs)
        tags = jax.tree.leaves(aux, is_leaf=is_tag)
        carried = [tag for tag in tags if isinstance(tag, jaxaccum.Carry)]
        kept = jax.tree.map(_independent, aux, is_leaf=is_tag)
        return loss, {"kept": kept, "carried": carried}

    return compared


def _independent(tag: PyTree) -> PyTree:
    """The tag, or nothing where its result depends on the partition by its meaning."""
    return () if is_tag(tag) and tag.reduction.of_partition else tag


def _eps(loss: LossCall) -> float:
    """That of the narrowest numbers among the parameters and what the loss computes."""
    leaves = jax.tree.leaves(loss.args[0])
    if not leaves:
        raise ValueError(
            "the first argument of fun holds no array, so there is no gradient to compare; make "
            "the parameters the first argument."
        )
    computed = narrowest_dtype(loss.program())
    return max(float(jnp.finfo(dtype).eps) for dtype in [computed, *map(jnp.result_type, leaves)])


def _worst_leaf(actual: PyTree, expected: PyTree) -> str:
    differences = leaf_differences(actual, expected)
    return max(differences, key=lambda name: differences[name])


def _message(
    leaf: str,
    options: Mapping[str, Any],
    batch_size: int,
    *,
    error: float,
    bound: float,
    cause: str,
) -> str:
    passed = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return "\n".join(
        (
            f"jaxaccum.value_and_grad(fun, {passed}) is not the full batch's",
            f"  leaf       {leaf}",
            f"  partition  {passed} of {batch_size} examples",
            f"  error      {error:.3g} of the largest entry",
            f"  bound      {bound:.3g}",
            f"  likely     {cause}",
        )
    )
