"""Tags: the wrappers by which a function says how each of its outputs combines over microbatches.

A tag is sugar for a collective over the axis of the loop: ``Mean(total, weight)`` is ``psum(total)
/ psum(weight)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self, TypeGuard, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from jaxaccum._base.types import PyTree
from jaxaccum._program.reductions import Reduction

T = TypeVar("T")


class Tag:
    """The base of all tags; a tag may hold a pytree and applies to each of its leaves."""

    reduction: ClassVar[Reduction]
    """How its arrays combine over microbatches."""

    @property
    def content(self) -> PyTree:
        """What is combined: its first field, which of a `Mean` is the total."""
        field, *_ = _fields(type(self))
        return getattr(self, field)


def _fields(tag: type[Any]) -> list[str]:
    """The names of what a tag holds."""
    return [field.name for field in dataclasses.fields(tag)]


def _is_number(x: Any) -> bool:
    return isinstance(x, bool | int | float | complex) or (hasattr(x, "dtype") and jnp.ndim(x) == 0)


class _Scalable(Tag):
    """A tag that is linear in what it holds: numbers scale it, divide it and negate it."""

    __array_ufunc__ = None  # numpy scalars on the left hand it over to __rmul__

    def _scaled(self, scale: Callable[[Any], Any]) -> Self:
        """The tag with `scale` applied to the values that it is linear in."""
        raise NotImplementedError

    def _refuse(self, other: Any) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"{name} cannot be added to {type(other).__name__}: each term of a loss keeps its own "
            f'denominator. Return a dict of terms, as in {{"nll": {name}(…), "decay": …}}; its '
            "value is their sum, and a regularizer stays a bare scalar there."
        )

    __add__ = _refuse
    __radd__ = _refuse
    __sub__ = _refuse
    __rsub__ = _refuse

    def __mul__(self, scale: Any) -> Self:
        if not _is_number(scale):
            raise TypeError(
                f"{type(self).__name__} can be scaled by a number only; got {type(scale).__name__}."
            )
        return self._scaled(lambda x: x * scale)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Self:
        if not _is_number(divisor):
            raise TypeError(
                f"{type(self).__name__} can be divided by a number only; got "
                f"{type(divisor).__name__}."
            )
        return self._scaled(lambda x: x / divisor)

    def __neg__(self) -> Self:
        return self._scaled(lambda x: -x)


@dataclass_transform(frozen_default=True)
def _tag(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are the children of a pytree node."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_tag
class Mean(_Scalable):
    """A weighted mean over all examples: ``Σ total / Σ weight``, and 0 where ``Σ weight`` is 0.

    Both sums run over the microbatches, so the mean has one denominator, that of the whole batch,
    however the weights fall; both are differentiated.

    Args:
        total: the weighted sum over this microbatch's examples (or tokens); a scalar, an array or a
            pytree.
        weight: the non-negative weight that `total` sums over: one scalar for all leaves, or a
            pytree like `total` whose leaves are scalars or have the shape of their total. Integers
            are counted in float64 under x64, else in float32: no count overflows, and beyond 2^24
            float32 rounds it as it rounds the total.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> def fun(params, batch):
        ...     nll = (batch["x"] - params) ** 2
        ...     return jaxaccum.Mean(jnp.sum(nll * batch["mask"]), jnp.sum(batch["mask"]))
        >>> batch = {"x": jnp.array([1.0, 1, 2, 4]), "mask": jnp.array([1.0, 1, 0, 1])}
        >>> value, grad = jaxaccum.value_and_grad(fun, microbatch_size=2)(0.0, batch)
        >>> float(value), float(grad)  # (1 + 1 + 16) / 3; the mean of means is (1 + 16) / 2
        (6.0, -4.0)
    """

    reduction = Reduction.SUM
    total: PyTree
    weight: PyTree

    def _scaled(self, scale: Callable[[Any], Any]) -> Mean:
        return Mean(jax.tree.map(scale, self.total), self.weight)


@_tag
class Sum(_Scalable):
    """A sum over all examples: ``Σ x`` over the microbatches.

    Integers and booleans are summed, and returned, in the dtype of ``jnp.sum``: 64 bits under x64,
    else 32 bits, where a sum beyond 2^31 wraps as that of the full batch does.
    """

    reduction = Reduction.SUM
    x: PyTree

    def _scaled(self, scale: Callable[[Any], Any]) -> Sum:
        return Sum(jax.tree.map(scale, self.x))


@_tag
class Max(Tag):
    """The elementwise maximum over microbatches; a derivative of it is an error."""

    reduction = Reduction.MAX
    x: PyTree


@_tag
class Min(Tag):
    """The elementwise minimum over microbatches; a derivative of it is an error."""

    reduction = Reduction.MIN
    x: PyTree


@_tag
class Concat(Tag):
    """One row per example: the rows of the whole batch, in the batch's order whatever the split;
    differentiable."""

    reduction = Reduction.CONCAT
    x: PyTree


@_tag
class Stack(Tag):
    """One entry per microbatch, along a new leading axis: for diagnostics, since its shape depends
    on the partition."""

    reduction = Reduction.STACK
    x: PyTree


@_tag
class Last(Tag):
    """The value of the last microbatch; a derivative of it is an error.

    What depends on whole arguments alone, as a temperature does, needs no tag and has a derivative.
    Nor does what follows from collectives over the microbatches, as the new statistics of a
    BatchNorm do.
    """

    reduction = Reduction.LAST
    x: PyTree


@_tag
class Carry(Tag):
    """The new state of the argument declared ``CARRY``: same structure, shapes and dtypes; a
    derivative is an error."""

    reduction = Reduction.CARRY
    state: PyTree


@_tag
class Unvaried(Tag):
    """What an adapter returns as the same for every microbatch, and what is said where it is
    not."""

    reduction = Reduction.LAST
    x: PyTree
    refusal: str = dataclasses.field(metadata={"static": True})


TAGS: tuple[type[Tag], ...] = (Mean, Sum, Max, Min, Concat, Stack, Last, Carry)
"""All that users write, in the order in which messages name them."""


def spelled(tag: type[Tag]) -> str:
    """A tag as it is written: ``Mean(total, weight)``."""
    return f"{tag.__name__}({', '.join(_fields(tag))})"


def is_tag(x: Any) -> TypeGuard[Tag]:
    """Whether `x` is a tag, the leaf at which outputs are read."""
    return isinstance(x, Tag)
