"""Open the program: one flat list of equations in which every collective over the loop's axis is
an equation of its own.

Only what contains a collective is opened. A scan is unrolled, because each of its steps is a cut of
its own; a checkpoint is dropped, because the schedule recomputes. Where JAX decides at run time
what is computed, or where a custom rule would be torn apart, the program cannot be cut, and is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.source_lines import frame_of
from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._jaxpr.compat import scan_arity
from jaxaccum._jaxpr.equations import axes_of, called, inside, is_index, retraced, without_unused
from jaxaccum._jaxpr.evaluate import Rule, as_function, evaluate
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._jaxpr.variables import type_of, types_of


def is_collective(eqn: jex.JaxprEqn, axis_name: str) -> bool:
    """Whether the equation itself exchanges values over the axis."""
    return axis_name in axes_of(eqn) and not is_index(eqn)


def opened(trace: Trace) -> jex.Jaxpr:
    """The jaxpr of the trace, of the same arguments, with every collective at top level and nothing
    that is unused."""
    jaxpr, axis = trace.jaxpr, trace.axis
    if any(_collective_inside(eqn, axis[0]) for eqn in jaxpr.eqns):
        flat = lambda *args: evaluate(jaxpr, args, _opening(axis[0]))
        jaxpr = retraced(flat, types_of(jaxpr.invars), axis)
    return without_unused(jaxpr)


def _collective_inside(eqn: jex.JaxprEqn, axis_name: str) -> jex.JaxprEqn | None:
    """The first collective over the axis inside of an equation, at any depth."""
    return next((inner for inner in inside(eqn) if is_collective(inner, axis_name)), None)


def _opening(axis_name: str) -> Rule:
    """What contains a collective over the axis is opened, and nothing else."""

    def rule(eqn: jex.JaxprEqn, values: list[Array]) -> list[Array] | None:
        collective = _collective_inside(eqn, axis_name)
        if collective is None:
            return None
        if (program := called(eqn)) is not None:
            return as_function(program, rule)(*values)
        if eqn.primitive.name == "scan":
            return _unroll(eqn, values, rule)
        raise ValueError(_refusal(eqn.primitive.name, collective, axis_name))

    return rule


def _refusal(name: str, collective: jex.JaxprEqn, axis_name: str) -> str:
    return (
        f"{collective.primitive.name} over {axis_name!r} stands inside a {_WHAT.get(name, name)} "
        f"(at {frame_of(collective)}), where the program cannot be divided between microbatches. "
        f"{_INSTEAD.get(name, 'Move it out of there.')}"
    )


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


def _unroll(eqn: jex.JaxprEqn, values: list[Array], rule: Rule) -> list[Array]:
    """The steps of a scan, one after the other."""
    params = eqn.params
    body = as_function(params["jaxpr"], rule)
    (n, k), length = scan_arity(params), params["length"]
    consts, carry, xs = values[:n], values[n : n + k], values[n + k :]
    if length == 0:
        return [*carry, *(varying.zeros(type_of(v)) for v in eqn.outvars[k:])]
    written: list[list[Array]] = [[]] * length
    for i in reversed(range(length)) if params["reverse"] else range(length):
        outs = body(*consts, *carry, *_rows(xs, i))
        carry, written[i] = outs[:k], outs[k:]
    return [*carry, *map(jnp.stack, zip(*written, strict=True))]


def _rows(xs: Iterable[Array], i: int) -> list[Array]:
    return [lax.index_in_dim(x, i, keepdims=False) for x in xs]
