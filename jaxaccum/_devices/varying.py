"""Devices in space: which mesh axes a value varies over, and the sums over them that follow the
loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxaccum._base.entries import entries, with_entries
from jaxaccum._base.types import Array, PyTree


def varying_axes(x: Array | jax.ShapeDtypeStruct | jax.core.ShapedArray) -> frozenset[str]:
    """The manual mesh axes over which `x` differs between devices; empty outside `shard_map`."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct | jax.core.ShapedArray) else jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(kind, "varying", ()))  # a mutable variable of Flax has none


def of(x: Array) -> jax.sharding.AbstractMesh:
    """The mesh that the type of `x` names; without axes where it names none."""
    return jax.typeof(x).sharding.mesh


def axis_names(x: Array) -> tuple[str, ...]:
    """The axes of the mesh that `x` is laid out on, as far as its type says, or itself where it is
    concrete."""
    sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    return (
        *of(x).axis_names,
        *(sharding.mesh.axis_names if isinstance(sharding, NamedSharding) else ()),
    )


def spec(x: Array) -> PartitionSpec:
    """Over which mesh axes each dimension is divided, as far as the type of `x` says: on explicit
    meshes."""
    return jax.typeof(x).sharding.spec


def names(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    """The mesh axes over which one dimension is divided."""
    entry = spec[dim] if dim < len(spec) else None
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def every_name(spec: PartitionSpec) -> set[str]:
    """The mesh axes over which any dimension is divided."""
    return {name for dim in range(len(spec)) for name in names(spec, dim)}


def is_summed(x: Array) -> bool:
    """Whether the type of `x` says that it is a sum which JAX has still to take, or that its
    cotangent is one."""
    own = spec(x)
    return bool(own.unreduced or own.reduced)


def plain(x: Array) -> Array:
    """`x` as an array of a plain type, its sum over devices taken."""
    return jax.sharding.reshard(x, _of_parts(x)) if is_summed(x) else x


def as_cotangent(grad: Array, x: Array) -> Array:
    """A gradient in the type of the cotangents of `x`: a sum to be taken is one of a value that is
    reduced."""
    if not is_summed(x):
        return grad
    own = spec(x)
    return jax.sharding.reshard(grad, _of_parts(x, unreduced=own.reduced, reduced=own.unreduced))


def _of_parts(x: Array, **kinds: Any) -> NamedSharding:
    return NamedSharding(of(x), PartitionSpec(*spec(x).partitions, **kinds))


def full(aval: Any, value: ArrayLike, dtype: DTypeLike | None = None) -> Array:
    """An array of one value, over the mesh as its type says; of another dtype where one is
    given."""
    dtype = aval.dtype if dtype is None else dtype
    sharding = getattr(aval, "sharding", None)
    x = jnp.full(aval.shape, value, dtype, out_sharding=sharding if _at_hand(sharding) else None)
    return vary(x, varying_axes(aval))


def _at_hand(sharding: Any) -> bool:
    """Whether a type's sharding is one of the mesh at hand, if there is one.

    A function inside of ``shard_map`` may close over an array of the jitted function around it. Its
    type then speaks of a mesh that is not the one at hand, which ``jnp.zeros_like`` does not take.
    """
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    here = jax.sharding.get_abstract_mesh()
    return isinstance(mesh, jax.sharding.AbstractMesh) and (here.empty or here == mesh)


def zeros(aval: Any, dtype: DTypeLike | None = None) -> Array:
    """Zeros of a type, as `full` makes them."""
    return full(aval, 0, dtype)


def vary(tree: PyTree, axes: frozenset[str]) -> PyTree:
    """Cast every array to vary over `axes`, so that no derivative is summed over devices inside the
    loop."""

    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        if not missing or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return lax.pcast(x, missing, to="varying")

    return jax.tree.map(cast, tree) if axes else tree


def shard_index(mesh_axes: Sequence[str]) -> Array | int:
    """The place of this device's shard among those of the batch, the first axis varying slowest."""
    return lax.axis_index(tuple(mesh_axes)) if mesh_axes else 0


def num_shards(mesh_axes: Sequence[str]) -> int:
    """How many shards the batch has."""
    return math.prod(map(lax.axis_size, mesh_axes))


def checked(mesh_axes: Sequence[str]) -> bool:
    """Whether `shard_map` tracks which values vary (``check_vma=True``), and so transposes sums by
    itself."""
    return bool(varying_axes(lax.axis_index(tuple(mesh_axes))))


def sum_shards(x: Array, mesh_axes: tuple[str, ...]) -> Array:
    """The sum over all shards. Each device's own term receives the sum's cotangent unchanged."""
    if checked(mesh_axes) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return lax.psum(vary(x, frozenset(mesh_axes)), mesh_axes)
    # Unchecked, JAX would transpose the sum into another one and count every device's copy of the
    # loss.
    total = jax.custom_vjp(lambda x: lax.psum(x, mesh_axes))
    total.defvjp(lambda x: (lax.psum(x, mesh_axes), None), lambda _, cotangent: (cotangent,))
    return total(x)


def last_shard(x: Array, mesh_axes: tuple[str, ...]) -> Array:
    """The value on the last shard, which holds the last microbatches; itself where it is the same
    on all."""
    own = mesh_axes
    if checked(mesh_axes):
        own = tuple(name for name in mesh_axes if name in varying_axes(x))
    if not own:
        return x
    count = math.prod(map(lax.axis_size, own))
    return _of_shard(x, own, count - 1)


def of_one_shard(x: Array, axes: frozenset[str]) -> Array:
    """A value that is the same along `axes`, typed so: that of the first device, so that its
    cotangent counts once."""
    names = tuple(sorted(axes & varying_axes(x)))
    return _of_shard(x, names, 0) if names else x


def _of_shard(x: Array, names: tuple[str, ...], place: int) -> Array:
    """The value on one of the shards, on all of them."""
    wide = x.astype(jnp.int32) if x.dtype == jnp.bool_ else x
    alone = jnp.where(shard_index(names) == place, wide, jnp.zeros_like(wide))
    return lax.psum(alone, names).astype(x.dtype)


def sum_cotangents(x: Array, mesh_axes: tuple[str, ...]) -> Array:
    """`x`. Its gradient is summed over all shards where JAX does not do so by itself
    (``check_vma=False``)."""
    if not mesh_axes or checked(mesh_axes) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    same = jax.custom_vjp(lambda x: x)
    same.defvjp(lambda x: (x, None), lambda _, cotangent: (lax.psum(cotangent, mesh_axes),))
    return same(x)


def sum_at_once(arrays: list[Array], axes: list[tuple[str, ...]]) -> list[Array]:
    """Each array summed over its mesh axes, all arrays with the same axes in one collective."""
    results = list(arrays)
    for names in set(axes) - {()}:
        places = [i for i, own in enumerate(axes) if own == names]
        summed = lax.psum(vary(entries(arrays, places), frozenset(names)), names)
        results = with_entries(results, places, summed)
    return results


def sum_over_others(x: Array, axes: frozenset[str]) -> Array:
    """`x` summed over the mesh axes that it varies over, `axes` excepted: the parts of a parameter
    that is divided."""
    others = tuple(sorted(varying_axes(x) - axes))
    return lax.psum(x, others) if others else x


def gradient_axes(
    grad: Array, given_axes: frozenset[str], mesh_axes: tuple[str, ...]
) -> tuple[str, ...]:
    """The axes over which a gradient is summed: `mesh_axes` and all others, but those over which
    its parameter varies.

    A parameter that differs between devices is a different parameter on each; the gradient of one
    is its own.
    """
    return tuple(sorted((varying_axes(grad) | set(mesh_axes)) - given_axes))
