"""Whether two programs compute the same, whatever the order of their equations.

The problem. JAX derives one function in two ways, and gives the equations of the two programs
another order, their sums another order of addends, and calls other names.

The idea. Each value has a number, and values that are computed alike have the same one, in both
programs: from equal numbers, by an equal primitive with equal parameters. The programs compute the
same if their results have the same numbers.

    a = sin x; b = cos x; c = a + b      x: 0, sin of 0: 1, cos of 0: 2, sum of {1, 2}: 3
    b = cos x; a = sin x; c = b + a      x: 0, cos of 0: 2, sin of 0: 1, sum of {1, 2}: 3

A call is numbered as the equations that it holds. The body of a loop or a branch is numbered by
itself, with numbers for its own arguments. Prints and other effects count in their order. The `+`
of the example is JAX's sum of cotangents, which is taken in any order; `add` is not, since it
rounds as it is written.
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
from jaxaccum._jaxpr.structure import computing, const_key, literal_key
from jaxaccum._jaxpr.variables import Atom, Var, bound, types_of

Closed = tuple[jex.Jaxpr, Sequence[object]]
"""A jaxpr whose first arguments are constants, and the constants."""


def compute_the_same(*programs: Closed) -> bool:
    """Whether programs compute the same, of constants that hold the same numbers."""
    in_all = set.intersection(*(set(map(id, consts)) for _, consts in programs))
    numbers = _Numbers()
    keys = [numbers.of_program(program, in_all) for program in programs]
    return all(key == keys[0] for key in keys)


@dataclasses.dataclass
class _Numbers:
    """The numbers of all values so far."""

    known: dict[Hashable, int] = dataclasses.field(default_factory=dict)
    addends: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """The numbers that a sum of cotangents adds up."""
    entered: list[int] = dataclasses.field(default_factory=list)
    """The objects that are being looked into."""

    def of(self, key: Hashable) -> int:
        """The number of what has this key."""
        return self.known.setdefault(key, len(self.known))

    def of_program(self, program: Closed, in_all: set[int]) -> Hashable:
        """What tells a program from others. Constants that are in all programs, and those of an
        outer trace, are compared by identity."""
        jaxpr, consts = program
        keys: list[Hashable] = []
        for x in consts:
            by_identity = id(x) in in_all or isinstance(x, jax.core.Tracer)
            keys.append(id(x) if by_identity else const_key(np.asarray(x)))
        return self._function(jaxpr, [self.of(("constant", key)) for key in keys])

    def _function(self, jaxpr: jex.Jaxpr, consts: Sequence[int]) -> Hashable:
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
            inner, consts = self._opened(program)
            return self._results(inner, [*consts, *args], seen)
        if eqn.primitive.name == "add_any":
            return [self._sum(args)]
        params = self._key(computing(eqn))
        key = (eqn.primitive, tuple(args), params, compat.context_key(eqn))
        if eqn.effects:
            key = (*key, len(seen))
            seen.append(self.of(key))
        return [self.of((key, i, x)) for i, x in enumerate(types_of(eqn.outvars))]

    def _opened(self, program: jex.Jaxpr | ClosedJaxpr) -> tuple[jex.Jaxpr, list[int]]:
        """A program inside an equation, and the numbers of its constants."""
        jaxpr, consts = opened(program)
        return jaxpr, [self.of(("constant", const_key(x))) for x in consts]

    def _sum(self, args: list[int]) -> int:
        """The number of a sum, whatever the order of its addends."""
        addends = sorted(x for arg in args for x in self.addends.get(arg, [arg]))
        number = self.of(("sum", tuple(addends)))
        self.addends[number] = addends
        return number

    # -- parameters of equations

    def _key(self, x: object) -> Hashable:
        """What tells a parameter from others, by what it holds. One that holds itself is told by
        its depth there."""
        if id(x) in self.entered:
            return "entered", self.entered.index(id(x))
        self.entered.append(id(x))
        try:
            return type(x), self._content(x)
        finally:
            self.entered.pop()

    def _content(self, x: object) -> Hashable:
        if isinstance(x, jex.Jaxpr | ClosedJaxpr):
            return self._function(*self._opened(x))
        if isinstance(x, jax.Array | np.ndarray):
            return const_key(x)
        if isinstance(x, float | complex | np.generic):
            return np.asarray(x).tobytes()
        held = _parts(x)
        if held is not None:
            return tuple(map(self._key, held))
        try:
            return hash(x), x
        except TypeError:  # it has no hash
            return id(x)


def _parts(x: object) -> Iterable[object] | None:
    """What an object is made of; None of one that is compared as Python does.

    Two functions of one definition, which closed over the same, compute the same.
    """
    if isinstance(x, tuple | list):
        return x
    if isinstance(x, dict):
        names = sorted(x, key=str)
        return [*names, *map(x.get, names)]
    if isinstance(x, types.FunctionType):
        settings = x.__defaults__, x.__kwdefaults__, x.__dict__
        return [x.__code__, id(x.__globals__), *settings, *map(_held, x.__closure__ or ())]
    if isinstance(x, functools.partial):
        return [x.func, x.args, x.keywords]
    if isinstance(x, types.MethodType):
        return [x.__func__, x.__self__]
    is_of_jax = type(x).__module__.startswith("jax.")  # as the grid of a Pallas kernel
    if is_of_jax and dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [getattr(x, field.name) for field in dataclasses.fields(x)]
    return None


def _held(cell: types.CellType) -> object:
    """What a variable that a function closes over holds."""
    try:
        return cell.cell_contents
    except ValueError:  # it is not bound yet
        return types.CellType
