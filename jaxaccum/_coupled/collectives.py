"""Resolve collectives: of operands stacked over microbatches, by `jax.vmap`, for which they are
named axes already.

So every collective, its derivative and further axes (of a mesh, of an outer `vmap`) come from JAX.
It has no derivative of ``pmax`` and ``pmin``; theirs is that of ``reduce_max`` over all operands,
which divides it among equal maxima.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.types import Array
from jaxaccum._coupled.cut import Fragment
from jaxaccum._devices.without_checks import exchanged
from jaxaccum._jaxpr.equations import axes_of, unchanged


def resolve(
    fragment: Fragment, values: Sequence[Array], axis: tuple[str, int], stacked: Collection[Any]
) -> list[Array]:
    """Evaluate a fragment that holds collectives; `stacked` variables have an entry per microbatch,
    in and out."""
    name, size = axis
    mapped = lambda v: 0 if not isinstance(v, jex.Literal) and v in stacked else None
    one = lambda _, values: _evaluate(fragment.jaxpr, values)
    in_axes = (0, [mapped(v) for v in fragment.reads])
    out_axes = [mapped(v) for v in fragment.writes]
    return jax.vmap(one, in_axes, out_axes, axis_name=name)(jnp.zeros(size), list(values))


def _evaluate(jaxpr: jex.Jaxpr, values: Sequence[Array]) -> list[Array]:
    env: dict[Any, Any] = dict(zip(jaxpr.invars, values, strict=True))
    read = lambda v: v.val if isinstance(v, jex.Literal) else env[v]
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        rule, several = _EXTREMA.get(eqn.primitive.name), _OVER_SEVERAL_AXES.get(eqn.primitive.name)
        if several is not None and len(axes_of(eqn)) > 1:
            outs = [several(eqn, operands[0])]
        elif eqn.primitive.name == "psum" and _explicit():
            outs = [_summed(x, axes_of(eqn)) for x in operands]
        else:
            outs = (
                unchanged(eqn, operands, jaxpr)
                if rule is None
                else [_extremum(rule, axes_of(eqn), operands[0])]
            )
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _explicit() -> bool:
    """Whether arrays are typed by an explicit mesh: JAX cannot lower a psum of these that
    `jax.vmap` resolves."""
    return jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _summed(x: Array, axes: tuple[Any, ...]) -> Array:
    """Over the loop's axis, whose operands are gathered and added, and then over those of the
    mesh."""
    for name in sorted(axes, key=_manual):
        over = functools.partial(lax.psum, axis_name=name)
        x = _one(over, x, name) if _manual(name) else jnp.sum(_gathered(x[None], (name,)), axis=0)
    return x


def _gathered(x: Array, axes: tuple[Any, ...], dimension: int = 0) -> Array:
    """One axis after the other, the last first: `jax.vmap` resolves a gather over its own axis
    alone."""
    for name in reversed(axes):
        x = _one(
            functools.partial(lax.all_gather, axis_name=name, axis=dimension, tiled=True), x, name
        )
    return x


def _all_gather(eqn: jex.JaxprEqn, x: Array) -> Array:
    dimension = eqn.params["all_gather_dimension"]
    return _gathered(
        x if eqn.params["tiled"] else jnp.expand_dims(x, dimension), axes_of(eqn), dimension
    )


def _reduce_scatter(eqn: jex.JaxprEqn, x: Array) -> Array:
    """The transpose of `_all_gather`."""
    dimension = eqn.params["scatter_dimension"]
    for name in axes_of(eqn):
        scatter = functools.partial(
            lax.psum_scatter, axis_name=name, scatter_dimension=dimension, tiled=True
        )
        x = _one(scatter, x, name)
    return x if eqn.params["tiled"] else jnp.squeeze(x, dimension)


def _one(collective: Callable[[Array], Array], x: Array, name: str) -> Array:
    """Over one axis: the loop's, or one of the mesh, of which JAX checks types where a caller
    differentiates."""
    return exchanged(collective, x) if _manual(name) else collective(x)


def _manual(name: str) -> bool:
    return name in jax.sharding.get_abstract_mesh().manual_axes


_OVER_SEVERAL_AXES = {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter}
_EXTREMA = {"pmax": (lax.pmax, jnp.max), "pmin": (lax.pmin, jnp.min)}


def _extremum(rule: tuple[Any, Any], axes: tuple[Any, ...], operand: Array) -> Array:
    collective, reduction = rule
    extremum = jax.custom_jvp(lambda x: collective(x, axes))
    over_all = lambda x: reduction(_gathered(x[None], axes), axis=0)
    extremum.defjvp(lambda primals, tangents: jax.jvp(over_all, primals, tangents))
    return extremum(operand)
