"""By which power of the batch size one number becomes another.

A program is traced at two batch sizes. A number that follows from the batch size has one value at
each, and these two tell the law. With 8 and 4 examples::

    8      4       batch_size ** 1      len(x)
    0.125  0.25    batch_size ** -1     1 / len(x)
    3.0    3.0     batch_size ** 0      a constant
    7      3       none                 len(x) - 1

Only half-integer powers from -4 to 4 count as a law; any two positive numbers would follow some
power.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import SupportsComplex

import jax.numpy as jnp
import numpy as np

_Number = SupportsComplex | complex
Power = Fraction | None
"""A number proportional to ``batch_size ** power``; None where it follows no such law."""
_CONSTANT = Fraction(0)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The two batch sizes at which the program was traced."""

    first: int
    second: int

    def power(self, a: _Number, b: _Number) -> Power:
        """The power of the batch size by which `a` at the first size becomes `b` at the second."""
        try:
            first, second = complex(a), complex(b)
        except (TypeError, ValueError):
            return None
        if first == second or (first != first and second != second):
            return _CONSTANT
        apart = _tolerance(max(_spacing(a), _spacing(b)))
        return self._power(first, second, apart)

    def _power(self, a: complex, b: complex, apart: float) -> Power:
        if not _is_regular(a) or not _is_regular(b):
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

    def entries(self, first: int, second: int) -> int:
        """How many entries for each example an axis of these lengths holds; 0 if it has others."""
        count = first // self.first
        return count if (first, second) == (count * self.first, count * self.second) else 0

    def divided(self, by: int) -> Sizes | None:
        """The sizes of one of `by` equal shares; None where they do not divide."""
        if self.first % by or self.second % by:
            return None
        return Sizes(self.first // by, self.second // by)


def _spacing(x: object) -> float:
    """How far apart, relatively, the numbers of a constant's dtype are."""
    dtype = jnp.dtype(getattr(x, "dtype", float))
    if jnp.issubdtype(dtype, jnp.inexact):
        return float(jnp.finfo(dtype).eps)
    return float(np.finfo(float).eps)


def _tolerance(spacing: float) -> float:
    """How much a ratio of constants may be off: by some roundings, or by one where numbers are 1 %
    apart."""
    return spacing if spacing > 1e-4 else 8 * spacing


def _is_regular(x: complex) -> bool:
    return x != 0 and math.isfinite(abs(x))


def _is_small_integer(x: complex) -> bool:
    """Whether every floating dtype with 8 bits of mantissa, as bfloat16, holds the number
    exactly."""
    return x.imag == 0 and x.real == round(x.real) and abs(x.real) <= 256
