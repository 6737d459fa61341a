"""A value that passes no gradient: in reverse mode a cotangent that reaches it is an error, not
lost.

JAX asks for the cotangent of an output only where something differentiable reads it. So what is
returned as auxiliary output, compared, or read under ``stop_gradient`` is not refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from jaxaccum._base.entries import entries, with_entries
from jaxaccum._base.trees import safe_map
from jaxaccum._base.types import Array, Tangent
from jaxaccum._jaxpr.variables import Type


@dataclasses.dataclass(frozen=True)
class Refused:
    """A value that passes no gradient: what it moves with, by position among sources, and the
    error."""

    movers: tuple[int, ...]
    says: Callable[[], str]
    tangent: float = 0.0
    """Its tangent in forward mode, which cannot tell whether anybody reads it."""


def refusing(
    values: Sequence[Array], sources: Sequence[Array], refused: Mapping[int, Refused]
) -> list[Array]:
    """The values. Those at the positions `refused` are constants that move with sources.

    In reverse mode, a cotangent that reaches one of them is an error. In forward mode, its tangent
    is 0, or NaN where nobody declared it a constant.
    """

    @jax.custom_jvp
    def same(constants: list[Array], sources: list[Array]) -> list[Array]:
        del sources
        return constants

    def rule(
        primals: tuple[list[Array], list[Array]], moved: tuple[list[Tangent], list[Tangent]]
    ) -> tuple[list[Array], list[Tangent]]:
        tangent = lambda x, one: _tangent(x, one, moved[1])
        return same(*primals), safe_map(tangent, primals[0], refused.values())

    same.defjvp(rule, symbolic_zeros=True)
    if not refused:
        return list(values)
    constants = same(entries(values, refused), list(sources))
    return with_entries(values, refused, constants)


def _tangent(x: Array, one: Refused, tangents: Sequence[Tangent]) -> Tangent:
    """The tangent of a constant: 0, with an error as its transpose where it moves."""
    aval = jax.typeof(x)
    moving = [tangents[i] for i in one.movers if not isinstance(tangents[i], SymbolicZero)]
    if not moving:
        return SymbolicZero(aval.to_tangent_aval())
    return _constant.bind(
        moving[0], aval=aval.to_tangent_aval(), tangent=one.tangent, says=one.says
    )


def refusal(name: str, tag: str | None, *, whole: bool) -> str:
    """What to say where a derivative is asked of an output; `whole`: it depends on whole arguments
    alone."""
    reason = f"its tag {tag} passes" if tag else "an output of collectives without a tag passes"
    stacked = (
        f"Return Stack(x) and {_OF_A_STACK[tag or 'Last']}, or Mean(x, 1) for the mean over "
        "microbatches."
    )
    untagged = (
        "The output depends only on arguments that are not cut into microbatches, so return it "
        "without a tag."
    )
    mend = untagged if whole else stacked
    return (
        f"a derivative of {name} is needed, but {reason} no derivative, so the part of "
        f"the gradient that goes through this output would be lost. {mend} If you do not want this "
        "derivative, return the output as auxiliary output (has_aux=True), or wrap it in "
        "jax.lax.stop_gradient."
    )


_OF_A_STACK = {
    "Max": "take the maximum of it", "Min": "take the minimum of it",
    "Last": "take its last entry", "Carry": "take its last entry",
}  # fmt: skip
"""What gives the same with a derivative, by the tag that passes none."""


def _full(moving: Array, *, aval: Type, tangent: float, says: Callable[[], str]) -> Array:
    del moving, says
    return jnp.full(aval.shape, tangent, aval.dtype)


def _refuse(
    cotangent: Tangent, moving: Array, *, aval: Type, tangent: float, says: Callable[[], str]
) -> NoReturn:
    del cotangent, moving, aval, tangent
    raise ValueError(says())


_constant = jex.Primitive("tangent_without_transpose")
"""The tangent of a constant that moves: linear, and without a transpose."""
_constant.def_impl(_full)
_constant.def_abstract_eval(lambda moving, *, aval, tangent, says: aval)
mlir.register_lowering(_constant, mlir.lower_fun(_full, multiple_results=False))
batching.primitive_batchers[_constant] = lambda args, dims, **params: (
    _constant.bind(*args, **params),
    None,
)
ad.deflinear2(_constant, _refuse)
