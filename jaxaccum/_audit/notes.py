"""What a walk notes on its way: the calls that it is inside of, the faults, and the lines that the
report will name.

A note is kept once, however often an equation is walked. Loops walk their bodies several times.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.extend.core as jex

from jaxaccum._audit.constants import Constants
from jaxaccum._audit.equation import Op, Shape, lengths
from jaxaccum._audit.lattice import (
    Addend,
    Fault,
    FaultKind,
    Kind,
    Layout,
    Scale,
    Sizes,
    Value,
    any_params,
    faults_of,
    origin_of,
    rows,
    statistic,
)  # fmt: skip
from jaxaccum._audit.sources import Enclosing, Site, is_library
from jaxaccum._base.source_lines import Frame

_OF_ONE_MICROBATCH = "a statistic is taken over one microbatch, not over the whole batch"
_CAUSES = {FaultKind.COUPLING, FaultKind.PAIRWISE, FaultKind.SELECTION, FaultKind.UNKNOWN}
"""Faults of a statistic after which a further meeting of examples is not reported."""

GIVEN = (
    "outer_axes",
    "untyped_axes",
    "name_of",
    "may_be_nan",
    "is_finite",
    "keeps_groups",
    "in_order",
)
"""What a walk is told about its programs, and another walk of the same programs is told too."""


class Notes(Constants):
    """What is known around the current equation, and what was found so far."""

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
        self.keeps_groups: Callable[[int], bool] = lambda size: True
        """Whether microbatches hold whole groups of so many adjacent rows: a strided split does
        not."""
        self.in_order = True
        """Whether the microbatches' rows, one microbatch after the other, are the batch."""
        self.mesh_axes: frozenset[str] = frozenset()
        """Inside a program for one device, the mesh axes over which the batch is sharded."""
        self.outer_axes: frozenset[str] = frozenset()
        """Around the program, the mesh axes over which the batch is sharded too: it sees one
        device's share."""
        self.untyped_axes: frozenset[str] = frozenset()
        """Those of `outer_axes` along which JAX does not track what differs between devices."""
        self.in_parts = False
        """Whether the program is a step of a loop over parts of the batch that are cut by place."""
        self.calls: tuple[Enclosing, ...] = ()
        self.counts: Counter[str] = Counter()
        self.sites: dict[Addend, Site] = {}
        """Where each addend of a total was first seen."""
        self.sized: Site | None = None
        """Where rows were first divided or multiplied by the number of examples."""
        self.weights: dict[int, Site] = {}
        """Where each total first divides."""
        self.summed_axes: dict[Frame, tuple[str, ...]] = {}
        """The axes, other than the loop's, that are summed over at a line."""
        self.derivatives: dict[tuple[int, tuple[bool, ...]], Any] = {}
        """Backward passes of the user's own rules, by the identity of their equation and by which
        operands move."""
        self.checks_derivatives = True
        self.may_be_nan: Callable[[], bool] = lambda: True
        """Whether a number of the program or of its arguments is NaN."""
        self.is_finite: Callable[[], bool] = lambda: False
        """Whether the arguments are known, unlike tracers of ``jax.jit``, and finite."""

    def site(self, op: Op) -> Site:
        """Where the equation is."""
        return Site(op.eqn, self.calls)

    @contextlib.contextmanager
    def inside(self, op: Op, body: jex.Jaxpr, *, cached: bool = False) -> Iterator[None]:
        """Walk a body of `op`; `cached` says that JAX may share it between callers."""
        file = getattr(getattr(body, "debug_info", None), "func_filename", None) or ""
        before = self.calls
        self.calls = (*before, Enclosing(op.eqn, cached and is_library(file)))
        try:
            yield
        finally:
            self.calls = before

    @contextlib.contextmanager
    def over_parts(self, *, taken: bool) -> Iterator[None]:
        """Walk a step of a loop, which may be one over parts of the batch."""
        before = self.in_parts
        self.in_parts = before or taken
        try:
            yield
        finally:
            self.in_parts = before

    def note_axes(self, op: Op, axes: Iterable[object]) -> None:
        """Note the axes that a collective names, for what is said of its line."""
        if (frame := self.site(op).frame) is not None:
            self.summed_axes[frame] = tuple(sorted(name for name in axes if isinstance(name, str)))

    def growth(self, shapes: tuple[Shape, Shape], axes: Sequence[int]) -> Scale:
        """The factor that a sum of equal entries over `axes` brings."""
        return Scale(self.sizes.power(*lengths(shapes, axes)))

    # -- faults ------------------------------------------------------------------------------------

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
        site, order = self.site(op), len(self.faults) + 1
        key = (id(op.eqn), tuple(id(call.eqn) for call in self.calls), kind)
        found = Fault(kind, origin or site, site, note, hoistable, fix, order=order)
        return self.faults.setdefault(key, found)

    def declared(self, op: Op, kind: FaultKind, note: str) -> Fault:
        """A fault that the call announces itself."""
        site, order = self.site(op), len(self.faults) + 1
        found = Fault(kind, site, site, note, declared=True, order=order)
        return self.faults.setdefault(("declared", kind, note), found)

    def couple(
        self, op: Op, ins: Sequence[Value], *, kind: FaultKind = FaultKind.COUPLING, note: str = "",
        layout: Layout | None = None, fix: str = "",
    ) -> Value:  # fmt: skip
        """The result of an equation at which examples meet; rows where `layout` says so.

        Nothing new is reported if the operands are statistics that are wrong already.
        """
        summaries = [v for v in ins if v.summary]
        met = summaries or ins
        origin = origin_of(met)
        kinds = {fault.kind for fault in faults_of(summaries)}
        statistics = all(v.kind is Kind.STATISTIC for v in summaries)
        faults: frozenset[Fault] = frozenset()
        known = statistics and not kinds.isdisjoint(_CAUSES)
        if not known and FaultKind.UNKNOWN not in kinds:
            note = note or (_OF_ONE_MICROBATCH if summaries else "examples meet")
            hoistable = not any_params(met)
            fault = self.fault(op, kind, note, origin=origin, hoistable=hoistable, fix=fix)
            faults = frozenset([fault])
        if layout is not None:
            return rows(layout, faults=faults)
        return statistic(origin or self.site(op), faults=faults)

    def unknown(self, op: Op, note: str) -> Value:
        """The result of an equation that the analysis cannot follow."""
        return statistic(self.site(op), faults=frozenset([self.fault(op, FaultKind.UNKNOWN, note)]))
