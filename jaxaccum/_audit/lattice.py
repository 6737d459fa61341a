"""What the audit knows of a value: how it depends on the batch, where its examples lie, and what
normalizes it."""

from __future__ import annotations

import dataclasses
import enum
import math
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxaccum._audit.sources import Site

Power = Fraction | None
"""A number proportional to ``batch_size ** power``; None where it follows no such law."""


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
    of examples.
    """

    axes: tuple[int, ...]
    outer: int = 1
    inner: int = 1
    looped: bool = False

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


@dataclasses.dataclass(frozen=True)
class Scale:
    """A factor common to all examples: a power of the batch size times powers of totals over the
    batch."""

    power: Power = Fraction(0)
    weights: frozenset[Weight] = frozenset()

    def __mul__(self, other: Scale) -> Scale:
        power = None if self.power is None or other.power is None else self.power + other.power
        return Scale(power, _multiplied(self.weights, other.weights))

    def inverse(self) -> Scale:
        """1 / scale."""
        weights = frozenset(dataclasses.replace(w, exponent=-w.exponent) for w in self.weights)
        return Scale(None if self.power is None else -self.power, weights)

    def guarded(self) -> Scale:
        """The scale whose weights are kept from being 0, by a maximum, a small addend or a
        choice."""
        return Scale(
            self.power, frozenset(dataclasses.replace(w, guarded=True) for w in self.weights)
        )

    @property
    def trivial(self) -> bool:
        """Whether it is 1, or any constant."""
        return self.power == 0 and not self.weights


def _multiplied(one: frozenset[Weight], two: frozenset[Weight]) -> frozenset[Weight]:
    exponents: dict[int, int] = {}
    guarded: dict[int, bool] = {}
    for w in (*one, *two):
        exponents[w.number] = exponents.get(w.number, 0) + w.exponent
        guarded[w.number] = guarded.get(w.number, False) or w.guarded
    return frozenset(Weight(n, e, guarded[n]) for n, e in exponents.items() if e or guarded[n])


UNIT = Scale()
IRREGULAR = Scale(None)


@dataclasses.dataclass(frozen=True)
class Term:
    """One addend of a value: its scale, and whether it is independent of the batch."""

    scale: Scale = UNIT
    fixed: bool = False

    def times(self, scale: Scale) -> Term:
        """The addend under a further factor."""
        return Term(self.scale * scale, self.fixed)


PLAIN = frozenset([Term()])


class FaultKind(enum.StrEnum):
    """What stands between a loss and its accumulation."""

    COUPLING = "coupling"
    PAIRWISE = "pairwise"
    SELECTION = "selection"
    STATE = "state"
    BATCH_SIZE = "batch_size"
    DERIVATIVE = "derivative"
    POSITION = "position"
    RANDOM = "random"
    UNKNOWN = "unknown"
    COLLECTIVE = "collective"
    ASSUMPTION = "assumption"


CONSEQUENCES = (FaultKind.BATCH_SIZE, FaultKind.POSITION, FaultKind.DERIVATIVE)
"""What is no news of a value that is wrong already."""
HARMLESS = (FaultKind.RANDOM, FaultKind.COLLECTIVE, FaultKind.ASSUMPTION)
"""What leaves a verdict as it is."""


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
    STEP = "the step of a loop over the examples"
    MICROBATCH = "the microbatch's place"
    START = "the place of the microbatch's first example in the batch"
    GATHERED = (
        "no integer: all microbatches' rows, which reshape or sum to what no partition changes"
    )


@dataclasses.dataclass(frozen=True)
class Value:
    """One variable of the program, at every batch size at once."""

    kind: Kind = Kind.FIXED
    layout: Layout | None = None
    terms: frozenset[Term] = PLAIN
    params: bool = False
    """Whether it depends on the parameters."""
    faults: frozenset[Fault] = frozenset()
    origin: Site | None = None
    """The reduction, or the split of the batch axis, that a coupling would start from."""
    number: int = -1
    """Equal numbers mean equal values; -1 until numbered."""
    index: Index | None = None
    columns: tuple[bool, ...] = ()
    """For an array of indices: which entries of its last axis are the example's own place."""
    known: Any = None
    """The number that it holds everywhere, at both sizes."""
    at: tuple[np.ndarray, np.ndarray] | None = dataclasses.field(default=None, compare=False)
    """Its numbers at each of the two sizes, where they follow from shapes alone and are few."""
    closure: str = ""
    """The name of the key that it is made of, where `fun` closes over one."""
    overwritten: bool = False
    """Whether it is an argument whose "gradients" combine by maximum, so that no rule can mix
    them."""
    scalar: bool = False
    """Whether all of its entries are one number."""
    weight: Scale | None = None
    """As a divisor: the batch total that it is, up to a guard and a constant."""
    extremum: str | None = None
    """Whether it is the maximum or the minimum over the examples of something of theirs."""
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
    def scale(self) -> Scale:
        """The factor common to its addends; irregular where they differ."""
        scales = {term.scale for term in self.terms}
        return scales.pop() if len(scales) == 1 else IRREGULAR

    @property
    def zero(self) -> bool:
        """Whether it is known to be 0."""
        return self.known is not None and self.known == 0

    def but(self, **changes: Any) -> Value:
        """A new value like this one: what identified the old one does not carry over unless it is
        given."""
        reset: dict[str, Any] = {
            "number": -1, "index": None, "columns": (), "known": None, "at": None, "weight": None,
            "extremum": None, "root": None, "compares": frozenset(), "scalar": False,
            "overwritten": False,
        }  # fmt: skip
        return self.like(**reset | changes)

    def like(self, **changes: Any) -> Value:
        """A copy with other fields, as by ``dataclasses.replace``, but quick: each equation makes
        some."""
        other = object.__new__(Value)
        other.__dict__.update(self.__dict__, **changes)
        return other

    def scaled(self, scale: Scale) -> Value:
        """Its addends under a further factor."""
        return self.but(
            terms=frozenset(term.times(scale) for term in self.terms), scalar=self.scalar
        )


def fixed(scale: Scale = UNIT, **fields: Any) -> Value:
    """A value that is independent of the batch."""
    return Value(terms=frozenset([Term(scale)]), **fields)


def rows(layout: Layout, **fields: Any) -> Value:
    """A value with one part per example."""
    return Value(Kind.ROWS, layout, **fields)


def total(site: Site, terms: frozenset[Term], **fields: Any) -> Value:
    """A sum over the examples, taken at `site`."""
    return Value(Kind.TOTAL, terms=terms, origin=site, **fields)


def statistic(site: Site | None, **fields: Any) -> Value:
    """A function of the whole batch that is no sum."""
    return Value(Kind.STATISTIC, origin=site, **fields)


def _spacing(x: Any) -> float:
    """How far apart, relatively, the numbers of a constant's dtype are."""
    dtype = jnp.dtype(getattr(x, "dtype", float))
    return (
        float(jnp.finfo(dtype).eps)
        if jnp.issubdtype(dtype, jnp.inexact)
        else float(np.finfo(float).eps)
    )


def _tolerance(spacing: float) -> float:
    """How much a ratio of constants may be off: by some roundings, or by one where numbers are 1 %
    apart."""
    return spacing if spacing > 1e-4 else 8 * spacing


def _is_small_integer(x: complex) -> bool:
    """Whether every floating dtype with 8 bits of mantissa, as bfloat16, holds the number
    exactly."""
    return x.imag == 0 and x.real == round(x.real) and abs(x.real) <= 256


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The two batch sizes at which the program was traced."""

    first: int
    second: int

    def power(self, a: Any, b: Any) -> Power:
        """The power of the batch size by which `a` at the first size becomes `b` at the second."""
        apart = _tolerance(max(_spacing(a), _spacing(b)))
        try:
            a, b = complex(a), complex(b)
        except (TypeError, ValueError):
            return None
        if a == b or (a != a and b != b):
            return Fraction(0)
        if a == 0 or b == 0 or not math.isfinite(abs(a)) or not math.isfinite(abs(b)):
            return None
        ratio = b / a
        if ratio.imag or ratio.real <= 0:
            return None
        base = self.second / self.first
        power = Fraction(round(2 * math.log(ratio.real) / math.log(base)), 2)
        whole = power.denominator == 1 and _is_small_integer(a) and _is_small_integer(b)
        apart = 0.0 if whole else apart
        close = abs(ratio.real / base ** float(power) - 1) <= apart
        return power if close and abs(power) <= 4 else None

    def divided(self, by: int) -> Sizes | None:
        """The sizes of one of `by` equal shares; None where they do not divide."""
        if self.first % by or self.second % by:
            return None
        return Sizes(self.first // by, self.second // by)
