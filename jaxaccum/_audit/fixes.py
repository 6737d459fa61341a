"""What to write instead: one sentence for each kind of finding."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from jaxaccum._audit.lattice import Fault, FaultKind
from jaxaccum._audit.sources import Site
from jaxaccum._base.source_lines import Frame

_NO_DEVICES: Mapping[Frame, tuple[str, ...]] = {}

_ONCE = "the statistic does not depend on the parameters: compute it once on the full batch and pass it in"
_BATCH_NORM = (
    "give BatchNorm {keyword}={names}: it then has the full batch's statistics; or use another norm, as GroupNorm"
)
_LAYERS = {
    "flax/nnx/nn/normalization.py": ("axis_name", False),
    "flax/linen/normalization.py": ("axis_name", False),
    "equinox/nn/_batch_norm.py": ("axis_name", True),
    "haiku/_src/batch_norm.py": ("cross_replica_axis", False),
    "jaxaccum/linen.py": ("axis_name", False),
    "jaxaccum/nnx.py": ("axis_name", False),
}
"""Files of libraries with a BatchNorm: the argument that names its axes, and whether it is mapped."""
_STATISTIC = (
    'declare the statistic: jax.lax.pmean(…, "{axis}") of a mean, psum of a sum, makes it the full batch\'s; '
    "where it only normalizes, return jaxaccum.Mean(total, weight)"
)
_FIXES = {
    FaultKind.PAIRWISE: 'gather the other examples, others = jax.lax.all_gather(z, "{axis}", tiled=True), where the '
    "pairs that match are no longer the diagonal; or take the loss of all embeddings outside: z = "
    "jaxaccum.microbatch(encode)(params, x) with encode returning jaxaccum.Concat(z)",
    FaultKind.SELECTION: "do this once on the full batch, outside of fun, and pass the result in with the batch",
    FaultKind.STATE: "the loss reads a state that changes from microbatch to microbatch: pass the state whole (None in "
    "in_axes) and update it once, after the step",
    FaultKind.BATCH_SIZE: "keep the batch size out of it: return jaxaccum.Mean(total, weight) or jaxaccum.Sum(x), and "
    "let the library divide",
    FaultKind.DERIVATIVE: "apply the function before the division by the number of examples: to the value of each "
    "example, or to their sum, as in jaxaccum.Mean(function(jnp.sum(x)), x.size)",
    FaultKind.POSITION: "a place counts from 0 in every microbatch: make it a part of the batch, as "
    "jnp.arange(len(x)) of the whole batch",
    FaultKind.RANDOM: "pass the key with jaxaccum.EXAMPLE_KEY in in_axes, one key per example, and draw under jax.vmap",
    FaultKind.UNKNOWN: "compare numerically: audit(…, probe=True), or jaxaccum.testing.assert_exact",
    FaultKind.COLLECTIVE: "",
    FaultKind.ASSUMPTION: "for data that may be NaN, count what is there: "
    "jaxaccum.Mean(jnp.nansum(x), jnp.sum(~jnp.isnan(x)))",
}


def fix_of(fault: Fault, axis_name: str, devices: Mapping[Frame, tuple[str, ...]] = _NO_DEVICES) -> str:
    """What mends a fault; `devices` are the axes, other than the loop's, that are summed over at a line."""
    if fault.fix:
        return fault.fix
    if fault.kind is FaultKind.COUPLING or (fault.kind is FaultKind.SELECTION and fault.hoistable):
        if layer := _normalization(fault.origin) or _normalization(fault.use):
            keyword, mapped = _LAYERS[layer]
            names = _names(fault, axis_name, devices, mapped=mapped)
            return _BATCH_NORM.format(keyword=keyword, names=names)
        if fault.hoistable:
            return _ONCE
    return _FIXES.get(fault.kind, _STATISTIC).format(axis=axis_name)


def _names(
    fault: Fault, axis_name: str, devices: Mapping[Frame, tuple[str, ...]], *, mapped: bool
) -> str:
    """The axes for a layer: the loop's, after those over which it sums already.

    A layer that is `mapped` has an axis of `jax.vmap`, which leaves no trace in the program.
    """
    lines = [site.frame for site in (fault.origin, fault.use) if site is not None]
    known = next((devices[line] for line in lines if line is not None and line in devices), ())
    names = ", ".join(f'"{name}"' for name in (*known, axis_name))
    if not known and mapped:
        return f'("batch", {names}), where "batch" is the axis of your jax.vmap'
    return f"({names})" if known else names


def _normalization(site: Site | None) -> str | None:
    """The file of the normalization layer that an equation belongs to."""
    traceback: Any = site.eqn.source_info.traceback if site is not None else None
    frames = traceback.frames if traceback is not None else ()
    files = [frame.file_name.replace(os.sep, "/") for frame in frames]
    return next((end for file in files for end in _LAYERS if file.endswith(end)), None)


KEY_ARGUMENT = (
    "make {name} an argument of the loss, with jaxaccum.EXAMPLE_KEY in in_axes, and pass the one key in the call: the "
    "loss receives one key per example, to draw from under jax.vmap"
)
ONE_BY_ONE = (
    "draw for one example after the other, jax.lax.map(draw, keys), or pass a key of another generator, "
    'jax.random.key(seed, impl="threefry2x32")'
)
KEY_DRAWS = (
    "what KEY draws depends on the number of microbatches too: use jaxaccum.EXAMPLE_KEY for draws of an example, and a "
    "key with None in in_axes for draws that all share"
)
AFTERWARDS = "change the accumulated gradient instead, as optax.clip does"

TAG = {
    "SUM": "say that it is a sum: return jaxaccum.Sum(loss)",
    "RATIO": "give it one denominator, that of the batch: return jaxaccum.Mean(total, weight)",
    "PER_EXAMPLE": "return jaxaccum.Concat(x) for the rows, or jaxaccum.Mean(jnp.sum(x), x.size) for a loss",
}
OUTSIDE = (
    "a term that is independent of the batch counts once per microbatch: move it outside, as in "
    "jax.grad(lambda p: jaxaccum.microbatch(fun, …)(p, batch) + penalty(p)), or return a mean"
)
TERMS = "give each term its own denominator: return a dict of them, each jaxaccum.Mean(total, weight)"
NO_DIVISION = "return the sum, undivided, as total: jaxaccum.Mean(jnp.sum(x * weight), jnp.sum(weight))"
NO_GUARD = (
    "drop the guard of the weight: a Mean is 0 where its total weight is 0, and the guard would count once per "
    "microbatch"
)
ROWS = "return one row per example, the examples along axis 0"
UNDIVIDED_ROWS = (
    "return the rows undivided, jaxaccum.Concat(rows), and the denominator as one more output, "
    "jaxaccum.Sum(jnp.sum(weight)); divide after the step"
)
EQUAL = "coupled losses run with equal microbatches: choose num_microbatches that divides the batch, or pad it and mask"
