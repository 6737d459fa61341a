"""One equation of a program, as it was traced at both batch sizes.

An axis whose length is the same at both sizes has nothing to do with the batch. An axis whose
length differs "varies": either the examples lie along it, or the value is uniform along it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from jaxaccum._audit.lattice import Value

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """One equation, as traced at both sizes."""

    eqn: Any
    """At the first size. A `jax.extend.core.JaxprEqn`, whose abstract values JAX types too loosely
    to read a shape of."""
    other: Any
    """At the second size."""

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


def both_shapes(v: Any, w: Any) -> tuple[Shape, Shape]:
    """The shapes of a variable at both sizes; of what is not an array, such as a token, ()."""
    return getattr(v.aval, "shape", ()), getattr(w.aval, "shape", ())


def varying(shapes: tuple[Shape, Shape]) -> list[int]:
    """The axes whose size is not the same at both batch sizes."""
    return [axis for axis, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b]


def beyond(shapes: tuple[Shape, Shape], x: Value) -> list[int]:
    """The axes that vary and hold no rows of `x`."""
    own = x.layout.axes if x.rows and x.layout is not None else ()
    return [axis for axis in varying(shapes) if axis not in own]


def lengths(shapes: tuple[Shape, Shape], axes: Iterable[int]) -> tuple[int, int]:
    """How many entries lie along `axes`, at each size."""
    first, second = shapes
    axes = tuple(axes)
    return _length(first, axes), _length(second, axes)


def _length(shape: Shape, axes: Iterable[int]) -> int:
    return math.prod(shape[axis] for axis in axes)
