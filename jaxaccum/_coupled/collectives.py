"""Resolve collectives of operands that are stacked over microbatches, by `jax.vmap`, for which the
loop's axis is a named axis already.

So every collective, its derivative and further axes (of a mesh, of an outer `vmap`) come from JAX.
It has no derivative of ``pmax`` and ``pmin``; theirs is that of ``reduce_max`` over all operands,
which divides it among equal maxima.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaccum._base.source_lines import frame_of
from jaxaccum._base.types import Array
from jaxaccum._coupled.cut import Fragment
from jaxaccum._devices.without_checks import exchanged
from jaxaccum._jaxpr.equations import axes_of
from jaxaccum._jaxpr.evaluate import evaluate
from jaxaccum._jaxpr.variables import Atom, Var


def resolve(
    fragment: Fragment, values: Sequence[Array], axis: tuple[str, int], stacked: Collection[Var]
) -> list[Array]:
    """Evaluate a fragment that holds collectives; `stacked` variables have an entry per microbatch,
    in and out."""
    name, size = axis
    one = lambda _, values: evaluate(fragment.jaxpr, values, _resolved)
    in_axes = (0, _leading_axes(fragment.reads, stacked))
    out_axes = _leading_axes(fragment.writes, stacked)
    return jax.vmap(one, in_axes, out_axes, axis_name=name)(jnp.zeros(size), list(values))


def _leading_axes(atoms: Sequence[Atom], stacked: Collection[Var]) -> list[int | None]:
    """For `jax.vmap`: where the entries of the microbatches are, if there are any."""
    return [0 if not isinstance(v, jex.Literal) and v in stacked else None for v in atoms]


def _resolved(eqn: jex.JaxprEqn, operands: list[Array]) -> list[Array] | None:
    """The collectives for which `jax.vmap` has no rule, or not the one that is wanted."""
    name = eqn.primitive.name
    if name in _OVER_SEVERAL_AXES and len(axes_of(eqn)) > 1:
        return [_OVER_SEVERAL_AXES[name](eqn, operands[0])]
    if name == "all_gather" and eqn.params["tiled"] and _explicit() and not _manual(*axes_of(eqn)):
        return [_merged(eqn, operands[0])]
    if name == "psum" and _explicit():
        return [_summed(x, axes_of(eqn)) for x in operands]
    if name == "ppermute" and not _manual(*axes_of(eqn)):
        return [_permuted(eqn, x) for x in operands]
    if name in _EXTREMA:
        return [_extremum(*_EXTREMA[name], axes_of(eqn), operands[0])]
    return None


def _permuted(eqn: jex.JaxprEqn, x: Array) -> Array:
    """What each microbatch receives: zeros where nothing is sent, as between devices.

    `jax.vmap` wants every one to receive, so that the permutation is completed first.
    """
    (name,), pairs = axes_of(eqn), eqn.params["perm"]
    sent = dict(pairs)
    if len(set(sent)) < len(pairs) or len(set(sent.values())) < len(pairs):
        raise ValueError(
            f"ppermute over {name!r} (at {frame_of(eqn)}): each microbatch sends to one and "
            f"receives from one at most; got {pairs}."
        )
    size = lax.axis_size(name)
    if max([*sent, *sent.values()], default=0) >= size:
        raise ValueError(
            f"ppermute over {name!r} (at {frame_of(eqn)}) names microbatches up to "
            f"{max([*sent, *sent.values()])}, and there are {size}; write the permutation for "
            f"lax.axis_size({name!r}) microbatches."
        )
    idle = [i for i in range(size) if i not in sent]
    empty = [i for i in range(size) if i not in sent.values()]
    received = lax.ppermute(x, name, [*sent.items(), *zip(idle, empty, strict=True)])
    if not empty:
        return received
    receives = np.isin(np.arange(size), list(sent.values()))
    own = jnp.asarray(receives)[lax.axis_index(name)]
    return jnp.where(own, received, jnp.zeros_like(received))


def _explicit() -> bool:
    """Whether arrays are typed by an explicit mesh: JAX cannot lower a psum of these that
    `jax.vmap` resolves."""
    return jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _merged(eqn: jex.JaxprEqn, x: Array) -> Array:
    """The microbatches' rows after one another, sharded as those of one microbatch are: JAX asks
    for the layout of an axis that takes in a sharded one."""
    (name,), dimension = axes_of(eqn), eqn.params["all_gather_dimension"]
    rows = lax.all_gather(x, name, axis=dimension)
    sharding = jax.typeof(x).sharding
    shape = (
        *x.shape[:dimension],
        lax.axis_size(name) * x.shape[dimension],
        *x.shape[dimension + 1 :],
    )
    return lax.reshape(rows, shape, out_sharding=sharding)


def _summed(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over the loop's axis, by a gather, and then over the axes of the mesh."""
    for name in sorted(axes, key=_manual):
        over = functools.partial(lax.psum, axis_name=name)
        x = _one(over, x, name) if _manual(name) else jnp.sum(_gathered(x[None], (name,)), axis=0)
    return x


def _gathered(x: Array, axes: tuple[str, ...], dimension: int = 0) -> Array:
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
    """A collective over one axis: the loop's, or one of the mesh. There JAX would check types where
    a caller differentiates."""
    return exchanged(collective, x) if _manual(name) else collective(x)


def _manual(name: str) -> bool:
    return name in jax.sharding.get_abstract_mesh().manual_axes


_OVER_SEVERAL_AXES = {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter}
_EXTREMA = {"pmax": (lax.pmax, jnp.max), "pmin": (lax.pmin, jnp.min)}


def _extremum(
    collective: Callable[[Array, tuple[str, ...]], Array],
    reduction: Callable[..., Array],
    axes: tuple[str, ...],
    operand: Array,
) -> Array:
    extremum = jax.custom_jvp(lambda x: collective(x, axes))
    over_all = lambda x: reduction(_gathered(x[None], axes), axis=0)
    extremum.defjvp(lambda primals, tangents: jax.jvp(over_all, primals, tangents))
    return extremum(operand)
