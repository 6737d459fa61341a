"""The walk through a program traced at two batch sizes: equation by equation, by the table of
rules.

Every rule that is missing, and every doubt, ends in a fault of kind ``unknown``: nothing is exact
by default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.extend.core as jex

from jaxaccum._audit.constants import Constants
from jaxaccum._audit.folding import folded
from jaxaccum._audit.lattice import (
    CONSEQUENCES,
    HARMLESS,
    PLAIN,
    Fault,
    FaultKind,
    Kind,
    Layout,
    Scale,
    Sizes,
    Term,
    Value,
    rows,
    statistic,
)  # fmt: skip
from jaxaccum._audit.registry import RULES, Rule, Settled
from jaxaccum._audit.sources import Call, Site, is_library
from jaxaccum._audit.twins import same_function
from jaxaccum._base.source_lines import Frame

Shape = tuple[int, ...]


_PLACE = "the result depends on the position of an example in its microbatch"
_OF_ONE_MICROBATCH = "a statistic is taken over one microbatch, not over the whole batch"
_REPEATED = "the row of one example is repeated to the length of another array"
_CAUSES = (FaultKind.COUPLING, FaultKind.PAIRWISE, FaultKind.SELECTION, FaultKind.UNKNOWN)
"""Faults after which a further meeting of examples is no news."""


class ProgramsDifferError(Exception):
    """The two programs have different equations: the first one that differs, where there is one."""

    def __init__(self, site: Site | None = None) -> None:
        super().__init__()
        self.site = site


@dataclasses.dataclass(frozen=True)
class Op:
    """One equation, as traced at both sizes."""

    eqn: Any
    other: Any

    @property
    def name(self) -> str:
        """The primitive's."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """The parameters at the first size."""
        return self.eqn.params

    def shapes(self, i: int = 0) -> tuple[Shape, Shape]:
        """Those of operand `i`."""
        return self.eqn.invars[i].aval.shape, self.other.invars[i].aval.shape

    def out_shapes(self, i: int = 0) -> tuple[Shape, Shape]:
        """Those of result `i`."""
        return self.eqn.outvars[i].aval.shape, self.other.outvars[i].aval.shape

    @property
    def num_outs(self) -> int:
        """How many results it has."""
        return len(self.eqn.outvars)


def varying(shapes: tuple[Shape, Shape]) -> list[int]:
    """The axes whose size is not the same at both batch sizes."""
    return [i for i, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b]


def beyond(shapes: tuple[Shape, Shape], x: Value) -> list[int]:
    """The axes that vary and hold no rows of `x`."""
    own = x.layout.axes if x.rows and x.layout is not None else ()
    return [a for a in varying(shapes) if a not in own]


def _shapes(v: Any, w: Any) -> tuple[Shape, Shape]:
    return getattr(v.aval, "shape", ()), getattr(w.aval, "shape", ())


class Walk(Constants):
    """The state of one analysis: the sizes, the calls around the current equation, and what was
    found so far."""

    def __init__(self, sizes: Sizes, axis_name: str, axis_sizes: tuple[int, int]):
        super().__init__(sizes)
        self.axis_name = axis_name
        self.axis_sizes = axis_sizes
        """How many microbatches there are, at each size."""
        self.group = 1
        """How many adjacent rows of the batch are taken for one example."""
        self.one_by_one = False
        """Whether microbatches hold one example, which the loss reads as ``x[0]``."""
        self.groups: set[int] = set()
        """How many adjacent rows the program itself takes together: its batch axis is divided by
        them."""
        self.mesh_axes: frozenset[str] = frozenset()
        """Inside a program for one device, the mesh axes over which the batch is sharded."""
        self.outer_axes: frozenset[str] = frozenset()
        """Around the program, the mesh axes over which the batch is sharded too: it sees one
        device's share."""
        self.calls: tuple[Call, ...] = ()
        self.counts: Counter[str] = Counter()
        self.sites: dict[Term, Site] = {}
        """Where each addend of a total was first seen."""
        self.sized: Site | None = None
        """Where rows were first divided or multiplied by the number of examples."""
        self.weights: dict[int, Site] = {}
        """Where each total first divides."""
        self.devices: dict[Frame, tuple[str, ...]] = {}
        """The axes, other than the loop's, that are summed over at a line."""
        self.derivatives: dict[int, Any] = {}
        """Backward passes of the user's own rules, by the identity of their equation."""
        self.checks_derivatives = True
        self.may_be_nan: Callable[[], bool] = lambda: True
        """Whether a number of the program or of its arguments is NaN."""

    # -- identities --------------------------------------------------------------------------------

    def site(self, op: Op) -> Site:
        """Where the equation stands."""
        return Site(op.eqn, self.calls)

    def note_devices(self, op: Op, axes: Iterable[Any]) -> None:
        """Note the axes that a collective names, for what is said of its line."""
        if (frame := self.site(op).frame) is not None:
            self.devices[frame] = tuple(sorted(name for name in axes if isinstance(name, str)))

    def fault(
        self,
        op: Op,
        kind: FaultKind,
        note: str,
        *,
        origin: Site | None = None,
        hoistable: bool = False,
        fix: str = "",
    ) -> Fault:
        """The fault of this kind at this equation: one, however often the equation is walked."""
        key = (id(op.eqn), tuple(id(call.eqn) for call in self.calls), kind)
        if key not in self.faults:
            site = self.site(op)
            order = len(self.faults) + 1
            self.faults[key] = Fault(kind, origin or site, site, note, hoistable, fix, order=order)
        return self.faults[key]

    def declared(self, op: Op, kind: FaultKind, note: str) -> Fault:
        """A fault that the call announces itself."""
        key = ("declared", kind, note)
        if key not in self.faults:
            site = self.site(op)
            self.faults[key] = Fault(
                kind, site, site, note, declared=True, order=len(self.faults) + 1
            )
        return self.faults[key]

    def couple(
        self, op: Op, ins: Sequence[Value], *, kind: FaultKind = FaultKind.COUPLING, note: str = "",
        layout: Layout | None = None,
    ) -> Value:  # fmt: skip
        """The result of an equation at which examples meet; rows where `layout` says so."""
        summaries = [v for v in ins if v.summary]
        known = any(f.kind in _CAUSES for v in summaries for f in v.faults)
        unclear = any(f.kind is FaultKind.UNKNOWN for v in summaries for f in v.faults)
        origin = next((v.origin for v in summaries or ins if v.origin is not None), None)
        faults: frozenset[Fault] = frozenset()
        consequence = known and all(v.kind is Kind.STATISTIC for v in summaries)
        if not unclear and not consequence:
            note = note or (_OF_ONE_MICROBATCH if summaries else "examples meet")
            hoistable = not any(v.params for v in summaries or ins)
            faults = frozenset([self.fault(op, kind, note, origin=origin, hoistable=hoistable)])
        if layout is not None:
            return rows(layout, faults=faults)
        return statistic(origin or self.site(op), faults=faults)

    def unknown(self, op: Op, note: str) -> Value:
        """The result of an equation that the analysis cannot follow."""
        return statistic(self.site(op), faults=frozenset([self.fault(op, FaultKind.UNKNOWN, note)]))

    # -- bodies ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def inside(self, op: Op, body: Any, *, cached: bool = False) -> Iterator[None]:
        """Walk a body of `op`; `cached` says that JAX may share it between callers."""
        file = getattr(getattr(body, "debug_info", None), "func_filename", None) or ""
        before = self.calls
        self.calls = (*before, Call(op.eqn, cached and is_library(file)))
        try:
            yield
        finally:
            self.calls = before

    def body(
        self, op: Op, bodies: tuple[Any, Any], ins: Sequence[Value], *, cached: bool = False
    ) -> list[Value]:
        """The results of a body, a jaxpr at each size, applied to values."""
        first, second = (getattr(body, "jaxpr", body) for body in bodies)
        consts = [
            self.constant(a, b)
            for a, b in zip(*(getattr(body, "consts", ()) for body in bodies), strict=False)
        ]
        if len(consts) != len(
            first.constvars
        ):  # of an open jaxpr the constants are the first operands
            consts, ins = list(ins[: len(first.constvars)]), ins[len(first.constvars) :]
        with self.inside(op, first, cached=cached):
            return self.run(first, second, consts, ins)

    def run(
        self, first: Any, second: Any, consts: Sequence[Value], ins: Sequence[Value]
    ) -> list[Value]:
        """The results of a jaxpr, traced at both sizes."""
        if len(first.invars) != len(ins) or len(second.invars) != len(ins):
            raise ProgramsDifferError
        given, others = [*first.constvars, *first.invars], [*second.constvars, *second.invars]
        env = dict(zip(given, [*consts, *ins], strict=True))
        twins = dict(zip(given, others, strict=True))

        def read(v: Any, w: Any) -> Value:
            if isinstance(v, jex.Literal) and isinstance(w, jex.Literal):
                return self.constant(v.val, w.val)
            if isinstance(v, jex.Literal) or isinstance(w, jex.Literal) or twins[v] is not w:
                raise ProgramsDifferError
            return env[v]

        for eqn, other in zip(first.eqns, second.eqns, strict=False):
            try:
                if not same_function(eqn, other):
                    raise ProgramsDifferError
                ins = [read(v, w) for v, w in zip(eqn.invars, other.invars, strict=True)]
            except ProgramsDifferError:
                raise ProgramsDifferError(Site(eqn, self.calls)) from None
            env.update(zip(eqn.outvars, self.apply(Op(eqn, other), ins), strict=True))
            twins.update(zip(eqn.outvars, other.outvars, strict=True))
        if len(first.eqns) != len(second.eqns):
            raise ProgramsDifferError
        return [read(v, w) for v, w in zip(first.outvars, second.outvars, strict=True)]

    # -- one equation ------------------------------------------------------------------------------

    def apply(self, op: Op, ins: list[Value]) -> list[Value]:
        """The results of one equation, with what its operands suffer from."""
        self.counts[op.name] += 1
        if (constant := self._folded(op, ins)) is not None:
            return [constant]
        entry = RULES.get(op.name) or Rule(RULES["*"].apply)
        outs = entry.apply(self, op, ins)
        outs = outs if isinstance(outs, list) else [outs] * op.num_outs
        if entry.complete:
            return outs
        settled = isinstance(outs, Settled)
        return [
            self._checked(op, ins, out, entry=entry, i=i, settled=settled)
            for i, out in enumerate(outs)
        ]

    def _folded(self, op: Op, ins: list[Value]) -> Value | None:
        """The result of an equation of constants, where it can be computed at both sizes."""
        pairs = [v.at for v in ins if v.at is not None]
        if not ins or len(pairs) < len(ins):
            return None
        first, second = (
            folded(eqn, [pair[i] for pair in pairs]) for i, eqn in enumerate((op.eqn, op.other))
        )
        if first is None or second is None or first.shape != second.shape:
            return None
        return dataclasses.replace(self.constant(first, second), closure=_closure_of(ins))

    def _checked(
        self, op: Op, ins: list[Value], out: Value, *, entry: Rule, i: int, settled: bool
    ) -> Value:
        before = frozenset().union(*(v.faults for v in ins))
        faults = out.faults if settled else out.faults | before
        if not settled:
            faults |= self._position(op, ins, out, entry=entry, i=i)
        if not entry.scales and not settled and not faults - before:
            faults |= self._lost_scale(op, ins, out)
        if not settled and any(f.kind not in HARMLESS for f in before):
            faults = before | {f for f in faults if f.kind not in CONSEQUENCES}
        wrong = any(f.kind not in HARMLESS for f in faults)
        if out.rows and not wrong and not self._fits(op.out_shapes(i), out.layout):
            faults |= {self.fault(op, FaultKind.UNKNOWN, _REPEATED)}
        number = out.number if out.number >= 0 else self._numbered(op, ins, i)
        size = math.prod(op.out_shapes(i)[0]) if hasattr(op.eqn.outvars[i].aval, "shape") else 1
        one = size == 1 and not varying(_shapes(op.eqn.outvars[i], op.other.outvars[i]))
        return out.like(
            faults=faults, number=number, params=out.params or any(v.params for v in ins),
            closure=out.closure or _closure_of(ins), scalar=out.scalar or one,
        )  # fmt: skip

    def _fits(self, shapes: tuple[Shape, Shape], layout: Layout | None) -> bool:
        """Whether rows are as many as examples: JAX repeats the one row of a microbatch of one
        example."""
        if layout is None or layout.looped or not layout.axes:
            return True
        lengths = tuple(math.prod(shape[axis] for axis in layout.axes) for shape in shapes)
        copies = layout.outer * layout.inner
        return lengths == (copies * self.sizes.first, copies * self.sizes.second)

    def _position(
        self, op: Op, ins: list[Value], out: Value, *, entry: Rule, i: int
    ) -> frozenset[Fault]:
        """What is independent of the batch stays uniform along its axes, or depends on an example's
        place."""
        spent = any(v.index is not None for v in ins) and out.index is None and not any(out.columns)
        uneven = (
            out.kind is not Kind.STATISTIC and not entry.uniform and self._crosses(op, ins, out, i)
        )
        return (
            frozenset([self.fault(op, FaultKind.POSITION, _PLACE)])
            if spent or uneven
            else frozenset()
        )

    def _crosses(self, op: Op, ins: list[Value], out: Value, i: int) -> bool:
        """Whether an axis has the batch's size and holds no examples: along it a value is known to
        be uniform."""
        if beyond(_shapes(op.eqn.outvars[i], op.other.outvars[i]), out):
            return True
        rows_ = (
            len(out.layout.axes) if out.rows and out.layout is not None else 0
        )  # beside which a constant may lie
        operands = zip(op.eqn.invars, op.other.invars, ins, strict=True)
        return any(
            len(beyond(_shapes(v, w), x)) > (rows_ if x.fixed else 0) for v, w, x in operands
        )

    def _lost_scale(self, op: Op, ins: list[Value], out: Value) -> frozenset[Fault]:
        """A scaled operand gives a scaled result, or a rule has dropped a factor."""
        if out.kind is Kind.STATISTIC or out.terms != PLAIN:
            return frozenset()
        if all(
            term.scale.trivial
            for v in ins
            if not v.zero
            for term in v.terms
            if v.kind is not Kind.STATISTIC
        ):
            return frozenset()
        return frozenset(
            [self.fault(op, FaultKind.BATCH_SIZE, "a value scaled by the batch size enters")]
        )

    def _numbered(self, op: Op, ins: list[Value], i: int) -> int:
        numbers = tuple(v.number for v in ins)
        if op.num_outs == 0 or -1 in numbers or not numbers:
            return self.fresh()
        try:
            params = (tuple(sorted(eqn.params.items())) for eqn in (op.eqn, op.other))
            return self.number_of((op.name, i, *params, numbers))
        except TypeError:
            return self.fresh()

    def growth(self, shapes: tuple[Shape, Shape], axes: Sequence[int]) -> Scale:
        """The factor that a sum of equal entries over `axes` brings."""
        first, second = (math.prod(shape[i] for i in axes) for shape in shapes)
        return Scale(self.sizes.power(first, second))


def _closure_of(ins: Sequence[Value]) -> str:
    return next((v.closure for v in ins if v.closure), "")
