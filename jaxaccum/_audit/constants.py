"""What the constants of a program are at both batch sizes, and the numbers that tell which values
are equal.

8      16       the batch size to the power 1
3.0    3.0      a constant
[0 1]  [0 1 2]  the positions of the examples
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxaccum._audit.folding import LARGEST, is_arange, is_numeric, may_be_key, same
from jaxaccum._audit.lattice import (
    IRREGULAR,
    Fault,
    FaultKind,
    Index,
    Layout,
    Scale,
    Sizes,
    Value,
    fixed,
)


class Constants:
    """The constants of a walk, and its numbers of equal values."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.name_of: Callable[[Any], str | None] = lambda constant: None
        """The name of an array that the loss closes over."""
        self._fresh = 0
        self._numbers: dict[Any, int] = {}
        self.faults: dict[Any, Fault] = {}

    def fresh(self) -> int:
        """The number of a value like no other."""
        self._fresh += 1
        return self.number_of(("fresh", self._fresh))

    def number_of(self, key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def constant(self, a: Any, b: Any) -> Value:
        """A constant of the program, `a` at the first size and `b` at the second."""
        value = self._constant(a, b)
        name = self.name_of(a) if may_be_key(a) else None
        return value if name is None else dataclasses.replace(value, closure=name)

    def _constant(self, a: Any, b: Any) -> Value:
        if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
            one = getattr(a, "size", 0) == 1
            return fixed(
                Scale() if a is b else IRREGULAR,
                number=self.number_of(("traced", id(a))),
                scalar=one,
            )
        if not hasattr(a, "dtype") or jnp.issubdtype(a.dtype, "O") or jnp.ndim(a) == 0:
            return self._scalar(a, b)
        if np.shape(a) == np.shape(b):
            return self._array(a, b)
        return self._table(a, b)

    def _scalar(self, a: Any, b: Any) -> Value:
        if not is_numeric(a):
            return fixed(Scale() if same(a, b) else IRREGULAR, number=self.fresh(), scalar=True)
        power = self.sizes.power(a, b)
        known = np.asarray(a).item() if power == 0 else None
        dtype = str(getattr(a, "dtype", type(a)))
        number = self.number_of(
            ("literal", str(a), dtype) if power == 0 else ("literals", str(a), str(b))
        )
        return fixed(
            Scale(power), known=known, scalar=True, number=number, at=(np.asarray(a), np.asarray(b))
        )

    def _array(self, a: Any, b: Any) -> Value:
        """A constant array of the same shape at both sizes."""
        if not is_numeric(a) or a.size > LARGEST or a.size == 0:
            return fixed(Scale() if same(a, b) else IRREGULAR, number=self.fresh())
        at = (np.asarray(a), np.asarray(b))
        if all(np.all(x == x.flat[0]) for x in at):
            uniform = self._scalar(at[0].flat[0], at[1].flat[0])
            return dataclasses.replace(uniform, number=self.fresh(), at=at)
        return fixed(Scale() if same(a, b) else IRREGULAR, number=self.fresh(), at=at)

    def _table(self, a: Any, b: Any) -> Value:
        """A constant array of the batch's size: uniform, or a row for each place."""
        a, b = np.asarray(a), np.asarray(b)
        if (
            a.size
            and b.size
            and is_numeric(a)
            and np.all(a == a.flat[0])
            and np.all(b == b.flat[0])
        ):
            return dataclasses.replace(self._scalar(a.flat[0], b.flat[0]), number=self.fresh())
        if is_arange(a, self.sizes.first) and is_arange(b, self.sizes.second):
            return Value(index=Index.ROW, layout=Layout((0,)))
        note = "a constant array has a row for each place in the batch"
        fault = Fault(FaultKind.POSITION, None, None, note)
        return fixed(
            faults=frozenset([self.faults.setdefault((note, a.shape), fault)]), number=self.fresh()
        )
