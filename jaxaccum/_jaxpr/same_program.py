"""Whether two programs compute the same, whatever the order of their equations.

The problem. JAX derives one function in two ways, and gives the equations of the two programs
another order, their sums another order of addends, and calls other names.

The idea. Each value has a number, and values that are computed alike have the same one, in both
programs: from equal numbers, by an equal primitive with equal parameters. The programs compute the
same if their results have the same numbers.

    a = sin x; b = cos x; c = a + b      x: 0, sin of 0: 1, cos of 0: 2, sum of {1, 2}: 3
    b = cos x; a = sin x; c = b + a      x: 0, cos of 0: 2, sin of 0: 1, sum of {1, 2}: 3

A call is numbered as what it holds. A loop or a branch is told by what its body computes of its
arguments, which have numbers of their own. What may be seen from outside, such as a print, counts
in its order. Sums of cotangents alone are taken in any order: `add` rounds as it is written.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Hashable, Iterable, Mapping, Sequence

import jax
import jax.core
import jax.extend.core as jex
import numpy as np

from jaxaccum._jaxpr import compat
from jaxaccum._jaxpr.compat import ClosedJaxpr, opened
from jaxaccum._jaxpr.equations import called
from jaxaccum._jaxpr.structure import (
    computing,
    const_key,
    leaf_key,
    literal_key,
    params_key,
    value_key,
)
from jaxaccum._jaxpr.variables import Atom, Var, bound, types_of

Program = tuple[jex.Jaxpr, Sequence[object]]
"""A jaxpr whose first arguments are constants, and the constants."""


def are_equal(*programs: Program) -> bool:
    """Whether programs compute the same, of constants that hold the same numbers."""
    shared = set.intersection(*(set(map(id, consts)) for _, consts in programs))
    numbers = _Numbers()
    keys = [numbers.of_program(program, shared) for program in programs]
    return all(key == keys[0] for key in keys)


@dataclasses.dataclass
class _Numbers:
    """The numbers of all values so far."""

    known: dict[Hashable, int] = dataclasses.field(default_factory=dict)
    unhashed: list[Hashable] = dataclasses.field(default_factory=list)
    functions: list[types.FunctionType] = dataclasses.field(default_factory=list)
    """Those whose closures are being looked at."""
    addends: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """The numbers that a sum of cotangents adds up."""

    def of(self, key: Hashable) -> int:
        """The number of what has this key."""
        try:
            return self.known.setdefault(key, len(self.known))
        except TypeError:  # a parameter without a hash
            self.unhashed += [] if key in self.unhashed else [key]
            return -1 - self.unhashed.index(key)

    def of_program(self, program: Program, shared: set[int]) -> Hashable:
        """What tells a program from others; constants that are `shared` are told by themselves."""
        jaxpr, consts = program
        keys: list[Hashable] = []
        for x in consts:
            alone = id(x) in shared or isinstance(x, jax.core.Tracer)
            keys.append(id(x) if alone else const_key(np.asarray(x)))
        return self._function(jaxpr, [self.of(("constant", key)) for key in keys])

    def _function(self, jaxpr: jex.Jaxpr, consts: Sequence[int] = ()) -> Hashable:
        """What tells a program, by the numbers of its constants, from others."""
        given = types_of([*jaxpr.constvars, *jaxpr.invars])[len(consts) :]
        arguments = [self.of(("argument", i, x)) for i, x in enumerate(given)]
        seen: list[Hashable] = []
        results = self._results(jaxpr, [*consts, *arguments], seen)
        return tuple(given), tuple(results), tuple(seen)

    def _results(self, jaxpr: jex.Jaxpr, args: Sequence[int], seen: list[Hashable]) -> list[int]:
        """The numbers of a program's results; what is seen from outside is added to `seen`."""
        env = bound([*jaxpr.constvars, *jaxpr.invars], args)
        for eqn in jaxpr.eqns:
            env |= bound(eqn.outvars, self._outs(eqn, self._read(env, eqn.invars), seen))
        return self._read(env, jaxpr.outvars)

    def _read(self, env: Mapping[Var, int], atoms: Iterable[Atom]) -> list[int]:
        literal = lambda v: self.of(("literal", literal_key(v)))
        return [literal(v) if isinstance(v, jex.Literal) else env[v] for v in atoms]

    def _outs(self, eqn: jex.JaxprEqn, args: list[int], seen: list[Hashable]) -> list[int]:
        """The numbers of an equation's results."""
        if (program := called(eqn)) is not None:
            inner, consts = opened(program)
            held = [self.of(("constant", const_key(x))) for x in consts]
            return self._results(inner, [*held, *args], seen)
        if eqn.primitive.name == "add_any":
            return [self._sum(args)]
        params = params_key(computing(eqn), self._leaf)
        key = (eqn.primitive, tuple(args), params, compat.context_key(eqn))
        if eqn.effects:
            key = (*key, len(seen))
            seen.append(self.of(key))
        return [self.of((key, i, x)) for i, x in enumerate(types_of(eqn.outvars))]

    def _sum(self, args: list[int]) -> int:
        """The number of a sum, whatever the order of its addends."""
        addends = sorted(x for arg in args for x in self.addends.get(arg, [arg]))
        number = self.of(("sum", tuple(addends)))
        self.addends[number] = addends
        return number

    def _leaf(self, x: object) -> Hashable:
        """The key of a program or a function inside an equation, and of what holds neither.

        Two functions of one definition, which closed over the same, compute the same.
        """
        if isinstance(x, jex.Jaxpr | ClosedJaxpr):
            jaxpr, consts = opened(x)
            return self._function(jaxpr, [self.of(("constant", const_key(c))) for c in consts])
        if isinstance(x, types.FunctionType) and x not in self.functions:
            self.functions.append(x)  # it may close over itself
            held = [cell.cell_contents for cell in x.__closure__ or ()]
            key = x.__code__, value_key([*held, x.__defaults__], self._leaf)
            self.functions.pop()
            return key
        if isinstance(x, functools.partial):
            return type(x), value_key([x.func, x.args, x.keywords], self._leaf)
        if isinstance(x, types.MethodType):
            return type(x), value_key([x.__func__, x.__self__], self._leaf)
        if isinstance(x, jax.Array):
            return const_key(x)
        return leaf_key(x)
