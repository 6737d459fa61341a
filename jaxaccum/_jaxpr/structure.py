"""What a program computes, as a key: two programs with one key compute the same.

A function that is traced twice gives two programs, which JAX compiles twice. Their keys are equal:
of each equation the primitive, the parameters, the types and the places of its operands, whatever
their names, and of each constant inside its bytes. What cannot be compared by value, such as a
callback, is compared as Python compares it. The key says what a program computes when it runs, not
how it is differentiated.

    f(x) = sin x + 1   ->   (float32[3],), ((sin, (0,), (float32[3],)), (add, (1, 1.0),
    (float32[3],))), (2,)
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import jax
import jax.extend.core as jex
import numpy as np

from jaxaccum._jaxpr import compat
from jaxaccum._jaxpr.compat import ClosedJaxpr, opened
from jaxaccum._jaxpr.variables import Atom, Var, numbered, types_of

_RULES = {
    "custom_jvp_call": ("jvp_jaxpr_fun", "num_consts", "symbolic_zeros"),
    "custom_vjp_call": ("bwd", "fwd_jaxpr_thunk", "num_consts", "out_trees", "symbolic_zeros"),
    "CustomRoot": ("f", "params", "solve", "tangent_solve"),
}
"""The parameters of functions with a rule that say how to derive them. The function itself is a
program."""


def computing(eqn: jex.JaxprEqn) -> dict[str, object]:
    """The parameters of an equation that say what it computes."""
    held: dict[str, object] = dict(eqn.params)
    name = eqn.primitive.name
    if "_prim" in held:  # jax 0.12: an object whose attributes are the parameters
        kind = type(held["_prim"])
        held, name = {"_prim": kind, **vars(held["_prim"])}, kind.__name__
    return {key: x for key, x in held.items() if key not in _RULES.get(name, ())}


def key_of(jaxpr: jex.Jaxpr | ClosedJaxpr) -> Hashable:
    """The key of a jaxpr, closed or not. It may hold what has no hash."""
    program, consts = opened(jaxpr)
    return _key(program), tuple(map(const_key, consts))


def _key(jaxpr: jex.Jaxpr) -> Hashable:
    arguments = [*jaxpr.constvars, *jaxpr.invars]
    place = numbered(arguments)
    eqns: list[Hashable] = []
    for eqn in jaxpr.eqns:
        operands = _operands(eqn.invars, place)
        params = params_key(computing(eqn))
        context = compat.context_key(eqn)
        results = tuple(types_of(eqn.outvars))
        eqns.append((eqn.primitive, operands, params, context, results))
        for v in eqn.outvars:
            place[v] = len(place)
    return tuple(types_of(arguments)), tuple(eqns), _operands(jaxpr.outvars, place)


def _operands(atoms: Iterable[Atom], place: Mapping[Var, int]) -> tuple[Hashable, ...]:
    return tuple(literal_key(v) if isinstance(v, jex.Literal) else place[v] for v in atoms)


def literal_key(v: jex.Literal) -> Hashable:
    """A literal, told apart by its bits: 0.0 is not -0.0."""
    return v.aval, np.asarray(v.val).tobytes()


def params_key(params: Mapping[str, object]) -> Hashable:
    """The parameters of an equation, in the order of their names."""
    return tuple((name, _value_key(params[name])) for name in sorted(params))


def _value_key(x: object) -> Hashable:
    """A parameter of an equation; programs inside it by their keys, numbers by their bits."""
    if isinstance(x, jex.Jaxpr | ClosedJaxpr):
        return key_of(x)
    if isinstance(x, tuple | list):
        return type(x), tuple(map(_value_key, x))
    if isinstance(x, np.ndarray):
        return const_key(x)
    return type(x), repr(x) if isinstance(x, float) else x


def const_key(x: object) -> Hashable:
    """An array of JAX is itself alone: it never changes. Any other may, and is compared by what it
    holds now."""
    if isinstance(x, jax.Array):
        return id(x)
    held = np.asarray(x)
    return held.shape, held.dtype, held.tobytes()
