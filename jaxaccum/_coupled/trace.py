"""Open the program: one flat list of equations in which every collective over the loop's axis
stands by itself.

Only what contains a collective is opened. A scan is unrolled, because each of its steps is a cut of
its own; a checkpoint is dropped, because the schedule recomputes. Where JAX decides at run time
what is computed, or where a custom rule would be torn apart, there is nothing to cut at, and the
program is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jax.interpreters import partial_eval

from jaxaccum._base.source_lines import frame_of
from jaxaccum._devices import varying
from jaxaccum._jaxpr.compat import opened as open_jaxpr
from jaxaccum._jaxpr.compat import scan_arity
from jaxaccum._jaxpr.equations import axes_of, mentioned, unchanged, with_invars
from jaxaccum._jaxpr.traces import Trace


def is_collective(eqn: jex.JaxprEqn, axis_name: str) -> bool:
    """Whether the equation itself exchanges values over the axis."""
    return axis_name in axes_of(eqn) and _exchanges(eqn.primitive.name)


def opened(trace: Trace) -> jex.Jaxpr:
    """The jaxpr of the trace, of the same arguments, with every collective at top level and nothing
    that is unused."""
    jaxpr = trace.jaxpr
    if any(mentioned(eqn, trace.axis[0], _exchanges) for eqn in jaxpr.eqns):
        avals = [v.aval for v in jaxpr.invars]
        flat = lambda *args: _evaluate(jaxpr, list(args), trace)
        jaxpr = jax.make_jaxpr(flat, axis_env=[trace.axis])(*avals).jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return with_invars(used, list(used.invars))


def _exchanges(name: str) -> bool:
    return name != "axis_index"


def _evaluate(jaxpr: jex.Jaxpr, args: list[Any], trace: Trace) -> list[Any]:
    env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, jex.Literal) else env[v]
    for eqn in jaxpr.eqns:
        values = [read(v) for v in eqn.invars]
        nested = mentioned(eqn, trace.axis[0], _exchanges)
        outs = _open(eqn, values, trace) if nested else unchanged(eqn, values, jaxpr)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _open(eqn: jex.JaxprEqn, values: list[Any], trace: Trace) -> list[Any]:
    name = eqn.primitive.name
    if name in _CALLS:
        return _function(eqn.params[_CALLS[name]], trace)(*values)
    if name == "scan":
        return _unroll(eqn, values, trace)
    inner = next(_collectives(eqn, trace.axis[0]))
    raise ValueError(
        f"{inner.primitive.name} over {trace.axis[0]!r} stands inside a {_WHAT.get(name, name)} "
        f"(at {frame_of(inner)}), where the program cannot be divided between microbatches. "
        f"{_INSTEAD.get(name, 'Move it out of there.')}"
    )


def _collectives(eqn: jex.JaxprEqn, axis_name: str) -> Any:
    for sub in jex.jaxprs_in_params(eqn.params):
        for inner in sub.eqns:
            if is_collective(inner, axis_name):
                yield inner
            yield from _collectives(inner, axis_name)


_CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr",
}  # fmt: skip
_WHAT = {
    "cond": "lax.cond or lax.switch",
    "while": "while loop of unknown length",
    "custom_vjp_call": "jax.custom_vjp function",
    "custom_jvp_call": "jax.custom_jvp function",
}
_INSTEAD = {
    "cond": (
        "Call the collective before the branches and choose between its results, with jnp.where or "
        "inside them."
    ),
    "while": (
        "Use lax.scan or lax.fori_loop with a length that is known when the program is traced."
    ),
    "custom_vjp_call": (
        "Call the collective outside of it and pass the result in; its rule then stays whole."
    ),
    "custom_jvp_call": (
        "Call the collective outside of it and pass the result in; its rule then stays whole."
    ),
}


def _function(closed: Any, trace: Trace) -> Callable[..., list[Any]]:
    jaxpr, consts = open_jaxpr(closed)
    whole = with_invars(jaxpr, [*jaxpr.constvars, *jaxpr.invars])
    return lambda *args: _evaluate(whole, [*consts, *args], trace)


def _unroll(eqn: jex.JaxprEqn, values: list[Any], trace: Trace) -> list[Any]:
    params = eqn.params
    body = _function(params["jaxpr"], trace)
    (n, k), length = scan_arity(params), params["length"]
    consts, carry, xs = values[:n], values[n : n + k], values[n + k :]
    if length == 0:
        return [*carry, *(varying.zeros(v.aval) for v in eqn.outvars[k:])]
    written: list[list[Any]] = [[]] * length
    for i in reversed(range(length)) if params["reverse"] else range(length):
        outs = body(*consts, *carry, *(lax.index_in_dim(x, i, keepdims=False) for x in xs))
        carry, written[i] = outs[:k], outs[k:]
    return [*carry, *(jnp.stack(ys) for ys in zip(*written, strict=True))]
