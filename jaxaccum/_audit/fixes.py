"""What to write instead: one sentence for each kind of finding."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxaccum._audit.lattice import Fault, FaultKind
from jaxaccum._audit.sources import Site, line_of
from jaxaccum._base.source_lines import Frame

_NO_AXES: Mapping[Frame, tuple[str, ...]] = {}

_ONCE = (
    "the statistic does not depend on the parameters: compute it once on the full batch and pass "
    "it in with the batch"
)
_BATCH_NORM = (
    "give BatchNorm {keyword}={names}: it then uses the full batch's statistics{in_vmap}{more}; or "
    "use another norm, such as GroupNorm"
)
_IN_VMAP = ' (inside jax.vmap(…, axis_name="example") write {keyword}=("example", "{axis}"))'
_MASKED = (
    "the layer averages the means of microbatches, which its mask leaves unequal: use "
    "jaxaccum.linen.BatchNorm or jaxaccum.nnx.BatchNorm, which count the rows"
)


class _Layer(NamedTuple):
    """A BatchNorm of a library, and what its advice says."""

    keyword: str
    """The argument that names its axes."""
    mapped: bool = False
    """Whether it is always under `jax.vmap`."""
    more: str = ""
    """What else helps, with the `names` of its axes."""


_LAYERS = {
    "flax/nnx/nn/normalization.py": _Layer(
        "axis_name",
        more="; for all layers of a model, model.set_attributes(nnx.BatchNorm, axis_name={names})",
    ),
    "flax/linen/normalization.py": _Layer(
        "axis_name",
        more="; for all layers of a model, with jaxaccum.linen.batch_norm_over({names}) around "
        "model.apply",
    ),
    "equinox/nn/_batch_norm.py": _Layer("axis_name", mapped=True),
    "haiku/_src/batch_norm.py": _Layer(
        "cross_replica_axis",
        more="; where net.init runs it too, cross_replica_axis=None if hk.running_init() else "
        "{names}",
    ),
    "jaxaccum/linen.py": _Layer("axis_name"),
    "jaxaccum/nnx.py": _Layer("axis_name"),
}
"""Layers by the end of their file's name."""
_STATISTIC = (
    "make the statistic the full batch's: jax.lax.pmean(mean, "
    '"{axis}"), or jax.lax.psum(sum, "{axis}"); what is no mean and no sum, as a median, take over '
    'all rows, jax.lax.all_gather(x, "{axis}", tiled=True); where the loss is only divided by it, '
    "return jaxaccum.Mean(total, weight)"
)
_GRADIENT = (
    'make the inner gradient the full batch\'s: jax.lax.pmean(jax.grad(f)(params), "{axis}"), or '
    "psum where f is a sum; f itself has neither"
)
BATCH_SIZE = (
    "do not use the microbatch's size, such as len(x), in the loss: for a mean return "
    "jaxaccum.Mean(total, weight), and the library divides; for a sum return jaxaccum.Sum(x); "
    "where another value needs the size, pass the whole batch's size as an argument"
)
ADJACENT = (
    "take adjacent examples together, k at a time: x.reshape(-1, k, …), with whole groups of k in "
    "every microbatch and split='contiguous'; where every part is treated alike, pass audit=None"
)
PICKED = (
    "to add up parts of the batch, loop over x.reshape(k, -1, …) with jax.lax.scan, or over the "
    "examples with jax.lax.map; to bring examples together, make one row of them before the call; "
    "where all parts are treated alike, pass audit=None"
)
SORTED = (
    "rank or select on the full batch, outside: let fun return jaxaccum.Concat(x); where the order "
    "does not matter in the end, as for tokens that are sorted by expert, pass audit=None"
)
UPDATE = (
    'update it by what is summed over all microbatches, jax.lax.psum(sum, "{axis}") or '
    'jax.lax.pmean(mean, "{axis}"), and every state is updated once; or update it after the call'
)
RUNNING = (
    "what runs along the examples needs those before: let fun return jaxaccum.Concat(x) and take "
    "it outside, or gather the batch by jax.lax.all_gather over the axis of the microbatches"
)
PLACE = (
    "compute it from the examples; a number for each place in the batch can be an array of the "
    "batch, which is cut like the rest"
)
DIRECT = (
    "use a direct solver, such as jnp.linalg.solve; where the iteration always converges, pass "
    "audit=None"
)
WIDE = "sum in 32 bits, with a sign: x.astype(jnp.int32) before the sum"
IN_ORDER = (
    "sum over the gathered rows, or pick a microbatch's own by lax.axis_index(axis) * len(x) + "
    "jnp.arange(len(x)); for places in the batch use split='contiguous', or an array of the batch"
)
_NNX_STREAMS = (
    "let the layer draw from a random stream that the model holds before the call, and take the "
    "gradient with jaxaccum.nnx.value_and_grad: each example then draws what it draws in the whole "
    "batch"
)
_DRAWS = "each example then draws what it draws in the whole batch"
_FIXES = {
    FaultKind.PAIRWISE: (
        'gather the other side, others = jax.lax.all_gather(b, "{axis}", tiled=True), and take the '
        "matching pairs by jnp.sum(a * b, axis=1), since they are no longer the diagonal; or take "
        "the loss of all embeddings outside: z = jaxaccum.microbatch(encode)(params, x) with "
        "encode returning jaxaccum.Concat(z)"
    ),
    FaultKind.SELECTION: (
        "do this once on the full batch, outside of fun, and pass the result in with the batch"
    ),
    FaultKind.STATE: (
        "the loss reads a state that changes from microbatch to microbatch: pass the state whole "
        "(None in in_axes) and update it once, after the step"
    ),
    FaultKind.BATCH_SIZE: BATCH_SIZE,
    FaultKind.DERIVATIVE: (
        "apply the function before the division by the number of examples: to the value of each "
        "example, or to their sum, as in jaxaccum.Mean(function(jnp.sum(x)), x.size)"
    ),
    FaultKind.POSITION: (
        "positions count from 0 in every microbatch: compute them on the full batch, as position = "
        "jnp.arange(n), and pass them in with the batch; where they are divided by len(x), divide "
        "by n"
    ),
    FaultKind.RANDOM: "pass the key with jaxaccum.BATCH_KEY in in_axes: " + _DRAWS,
    FaultKind.UNKNOWN: (
        "compare numerically: audit(…, probe=True), or jaxaccum.testing.assert_exact"
    ),
    FaultKind.GATHERED: (
        "pass check_vma=True, the default, to jax.shard_map, and use it in the place of pmap; if "
        "every device does have the whole parameter, pass audit=None"
    ),
    FaultKind.COLLECTIVE: "",
    FaultKind.ASSUMPTION: (
        "if the loss may be NaN, replace NaN after the call, in the value and in the gradients"
    ),
}


def fix_of(
    fault: Fault, axis_name: str, summed_axes: Mapping[Frame, tuple[str, ...]] = _NO_AXES
) -> str:
    """What mends a fault; `summed_axes` are the named axes over which a line sums."""
    if fault.fix:
        return fault.fix
    of_statistic = fault.kind is FaultKind.COUPLING
    if of_statistic or (fault.kind is FaultKind.SELECTION and fault.hoistable):
        if layer := _normalization(fault.origin) or _normalization(fault.use):
            return _for_batch_norm(layer, axis_name, _axes_at(fault, summed_axes))
        if fault.hoistable:
            return _ONCE
        if of_statistic and fault.origin is not None and fault.origin.is_transposed:
            return _GRADIENT.format(axis=axis_name)
    if fault.kind is FaultKind.RANDOM and _is_of_nnx(fault.origin):
        return _NNX_STREAMS
    return _FIXES.get(fault.kind, _STATISTIC).format(axis=axis_name)


def _axes_at(fault: Fault, summed_axes: Mapping[Frame, tuple[str, ...]]) -> tuple[str, ...]:
    """The named axes over which the fault's line sums already."""
    lines = filter(None, (line_of(fault.origin), line_of(fault.use)))
    return next((summed_axes[line] for line in lines if line in summed_axes), ())


def _for_batch_norm(layer: str, axis_name: str, known: tuple[str, ...]) -> str:
    """The axes for a layer: the loop's, after those over which it sums already.

    A layer that is mapped has an axis of `jax.vmap`, which leaves no trace in the program.
    """
    keyword, mapped, more = _LAYERS[layer]
    if axis_name in known and layer.startswith("flax/"):
        return _MASKED
    names = ", ".join(f'"{name}"' for name in (*known, axis_name))
    in_vmap = ""
    if known:
        names = f"({names})"
    elif mapped:
        names = f'("batch", {names}), where "batch" is the axis of your jax.vmap'
    else:
        in_vmap = _IN_VMAP.format(keyword=keyword, axis=axis_name)
    more = more.format(names=names)
    return _BATCH_NORM.format(keyword=keyword, names=names, in_vmap=in_vmap, more=more)


def _normalization(site: Site | None) -> str | None:
    """The file of the normalization layer that an equation belongs to."""
    for file in _files(site):
        if layer := next(filter(file.endswith, _LAYERS), None):
            return layer
    return None


def _is_of_nnx(site: Site | None) -> bool:
    """Whether an equation belongs to a layer of nnx."""
    return any("flax/nnx/nn/" in file for file in _files(site))


def _files(site: Site | None) -> Iterator[str]:
    """The files through which an equation and the calls around it were traced, the innermost
    first."""
    if site is None:
        return
    for eqn in (site.eqn, *(call.eqn for call in reversed(site.calls))):
        traceback = eqn.source_info.traceback
        for frame in traceback.frames if traceback is not None else ():
            yield frame.file_name.replace(os.sep, "/")


KEY_ARGUMENT = (
    "make {name} an argument of the loss, with jaxaccum.BATCH_KEY in in_axes, and pass it in the "
    "call: " + _DRAWS
)
KEY_OF_MODEL = (
    "keep the key in an nnx.RngKey, made by jax.random.key(seed), or in nnx.Rngs: " + _DRAWS
)
ONE_BY_ONE = (
    "draw for one example after the other, jax.lax.map(draw, keys), or pass a key of another "
    'generator, jax.random.key(seed, impl="threefry2x32")'
)
KEY_DRAWS = (
    "what KEY draws depends on the number of microbatches too: for draws that all examples share, "
    "pass a key with None in in_axes; for draws per example, pass one with jaxaccum.BATCH_KEY: "
    + _DRAWS
)
BY_SPLIT = (
    "make one key per example by jax.random.split(key, len(x)), which gives each its key of the "
    "whole batch"
)
AFTERWARDS = "change the accumulated gradient instead, as optax.clip does"

TAG = {
    "SUM": "say that it is a sum: let fun return jaxaccum.Sum(x), with the x of this line",
    "RATIO": "give it one denominator, that of the batch: return jaxaccum.Mean(total, weight)",
    "PER_EXAMPLE": (
        "return jaxaccum.Concat(x) for the rows, or jaxaccum.Mean(jnp.sum(x), x.size) for a loss"
    ),
}
EXTREMUM = (
    "in aux return jaxaccum.{tag}(x) in its place; in the loss, whose gradient is wanted, make it "
    'the full batch\'s: jax.lax.{collective}(x, "{axis}")'
)
OUTSIDE = (
    "a term that does not depend on the batch would count once per microbatch: in aux return it "
    "without a tag; in the loss return a dict, whose values value_and_grad adds: "
    '{"data": jaxaccum.Sum(total), "penalty": penalty}; or add it outside of the function'
)
TERMS = (
    'give each term its own denominator: return a dict, whose values value_and_grad adds: {"mean": '
    'jaxaccum.Mean(jnp.sum(x), len(x)), "masked": 0.1 * jaxaccum.Mean(jnp.sum(y * mask), '
    "jnp.sum(mask))}"
)
OF_SIZE = "in aux count examples by jaxaccum.Sum(len(x)); in the loss " + TERMS
NO_DIVISION = (
    "return the sum, undivided, as total: jaxaccum.Mean(jnp.sum(x * weight), jnp.sum(weight))"
)
NO_GUARD = (
    "drop the guard of the weight: a Mean is 0 where its total weight is 0, and the guard would "
    "count once per microbatch"
)
ROWS = "return one row per example, the examples along axis 0"
UNDIVIDED_ROWS = (
    "return the rows undivided, jaxaccum.Concat(rows), and the denominator as one more output, "
    "jaxaccum.Sum(jnp.sum(weight)); divide after the step"
)
EQUAL = (
    "coupled losses run with equal microbatches: choose num_microbatches that divides the batch, "
    "or pad it and mask"
)
