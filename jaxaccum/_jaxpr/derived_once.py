"""Equal equations as calls of one function, so that JAX derives the derivative of each kind once.

The problem. `jax.numpy` is made of small compiled functions, and JAX keeps the derivative of each:
twelve equal layers cost it little more than one. In a traced program they are gone. It has
only primitives, and JAX derives every equation anew, which costs more than the rest of the trace.

The idea. Before a program is differentiated, an equation becomes a call of a function that holds it
alone, one function for all equations of a kind: the same primitive, parameters, types and literals.
The calls are ``inline``: they vanish from the program that comes out.

    y = sin x          y = jit[jaxpr={ lambda a. let b = sin a in (b,) }, inline=True] x
    z = sin y          z = jit[the same jaxpr] y
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence

import jax
import jax.core
import jax.extend.core as jex

from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import ClosedJaxpr, inlined, traced_mesh
from jaxaccum._jaxpr.structure import literal_key, params_key
from jaxaccum._jaxpr.variables import Atom, Var, types_of, variables


def evaluate(jaxpr: jex.Jaxpr, values: Sequence[Array]) -> list[Array]:
    """The outputs of a jaxpr without constants, ready to be differentiated.

    A program that was traced without knowing how a mesh divides its values is evaluated as it is:
    the types of its calls would be wrong.
    """
    as_traced = all(map(_has_type, values, jaxpr.invars))
    return jax.core.eval_jaxpr(as_calls(jaxpr) if as_traced else jaxpr, [], *values)


def _has_type(x: Array, v: Var) -> bool:
    return _strong(jax.typeof(x)) == _strong(v.aval)


def _strong(aval: object) -> object:
    return aval.update(weak_type=False) if isinstance(aval, jax.core.ShapedArray) else aval


def as_calls(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """The jaxpr with its equations as calls, but for those that hold a program or have an
    effect."""
    return jaxpr.replace(eqns=list(map(_as_call, jaxpr.eqns)))


def _as_call(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    kind = None if eqn.effects else _kind(eqn)
    if kind is None:
        return eqn
    call = _call(kind)
    operands: list[Atom] = [*variables(eqn.invars)]
    return eqn.replace(primitive=call.primitive, params=call.params, invars=operands)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What equal equations share, and one of them."""

    key: Hashable
    eqn: jex.JaxprEqn = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=4096)
def _call(kind: _Kind) -> jex.JaxprEqn:
    """The call of a function that holds the equation alone."""
    eqn = kind.eqn

    def one(*values: Array) -> list[Array]:
        rest = iter(values)
        operands = [v.val if isinstance(v, jex.Literal) else next(rest) for v in eqn.invars]
        outs = eqn.primitive.bind(*operands, **eqn.params)
        return outs if eqn.primitive.multiple_results else [outs]

    one.__name__ = eqn.primitive.name
    types = types_of(variables(eqn.invars))
    (call,) = jax.make_jaxpr(jax.jit(one))(*types).jaxpr.eqns
    return call.replace(params=inlined(call.params))


def _kind(eqn: jex.JaxprEqn) -> _Kind | None:
    """The kind of an equation; None for one that holds a program, or that cannot be compared."""
    if not eqn.invars or not eqn.outvars or any(map(_holds_program, eqn.params.values())):
        return None
    if traced_mesh(eqn) != jax.sharding.get_abstract_mesh():  # as inside of jax.sharding.auto_axes
        return None
    operands = tuple(literal_key(v) if isinstance(v, jex.Literal) else v.aval for v in eqn.invars)
    key = (eqn.primitive, operands, params_key(eqn.params), jax.sharding.get_abstract_mesh())
    try:
        hash(key)
    except TypeError:
        return None
    return _Kind(key, eqn)


def _holds_program(x: object) -> bool:
    if isinstance(x, tuple | list):
        return any(map(_holds_program, x))
    return isinstance(x, jex.Jaxpr | ClosedJaxpr)
