"""`assert_exact`: is a loss's accumulated gradient the full batch's? If not: where, by how much,
and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxaccum
from jaxaccum._program.argument_slots import assigned
from jaxaccum._program.axes_by_name import by_position, check_keywords
from jaxaccum.testing.bounds import leaf_differences, normwise
from jaxaccum.testing.causes import likely_cause
from jaxaccum.testing.oracle import draws_random_numbers, oracle

__all__ = ["assert_exact"]

FLOAT32 = float(np.finfo(np.float32).eps)  # of the accumulator, where parameters are narrower

TAGS = (
    jaxaccum.Mean,
    jaxaccum.Sum,
    jaxaccum.Max,
    jaxaccum.Min,
    jaxaccum.Concat,
    jaxaccum.Stack,
    jaxaccum.Last,
    jaxaccum.Carry,
)


def assert_exact(
    fun: Callable[..., Any],
    *args: Any,
    in_axes: Any = (None, 0),
    has_aux: bool = False,
    partitions: Iterable[int | Mapping[str, Any]] | None = None,
    audit: bool = False,
    **kwargs: Any,
) -> None:
    """Asserts that accumulating `fun` over microbatches gives the value and gradient of the full
    batch.

        max |value_and_grad(fun, partition)(*args) − full_batch(fun)(*args in float64)| ≤ bound ·
        max |full_batch|

    The bound is 16 times the error of the full batch itself in the dtypes of `args`, plus 256 eps,
    and at most 1/4: a network's own rounding is allowed, a wrong rule is not.

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
      partitions: microbatch sizes, or dicts of keyword arguments of `jaxaccum.value_and_grad`. By
        default 1, 2, half, all but one, and all of the batch. Coupled losses need sizes that divide
        the batch.
      audit: whether to let `jaxaccum.audit` read the loss first.
      **kwargs: the keyword arguments of `fun`.

    Raises:
      AssertionError: naming the leaf, the partition, the error, the bound and the likely cause.
      ValueError: `audit` is asked of a jaxaccum that has none, or `partitions` is empty.

    >>> def loss(params, batch):
    ...     errors = (batch["x"] @ params - batch["y"]) ** 2
    ...     return jaxaccum.Mean(jnp.sum(errors * batch["weight"]), jnp.sum(batch["weight"]))
    >>> batch = {"x": jnp.eye(3), "y": jnp.arange(3.0), "weight": jnp.array([1.0, 0.0, 2.0])}
    >>> assert_exact(loss, jnp.ones(3), batch)
    """
    check_keywords(kwargs, in_axes, "testing.assert_exact", fun)
    fun, args, in_axes = by_position(fun, args, kwargs, assigned(in_axes, args, kwargs, fun))
    if audit:
        _audit(fun, args, in_axes=in_axes, has_aux=has_aux)
    batch_size = len(jaxaccum.partition(*args, in_axes=in_axes, microbatch_size=1))
    chosen = [
        _as_options(each)
        for each in (default_sizes(batch_size) if partitions is None else partitions)
    ]
    if not chosen:
        raise ValueError(
            "partitions is empty: assert_exact would compare nothing; pass microbatch sizes, such "
            "as [1, 2]"
        )
    fun = _comparable(fun) if has_aux else fun
    exactly = not draws_random_numbers(fun, *args, in_axes=in_axes)
    expected = oracle(fun, *args, in_axes=in_axes, has_aux=has_aux, float64=exactly)
    own = oracle(fun, *args, in_axes=in_axes, has_aux=has_aux, float64=False) if exactly else None
    for options in chosen:
        transformed = jaxaccum.value_and_grad(
            fun, in_axes=in_axes, has_aux=has_aux, audit=None, **options
        )
        actual = _named(jax.jit(transformed)(*args), has_aux)
        for part, wanted in expected.items():
            rounding = normwise(own[part], wanted) if own else _eps(args)
            returned = (
                _eps(args) if _eps(args) > FLOAT32 else 0.0
            )  # the sum is rounded to the parameters' dtype
            bound = min(16 * rounding + 256 * min(_eps(args), FLOAT32) + returned, 0.25)
            error = normwise(actual[part], wanted)
            if error > bound:
                cause = likely_cause(
                    fun, args, actual, expected, in_axes=in_axes, has_aux=has_aux, options=options
                )
                leaf = part + _worst_leaf(actual[part], wanted)
                raise AssertionError(
                    _message(leaf, options, batch_size, error=error, bound=bound, cause=cause)
                )


def default_sizes(batch_size: int) -> list[int]:
    """1, 2, half, all but one, and all: divisors and not."""
    return sorted(
        {1, min(2, batch_size), (batch_size + 1) // 2, max(batch_size - 1, 1), batch_size}
    )


def _as_options(partition: int | Mapping[str, Any]) -> dict[str, Any]:
    return {"microbatch_size": partition} if isinstance(partition, int) else dict(partition)


def _audit(fun: Callable[..., Any], args: tuple[Any, ...], *, in_axes: Any, has_aux: bool) -> None:
    audited = getattr(jaxaccum, "audit", None)
    if audited is None:
        raise ValueError(
            "audit=True needs jaxaccum.audit, which this version of jaxaccum lacks: pass "
            "audit=False"
        )
    audited(fun, *args, in_axes=in_axes, has_aux=has_aux).raise_if_inexact()


def _comparable(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun` whose aux sets apart the carried state and drops what depends on the partition by its
    meaning."""

    def compared(*args: Any, **kwargs: Any) -> Any:
        loss, aux = fun(*args, **kwargs)
        carried = [
            tag for tag in jax.tree.leaves(aux, is_leaf=_is_tag) if isinstance(tag, jaxaccum.Carry)
        ]
        dependent = (jaxaccum.Stack, jaxaccum.Last, jaxaccum.Carry)
        kept = jax.tree.map(
            lambda tag: () if isinstance(tag, dependent) else tag, aux, is_leaf=_is_tag
        )
        return loss, {"kept": kept, "carried": carried}

    return compared


def _is_tag(node: Any) -> bool:
    return isinstance(node, TAGS)


def _named(result: Any, has_aux: bool) -> dict[str, Any]:
    value, gradient = result
    if not has_aux:
        return {"value": value, "gradient": gradient}
    return {"value": value[0], "gradient": gradient, "aux": value[1]["kept"]}


def _eps(args: Any) -> float:
    """That of the narrowest parameter."""
    return max(float(jnp.finfo(jnp.asarray(leaf).dtype).eps) for leaf in jax.tree.leaves(args[0]))


def _worst_leaf(actual: Any, expected: Any) -> str:
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
