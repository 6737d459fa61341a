"""Equal equations as calls of one function, so that JAX derives the derivative of each kind once.

The problem. `jax.numpy` is made of small compiled functions, and JAX keeps the derivative of each:
twelve equal layers cost it little more than one. In a traced program they are gone. It has
only primitives, and JAX derives every equation anew, which costs more than the rest of the trace.

The idea. Before a program is differentiated, an equation becomes a call of a function that holds it
alone, one function for all equations of a kind: the same primitive, parameters, types and literals.
The calls are ``inline``: they vanish from the program that comes out.

    y = sin x          y = jit[jaxpr={ lambda a. let b = sin a in (b,) }, inline=True] x
    z = sin y          z = jit[the same jaxpr] y

So do equal blocks of equations, as layers have them. A block ends with a matrix product or a
convolution, so that equal layers fall into equal blocks, wherever they begin. It stays under one
name of ``jax.named_scope``, which its equations keep. In a profile they all have the source line of
the first.

    h = x @ w; y = sin h; z = y @ v; a = sin z; b = a @ u
      ->  h = x @ w;  z = jit[{ sin, @ }] h v;  b = jit[the same] z u

The cost. A key per equation. A block that comes once is not worth a function of its own: its
equations are calls by themselves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.core
import jax.extend.core as jex

from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import (
    ClosedJaxpr,
    context_key,
    context_of,
    inlined,
    is_jit_disabled,
)
from jaxaccum._jaxpr.segments import in_groups
from jaxaccum._jaxpr.structure import literal_key, params_key
from jaxaccum._jaxpr.variables import (
    Atom,
    Env,
    Type,
    Var,
    bound,
    numbered,
    read,
    types_of,
    variables,
)


def evaluate(jaxpr: jex.Jaxpr, values: Sequence[Array]) -> list[Array]:
    """The outputs of a jaxpr without constants, ready to be differentiated.

    A program that was traced without knowing how a mesh divides its values is evaluated as it is:
    the types of its calls would be wrong. So is one under ``jax.disable_jit``, which has no calls.
    """
    as_traced = all(map(_has_type, values, jaxpr.invars)) and not is_jit_disabled()
    return jax.core.eval_jaxpr(as_calls(jaxpr) if as_traced else jaxpr, [], *values)


def _has_type(x: Array, v: Var) -> bool:
    return _strong(jax.typeof(x)) == _strong(v.aval)


def _strong(aval: object) -> object:
    return aval.update(weak_type=False) if isinstance(aval, jax.core.ShapedArray) else aval


# -- a program as calls ----------------------------------------------------------------------------


def as_calls(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """The jaxpr with its equations as calls, but for those that hold a program or have an
    effect."""
    groups = _groups(jaxpr.eqns)
    programs = in_groups(jaxpr, list(map(_eqns_of, groups)))
    blocks = list(map(_Block, programs, groups))
    times = Counter(block.form for block in blocks)
    calls: dict[Hashable, jex.JaxprEqn] = {}
    eqns: list[jex.JaxprEqn] = []
    for block in blocks:
        if times[block.form] == 1 or len(block.equations) == 1:
            eqns += [one.as_call() for one in block.equations]
            continue
        if block.form not in calls:
            calls[block.form] = _call(block.function())
        eqns.append(block.as_call(calls[block.form]))
    return jaxpr.replace(eqns=eqns)


def _eqns_of(group: Sequence[_Equation]) -> list[jex.JaxprEqn]:
    return [one.eqn for one in group]


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function that holds some equations; it equals every other with its key."""

    key: Hashable
    run: Callable[..., list[Array]] = dataclasses.field(compare=False)
    types: list[Type] = dataclasses.field(compare=False)
    first: jex.JaxprEqn = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=4096)
def _call(function: _Function) -> jex.JaxprEqn:
    """The call of a function, under the settings under which its equations were traced."""
    with context_of(function.first):
        (call,) = jax.make_jaxpr(jax.jit(function.run))(*function.types).jaxpr.eqns
    return call.replace(params=inlined(call.params))


# -- equations -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Kind:
    """What equal equations share, and one of them; one object for all of a program."""

    key: Hashable
    eqn: jex.JaxprEqn

    @functools.cached_property
    def call(self) -> jex.JaxprEqn:
        """The call of a function that holds the equation alone."""
        eqn = self.eqn

        def one(*values: Array) -> list[Array]:
            rest = iter(values)
            operands = [v.val if isinstance(v, jex.Literal) else next(rest) for v in eqn.invars]
            outs = eqn.primitive.bind(*operands, **eqn.params)
            return outs if eqn.primitive.multiple_results else [outs]

        one.__name__ = eqn.primitive.name
        return _call(_Function(self.key, one, types_of(variables(eqn.invars)), eqn))


@dataclasses.dataclass(frozen=True)
class _Equation:
    """An equation and its kind; None where it stays as it is."""

    eqn: jex.JaxprEqn
    kind: _Kind | None

    def as_call(self) -> jex.JaxprEqn:
        """The equation as a call of a function that holds it alone."""
        return self.eqn if self.kind is None else _calling(self.kind.call, self.eqn)

    def continues(self, before: _Equation) -> bool:
        """Whether it may stand in one block with the equation before it."""
        if self.kind is None or before.kind is None or before.eqn.primitive.name in _LAST:
            return False
        one, other = self.eqn, before.eqn
        same_name = one.source_info.name_stack == other.source_info.name_stack
        return same_name and context_key(one) == context_key(other)


_LAST = ("dot_general", "conv_general_dilated")
"""With these a block ends."""


def _calling(call: jex.JaxprEqn, eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    """A call in the place of an equation."""
    operands: list[Atom] = [*variables(eqn.invars)]
    return eqn.replace(primitive=call.primitive, params=call.params, invars=operands)


def _kind(eqn: jex.JaxprEqn) -> Hashable:
    """What tells the kind of an equation; None for one that holds a program or has an effect."""
    if eqn.effects or not eqn.invars or not eqn.outvars:
        return None
    if any(map(_holds_program, eqn.params.values())):
        return None
    operands = tuple(literal_key(v) if isinstance(v, jex.Literal) else v.aval for v in eqn.invars)
    return (eqn.primitive, operands, params_key(eqn.params), context_key(eqn))


def _holds_program(x: object) -> bool:
    if isinstance(x, tuple | list):
        return any(map(_holds_program, x))
    return isinstance(x, jex.Jaxpr | ClosedJaxpr)


# -- blocks ----------------------------------------------------------------------------------------


def _groups(eqns: Sequence[jex.JaxprEqn]) -> list[list[_Equation]]:
    """The equations, divided into blocks."""
    kinds: dict[Hashable, _Kind] = {}
    groups: list[list[_Equation]] = []
    for eqn in eqns:
        one = _Equation(eqn, _kept(kinds, eqn))
        if groups and one.continues(groups[-1][-1]):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _kept(kinds: dict[Hashable, _Kind], eqn: jex.JaxprEqn) -> _Kind | None:
    """The kind of an equation; None where it cannot be compared."""
    key = _kind(eqn)
    try:
        return None if key is None else kinds.setdefault(key, _Kind(key, eqn))
    except TypeError:  # a parameter without a hash
        return None


@dataclasses.dataclass(frozen=True)
class _Block:
    """Equations in a row, and the program that they are."""

    program: jex.Jaxpr
    equations: list[_Equation]

    @functools.cached_property
    def form(self) -> tuple[tuple[_Kind | None, ...], Hashable]:
        """What tells the block from others of the program."""
        place = numbered(self.program.invars)
        operands: list[Hashable] = []
        for eqn in self.program.eqns:
            operands.append(tuple(place[v] for v in variables(eqn.invars)))
            for v in eqn.outvars:
                place[v] = len(place)
        outs = tuple(place[v] for v in variables(self.program.outvars))
        return tuple(one.kind for one in self.equations), (tuple(operands), outs)

    def function(self) -> _Function:
        """A function that holds the block."""
        calls, program = [one.as_call() for one in self.equations], self.program

        def block(*values: Array) -> list[Array]:
            env: Env = bound(program.invars, values)
            for call in calls:
                outs = call.primitive.bind(*read(env, call.invars), **call.params)
                env |= bound(call.outvars, outs)
            return read(env, program.outvars)

        kinds, places = self.form
        keys = tuple(kind and kind.key for kind in kinds)
        return _Function((keys, places), block, types_of(program.invars), program.eqns[0])

    def as_call(self, call: jex.JaxprEqn) -> jex.JaxprEqn:
        """The block as a call of a function that holds an equal one."""
        operands: list[Atom] = [*self.program.invars]
        outs = variables(self.program.outvars)
        return _calling(call, self.program.eqns[0].replace(invars=operands, outvars=outs))
