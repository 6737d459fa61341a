"""What the audit knows of a value: how it depends on the batch, where its examples lie, and what
it is divided by.

The problem. The microbatches' gradients add up to the full batch's if each term of the loss is a
sum over examples, divided by one number that all microbatches share. Which losses are of this form?

The idea. Forget the numbers of a variable, and keep what decides this question, a `Value`. Its kind
says how it depends on the batch::

    FIXED      independent of the batch                    parameters, 0.1, len(x)
    ROWS       one part per example, along `layout`        x, x @ w, (x @ w - y) ** 2
    TOTAL      a sum over the examples                     sum(x), sum(mask), mean(x)
    STATISTIC  another function of the whole batch         sum(x) ** 2, max(x)

A total is a sum of addends, its `terms`. Each has a `Scale`, the factor that all examples share:
``batch_size ** power`` times powers of other totals. And a term is `fixed` if it comes from a value
that is independent of the batch.

A mean loss, step by step (`x` has one row per example)::

    r = (x @ w) ** 2               ROWS
    s = sum(r)                     TOTAL, its one term of scale 1
    n = len(x)                     FIXED (whatever the examples are), of scale batch_size ** 1
    s / n                          TOTAL, its one term of scale batch_size ** -1: a mean
    s / n + 0.1 * sum(w**2)        a second term, fixed and of scale 1: still a mean
    s + 0.1 * sum(w**2)            scales 1 and 1, and the latter fixed: the penalty would count
                                   once per microbatch
    s / sum(mask)                  the scale holds the total sum(mask) to the power -1: a ratio

A loss with a BatchNorm::

    h = x @ w                      ROWS
    m = mean(h)                    TOTAL of scale batch_size ** -1
    h - m                          ROWS, with a fault of kind `coupling`: each microbatch would
                                   subtract a total of its own
    mean((h - m) ** 2)             a mean, with the fault that it inherits: COUPLED
    pmean(m, "microbatch")         FIXED: the full batch's, which all microbatches share
    mean((h - that) ** 2)          a mean without a coupling: exact

A value that is wrong carries its `Fault`, and so does every value computed from it. The worst fault
of the output decides the verdict. Without faults its kind and its terms decide (`judge`).

The cost. A few small immutable objects per equation. The terms of a value are a set, so that a loop
that adds equal terms has a fixed point.

The weakness. The lattice knows two kinds of factors, powers of the batch size and of totals, and no
algebra: ``s / (n + 1)`` is neither, and ``h - m + m`` is reported as coupled, although it is `h`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np

from jaxaccum._audit.sizes import Power
from jaxaccum._audit.sizes import Sizes as Sizes
from jaxaccum._audit.sources import Site


class Kind(enum.Enum):
    """How a value depends on the batch. Each kind includes those before it in generality, not in
    order."""

    FIXED = "independent of the batch: uniform along every axis whose size is the batch's"
    ROWS = "one part per example"
    TOTAL = "a sum over the examples"
    STATISTIC = "another function of the whole batch"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the examples lie: on one axis of ``outer * batch_size * inner``, on two that split it,
    or in a loop.

    No axis: one example's part, inside a loop over the examples. `looped`, with an axis: one chunk
    of examples. `by_place`: the first axis holds parts of the batch (see `cut_by_place`), or the
    chunk is one.
    """

    axes: tuple[int, ...]
    outer: int = 1
    inner: int = 1
    looped: bool = False
    by_place: bool = False

    def at(self, *axes: int) -> Layout:
        """The same examples on other axes."""
        return dataclasses.replace(self, axes=axes)

    @property
    def plain(self) -> bool:
        """Whether one axis holds one entry per example."""
        return len(self.axes) == 1 and (self.outer, self.inner, self.looped) == (1, 1, False)


ONE_EXAMPLE = Layout((), looped=True)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A total over the batch that scales a value: which one, to what power, and whether it is
    guarded against 0."""

    number: int
    exponent: int = 1
    guarded: bool = False

    def inverse(self) -> Weight:
        """1 / weight."""
        return dataclasses.replace(self, exponent=-self.exponent)

    def with_guard(self) -> Weight:
        """The weight, kept from being 0."""
        return dataclasses.replace(self, guarded=True)

    def times(self, other: Weight) -> Weight:
        """The product of two powers of one total."""
        guarded = self.guarded or other.guarded
        return Weight(self.number, self.exponent + other.exponent, guarded)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A factor common to all examples: a power of the batch size times powers of totals over the
    batch."""

    power: Power = Fraction(0)
    weights: frozenset[Weight] = frozenset()

    def __mul__(self, other: Scale) -> Scale:
        if other.trivial:
            return self
        if self.trivial:
            return other
        power = None if self.power is None or other.power is None else self.power + other.power
        return Scale(power, _multiplied(self.weights, other.weights))

    def inverse(self) -> Scale:
        """1 / scale."""
        weights = frozenset(map(Weight.inverse, self.weights))
        return Scale(None if self.power is None else -self.power, weights)

    def guarded(self) -> Scale:
        """The scale whose weights are kept from being 0, by a maximum, a small addend or a
        choice."""
        return Scale(self.power, frozenset(map(Weight.with_guard, self.weights)))

    @property
    def trivial(self) -> bool:
        """Whether it is 1, or any constant."""
        return self is UNIT or (self.power == 0 and not self.weights)


def _multiplied(one: frozenset[Weight], two: frozenset[Weight]) -> frozenset[Weight]:
    found: dict[int, Weight] = {}
    for w in (*one, *two):
        known = found.get(w.number)
        found[w.number] = w if known is None else known.times(w)
    return frozenset(w for w in found.values() if w.exponent or w.guarded)


UNIT = Scale()
IRREGULAR = Scale(None)


@dataclasses.dataclass(frozen=True)
class Addend:
    """One addend of a value: its scale, and whether it is independent of the batch."""

    scale: Scale = UNIT
    fixed: bool = False

    def times(self, scale: Scale) -> Addend:
        """The addend under a further factor."""
        return Addend(self.scale * scale, self.fixed)


PLAIN = frozenset([Addend()])


class FaultKind(enum.StrEnum):
    """What keeps a loss from being accumulated."""

    COUPLING = "coupling"
    PAIRWISE = "pairwise"
    SELECTION = "selection"
    STATE = "state"
    BATCH_SIZE = "batch_size"
    DERIVATIVE = "derivative"
    POSITION = "position"
    RANDOM = "random"
    UNKNOWN = "unknown"
    GATHERED = "gathered"
    COLLECTIVE = "collective"
    ASSUMPTION = "assumption"


CONSEQUENCES = (FaultKind.BATCH_SIZE, FaultKind.POSITION, FaultKind.DERIVATIVE)
"""Faults that only follow where a value is wrong already: they are not reported then."""
HARMLESS = (FaultKind.RANDOM, FaultKind.COLLECTIVE, FaultKind.ASSUMPTION)
"""Faults that leave a verdict as it is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fault:
    """An equation at which examples meet, or at which the analysis gave up; compared by
    identity."""

    kind: FaultKind
    origin: Site | None
    use: Site | None
    note: str
    hoistable: bool = False
    """Whether the statistic does not depend on the parameters, so that it can be computed once,
    before training."""
    fix: str = ""
    """What to write instead, where the kind alone does not say it."""
    declared: bool = False
    """Whether the call says so itself: its key is a KEY, or the state of a random stream."""
    order: int = 0
    """When it was found: a cause comes before its consequences."""


class Index(enum.Enum):
    """An integer that names an example: legitimate where it only says which."""

    ROW = "the example's own place, along the axes of the layout"
    ENTRY = "the place of an entry, along an axis that holds several for each example"
    STEP = "the step of a loop over the examples"
    MICROBATCH = "the microbatch's place"
    START = "the place of the microbatch's first example in the batch"
    GATHERED = (
        "not an integer: all microbatches' rows, which reshape or sum to what no partition changes"
    )


@dataclasses.dataclass(frozen=True)
class Value:
    """One variable of the program, at every batch size at once."""

    kind: Kind = Kind.FIXED
    layout: Layout | None = None
    terms: frozenset[Addend] = PLAIN
    params: bool = False
    """Whether it depends on the parameters."""
    faults: frozenset[Fault] = frozenset()
    origin: Site | None = None
    """The reduction, or the split of the batch axis, that a coupling would start from."""
    number: int = -1
    """Equal numbers mean equal values; -1 until numbered."""
    index: Index | None = None
    columns: tuple[Index | None, ...] = ()
    """For an array of indices: which entries of its last axis are places, and of which kind."""
    known: Any = None
    """The number that it holds everywhere, at both sizes."""
    at: tuple[np.ndarray, np.ndarray] | None = dataclasses.field(default=None, compare=False)
    """Its numbers at each of the two sizes, where they follow from shapes alone and are few."""
    by_order: bool = False
    """Whether it has, or is, places in an order that is not the batch's (`gathered_order`)."""
    own_place: bool = False
    """Whether it is the example's own place in that order, and no function of it."""
    closure: str = ""
    """The name of the key that it is made of, where `fun` closes over one."""
    overwritten: bool = False
    """Whether it is an argument whose "gradients" combine by maximum: no rule can mix them."""
    scalar: bool = False
    """Whether all of its entries are one number."""
    weight: Scale | None = None
    """As a divisor: the batch total that it is, up to a guard and a constant."""
    extremum: str | None = None
    """Whether it is the maximum or the minimum over the examples of something of theirs."""
    never_nan: bool = False
    """Whether it is NaN only where an argument is not finite, or numbers overflow."""
    root: Value | None = None
    """The total that it is the square root of."""
    compares: frozenset[int] = frozenset()
    """For a condition: the totals that it compares with constants, and nothing else."""

    @property
    def fixed(self) -> bool:
        """Whether it is independent of the batch."""
        return self.kind is Kind.FIXED

    @property
    def rows(self) -> bool:
        """Whether it has one part per example."""
        return self.kind is Kind.ROWS

    @property
    def summary(self) -> bool:
        """Whether it is a total or another statistic of the batch."""
        return self.kind in (Kind.TOTAL, Kind.STATISTIC)

    @property
    def placed(self) -> bool:
        """Whether it is a place, or an array of indices that holds places."""
        return self.index is not None or any(self.columns)

    @property
    def plain(self) -> bool:
        """Whether it is one addend of scale 1 that counts with each example."""
        return self.terms is PLAIN or self.terms == PLAIN

    @property
    def scale(self) -> Scale:
        """The factor common to its addends; irregular where they differ."""
        if self.terms is PLAIN:
            return UNIT
        scales = {term.scale for term in self.terms}
        return scales.pop() if len(scales) == 1 else IRREGULAR

    @property
    def zero(self) -> bool:
        """Whether it is known to be 0."""
        return self.known is not None and self.known == 0

    def but(self, **changes: Any) -> Value:
        """A new value like this one: what identified the old one does not carry over unless it is
        given."""
        return self.like(**_UNIDENTIFIED | changes)

    def like(self, **changes: Any) -> Value:
        """A copy with other fields, as by ``dataclasses.replace``, but quick: each equation makes
        some."""
        other = object.__new__(Value)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def scaled(self, scale: Scale) -> Value:
        """Its addends under a further factor."""
        if scale.trivial:
            return self.but(scalar=self.scalar)
        terms = frozenset(term.times(scale) for term in self.terms)
        return self.but(terms=terms, scalar=self.scalar)


_UNIDENTIFIED: dict[str, Any] = {
    "number": -1, "index": None, "columns": (), "known": None, "at": None, "weight": None,
    "extremum": None, "root": None, "compares": frozenset(), "scalar": False,
    "overwritten": False, "never_nan": False,
}  # fmt: skip
"""What a value is called, or known to be, before a rule says so."""
_ANY = Value()


def fixed(scale: Scale = UNIT, **fields: Any) -> Value:
    """A value that is independent of the batch."""
    terms = PLAIN if scale.trivial else frozenset([Addend(scale)])
    return _ANY.like(terms=terms, **fields)


def rows(layout: Layout, **fields: Any) -> Value:
    """A value with one part per example."""
    return _ANY.like(kind=Kind.ROWS, layout=layout, **fields)


def own_places(axis: int, inner: int) -> Value:
    """0, 1, 2, … along an axis that holds `inner` entries for each example."""
    index = Index.ROW if inner == 1 else Index.ENTRY
    return _ANY.like(index=index, layout=Layout((axis,), inner=inner))


def total(site: Site, terms: frozenset[Addend], **fields: Any) -> Value:
    """A sum over the examples, taken at `site`."""
    return _ANY.like(kind=Kind.TOTAL, terms=terms, origin=site, **fields)


def statistic(site: Site | None, **fields: Any) -> Value:
    """A function of the whole batch that is not a sum."""
    return _ANY.like(kind=Kind.STATISTIC, origin=site, **fields)


def is_wrong(faults: Iterable[Fault]) -> bool:
    """Whether one of them changes the verdict."""
    return any(fault.kind not in HARMLESS for fault in faults)


_NO_FAULTS: frozenset[Fault] = frozenset()


def faults_of(values: Iterable[Value]) -> frozenset[Fault]:
    """All faults of some values."""
    found = [v.faults for v in values if v.faults]
    return frozenset[Fault]().union(*found) if found else _NO_FAULTS


def origin_of(values: Iterable[Value]) -> Site | None:
    """The first reduction or split that some values come from."""
    return next((v.origin for v in values if v.origin is not None), None)


def any_params(values: Iterable[Value]) -> bool:
    """Whether one of them depends on the parameters."""
    return any(v.params for v in values)
