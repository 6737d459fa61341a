"""The index of the microbatch as an argument: what reads ``axis_index`` over the loop's axis reads
it instead.

    { lambda x. let i = axis_index[microbatch]; y = mul x i in (y,) }
      -> { lambda i x. let y = mul x i in (y,) }

A ``scan``, ``while``, ``cond`` or checkpoint that asks for the index inside is built anew around a
body that is given it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex
from jax import lax

from jaxaccum._base.entries import part_of
from jaxaccum._base.source_lines import frame_of
from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import scan_arity
from jaxaccum._jaxpr.equations import (
    axes_of,
    is_index,
    mentions,
    mentions_inside,
    retraced,
    with_invars,
)
from jaxaccum._jaxpr.evaluate import Rule, as_function, evaluate
from jaxaccum._jaxpr.variables import types_of


def index_as_argument(jaxpr: jex.Jaxpr, axis: tuple[str, int]) -> jex.Jaxpr:
    """The jaxpr with the loop's index as a new first argument, which replaces ``axis_index`` at any
    depth."""
    name, index = axis[0], jax.ShapeDtypeStruct((), "int32")
    if not any(map(is_index, mentions(jaxpr, name))):
        unread = jax.make_jaxpr(lambda i: i)(index).jaxpr
        return with_invars(jaxpr, [*unread.invars, *jaxpr.invars])
    given = lambda i, *args: evaluate(jaxpr, args, _with_index(i, name))
    return retraced(given, [index, *types_of(jaxpr.invars)], axis)


def _with_index(index: Array, axis_name: str) -> Rule:
    """``axis_index`` of the axis is `index`; what contains it is opened, and nothing else."""

    def rule(eqn: jex.JaxprEqn, values: list[Array]) -> list[Array] | None:
        if is_index(eqn) and axis_name in axes_of(eqn):
            return [index]
        if not any(map(is_index, mentions_inside(eqn, axis_name))):
            return None
        open_it = _OPEN.get(eqn.primitive.name)
        if open_it is None:
            raise NotImplementedError(
                f"axis_index of {axis_name!r} inside {eqn.primitive.name} (at "
                f"{frame_of(eqn)}); compute it outside and pass it in as an argument."
            )
        return open_it(lambda jaxpr: as_function(jaxpr, rule), eqn.params, values)

    return rule


# -- equations with a program inside, built anew ---------------------------------------------------

Opened = Callable[[Any], Callable[..., list[Array]]]
"""A jaxpr inside, as a function of its arguments that knows the index."""
Params = dict[str, Any]


def _open_jit(opened: Opened, params: Params, values: list[Array]) -> list[Array]:
    return opened(params["jaxpr"])(*values)


def _open_checkpoint(opened: Opened, params: Params, values: list[Array]) -> list[Array]:
    again = jax.checkpoint(
        opened(params["jaxpr"]), prevent_cse=params["prevent_cse"], policy=params["policy"]
    )
    return again(*values)


def _open_scan(opened: Opened, params: Params, values: list[Array]) -> list[Array]:
    step, (n, k) = opened(params["jaxpr"]), scan_arity(params)

    def body(carry: list[Array], xs: list[Array]) -> tuple[list[Array], list[Array]]:
        outs = step(*values[:n], *carry, *xs)
        return outs[:k], outs[k:]

    options = part_of(params, ("length", "reverse", "unroll"))
    carry, ys = lax.scan(body, values[n : n + k], values[n + k :], **options)
    return [*carry, *ys]


def _open_while(opened: Opened, params: Params, values: list[Array]) -> list[Array]:
    n, k = params["cond_nconsts"], params["body_nconsts"]
    test, body = opened(params["cond_jaxpr"]), opened(params["body_jaxpr"])
    step = lambda carry: body(*values[n : n + k], *carry)
    return lax.while_loop(lambda carry: test(*values[:n], *carry)[0], step, values[n + k :])


def _open_cond(opened: Opened, params: Params, values: list[Array]) -> list[Array]:
    return lax.switch(values[0], list(map(opened, params["branches"])), *values[1:])


_OPEN = {
    "jit": _open_jit, "pjit": _open_jit,
    "checkpoint": _open_checkpoint, "remat": _open_checkpoint, "remat2": _open_checkpoint,
    "scan": _open_scan, "while": _open_while, "cond": _open_cond,
}  # fmt: skip
