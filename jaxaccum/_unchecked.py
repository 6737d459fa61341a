"""Run a coupled program where JAX tracks which values vary over a mesh (`shard_map` with ``check_vma=True``).

There JAX refuses every collective over an axis that is none of the mesh's, those of `jax.vmap` as well. So a coupled
program is traced and run as under ``check_vma=False``, on values whose types say nothing about devices; what it returns
varies over every axis that its arguments vary over, and the sums over devices that follow are typed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
from jax import lax
from jax._src import config  # `shard_map` has no public name for the state that its own check_vma sets
from jax.interpreters import ad, batching, mlir

from jaxaccum._trace import axes_of, changed, unchanged
from jaxaccum._tree import key_impl
from jaxaccum._types import Array, PyTree


def unchecked() -> Any:
    """A context in which JAX does not track which values vary."""
    return config._check_vma(False)


def untyped(tree: PyTree) -> PyTree:
    """The same values, whose types say nothing about devices; keys have no such types."""
    return jax.tree.map(lambda x: _untyped.bind(x) if key_impl(x) is None else x, tree)


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
    return [typed(cotangent, x.aval.manual_axis_type.varying)]


ad.deflinear2(_untyped, _transpose)


def typed(tree: PyTree, axes: Collection[str]) -> PyTree:
    """The inverse of `untyped`: values that vary over the axes. JAX's own cast would sum cotangents over devices."""
    names = tuple(sorted(axes))
    return jax.tree.map(lambda x: _typed.bind(x, axes=names) if key_impl(x) is None else x, tree)


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


def exchanged(collective: Callable[[Array], Array], x: Array) -> Array:
    """``collective(x)``, linear in `x`, of which JAX checks no types: nor of its transpose, wherever that is taken."""
    with unchecked():
        jaxpr = jax.make_jaxpr(collective)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    return _exchanged.bind(x, jaxpr=jaxpr)


def with_exchanges(jaxpr: jex.Jaxpr, loop_axis: str) -> jex.Jaxpr:
    """The jaxpr whose linear collectives over the mesh alone are `exchanged`; the loop resolves those over its axis."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes) - {loop_axis}

    def change(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
        if eqn.primitive.name not in _LINEAR or not manual.issuperset(axes_of(eqn)) or len(eqn.invars) != 1:
            return eqn
        aval: Any = eqn.invars[0].aval
        with unchecked():
            one = jax.make_jaxpr(lambda x: unchanged(eqn, [x], jaxpr)[0])
            inner = one(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return eqn.replace(primitive=_exchanged, params={"jaxpr": inner}, effects=jex.no_effects)

    return changed(jaxpr, change)


_LINEAR = {"all_gather", "reduce_scatter", "ppermute", "all_to_all"}


def _evaluated(x: Any, jaxpr: Any) -> Any:
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x)[0]


def _lowered(ctx: Any, x: Any, jaxpr: Any) -> Any:
    with unchecked():
        return mlir.lower_fun(_evaluated, multiple_results=False)(ctx, x, jaxpr=jaxpr)


def _backward(cotangent: Any, x: Any, jaxpr: Any) -> list[Any]:
    (aval,) = jaxpr.in_avals
    shape = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    with unchecked():
        transpose = jax.linear_transpose(functools.partial(_evaluated, jaxpr=jaxpr), shape)
    return [exchanged(lambda cotangent: transpose(cotangent)[0], cotangent)]


def _batched(args: Any, dims: Any, *, jaxpr: Any) -> tuple[Any, int]:
    (x,), (dim,) = args, dims
    return exchanged(jax.vmap(functools.partial(_evaluated, jaxpr=jaxpr), dim), x), 0


_exchanged = jex.Primitive("exchanged")
_exchanged.def_impl(_evaluated)
_exchanged.def_abstract_eval(lambda x, jaxpr: jax.core.ShapedArray(jaxpr.out_avals[0].shape, jaxpr.out_avals[0].dtype))
mlir.register_lowering(_exchanged, _lowered)
batching.primitive_batchers[_exchanged] = _batched
ad.deflinear2(_exchanged, _backward)
