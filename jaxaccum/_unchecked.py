"""Run a coupled program where JAX tracks which values vary over a mesh (`shard_map` with ``check_vma=True``).

There JAX refuses every collective over an axis that is none of the mesh's, those of `jax.vmap` as well. So a coupled
program is traced and run as under ``check_vma=False``, on values whose types say nothing about devices; what it returns
varies over every axis that its arguments vary over, and the sums over devices that follow are typed again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax._src import config  # `shard_map` has no public name for the state that its own check_vma sets
from jax.interpreters import ad, batching, mlir

from jaxaccum import _mesh
from jaxaccum._types import PyTree


def unchecked() -> Any:
    """A context in which JAX does not track which values vary."""
    return config._check_vma(False)


def untyped(tree: PyTree) -> PyTree:
    """The same values, whose types say nothing about devices; keys have no such types."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: x if is_key(x) else _untyped.bind(x), tree)


def untyped_shard_index(mesh_axes: Sequence[str]) -> Any:
    """`_mesh.shard_index` where JAX does not track which values vary: axis by axis, since their indices still do."""
    place: Any = 0
    for name in mesh_axes:
        place = place * lax.axis_size(name) + untyped(lax.axis_index(name))
    return place


_untyped = jex.Primitive("untyped")
_untyped.def_impl(lambda x: x)
_untyped.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape, x.dtype))
mlir.register_lowering(_untyped, lambda _, x: [x])
batching.defvectorized(_untyped)


def _transpose(cotangent: Any, x: Any) -> list[Any]:
    return [_mesh.vary(cotangent, frozenset(x.aval.manual_axis_type.varying))]


ad.deflinear2(_untyped, _transpose)


def typed(tree: PyTree, axes: Collection[str]) -> PyTree:
    """The inverse of `untyped`: values that vary over the axes. JAX's own cast would sum cotangents over devices."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda x: x if is_key(x) else _typed.bind(x, axes=tuple(sorted(axes))), tree)


def _varying(x: Any, axes: tuple[str, ...]) -> Any:
    mesh = jax.sharding.get_abstract_mesh()
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * len(x.shape)))
    kind = type(x.manual_axis_type)(varying=frozenset(axes))
    return jax.core.ShapedArray(x.shape, x.dtype, sharding=sharding, manual_axis_type=kind)


_typed = jex.Primitive("typed")
_typed.def_impl(lambda x, axes: x)
_typed.def_abstract_eval(_varying)
mlir.register_lowering(_typed, lambda _, x, axes: [x])
batching.defvectorized(_typed)
ad.deflinear2(_typed, lambda cotangent, x, axes: [_untyped.bind(cotangent)])
