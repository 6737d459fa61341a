"""The function that was traced: is its derivative that of the trace?

The problem. A derivative rule is a Python function, which JAX runs where it derives. One that is
defined inside the loss may close over the batch, and in a traced program the batch of the trace is
gone. Or it reads a Python variable or a setting, which the loss has changed since.

    def loss(w, x):
        double = jax.custom_jvp(lambda z: 2 * z)
        double.defjvp(lambda p, t: (2 * p[0], t[0] * x))     # closes over x, a tracer of the trace

    def loss(w, x):
        for slope in (0.5, 2.0):                             # `slope` is 2.0 after the loop
            x = leaky(x @ w, lambda t: slope * t)

The idea. JAX derives the loss once, and its program twice, because a rule can change what it reads.
Where these are not one program, the loss is derived itself: it is called again inside the loop.

The cost. A loss that has a rule of the user's own is derived three times more while it is traced.
The weakness: the loss is called without the value of the loop's index, and with its own closures.
One that reads ``axis_index``, or closes over what is differentiated, is refused. So is a coupled
one, unless it has a ``pmax``, which JAX cannot derive: then nothing is compared. A second
derivative would run the rules that are left after the first one late again: it is refused.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.extend.core as jex
import numpy as np
from jax import lax

from jaxaccum._base.entries import entries, places_of, with_entries
from jaxaccum._base.trees import is_inexact
from jaxaccum._base.types import Array
from jaxaccum._jaxpr import derived_once
from jaxaccum._jaxpr.compat import bound_axis
from jaxaccum._jaxpr.derivative_rules import with_rules_of_users
from jaxaccum._jaxpr.equations import constants_first
from jaxaccum._jaxpr.same_program import Closed, compute_the_same
from jaxaccum._jaxpr.variables import Type, Var, types_of

Fun = Callable[..., list[Array]]
"""A function of arrays."""


class _Derived(NamedTuple):
    """What is known of a derivative."""

    differs: bool
    has_rules_left: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Original:
    """A function that was traced, its trace, and what it closed over."""

    fun: Fun
    jaxpr: jex.Jaxpr
    """A program of ``(index, *consts, *args)``."""
    consts: Sequence[Array]
    axis: tuple[str, int]
    reads_index: bool
    _known: dict[tuple[int, ...], _Derived] = dataclasses.field(default_factory=dict)

    def __call__(self, *args: Array) -> list[Array]:
        """Call the function again, under its axis, whose size may be read in Python."""
        with bound_axis(*self.axis):
            return self.fun(*args)

    def has_other_derivative(self, moved: Sequence[int]) -> bool:
        """Whether its derivative with respect to those of ``(*consts, *args)`` at `moved` is not
        the trace's.

        Where constants are differentiated, the derivative with respect to all arguments stands for
        theirs: called again, the function has none with respect to what it closes over.
        """
        return self._derived(moved).differs

    def has_rules_left(self, moved: Sequence[int]) -> bool:
        """Whether a second derivative would run rules of the user's own, late again."""
        return self._derived(moved).has_rules_left

    def _derived(self, moved: Sequence[int]) -> _Derived:
        places = tuple(place - len(self.consts) for place in moved)
        if not self.rules or not places:
            return _Derived(differs=False, has_rules_left=False)
        if min(places) < 0:
            places = tuple(places_of(is_inexact(v.aval) for v in self._arguments))
        if places not in self._known:
            self._known[places] = self._compared(places)
        return self._known[places]

    @functools.cached_property
    def rules(self) -> list[jex.JaxprEqn]:
        """The equations that have a rule of the user's own."""
        return list(with_rules_of_users(self.jaxpr))

    def _compared(self, moved: Sequence[int]) -> _Derived:
        """Whether JAX derives the function and its trace, the second time too, as other programs.

        The trace alone may have no derivative: a rule reads values of the trace, or of a
        ``jax.vmap`` inside the loss, that are gone. The second run may find an iterator empty.
        """
        types = types_of(self._arguments)
        with bound_axis(*self.axis):
            ours = _derivative(self._evaluated, types, moved)
            theirs = _derivative(self.fun, types, moved)
            again = _derivative(self._evaluated, types, moved)
        if ours is None or theirs is None or again is None:
            differs = ours is not theirs
        else:
            differs = not compute_the_same(ours, theirs, again)
        left = theirs is not None and bool(list(with_rules_of_users(theirs[0])))
        return _Derived(differs, left)

    def _evaluated(self, *args: Array) -> list[Array]:
        index = lax.axis_index(self.axis[0]) if self.reads_index else np.int32(0)
        return derived_once.evaluate(self.jaxpr, [cast(Array, index), *self.consts, *args])

    @property
    def _arguments(self) -> list[Var]:
        return self.jaxpr.invars[1 + len(self.consts) :]


def _derivative(fun: Fun, types: Sequence[Type], moved: Sequence[int]) -> Closed | None:
    """The program of a function's results and gradients, and its constants; None where JAX or a
    rule raises an error, which comes again where the loss is derived."""

    def pull(*arrays: Array) -> list[Array]:
        def function(*moving: Array) -> tuple[list[Array], list[Array]]:
            outs = fun(*with_entries(arrays, moved, moving))
            return list(filter(is_inexact, outs)), outs

        # Each value is its own cotangent: any of the right type will do.
        values, pullback, outs = jax.vjp(function, *entries(arrays, moved), has_aux=True)
        return [*outs, *pullback(values)]

    try:
        return constants_first(jax.make_jaxpr(pull)(*types))
    except Exception:  # of a rule, in any way
        return None
