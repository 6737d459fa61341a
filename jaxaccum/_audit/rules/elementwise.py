"""Functions applied entry by entry: examples stay apart, and what is no linear function undoes a
sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxaccum._audit.lattice import (
    IRREGULAR,
    UNIT,
    Fault,
    FaultKind,
    Layout,
    Value,
    fixed,
    rows,
    statistic,
)
from jaxaccum._audit.registry import rule
from jaxaccum._audit.sources import Site
from jaxaccum._audit.walk import Op, Walk

_NONLINEAR = """
    abs sign floor ceil round nextafter exp exp2 log log1p expm1 tanh logistic sin cos tan asin acos
    atan sinh cosh asinh acosh atanh atan2 erf erfc erf_inv lgamma digamma igamma igammac
    igamma_grad_a random_gamma_grad polygamma zeta regularized_incomplete_beta bessel_i0e bessel_i1e
    cbrt is_finite not xor rem min clamp shift_left mulhi shift_right_logical shift_right_arithmetic
    bitcast_convert_type population_count clz lt_to le_to eq_to log2 one_minus_square polynomial
"""
_LINEAR = "neg conj real imag reduce_precision"
_IDENTITY = (
    "copy copy_p device_put name sharding_constraint mesh_cast pvary optimization_barrier reshard"
)


def same_layout(values: Sequence[Value]) -> bool:
    """Whether all rows lie alike."""
    return len({v.layout for v in values if v.rows}) <= 1


def layout_of(values: Sequence[Value]) -> Layout | None:
    """Where the rows of the operands lie."""
    return next((v.layout for v in values if v.rows), None)


def origin_of(values: Sequence[Value]) -> Site | None:
    """The first reduction or split that the operands come from."""
    return next((v.origin for v in values if v.origin is not None), None)


@rule(_NONLINEAR, uniform=True)
def combine(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A function of its operands that is linear in none of them."""
    parts, layout = [v for v in ins if v.rows], layout_of(ins)
    if (extremum := _extremum_of(op, ins)) is not None:
        return statistic(ins[0].origin, extremum=extremum)
    if summaries := [v for v in ins if v.summary]:
        return walk.couple(op, summaries, layout=layout)
    if layout is None:
        return fixed(UNIT if _constant(op, ins) else IRREGULAR, scalar=all(v.scalar for v in ins))
    if not same_layout(parts):
        return walk.couple(
            op,
            parts,
            kind=FaultKind.PAIRWISE,
            note="different examples are combined",
            layout=layout,
        )
    if weighted := [v for v in parts if any(term.scale.weights for term in v.terms)]:
        return walk.couple(
            op, weighted, note="an example scaled by a statistic of the batch enters", layout=layout
        )
    faults: frozenset[Fault] = frozenset()
    if not _constant(op, ins):
        faults = frozenset(
            [
                walk.fault(
                    op, FaultKind.BATCH_SIZE, "a value that changes with the batch size enters"
                )
            ]
        )
    return rows(layout, faults=faults, origin=origin_of(parts))


_INCREASING = frozenset(
    ("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sqrt", "cbrt", "erf", "asinh",
     "sinh", "atan", "sign", "floor", "ceil")
)  # fmt: skip


def _extremum_of(op: Op, ins: list[Value]) -> str | None:
    """Whether it is an extremum over the examples too: an increasing function of one, or the larger
    of two maxima."""
    kinds = {v.extremum for v in ins}
    if len(kinds) != 1 or any(v.faults for v in ins):
        return None
    (kind,) = kinds
    return kind if op.name in _INCREASING or op.name == kind else None


def _constant(op: Op, ins: list[Value]) -> bool:
    """Whether neither the function nor its operands change with the batch size."""
    mine, other = (
        {k: text_of(v) if "jaxpr" in k else v for k, v in eqn.params.items() if _says(k)}
        for eqn in (op.eqn, op.other)
    )
    return mine == other and all(v.scale.trivial for v in ins)


def _says(parameter: str) -> bool:
    """Whether a parameter is a part of the function, and neither a placement nor what a jaxpr says
    as well."""
    return not any(word in parameter for word in ("sharding", "computation", "shape", "sizes"))


def text_of(body: Any) -> Any:
    """What a jaxpr does, whose identity says nothing; with constants it is like no other."""
    open_ = getattr(body, "jaxpr", body)
    return (
        str(open_) if not (getattr(body, "consts", ()) or getattr(open_, "constvars", ())) else body
    )


@rule(_LINEAR, uniform=True)
def linear(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A linear function of one operand; that turns its sign makes a minimum of a maximum."""
    (x,) = ins
    opposite = {"max": "min", "min": "max", None: None}[x.extremum]
    return x.but(scalar=x.scalar, extremum=opposite if op.name == "neg" else None)


@rule(_IDENTITY, uniform=True)
def identity(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The operands themselves."""
    return list(ins)


@rule("stop_gradient", uniform=True)
def stopped(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """The same number without a gradient: it cancels with nothing that has one."""
    (x,) = ins
    if not x.params:
        return [x]
    if any(term.scale.weights for term in x.terms):
        return walk.couple(op, [x], note=_STOPPED, layout=x.layout)
    return dataclasses.replace(x, number=walk.fresh(), root=None)


_STOPPED = "a ratio over one microbatch is taken without its gradient"


@rule("convert_element_type", uniform=True)
def convert(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A change of dtype: linear, except from inexact to integer and to boolean."""
    old, new = op.eqn.invars[0].aval.dtype, op.eqn.outvars[0].aval.dtype
    exact = not jnp.issubdtype(old, jnp.inexact) or jnp.issubdtype(new, jnp.inexact)
    if exact and (new != jnp.bool_ or old == jnp.bool_):
        return dataclasses.replace(ins[0], number=-1)
    return combine(walk, op, ins)
