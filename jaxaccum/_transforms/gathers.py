"""Parameters that are divided over the batch's mesh axes, gathered where a device needs them
whole."""

from __future__ import annotations

import functools

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxaccum._base.types import Array, Fun, PyTree
from jaxaccum._devices import varying


def divided(spec: P) -> list[tuple[int, tuple[str, ...]]]:
    """The divided dimensions, each with its mesh axes."""
    every = [(dim, varying.names(spec, dim)) for dim in range(len(spec))]
    return [(dim, names) for dim, names in every if names]


def gathered(x: Array, spec: P) -> Array:
    """The whole array; this device holds a share of it, and its cotangent is summed over devices
    and scattered."""
    for dim, names in divided(spec):
        x = lax.all_gather(x, names, axis=dim, tiled=True)
    return x


def gathering(fun: Fun, sharded: dict[int, P], row: int) -> Fun:
    """`fun` of shares of its parameters, which it gathers at every microbatch.

    The barrier ties them to the microbatch: else the compiler, which sees that they never change,
    gathers them before the loop and keeps them.
    """

    @functools.wraps(fun)
    def whole(*args: PyTree, **kwargs: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        tie = leaves[row]
        for i, spec in sharded.items():
            leaves[i] = gathered(_tied(leaves[i], tie), spec)
        args, kwargs = treedef.unflatten(leaves)
        return fun(*args, **kwargs)

    return whole


@jax.custom_vjp
def _tied(x: Array, row: Array) -> Array:
    """`x`, which the compiler must take to depend on `row`; its cotangent passes as it is.

    A rule of its own, because in jax 0.12 a barrier's transpose cannot add into references.
    """
    return lax.optimization_barrier((x, row))[0]


_tied.defvjp(lambda x, row: (_tied(x, row), None), lambda _, cotangent: (cotangent, None))
