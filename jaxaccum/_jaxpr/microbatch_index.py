"""The index of the microbatch as an argument: what reads ``axis_index`` over the loop's axis reads
it instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
from jax import lax

from jaxaccum._base.source_lines import frame_of
from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import opened, scan_arity
from jaxaccum._jaxpr.equations import (
    axes_of,
    mentioned,
    mentions,
    unchanged,
    with_invars,
)


def _is_index(name: str) -> bool:
    return name == "axis_index"


def index_as_argument(jaxpr: jex.Jaxpr, axis: tuple[str, int]) -> jex.Jaxpr:
    """The jaxpr with the loop's index as a new first argument, which replaces ``axis_index`` at any
    depth."""
    avals = [v.aval for v in jaxpr.invars]
    index = jax.ShapeDtypeStruct((), "int32")
    if not any(_is_index(eqn.primitive.name) for eqn in mentions(jaxpr, axis[0])):
        aval = jax.make_jaxpr(lambda i: i)(index).jaxpr
        return with_invars(jaxpr, [*aval.invars, *jaxpr.invars])
    evaluate = _Indexed(axis[0], jaxpr).evaluate
    return jax.make_jaxpr(lambda i, *args: evaluate(jaxpr, i, list(args)), axis_env=[axis])(
        index, *avals
    ).jaxpr


@dataclasses.dataclass(frozen=True)
class _Indexed:
    """Evaluates a jaxpr in which ``axis_index`` of one axis is a given value; opens only what
    contains it."""

    axis_name: str
    whole: jex.Jaxpr

    def evaluate(self, jaxpr: jex.Jaxpr, index: Array, args: list[Any]) -> list[Any]:
        env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            values = [v.val if isinstance(v, jex.Literal) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, index, values), strict=True))
        return [v.val if isinstance(v, jex.Literal) else env[v] for v in jaxpr.outvars]

    def _equation(self, eqn: jex.JaxprEqn, index: Array, values: list[Any]) -> list[Any]:
        if _is_index(eqn.primitive.name) and self.axis_name in axes_of(eqn):
            return [index]
        if not mentioned(eqn, self.axis_name, _is_index):
            return unchanged(eqn, values, self.whole)
        rule = _OPEN.get(eqn.primitive.name)
        if rule is None:
            raise NotImplementedError(
                f"axis_index of {self.axis_name!r} inside {eqn.primitive.name} (at "
                f"{frame_of(eqn)}); compute it outside and pass it in as an argument."
            )
        return rule(self, eqn.params, index, values)

    def closed(self, closed: Any, index: Array) -> Callable[..., list[Any]]:
        """A closed jaxpr as a function of its arguments, the index closed over."""
        jaxpr, consts = opened(closed)
        jaxpr = with_invars(jaxpr, [*jaxpr.constvars, *jaxpr.invars])
        return lambda *args: self.evaluate(jaxpr, index, [*consts, *args])


def _open_jit(self: _Indexed, params: dict[str, Any], index: Array, values: list[Any]) -> list[Any]:
    return self.closed(params["jaxpr"], index)(*values)


def _open_checkpoint(
    self: _Indexed, params: dict[str, Any], index: Array, values: list[Any]
) -> list[Any]:
    fun = self.closed(params["jaxpr"], index)
    return jax.checkpoint(fun, prevent_cse=params["prevent_cse"], policy=params["policy"])(*values)


def _open_scan(
    self: _Indexed, params: dict[str, Any], index: Array, values: list[Any]
) -> list[Any]:
    fun, (n, k) = self.closed(params["jaxpr"], index), scan_arity(params)

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = fun(*values[:n], *carry, *xs)
        return outs[:k], outs[k:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(body, values[n : n + k], values[n + k :], **options)
    return [*carry, *ys]


def _open_while(
    self: _Indexed, params: dict[str, Any], index: Array, values: list[Any]
) -> list[Any]:
    n, k = params["cond_nconsts"], params["body_nconsts"]
    test, body = self.closed(params["cond_jaxpr"], index), self.closed(params["body_jaxpr"], index)
    step = lambda carry: body(*values[n : n + k], *carry)
    return lax.while_loop(lambda carry: test(*values[:n], *carry)[0], step, values[n + k :])


def _open_cond(
    self: _Indexed, params: dict[str, Any], index: Array, values: list[Any]
) -> list[Any]:
    branches = [self.closed(branch, index) for branch in params["branches"]]
    return lax.switch(values[0], branches, *values[1:])


_OPEN = {
    "jit": _open_jit, "pjit": _open_jit,
    "checkpoint": _open_checkpoint, "remat": _open_checkpoint, "remat2": _open_checkpoint,
    "scan": _open_scan, "while": _open_while, "cond": _open_cond,
}  # fmt: skip
