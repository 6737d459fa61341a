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


def refusing(
    values: Sequence[Array], sources: Sequence[Array], refused: Mapping[int, Refused]
) -> list[Array]:
    """The values. Those at the positions `refused` are constants that move with sources.

    In reverse mode, a cotangent that reaches one of them is an error. In forward mode, its tangent
    is 0.
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
    return _zero.bind(moving[0], aval=aval.to_tangent_aval(), says=one.says)


def refusal(name: str, tag: str, *, whole: bool) -> str:
    """What to say where a derivative is asked of an output; `whole`: it depends on whole arguments
    alone."""
    stacked = (
        f"Return Stack(x) and {_OF_A_STACK[tag]}, or Mean(x, 1) for the mean over microbatches."
    )
    untagged = (
        "The output depends only on arguments that are not cut into microbatches, so return it "
        "without a tag."
    )
    mend = untagged if whole else stacked
    return (
        f"a derivative of {name} is needed, but its tag {tag} passes no derivative, so the part of "
        f"the gradient that goes through this output would be lost. {mend} If you do not want this "
        "derivative, return the output as auxiliary output (has_aux=True), or wrap it in "
        "jax.lax.stop_gradient."
    )


_OF_A_STACK = {
    "Max": "take the maximum of it", "Min": "take the minimum of it",
    "Last": "take its last entry", "Carry": "take its last entry",
}  # fmt: skip
"""What gives the same with a derivative, by the tag that passes none."""


def _zeros(tangent: Array, *, aval: Type, says: Callable[[], str]) -> Array:
    del tangent, says
    return jnp.zeros(aval.shape, aval.dtype)


def _refuse(cotangent: Tangent, tangent: Array, *, aval: Type, says: Callable[[], str]) -> NoReturn:
    del cotangent, tangent, aval
    raise ValueError(says())


_zero = jex.Primitive("zero_without_transpose")
"""The tangent 0 of a value that moves: linear, and without a transpose."""
_zero.def_impl(_zeros)
_zero.def_abstract_eval(lambda tangent, *, aval, says: aval)
mlir.register_lowering(_zero, mlir.lower_fun(_zeros, multiple_results=False))
batching.primitive_batchers[_zero] = lambda args, dims, **params: (
    _zero.bind(*args, **params),
    None,
)
ad.deflinear2(_zero, _refuse)
