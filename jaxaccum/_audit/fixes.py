"""What to write instead: one sentence for each kind of finding."""

from __future__ import annotations

from typing import Any

from jaxaccum._audit.lattice import Fault, FaultKind
from jaxaccum._audit.sources import Site

_ONCE = "the statistic does not depend on the parameters: compute it once on the full batch and pass it in"
_BATCH_NORM = 'give BatchNorm axis_name="{axis}": it then has the full batch\'s statistics; or use GroupNorm'
_STATISTIC = (
    'declare the statistic: jax.lax.pmean(…, "{axis}") of a mean, psum of a sum, makes it the full batch\'s; '
    "where it only normalizes, return jaxaccum.Mean(total, weight)"
)
_FIXES = {
    FaultKind.PAIRWISE: 'gather the other examples, jax.lax.all_gather(z, "{axis}", tiled=True), or take the loss '
    "of all embeddings outside: z = jaxaccum.microbatch(encode)(params, x) with encode returning jaxaccum.Concat(z)",
    FaultKind.SELECTION: "do this once on the full batch, outside of fun, and pass the result in with the batch",
    FaultKind.STATE: "the loss reads a state that changes from microbatch to microbatch: pass the state whole (None in "
    "in_axes) and update it once, after the step",
    FaultKind.BATCH_SIZE: "keep the batch size out of it: return jaxaccum.Mean(total, weight) or jaxaccum.Sum(x), and "
    "let the library divide",
    FaultKind.DERIVATIVE: "apply the function before the division by the number of examples: to the value of each "
    "example, or to their sum, as in jaxaccum.Mean(function(jnp.sum(x)), x.size)",
    FaultKind.POSITION: "pass what belongs to an example as a part of the batch (its index, its row of the table)",
    FaultKind.RANDOM: "pass the key with jaxaccum.EXAMPLE_KEY in in_axes, one key an example, and draw under jax.vmap",
    FaultKind.UNKNOWN: "compare numerically: audit(…, probe=True), or jaxaccum.testing.assert_exact",
    FaultKind.COLLECTIVE: "",
    FaultKind.ASSUMPTION: "for data that may be NaN, count what is there: "
    "jaxaccum.Mean(jnp.nansum(x), jnp.sum(~jnp.isnan(x)))",
}


def fix_of(fault: Fault, axis_name: str) -> str:
    """What mends a fault."""
    if fault.fix:
        return fault.fix
    if fault.kind is FaultKind.COUPLING or (fault.kind is FaultKind.SELECTION and fault.hoistable):
        if _in_normalization(fault.origin) or _in_normalization(fault.use):
            return _BATCH_NORM.format(axis=axis_name)
        if fault.hoistable:
            return _ONCE
    return _FIXES.get(fault.kind, _STATISTIC).format(axis=axis_name)


def _in_normalization(site: Site | None) -> bool:
    """Whether an equation belongs to a normalization layer of a library."""
    traceback: Any = site.eqn.source_info.traceback if site is not None else None
    frames = traceback.frames if traceback is not None else ()
    return any("site-packages" in f.file_name and f.file_name.endswith("normalization.py") for f in frames)


KEY_ARGUMENT = (
    "make {name} an argument of the loss, with jaxaccum.EXAMPLE_KEY in in_axes: one key an example, to draw from "
    "under jax.vmap"
)
ROWS_ARGUMENT = "make {name} an argument of the loss with 0 in in_axes, or a part of the batch"
ONE_BY_ONE = (
    "draw for one example after the other, jax.lax.map(draw, keys), or pass a key of another generator, "
    'jax.random.key(seed, impl="threefry2x32")'
)
AFTERWARDS = "change the accumulated gradient instead, as optax.clip does"

TAG = {
    "SUM": "say that it is a sum: return jaxaccum.Sum(loss)",
    "RATIO": "give it one denominator, that of the batch: return jaxaccum.Mean(total, weight)",
    "PER_EXAMPLE": "return jaxaccum.Concat(x) for the rows, or jaxaccum.Mean(jnp.sum(x), x.size) for a loss",
}
OUTSIDE = (
    "a term that is independent of the batch counts once a microbatch: move it outside, as in "
    "jax.grad(lambda p: jaxaccum.microbatch(fun, …)(p, batch) + penalty(p)), or return a mean"
)
TERMS = "give each term its own denominator: return a dict of them, each jaxaccum.Mean(total, weight)"
NO_DIVISION = "return the sum, undivided, as total: jaxaccum.Mean(jnp.sum(x * weight), jnp.sum(weight))"
NO_GUARD = (
    "drop the guard of the weight: a Mean is 0 where its total weight is 0, and the guard would count once a microbatch"
)
EQUAL = "coupled losses run with equal microbatches: choose num_microbatches that divides the batch, or pad it and mask"
