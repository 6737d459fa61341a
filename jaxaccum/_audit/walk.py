"""The walk through a program traced at two batch sizes: equation by equation, by the table of
rules.

The problem. A loss is exact over microbatches if it is the same sum over examples at every batch
size. A trace says what a program does at one size. In it, the 8 of a batch of 8 examples and the 8
of 8 classes look alike.

The idea. Trace the program at two sizes, and read both traces side by side. They must have the same
equations. A number or the length of an axis belongs to the batch exactly where the traces differ::

    batch of 8                      batch of 4                      what it is
    b:f32[8] = mul x w              b:f32[4] = mul x w              rows, along axis 0
    c:f32[] = reduce_sum b          c:f32[] = reduce_sum b          a total
    d:f32[] = div c 8.0             d:f32[] = div c 4.0             a total times batch_size ** -1

Each variable has one `Value` (see `lattice`), for both sizes at once. A rule of `rules/` takes the
values of an equation's operands to those of its results. `checks` then looks for what can go wrong
with any primitive. Bodies of calls, loops and branches are walked by their rules, which call back
`Walk.body`.

Nothing is exact by default. A primitive without a rule, two programs that differ, and every doubt
end in a fault of kind ``unknown``.

The cost. Two traces, and one rule per equation. A body of a loop is walked until the values that it
carries no longer change, which takes a few rounds.

The weakness. A verdict holds for the two sizes that were traced: ``if len(x) > 1000`` in Python
takes the same branch at 8 and at 4. So a call is audited at its own sizes, the batch's and the
microbatch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from jaxaccum._audit.checks import Result, checked, closure_of, overflow
from jaxaccum._audit.equation import Op as Op
from jaxaccum._audit.equation import Shape as Shape
from jaxaccum._audit.equation import beyond as beyond
from jaxaccum._audit.equation import varying as varying
from jaxaccum._audit.folding import folded
from jaxaccum._audit.gathered_order import GatheredOrder, out_of_order
from jaxaccum._audit.lattice import IRREGULAR, Fault, Sizes, Value, fixed, is_wrong
from jaxaccum._audit.nans import are_never_nan
from jaxaccum._audit.notes import GIVEN, Notes
from jaxaccum._audit.registry import RULES, Rule, Settled
from jaxaccum._audit.sources import Site
from jaxaccum._audit.twins import same_function
from jaxaccum._jaxpr.compat import opened, variable_of

_Atom = jex.Var | jex.Literal


class ProgramsDifferError(Exception):
    """The two programs have different equations: the first one that differs, where there is one."""

    def __init__(self, site: Site | None = None) -> None:
        super().__init__()
        self.site = site


class _Known(NamedTuple):
    """What is known of a variable: the variable at the second size, and its value."""

    twin: jex.Var
    value: Value


class Walk(Notes):
    """The state of one analysis, and the way through its equations."""

    outermost: _Environment | None = None
    """The values of the program's own variables, outside of all bodies."""

    def again(self, sizes: Sizes) -> Walk:
        """Another walk of the same programs, which takes the sizes for others."""
        other = Walk(sizes, self.axis_name, self.axis_sizes)
        for name in GIVEN:
            setattr(other, name, getattr(self, name))
        return other

    def body(
        self,
        op: Op,
        bodies: tuple[object, object],
        ins: Sequence[Value],
        *,
        cached: bool = False,
    ) -> list[Value]:
        """The results of a body, a jaxpr at each size, closed or open, applied to values."""
        first, own = opened(bodies[0])
        second, others = opened(bodies[1])
        consts, count = self.constants(own, others), len(first.constvars)
        if len(consts) != count:  # of an open jaxpr the constants are the first operands
            consts, ins = list(ins[:count]), ins[count:]
        with self.inside(op, first, cached=cached):
            return self.run(first, second, consts, ins)

    def run(
        self, first: jex.Jaxpr, second: jex.Jaxpr, consts: Sequence[Value], ins: Sequence[Value]
    ) -> list[Value]:
        """The results of a jaxpr, traced at both sizes."""
        if len(first.invars) != len(ins) or len(second.invars) != len(ins):
            raise ProgramsDifferError
        env = _Environment(self)
        if not self.calls:
            self.outermost = env
        env.write(first.constvars, second.constvars, consts)
        env.write(first.invars, second.invars, ins)
        for eqn, other in zip(first.eqns, second.eqns, strict=False):
            operands = self._operands(env, eqn, other)
            env.write(eqn.outvars, other.outvars, self.apply(Op(eqn, other), operands))
        if len(first.eqns) != len(second.eqns):
            raise ProgramsDifferError
        return env.read(first.outvars, second.outvars)

    def _operands(self, env: _Environment, eqn: jex.JaxprEqn, other: jex.JaxprEqn) -> list[Value]:
        """The values of the operands of an equation, which must be the same in both programs."""
        try:
            if not same_function(eqn, other):
                raise ProgramsDifferError
            return env.read(eqn.invars, other.invars)
        except ProgramsDifferError:
            raise ProgramsDifferError(Site(eqn, self.calls)) from None

    def constant(self, a: Any, b: Any) -> Value:
        """A constant of the program; what a derivative rule closes over may be one of its
        variables."""
        v, w = variable_of(a), variable_of(b)
        if self.outermost is None or (v is None and w is None):
            return super().constant(a, b)
        known = self.outermost.known(v, w)
        return super().constant(a, b) if known is None else known

    def apply(self, op: Op, ins: list[Value]) -> list[Value]:
        """The results of one equation, with what its operands suffer from."""
        self.counts[op.name] += 1
        if (constant := self._folded(op, ins)) is not None:
            return [constant]
        rule = RULES.get(op.name) or Rule(RULES["*"].apply)
        outs = rule.apply(self, op, ins)
        outs = outs if isinstance(outs, list) else [outs] * op.num_outs
        if rule.complete:
            return self._of_bodies(op, ins, outs)
        settled = isinstance(outs, Settled)
        never_nan = are_never_nan(op, ins)
        results = [Result(op, ins, i, x, rule, settled) for i, x in enumerate(outs)]
        return [checked(self, result).like(never_nan=never_nan) for result in results]

    def _of_bodies(self, op: Op, ins: list[Value], outs: list[Value]) -> list[Value]:
        """The results of what has bodies: a loop may sum, and may ask for the order of rows."""
        order = GatheredOrder.of(self, op, ins)
        asks = order is not None and order.is_of_steps()
        common = frozenset([out_of_order(self, op)]) if asks else frozenset[Fault]()
        return [self._with(common, op, ins, i, x) for i, x in enumerate(outs)]

    def _with(self, common: frozenset[Fault], op: Op, ins: list[Value], i: int, x: Value) -> Value:
        """A result with these faults, and that of its own sum."""
        new = common if is_wrong(x.faults) else common | overflow(self, op, i, ins, x)
        return x.like(faults=x.faults | new) if new else x

    def _folded(self, op: Op, ins: list[Value]) -> Value | None:
        """The result of an equation of constants, where it can be computed at both sizes."""
        pairs = [v.at for v in ins if v.at is not None]
        if not pairs or len(pairs) < len(ins):
            return None
        at_first, at_second = zip(*pairs, strict=True)
        first, second = folded(op.eqn, at_first), folded(op.other, at_second)
        if first is None or second is None or first.shape != second.shape:
            return None
        return self.constant(first, second).like(closure=closure_of(ins))


class _Environment:
    """The values of the variables of one jaxpr, and which variables of the two programs belong
    together."""

    def __init__(self, walk: Walk):
        self._walk = walk
        self._known: dict[jex.Var, _Known] = {}

    def write(
        self, variables: Iterable[jex.Var], twins: Iterable[jex.Var], values: Iterable[Value]
    ) -> None:
        for v, w, value in zip(variables, twins, values, strict=True):
            self._known[v] = _Known(w, value)

    def read(self, atoms: Iterable[_Atom], twins: Iterable[_Atom]) -> list[Value]:
        return [self._read(v, w) for v, w in zip(atoms, twins, strict=True)]

    def known(self, v: jex.Var | None, w: jex.Var | None) -> Value | None:
        """The value of a variable and of its twin; nothing is known of two that are not twins."""
        found = None if v is None else self._known.get(v)
        if found is not None and found.twin is w:
            return found.value
        held = self._known.keys() | {known.twin for known in self._known.values()}
        return None if held.isdisjoint([v, w]) else fixed(IRREGULAR, number=self._walk.fresh())

    def _read(self, v: _Atom, w: _Atom) -> Value:
        if isinstance(v, jex.Literal) and isinstance(w, jex.Literal):
            return self._walk.written(v.val, w.val)
        if isinstance(v, jex.Literal) or isinstance(w, jex.Literal):
            raise ProgramsDifferError
        twin, value = self._known[v]
        if twin is not w:
            raise ProgramsDifferError
        return value
