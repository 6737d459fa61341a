"""The variables of a jaxpr, and the values that they have while it is evaluated."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TypeGuard, TypeVar, cast

import jax
import jax.core
import jax.extend.core as jex

from jaxaccum._base.trees import is_inexact

T = TypeVar("T")
Var = jex.Var
Atom = jex.Var | jex.Literal
"""An operand or a result: a variable, or a number that is written into the program."""
Env = dict[jex.Var, jax.Array]
"""Values by variable."""
Type = jax.core.ShapedArray
"""The shape, the dtype and the layout of a variable's value: its abstract value."""


def is_variable(v: Atom) -> TypeGuard[Var]:
    """Whether an operand or a result is a variable; the others are literals."""
    return not isinstance(v, jex.Literal)


def variables(atoms: Iterable[Atom]) -> list[Var]:
    """The variables among operands or results."""
    return list(filter(is_variable, atoms))


def operands_of(eqns: Iterable[jex.JaxprEqn]) -> list[Var]:
    """The variables that equations read, one after the other, whatever computes them."""
    return [v for eqn in eqns for v in variables(eqn.invars)]


def results_of(eqns: Iterable[jex.JaxprEqn]) -> list[Var]:
    """The variables that equations compute, without those that are never read."""
    return [v for eqn in eqns for v in eqn.outvars if not isinstance(v, jex.DropVar)]


def taken_by(eqns: Sequence[jex.JaxprEqn], wanted: Iterable[Atom] = ()) -> list[Var]:
    """The variables that equations read and do not compute, each once; those of `wanted` too."""
    taken = dict.fromkeys([*operands_of(eqns), *variables(wanted)])
    for v in results_of(eqns):
        taken.pop(v, None)
    return list(taken)


def among(names: Iterable[Var], chosen: Container[Var]) -> list[Var]:
    """Those of the names that are chosen, in the order of the names."""
    return [v for v in names if v in chosen]


def not_among(names: Iterable[Var], held: Container[Var]) -> list[Var]:
    """Those of the names that are not held, in the order of the names."""
    return [v for v in names if v not in held]


def differentiable(atoms: Iterable[Var]) -> list[Var]:
    """The variables whose values can have a derivative."""
    return [v for v in atoms if is_inexact(v.aval)]


def type_of(v: Atom) -> Type:
    """The type of a variable that holds an array."""
    return cast(Type, v.aval)


def types_of(atoms: Iterable[Atom]) -> list[Type]:
    """The types of variables that hold arrays."""
    return [type_of(v) for v in atoms]


def bound(names: Sequence[Var], values: Iterable[T]) -> dict[Var, T]:
    """A value for each of the variables."""
    return dict(zip(names, values, strict=True))


def numbered(names: Iterable[Var]) -> dict[Var, int]:
    """The places of variables in a list."""
    return {v: place for place, v in enumerate(names)}


def read(env: Mapping[Var, jax.Array], atoms: Iterable[Atom]) -> list[jax.Array]:
    """The values of operands."""
    return [v.val if isinstance(v, jex.Literal) else env[v] for v in atoms]
