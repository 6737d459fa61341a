"""How gradients combine over microbatches: in place, or as a plain sum; and in which dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxaccum import _mesh
from jaxaccum._tree import cast, widen
from jaxaccum._types import Array


@dataclasses.dataclass(frozen=True)
class Sums:
    """The sum of weighted gradients: into references that the backward pass adds to, or as values.

    Made by `in_place` and `tree`; `dtype` overrides that of the sums, which otherwise is the parameter's, or float32
    for a parameter of lower precision.
    """

    in_place: bool
    dtype: Any = None

    def dtype_for(self, parameter: Array) -> Any:
        """The dtype in which the gradient of `parameter` is summed and returned."""
        if self.dtype is None or jnp.issubdtype(parameter.dtype, jnp.complexfloating):
            return widen(parameter.dtype)
        return jnp.dtype(self.dtype)

    def zeros(self, parameter: Array) -> Array:
        """The sum before the first microbatch, laid out over the mesh and varying as the parameter."""
        return _mesh.vary(jnp.zeros_like(parameter, self.dtype_for(parameter)), _mesh.varying_axes(parameter))


def in_place(dtype: DTypeLike | None = None) -> Sums:
    """Sum gradients in place: the backward pass adds into the one buffer that the optimizer then reads.

    Guarantees: ``Σ wᵢ gᵢ / Σ wᵢ`` in `dtype`, no second tree of gradients; reverse-mode differentiable any number of
    times. It has no forward-mode derivative: use `tree` under `jax.jvp`, `jax.jacfwd` or `jax.hessian`.

    Args:
        dtype: of the sums; None is float32 for parameters of lower precision and the parameter's own otherwise.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> fun = lambda w, x: jnp.mean((w * x) ** 2)
        >>> sums = jaxaccum.accumulators.in_place()
        >>> jaxaccum.grad(fun, num_microbatches=2, accumulator=sums)(1.0, jnp.array([1.0, 3.0])).item()
        10.0
    """
    return Sums(in_place=True, dtype=dtype)


def tree(dtype: DTypeLike | None = None) -> Sums:
    """Sum gradients as values, without references: every transformation of JAX applies, at one more tree of memory.

    Args:
        dtype: of the sums; None is float32 for parameters of lower precision and the parameter's own otherwise.

    Example:
        >>> import jax, jax.numpy as jnp, jaxaccum
        >>> fun = lambda w, x: jnp.mean((w * x) ** 2)
        >>> grad = jaxaccum.grad(fun, num_microbatches=2, accumulator=jaxaccum.accumulators.tree())
        >>> jax.jacfwd(grad)(1.0, jnp.array([1.0, 3.0])).item()
        10.0
    """
    return Sums(in_place=False, dtype=dtype)


@jax.custom_vjp
def port(sink: Array, parameter: Array) -> Array:
    """The parameter; its cotangent goes, cast up, to `sink`, an array of zeros that is never read.

    A reference takes cotangents of its own dtype only, so a float32 sum of bfloat16 gradients needs a float32 input.
    """
    del sink
    return parameter


def _port_backward(sink: Any, cotangent: Array) -> tuple[Array, None]:
    return cast(cotangent, sink.dtype), None


class _DtypeOf:
    """A residual that holds a dtype and no array."""

    def __init__(self, dtype: Any):
        self.dtype = dtype


jax.tree_util.register_static(_DtypeOf)
port.defvjp(lambda sink, parameter: (parameter, _DtypeOf(sink.dtype)), _port_backward)
