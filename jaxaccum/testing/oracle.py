"""The full-batch oracle: value, gradient and aux of a loss in one pass, in float64 if possible."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

import jaxaccum
from jaxaccum._base.trees import key_data
from jaxaccum._base.types import Array, Axes, Fun, PyTree
from jaxaccum._host_loop.partition import in_axes_of_parts

__all__ = ["LossCall", "Result", "draws_random_numbers", "oracle"]

Result = dict[str, PyTree]
"""``"value"`` and ``"gradient"``, and ``"aux"`` where the loss has one."""


class LossCall(NamedTuple):
    """A loss, the arguments of one call, and how these are cut.

    Where it has aux, this is a dict, and what is compared is under ``"kept"``.
    """

    fun: Fun
    args: tuple[PyTree, ...]
    in_axes: tuple[Axes, ...]
    has_aux: bool
    axis_name: str = "microbatch"

    def full_batch(self) -> Fun:
        """The loss in one pass over the whole batch."""
        return jaxaccum.full_batch(self.fun, self.in_axes, self.axis_name)

    def program(self) -> jex.Jaxpr:
        """What it computes of the whole batch, in the dtypes of its arguments."""
        return jax.make_jaxpr(self.full_batch())(*self.args).jaxpr

    def of_part(self, args: tuple[PyTree, ...]) -> LossCall:
        """The same loss of one microbatch, as `partition` returns its arguments."""
        return self._replace(args=args, in_axes=in_axes_of_parts(self.in_axes))

    def named(self, value: PyTree, gradient: PyTree) -> Result:
        """What `jax.value_and_grad` returned, by name."""
        if not self.has_aux:
            return {"value": value, "gradient": gradient}
        value, aux = value
        kept = jax.tree.map(key_data, aux["kept"])  # keys are compared by their numbers
        return {"value": value, "gradient": gradient, "aux": kept}


def oracle(loss: LossCall, *, float64: bool = True) -> Result:
    """Value, gradient and aux of the whole batch in one pass."""
    if not float64:
        return _evaluated(loss, loss.args)
    # Constants that fun closes over keep their dtype, and meet float64 arguments here.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return _evaluated(loss, jax.tree.map(_to_float64, loss.args))


def draws_random_numbers(loss: LossCall) -> bool:
    """Whether the loss draws from `jax.random`, whose numbers depend on the dtype."""
    return "random_bits" in str(loss.program())


def _evaluated(loss: LossCall, args: tuple[PyTree, ...]) -> Result:
    full = loss.full_batch()

    def total(*args: PyTree) -> PyTree:
        """The loss as one number, the sum of its terms."""
        terms, aux = full(*args) if loss.has_aux else (full(*args), None)
        first, *rest = jax.tree.leaves(terms)
        value = sum(rest, start=first)
        return (value, aux) if loss.has_aux else value

    transformed = jax.value_and_grad(total, has_aux=loss.has_aux)
    return loss.named(*jax.jit(transformed)(*args))


def _to_float64(leaf: PyTree) -> Array:
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array.astype(jnp.complex128)
    return array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array
