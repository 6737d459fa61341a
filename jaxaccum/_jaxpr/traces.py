"""One trace of `fun`: a jaxpr over flat arrays with its closure hoisted, its loop index an
argument, its uses known.

`fun` is called once for each size of microbatch; everything after that, the pass that computes
denominators, the derivative, the derivative of the derivative, evaluates the jaxpr.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
from jax.interpreters import partial_eval

from jaxaccum._base.trees import is_inexact
from jaxaccum._jaxpr import derived_once, reversible, running_sums
from jaxaccum._jaxpr.compat import ClosedJaxpr, anonymous, is_reference, is_reference_effect
from jaxaccum._jaxpr.equations import (
    axes_in,
    changed,
    changed_param,
    mentions,
    with_invars,
    with_outvars,
)
from jaxaccum._jaxpr.microbatch_index import index_as_argument


@dataclasses.dataclass(frozen=True)
class Trace:
    """A function of ``(index, *consts, *args)``, all arrays; `consts` are what `fun` closed
    over."""

    jaxpr: jex.Jaxpr
    num_consts: int
    axis: tuple[str, int]
    """The name and the size of the loop's axis."""

    def __call__(self, index: Any, arrays: Sequence[Any]) -> list[Any]:
        """Evaluate at microbatch `index`; `arrays` are the hoisted constants, then the
        arguments."""
        return jax.core.eval_jaxpr(self.jaxpr, [], index, *arrays)

    def derived(self, index: Any, arrays: Sequence[Any]) -> list[Any]:
        """Evaluate at microbatch `index`, to be differentiated: JAX derives equal equations
        once."""
        return derived_once.evaluate(self.jaxpr, [index, *arrays])

    def with_sums(
        self, index: Any, arrays: Sequence[Any], sums: Sequence[Any], places: Mapping[int, int]
    ) -> tuple[list[Any], list[Any]]:
        """Evaluate at microbatch `index`, with running sums of the gradients of the arrays at
        `places`."""
        shifted = {
            position + 1: place for position, place in places.items()
        }  # the index is the first argument
        return running_sums.evaluate(self.jaxpr, [index, *arrays], sums, shifted)

    def needs(self, outputs: Sequence[int]) -> list[bool]:
        """Which of ``(*consts, *args)`` the given outputs depend on."""
        return self._restrict(outputs)[1][1:]

    def only(self, outputs: Sequence[int]) -> Trace:
        """The trace that computes the given outputs and nothing else, of the same arguments."""
        jaxpr, used = self._restrict(outputs)
        kept = iter(jaxpr.invars)
        invars = [next(kept) if u else v for v, u in zip(self.jaxpr.invars, used, strict=True)]
        return dataclasses.replace(self, jaxpr=with_invars(jaxpr, invars))

    def closed(self, consts: Sequence[Any]) -> Any:
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
        first, rest = (with_outvars(self.jaxpr, own) for own in (outvars[:count], outvars[count:]))
        return dataclasses.replace(self, jaxpr=first), dataclasses.replace(self, jaxpr=rest)

    @property
    def arguments(self) -> list[jex.Var]:
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
        given = [1 << i if is_inexact(v.aval) else 0 for i, v in enumerate(self.arguments)]
        found = reversible.movers(self.jaxpr, [0, *given]) if outputs else {}
        ends = [eqn for eqn in self.jaxpr.eqns if eqn.primitive.name == "stop_gradient"]
        pairs = [(eqn.outvars[0], eqn.invars[0]) for eqn in ends]
        stopped = {v: found.get(x, 0) for v, x in pairs if not isinstance(x, jex.Literal)}
        outvars = [self.jaxpr.outvars[i] for i in outputs]
        bits = [0 if isinstance(v, jex.Literal) else stopped.get(v, 0) for v in outvars]
        return [{i for i in range(len(given)) if own >> i & 1} for own in bits]

    def is_of(self, output: int, allowed: Sequence[bool]) -> bool:
        """Whether an output depends on some of ``(*consts, *args)``, all of them `allowed`, and on
        nothing else.

        Nothing else: the index of the microbatch, a collective over its axis, or what it does to
        the outside.
        """
        jaxpr, used = self._restrict([output])
        alone = dataclasses.replace(self, jaxpr=jaxpr)
        outside = any(
            eqn.primitive.name == "io_callback" for eqn in reversible.equations_inside(jaxpr)
        )
        if outside or alone.coupling is not None or any(is_reference(v.aval) for v in jaxpr.invars):
            return False
        return any(used) and all(
            may for may, reads in zip([False, *allowed], used, strict=True) if reads
        )

    def first(self, count: int) -> Trace:
        """The trace of its first `count` outputs, with all prints and callbacks, of the same
        arguments."""
        jaxpr = with_outvars(self.jaxpr, self.jaxpr.outvars[:count])
        used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * count, instantiate=True)
        return dataclasses.replace(self, jaxpr=with_invars(used, list(used.invars)))

    def pure(self) -> Trace:
        """The trace without the effects of prints and callbacks, so that those that no output needs
        can be left out."""
        return dataclasses.replace(self, jaxpr=changed(self.jaxpr, _pure))

    def before(self, change: Callable[[Any, list[Any]], list[Any]], keep: Collection[int]) -> Trace:
        """The trace of changed arguments, but for the outputs `keep`, which are those of the
        arguments as they came."""

        as_they_came = self.pure().only(sorted(keep))

        def both(index: Any, *arrays: Any) -> list[Any]:
            outs, kept = self(index, change(index, list(arrays))), iter(as_they_came(index, arrays))
            return [next(kept) if i in keep else out for i, out in enumerate(outs)]

        jaxpr = jax.make_jaxpr(both, axis_env=[self.axis])(
            *(v.aval for v in self.jaxpr.invars)
        ).jaxpr
        used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
        return dataclasses.replace(self, jaxpr=with_invars(used, list(used.invars)))

    @property
    def coupling(self) -> jex.JaxprEqn | None:
        """The first collective over the loop's axis, at any depth: it couples examples of different
        microbatches."""
        return next(
            (
                eqn
                for eqn in mentions(self.jaxpr, self.axis[0])
                if eqn.primitive.name != "axis_index"
            ),
            None,
        )

    @property
    def other_axes(self) -> frozenset[str]:
        """The named axes, other than the loop's, that collectives in it mention."""
        return frozenset(axes_in(self.jaxpr)) - {self.axis[0]}

    @property
    def exchanges(self) -> bool:
        """Whether collectives that are no sums mention an axis other than the loop's."""
        eqns = (eqn for name in self.other_axes for eqn in mentions(self.jaxpr, name))
        return any(eqn.primitive.name not in ("psum", "axis_index") for eqn in eqns)

    @property
    def effects(self) -> bool:
        """Whether evaluating it can be seen from outside: prints, callbacks, references;
        collectives cannot."""
        # JAX counts the name of an axis among the effects, under a class that it does not export.
        return any(type(effect).__name__ != "NamedAxisEffect" for effect in self.jaxpr.effects)

    def _restrict(self, outputs: Sequence[int]) -> tuple[jex.Jaxpr, list[bool]]:
        jaxpr, wanted = self.jaxpr, [i in set(outputs) for i in range(len(self.jaxpr.outvars))]
        if jaxpr.effects:  # JAX keeps every equation that has effects
            jaxpr = changed(jaxpr.replace(eqns=_needed(jaxpr, outputs)), _pure)
        return partial_eval.dce_jaxpr(jaxpr, wanted)


def trace(
    fun: Callable[..., list[Any]], args: Sequence[Any], axis: tuple[str, int]
) -> tuple[Trace, list[Any]]:
    """Trace `fun` at the shapes of `args` under a named axis of the given size; returns the trace
    and its constants."""
    closed = jax.make_jaxpr(fun, axis_env=[axis])(*args)
    jaxpr = with_invars(closed.jaxpr, [*closed.jaxpr.constvars, *closed.jaxpr.invars])
    return Trace(index_as_argument(jaxpr, axis), len(closed.consts), axis), list(closed.consts)


def _needed(jaxpr: jex.Jaxpr, outputs: Sequence[int]) -> list[jex.JaxprEqn]:
    """The equations that the outputs depend on; a write to a reference counts if a later needed
    equation reads it."""
    needed = {jaxpr.outvars[i] for i in outputs if not isinstance(jaxpr.outvars[i], jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        variables = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        touched = [v for v in variables if is_reference(v.aval)]
        if needed.isdisjoint([*eqn.outvars, *touched]):
            continue
        needed.update(variables)
        kept.append(eqn)
    return kept[::-1]


def _pure(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    if not eqn.effects:
        return eqn
    params = {name: changed_param(value, _pure) for name, value in eqn.params.items()}
    return eqn.replace(
        params=params, effects={one for one in eqn.effects if is_reference_effect(one)}
    )
