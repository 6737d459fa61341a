"""Run a coupled program where JAX tracks which values vary over a mesh (`shard_map` with
``check_vma=True``).

There JAX refuses every collective over an axis that does not belong to the mesh, and so those of
`jax.vmap`. So a coupled program is traced and run as under ``check_vma=False``, on values with
types that say nothing about devices. What it returns varies over every axis that its arguments vary
over, and the sums over devices that follow are typed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import jax
import jax.core
import jax.extend.core as jex
from jax import lax
from jax.interpreters import ad, batching, mlir

from jaxaccum._base.trees import key_impl
from jaxaccum._base.types import Array, PyTree
from jaxaccum._jaxpr import compat
from jaxaccum._jaxpr.compat import ClosedJaxpr
from jaxaccum._jaxpr.equations import axes_of, changed
from jaxaccum._jaxpr.evaluate import unchanged
from jaxaccum._jaxpr.variables import Type, type_of


def unchecked() -> AbstractContextManager[None]:
    """A context in which JAX does not track which values vary."""
    return compat.without_varying_checks()


def mapped_mesh_axes() -> frozenset[str]:
    """The manual mesh axes over which an outer ``jax.vmap(…, spmd_axis_name=…)`` divides what it
    maps."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return compat.mesh_axes_of_vmaps() & frozenset(manual)


def untyped(tree: PyTree) -> PyTree:
    """The same values, with types that say nothing about devices; keys have no such types."""
    return jax.tree.map(lambda x: _untyped.bind(x) if key_impl(x) is None else x, tree)


def untyped_shard_index(mesh_axes: Sequence[str]) -> Any:
    """`varying.shard_index` where JAX does not track which values vary: axis by axis, since their
    indices still do."""
    place: Any = 0
    for name in mesh_axes:
        place = place * lax.axis_size(name) + untyped(lax.axis_index(name))
    return place


def _everywhere(x: Type) -> Type:
    """The type of `x`, laid out over explicit axes as it is, and the same on all devices of manual
    ones."""
    return x.update(weak_type=False, manual_axis_type=type(x.manual_axis_type)())


_untyped = jex.Primitive("untyped")
_untyped.def_impl(lambda x: x)
_untyped.def_abstract_eval(_everywhere)
mlir.register_lowering(_untyped, lambda _, x: [x])
batching.defvectorized(_untyped)


def _transpose(cotangent: Any, x: Any) -> list[Any]:
    return [typed(cotangent, x.aval.manual_axis_type.varying)]


ad.deflinear2(_untyped, _transpose)


def typed(tree: PyTree, axes: Collection[str]) -> PyTree:
    """The inverse of `untyped`: values that vary over the axes. JAX's own cast would sum cotangents
    over devices."""
    names = tuple(sorted(axes))
    return jax.tree.map(lambda x: _typed.bind(x, axes=names) if key_impl(x) is None else x, tree)


def _varying(x: Type, axes: tuple[str, ...]) -> Type:
    mesh, sharding = jax.sharding.get_abstract_mesh(), x.sharding
    if sharding.mesh.empty:
        sharding = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec(*[None] * len(x.shape))
        )
    return x.update(
        sharding=sharding, manual_axis_type=type(x.manual_axis_type)(varying=frozenset(axes))
    )


_typed = jex.Primitive("typed")
_typed.def_impl(lambda x, axes: x)
_typed.def_abstract_eval(_varying)
mlir.register_lowering(_typed, lambda _, x, axes: [x])
batching.defvectorized(_typed)
ad.deflinear2(_typed, lambda cotangent, x, axes: [_untyped.bind(cotangent)])


def exchanged(collective: Callable[[Array], Array], x: Array) -> Array:
    """``collective(x)``, which is linear in `x`, without JAX's checks of types: here, and where it
    is transposed."""
    return _exchanged.bind(x, **_sealed(collective, jax.typeof(x)))


def with_exchanges(jaxpr: jex.Jaxpr, loop_axis: str) -> jex.Jaxpr:
    """The jaxpr with its linear collectives over the mesh alone as `exchanged`; the loop resolves
    those over its axis."""
    manual = set(jax.sharding.get_abstract_mesh().manual_axes) - {loop_axis}

    def change(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
        linear = eqn.primitive.name in _LINEAR and len(eqn.invars) == 1
        if not linear or not manual.issuperset(axes_of(eqn)):
            return eqn
        params = _sealed(lambda x: unchanged(eqn, [x], jaxpr)[0], type_of(eqn.invars[0]))
        return eqn.replace(primitive=_exchanged, params=params, effects=jex.no_effects)

    return changed(jaxpr, change)


_LINEAR = {"all_gather", "reduce_scatter", "ppermute", "all_to_all"}


def _sealed(collective: Callable[[Array], Array], aval: Type) -> dict[str, Any]:
    """The collective of an array of that type: as it is lowered, and the type of its result.

    It is lowered on arrays without a layout over explicit axes, because JAX does not lower
    ``reduce_scatter`` on those that have one (0.12: on any array, 0.10: on one that is divided).
    """
    aval = _everywhere(aval)
    with unchecked():
        (out,) = jax.make_jaxpr(collective)(aval).out_avals
        with _no_mesh():
            return {
                "jaxpr": jax.make_jaxpr(collective)(_bare(aval)),
                "out": _everywhere(cast(Type, out)),
            }


def _no_mesh() -> AbstractContextManager[object]:
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def _bare(aval: Type) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _evaluated(x: Array, jaxpr: ClosedJaxpr, out: Type) -> Array:
    del out
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, x)[0]


def _lowered(ctx: Any, x: Any, **params: Any) -> Any:
    with unchecked(), _no_mesh():
        bare = ctx.replace(avals_in=params["jaxpr"].in_avals, avals_out=params["jaxpr"].out_avals)
        return mlir.lower_fun(functools.partial(_evaluated, **params), multiple_results=False)(
            bare, x
        )


def _backward(cotangent: Any, x: Any, **params: Any) -> list[Any]:
    with unchecked():
        transpose = jax.linear_transpose(
            functools.partial(_evaluated, **params), _everywhere(x.aval)
        )
    return [exchanged(lambda cotangent: transpose(cotangent)[0], cotangent)]


def _batched(args: Any, dims: Any, **params: Any) -> tuple[Any, int]:
    (x,), (dim,) = args, dims
    return exchanged(jax.vmap(functools.partial(_evaluated, **params), dim), x), 0


_exchanged = jex.Primitive("exchanged")
_exchanged.def_impl(_evaluated)
_exchanged.def_abstract_eval(lambda x, jaxpr, out: out)
mlir.register_lowering(_exchanged, _lowered)
batching.primitive_batchers[_exchanged] = _batched
ad.deflinear2(_exchanged, _backward)
