"""What the constants of a program are at both batch sizes, and the numbers that tell which values
are equal.

8      16       the batch size to the power 1
3.0    3.0      a constant
[0 1]  [0 1 2]  the positions of the examples
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import jax.core
import jax.numpy as jnp
import numpy as np

from jaxaccum._audit.folding import LARGEST, Constant, is_arange, is_numeric, may_be_key, same
from jaxaccum._audit.lattice import (
    IRREGULAR,
    Fault,
    FaultKind,
    Scale,
    Sizes,
    Value,
    fixed,
    own_places,
)
from jaxaccum._audit.nans import are_finite


class Constants:
    """The constants of a walk, and its numbers of equal values."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.name_of: Callable[[Constant], str | None] = lambda constant: None
        """The name of an array that the loss closes over."""
        self._fresh = 0
        self._numbers: dict[Hashable, int] = {}
        self._written: dict[Hashable, Value] = {}
        self.faults: dict[Hashable, Fault] = {}

    def fresh(self) -> int:
        """The number of a value like no other."""
        self._fresh += 1
        return self.number_of(("fresh", self._fresh))

    def number_of(self, key: Hashable) -> int:
        """The number of a value, the same whenever its key comes again."""
        return self._numbers.setdefault(key, len(self._numbers))

    def constants(self, first: Iterable[Constant], second: Iterable[Constant]) -> list[Value]:
        """Those of a program, in pairs of one at each size."""
        return [self.constant(a, b) for a, b in zip(first, second, strict=False)]

    def written(self, a: Constant, b: Constant) -> Value:
        """A number that is written in an equation, `a` at the first size and `b` at the second."""
        key = (_bits(a), _bits(b))
        if (known := self._written.get(key)) is not None:
            return known
        value = self.constant(a, b)
        if np.ndim(a) == 0 and not may_be_key(a):
            self._written[key] = value
        return value

    def constant(self, a: Constant, b: Constant) -> Value:
        """A constant of the program, `a` at the first size and `b` at the second."""
        value = self._constant(a, b)
        value = value.like(never_nan=value.at is not None and are_finite(value.at))
        name = self.name_of(a) if may_be_key(a) else None
        return value if name is None else value.like(closure=name)

    def _constant(self, a: Constant, b: Constant) -> Value:
        if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
            one = getattr(a, "size", 0) == 1
            number = self.number_of(("traced", id(a)))
            return fixed(_constant_if(a is b), number=number, scalar=one)
        if not hasattr(a, "dtype") or jnp.issubdtype(a.dtype, "O") or jnp.ndim(a) == 0:
            return self._scalar(a, b)
        if np.shape(a) == np.shape(b):
            return self._array(a, b)
        return self._table(a, b)

    def _scalar(self, a: Constant, b: Constant) -> Value:
        if not is_numeric(a):
            return fixed(_constant_if(same(a, b)), number=self.fresh(), scalar=True)
        power, at = self.sizes.power(a, b), (np.asarray(a), np.asarray(b))
        if power != 0:
            number = self.number_of(("literals", str(a), str(b)))
            return fixed(Scale(power), scalar=True, number=number, at=at)
        number = self.number_of(("literal", str(a), str(getattr(a, "dtype", type(a)))))
        return fixed(Scale(power), known=at[0].item(), scalar=True, number=number, at=at)

    def _array(self, a: Constant, b: Constant) -> Value:
        """A constant array of the same shape at both sizes."""
        if not is_numeric(a) or a.size > LARGEST or a.size == 0:
            return fixed(_constant_if(same(a, b)), number=self.fresh())
        first, second = at = (np.asarray(a), np.asarray(b))
        if _is_uniform(first) and _is_uniform(second):
            uniform = self._scalar(first.flat[0], second.flat[0])
            return uniform.like(number=self.fresh(), at=at)
        return fixed(_constant_if(same(a, b)), number=self.fresh(), at=at)

    def _table(self, a: Constant, b: Constant) -> Value:
        """A constant array of the batch's size: uniform, or a row for each place."""
        first, second = np.asarray(a), np.asarray(b)
        both_filled = first.size and second.size
        if both_filled and is_numeric(first) and _is_uniform(first) and _is_uniform(second):
            uniform = self._scalar(first.flat[0], second.flat[0])
            return uniform.like(number=self.fresh())
        inner = self.sizes.entries(first.size, second.size)
        if inner and is_arange(first) and is_arange(second):
            return own_places(0, inner)
        note = "a constant array has a row for each place in the batch"
        found = Fault(FaultKind.POSITION, None, None, note)
        fault = self.faults.setdefault((note, first.shape), found)
        return fixed(faults=frozenset([fault]), number=self.fresh())


def _bits(x: Constant) -> Hashable:
    """What tells one number of a program from another: 0.0 is not -0.0."""
    dtype = getattr(x, "dtype", None)
    return (type(x), repr(x)) if dtype is None else (dtype, np.asarray(x).tobytes())


def _constant_if(alike: bool) -> Scale:
    """The scale of a constant, if it is alike at both sizes."""
    return Scale() if alike else IRREGULAR


def _is_uniform(x: np.ndarray) -> bool:
    """Whether all entries are one number; 0.0 is not -0.0."""
    return x.tobytes() == x.flat[0].tobytes() * x.size
