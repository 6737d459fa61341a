"""The loss traced at the sizes at which it will run: shapes only, nothing is computed."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum import _arguments, _check
from jaxaccum._arguments import Layout, Role, Slot
from jaxaccum._audit.sources import is_library
from jaxaccum._batch import Partition
from jaxaccum._outputs import loss_and_aux
from jaxaccum._program import example_keys
from jaxaccum._tags import Mean, is_tag
from jaxaccum._tree import is_array, leaves_with_names
from jaxaccum._types import Fun, PyTree


@dataclasses.dataclass(frozen=True)
class Output:
    """One leaf of what the loss returned: its tag's name ("" without one), its arrays, and whether it is aux."""

    name: str
    tag: str
    aux: bool
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Traced:
    """The program at one size; of a `Mean`, a total and a weight stand together."""

    closed: Any
    outputs: tuple[Output, ...]
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the loss is called with, as shapes, and how the batch is divided."""

    layout: Layout
    shapes: tuple[Any, ...]
    partition: Partition
    given: tuple[Any, ...] = ()
    """The leaves as they came."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """One an array."""
        return self.layout.slots

    def at(self, size: int) -> list[Any]:
        """The shapes of the arrays for a batch of `size` examples."""
        return [self._resized(slot, x, size) for slot, x in zip(self.slots, self.shapes, strict=True)]

    def _resized(self, slot: Slot, x: Any, size: int) -> Any:
        if slot.role is Role.ROWS:
            return jax.ShapeDtypeStruct((*x.shape[: slot.axis], size, *x.shape[slot.axis + 1 :]), x.dtype)
        if slot.role is Role.EXAMPLE_KEY:
            return jax.eval_shape(example_keys, x, jax.ShapeDtypeStruct((size,), jnp.int32))
        return x


def read(args: Sequence[Any], in_axes: Any, num_microbatches: int) -> Arguments:
    """The arguments, which may be shapes, as `value_and_grad` would read them."""
    args = tuple(jax.tree.map(_as_array, arg) if i == 0 else arg for i, arg in enumerate(args))
    leaves, treedef = jax.tree.flatten(args)
    places = [i for i, x in enumerate(leaves) if is_array(x) or isinstance(x, jax.ShapeDtypeStruct)]
    layouts: list[Layout] = []

    def arrays(given: list[Any]) -> list[Any]:
        full = list(leaves)
        for i, x in zip(places, given, strict=True):
            full[i] = x
        layout, read = _arguments.read(treedef.unflatten(full), {}, in_axes)
        layouts.append(layout)
        return read

    shapes = jax.eval_shape(arrays, [leaves[i] for i in places])
    size = _arguments.batch_size(layouts[0].slots, shapes)
    partition = _check.partition(size, num_microbatches=num_microbatches, microbatch_size=None, split="contiguous")
    return Arguments(layouts[0], tuple(shapes), partition, tuple(leaves))


def _as_array(x: Any) -> Any:
    """A Python number of the first argument is differentiated, and so traced."""
    return jnp.asarray(x) if isinstance(x, float | complex) else x


def trace(fun: Fun, arguments: Arguments, size: int, *, axis: tuple[str, int], has_aux: bool) -> Traced:
    """`fun` on a batch of `size` examples, under an axis of the loop's name."""
    outputs: list[Output] = []
    counts: list[int] = []

    def flat(*arrays: Any) -> list[Any]:
        args, kwargs = arguments.layout.build(list(arrays))
        values: list[Any] = []
        loss, aux = loss_and_aux(fun(*args, **kwargs), has_aux)
        for tree, name, is_aux in ((loss, "the loss", False), (aux, "aux", True)):
            for leaf_name, leaf in leaves_with_names(tree, name, is_leaf=is_tag):
                for output, parts in _parts(leaf_name, leaf, is_aux):
                    outputs.append(output)
                    counts.append(len(parts))
                    values.extend(parts)
        return values

    try:
        closed = jax.make_jaxpr(flat, axis_env=[axis])(*arguments.at(size))
    except NameError as error:
        _unbound(error)
        raise
    return Traced(closed, tuple(outputs), tuple(counts))


def _unbound(error: NameError) -> None:
    """Say of JAX's error for an axis without a meaning what to do; a name that Python misses is the user's."""
    if error.name is not None:  # Python's own errors hold the name
        return
    stack = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in stack if not is_library(frame.filename)]
    where = f"{own[-1].filename}:{own[-1].lineno}" if own else "its program"
    name = re.search(r"axis name: (\S+?)\.?(\s|$)", str(error))
    axis = f"the axis {name[1]!r}" if name else "an axis"
    raise ValueError(
        f"the loss sums over {axis} (at {where}), and nothing around the audit gives that name to an axis; call the "
        "audit where the loss runs, inside the jax.pmap, jax.vmap or jax.shard_map with that axis, or leave the name "
        "out of the model."
    ) from error


def _parts(name: str, leaf: Any, aux: bool) -> list[tuple[Output, list[Any]]]:
    """The arrays of one output."""
    record: Callable[[str, str, Any], Output] = lambda name, tag, x: Output(name, tag, aux, jnp.shape(x))
    if isinstance(leaf, Mean):
        totals = leaves_with_names(leaf.total, name)
        weights = jax.tree.leaves(leaf.weight)
        pairs = zip(totals, weights * len(totals) if len(weights) == 1 else weights, strict=True)
        return [(record(part, "Mean", total), [total, weight]) for (part, total), weight in pairs]
    if is_tag(leaf):
        content: PyTree = getattr(leaf, "state", None) if hasattr(leaf, "state") else leaf.x
        return [(record(part, type(leaf).__name__, x), [x]) for part, x in leaves_with_names(content, name)]
    return [(record(name, "", leaf), [leaf])]
