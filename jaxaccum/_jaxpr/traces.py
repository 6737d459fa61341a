"""One trace of `fun`: a jaxpr of flat arrays, of what `fun` closes over, and of the loop's index.

`fun` is traced once for each size of microbatch. Everything after that evaluates the jaxpr: the
pass that computes denominators, the derivative, the derivative of the derivative. One exception:
where a derivative rule of the user's own gives `fun` another derivative than the jaxpr, `fun` is
called again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.core
import jax.extend.core as jex
from jax import lax
from jax.interpreters import partial_eval

from jaxaccum._base.entries import entries, places_of, with_entries
from jaxaccum._base.trees import is_inexact
from jaxaccum._base.types import Array
from jaxaccum._jaxpr import derived_once, reversible, running_sums
from jaxaccum._jaxpr.compat import (
    ClosedJaxpr,
    anonymous,
    is_axis_effect,
    is_reference,
    is_reference_effect,
)
from jaxaccum._jaxpr.dependencies import Dependencies
from jaxaccum._jaxpr.derivative_rules import rule_of
from jaxaccum._jaxpr.equations import (
    axes_in,
    changed,
    changed_params,
    constants_first,
    equations_inside,
    is_index,
    mentions,
    mentions_inside,
    retraced,
    with_invars,
    with_outvars,
    without_unused,
)
from jaxaccum._jaxpr.microbatch_index import index_as_argument
from jaxaccum._jaxpr.original import Original
from jaxaccum._jaxpr.variables import Atom, Var, types_of, variables


@dataclasses.dataclass(frozen=True)
class Trace:
    """A function of ``(index, *consts, *args)``, all arrays; `consts` are what `fun` closed
    over."""

    jaxpr: jex.Jaxpr
    num_consts: int
    axis: tuple[str, int]
    """The name and the size of the loop's axis."""
    original: Original | None = dataclasses.field(default=None, compare=False)
    """What was traced, if it has a derivative rule of the user's own. None, too, if it reads the
    loop's index inside of a loop or a branch."""
    is_callable: bool = dataclasses.field(default=True, compare=False)
    """Whether what was traced, called again, has the same outputs, among others."""
    places: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    """Which of those outputs it has, if these are not the first ones."""

    def __call__(self, index: Array, arrays: Sequence[Array]) -> list[Array]:
        """Evaluate at microbatch `index`; `arrays` are the hoisted constants, then the
        arguments."""
        return jax.core.eval_jaxpr(self.jaxpr, [], index, *arrays)

    def derived(self, index: Array, arrays: Sequence[Array]) -> list[Array]:
        """Evaluate at microbatch `index`, to be differentiated: JAX derives equal equations
        once."""
        return derived_once.evaluate(self.jaxpr, [index, *arrays])

    def called_again(self, arrays: Sequence[Array]) -> list[Array]:
        """The same outputs of `fun` itself."""
        assert self.original is not None
        count = len(self.jaxpr.outvars)
        places = self.places[:count] or range(count)
        return entries(self.original(*arrays[self.num_consts :]), places)

    def has_other_derivative(self, moved: Sequence[int]) -> bool:
        """Whether `fun` has another derivative than the jaxpr, with respect to those of ``(*consts,
        *args)`` at `moved`."""
        return self.original is not None and self.original.has_other_derivative(moved)

    def can_be_called_again(self, moved: Sequence[int]) -> bool:
        """Whether `fun` can be derived in the place of the jaxpr."""
        closes_over = any(place < self.num_consts for place in moved)
        return self.is_callable and self.coupling is None and not closes_over

    def has_rules_left(self, moved: Sequence[int]) -> bool:
        """Whether a second derivative of `fun`, called again, would run rules late."""
        return self.original is not None and self.original.has_rules_left(moved)

    def refusal(self) -> NotImplementedError:
        """The error where it has to be, and cannot."""
        assert self.original is not None
        rule = rule_of(self.original.rules[0])
        return NotImplementedError(
            f"The derivative rule at {rule} may read the batch, what the loss "
            "computes, or a Python variable or setting that changes while the loss runs. This is "
            f"not supported where the loss has a collective over {self.axis[0]!r} or reads its "
            "index, draws random numbers from a model's streams, or closes over what is "
            "differentiated. Pass what the rule reads as an argument."
        )

    def with_sums(
        self,
        index: Array,
        arrays: Sequence[Array],
        sums: Sequence[Array],
        places: Mapping[int, int],
    ) -> tuple[list[Array], list[Array]]:
        """Evaluate at microbatch `index`, with running sums of the gradients of the arrays at
        `places`."""
        # The index is the first argument, so all others are one place further on.
        shifted = {position + 1: place for position, place in places.items()}
        return running_sums.evaluate(self.jaxpr, [index, *arrays], sums, shifted)

    def needs(self, outputs: Sequence[int]) -> list[bool]:
        """Which of ``(*consts, *args)`` the given outputs depend on."""
        return self._restrict(outputs)[1][1:]

    def only(self, outputs: Sequence[int]) -> Trace:
        """The trace that computes the given outputs and nothing else, of the same arguments: it has
        no print and no callback that they do not need."""
        jaxpr, used = self._restrict(outputs)
        invars = with_entries(self.jaxpr.invars, places_of(used), jaxpr.invars)
        return self.with_jaxpr(with_invars(jaxpr, invars))

    def closed(self, consts: Sequence[Array]) -> ClosedJaxpr:
        """The trace with its constants, as a function of the index and the arguments."""
        index, *rest = self.jaxpr.invars
        constvars, invars = rest[: self.num_consts], [index, *rest[self.num_consts :]]
        jaxpr = self.jaxpr.replace(
            constvars=constvars, invars=invars, debug_info=anonymous(self.jaxpr)
        )
        return ClosedJaxpr(jaxpr, list(consts))

    def split(self, count: int) -> tuple[Trace, Trace]:
        """The trace with the first `count` outputs, and the one with the others."""
        outvars = self.jaxpr.outvars
        first, rest = outvars[:count], outvars[count:]
        return (
            dataclasses.replace(self, jaxpr=with_outvars(self.jaxpr, first)),
            self.with_jaxpr(with_outvars(self.jaxpr, rest)),
        )

    @property
    def arguments(self) -> list[Var]:
        """The variables of ``(*consts, *args)``."""
        return list(self.jaxpr.invars[1:])

    def is_reversible(self, moved: Sequence[bool]) -> bool:
        """Whether JAX has a reverse derivative with respect to those of ``(*consts, *args)`` that
        are `moved`."""
        return reversible.is_reversible(self.jaxpr, [False, *moved])

    def movers(self, outputs: Collection[int]) -> list[set[int]]:
        """The places in ``(*consts, *args)`` of what each of the outputs moves with.

        Each of them ends in a ``stop_gradient``, which is left aside; one that does not moves with
        nothing.
        """
        if not outputs:
            return []
        given = [1 << i if is_inexact(v.aval) else 0 for i, v in enumerate(self.arguments)]
        found = reversible.movers(self.jaxpr, [0, *given])
        stopped: dict[Var, reversible.Movers] = {}
        for eqn in self.jaxpr.eqns:
            if eqn.primitive.name == "stop_gradient":
                (stopped[eqn.outvars[0]],) = reversible.movers_of(eqn.invars, found)
        outvars = entries(self.jaxpr.outvars, outputs)
        return list(map(_bits, reversible.movers_of(outvars, stopped)))

    def is_of(self, output: int, allowed: Sequence[bool]) -> bool:
        """Whether an output depends only on the `allowed` ones of ``(*consts, *args)``: not on the
        index of the microbatch, a collective over its axis, or the outside."""
        whole = [False, *allowed]
        if self._dependencies.among(output, whole):
            return True
        if not self._dependencies.is_vague(output):
            return False
        jaxpr, used = self._restrict([output])
        outside = reversible.holds(jaxpr, "io_callback")
        reads_references = any(is_reference(v.aval) for v in jaxpr.invars)
        if outside or self.with_jaxpr(jaxpr).coupling is not None or reads_references:
            return False
        return all(itertools.compress(whole, used))

    def depends(self, output: int, wrt: Sequence[bool]) -> bool:
        """Whether an output depends on any of ``(*consts, *args)`` that `wrt` names."""
        if self._dependencies.is_vague(output):
            return any(itertools.compress(wrt, self.needs([output])))
        return self._dependencies.any(output, [False, *wrt])

    @functools.cached_property
    def _dependencies(self) -> Dependencies:
        return Dependencies.of(self.jaxpr, self.axis[0])

    def first(self, count: int) -> Trace:
        """The trace of its first `count` outputs, with all prints and callbacks, of the same
        arguments."""
        jaxpr = with_outvars(self.jaxpr, self.jaxpr.outvars[:count])
        return dataclasses.replace(self, jaxpr=without_unused(jaxpr))

    def rearranged(self, order: Sequence[int]) -> Trace:
        """The trace of the same outputs in another order."""
        jaxpr = with_outvars(self.jaxpr, entries(self.jaxpr.outvars, order))
        places = self.places or range(len(self.jaxpr.outvars))
        return dataclasses.replace(self, jaxpr=jaxpr, places=tuple(entries(places, order)))

    def with_constant(self, outputs: Collection[int]) -> Trace:
        """The trace in which some outputs are constants to every derivative."""
        jaxpr = self.jaxpr
        moving = [i for i in outputs if is_inexact(jaxpr.outvars[i].aval)]
        old = entries(jaxpr.outvars, moving)
        stop = lambda *values: list(map(lax.stop_gradient, values))
        stopped = jax.make_jaxpr(stop)(*types_of(old)).jaxpr
        of: dict[Atom, Atom] = dict(zip(stopped.invars, old, strict=True))
        eqns = [eqn.replace(invars=[of[v] for v in eqn.invars]) for eqn in stopped.eqns]
        outvars = with_entries(jaxpr.outvars, moving, stopped.outvars)
        return self.with_jaxpr(with_outvars(jaxpr.replace(eqns=[*jaxpr.eqns, *eqns]), outvars))

    def before(
        self, change: Callable[[Array, list[Array]], list[Array]], keep: Collection[int]
    ) -> Trace:
        """The trace of changed arguments, but for the outputs `keep`, which are those of the
        arguments as they came."""
        kept = sorted(keep)
        as_they_came = self.only(kept)

        def both(index: Array, *arrays: Array) -> list[Array]:
            outs = self(index, change(index, list(arrays)))
            return with_entries(outs, kept, as_they_came(index, arrays))

        types = types_of(self.jaxpr.invars)
        return self.with_jaxpr(without_unused(retraced(both, types, self.axis)))

    @property
    def coupling(self) -> jex.JaxprEqn | None:
        """The first collective over the loop's axis, at any depth: it couples examples of different
        microbatches."""
        return next(itertools.filterfalse(is_index, mentions(self.jaxpr, self.axis[0])), None)

    @functools.cached_property
    def other_axes(self) -> frozenset[str]:
        """The named axes, other than the loop's, that collectives in it mention."""
        return frozenset(axes_in(self.jaxpr)) - {self.axis[0]}

    @property
    def exchanges(self) -> bool:
        """Whether collectives other than sums mention an axis other than the loop's."""
        for name in self.other_axes:
            for eqn in mentions(self.jaxpr, name):
                if eqn.primitive.name not in ("psum", "axis_index"):
                    return True
        return False

    @property
    def effects(self) -> bool:
        """Whether evaluating it can be seen from outside: prints, callbacks, references;
        collectives cannot."""
        return not all(map(is_axis_effect, self.jaxpr.effects))

    def with_jaxpr(self, jaxpr: jex.Jaxpr) -> Trace:
        """The trace of another jaxpr, which is no longer what `fun` returns."""
        return dataclasses.replace(self, jaxpr=jaxpr, is_callable=False)

    def _restrict(self, outputs: Sequence[int]) -> tuple[jex.Jaxpr, list[bool]]:
        jaxpr, wanted = self.jaxpr, [False] * len(self.jaxpr.outvars)
        for i in outputs:
            wanted[i] = True
        if jaxpr.effects:  # JAX keeps every equation that has effects
            jaxpr = changed(jaxpr.replace(eqns=_needed(jaxpr, outputs)), _pure)
        return partial_eval.dce_jaxpr(jaxpr, wanted)


def trace(
    fun: Callable[..., list[Array]], args: Sequence[object], axis: tuple[str, int]
) -> tuple[Trace, list[Array]]:
    """Trace `fun` at the shapes of `args` under a named axis of the given size; returns the trace
    and its constants."""
    plain, consts = constants_first(jax.make_jaxpr(fun, axis_env=[axis])(*args))
    jaxpr = index_as_argument(plain, axis)
    reads_index = any(map(is_index, mentions(plain, axis[0])))
    original = Original(fun, jaxpr, consts, axis, reads_index)
    if not original.rules or _reads_index_in_control_flow(plain, axis[0]):
        original = None
    return Trace(jaxpr, len(consts), axis, original, is_callable=not reads_index), consts


_CONTROL_FLOW = ("scan", "while", "cond")


def _reads_index_in_control_flow(jaxpr: jex.Jaxpr, axis_name: str) -> bool:
    """Whether a loop or a branch asks for the index. In the trace it is then given the index, so
    that it is not the same equation."""
    nested = [eqn for eqn in equations_inside(jaxpr) if eqn.primitive.name in _CONTROL_FLOW]
    return any(any(map(is_index, mentions_inside(eqn, axis_name))) for eqn in nested)


def _needed(jaxpr: jex.Jaxpr, outputs: Sequence[int]) -> list[jex.JaxprEqn]:
    """The equations that the outputs depend on; a write to a reference counts if a later needed
    equation reads it."""
    needed = set(variables(entries(jaxpr.outvars, outputs)))
    kept: list[jex.JaxprEqn] = []
    for eqn in reversed(jaxpr.eqns):
        operands = variables(eqn.invars)
        touched = [v for v in operands if is_reference(v.aval)]
        if not needed.isdisjoint([*eqn.outvars, *touched]):
            needed.update(operands)
            kept.append(eqn)
    return kept[::-1]


def _pure(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    """The equation without its effects on the outside; what it does to references stays."""
    if not eqn.effects:
        return eqn
    effects = set(filter(is_reference_effect, eqn.effects))
    return eqn.replace(params=changed_params(eqn, _pure), effects=effects)


def _bits(number: int) -> set[int]:
    """The places of the ones in a number."""
    return {i for i in range(number.bit_length()) if number >> i & 1}
