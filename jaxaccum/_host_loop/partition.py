"""`partition` gives a host loop its microbatches; `pad_batch` gives every batch one size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._base.trees import is_array, key_impl, leaves_with_names
from jaxaccum._base.types import EXAMPLE_KEY, KEY, Array, Axes, InAxes, PyTree, Sentinel, Split
from jaxaccum._program import argument_slots, validate
from jaxaccum._program.argument_slots import ArgumentTree, Role, Slot
from jaxaccum._program.axes_by_name import check_keywords
from jaxaccum._program.example_keys import example_keys
from jaxaccum._program.microbatches import Partition


def partition(
    *args: Any,
    in_axes: InAxes = (None, 0),
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    split: Split = "contiguous",
    **kwargs: Any,
) -> list[tuple[Any, ...]]:
    """The arguments of every microbatch, as the loop would see them.

    Use them to run one microbatch again, alone, or to feed a host loop. Microbatch i holds the rows
    that follow those of microbatch i - 1; with a strided split it holds the rows i, i + n, …. It
    equals::

        for i, rows in enumerate(np.split(np.arange(batch_size), bounds)):
            yield params, jax.tree.map(lambda x: x[rows], batch)

    Args:
        *args: the arguments of the function.
        in_axes: one entry per argument; a ``KEY`` and an ``EXAMPLE_KEY`` come folded, ``CARRY`` is
            the initial state, and ``BATCH_KEY`` is refused. A dict names keyword arguments, and
            passes positional ones whole.
        num_microbatches: that many, their sizes differing by at most 1, the larger first. This or
            `microbatch_size`.
        microbatch_size: as many microbatches of this size as fit, and one remainder.
        split: ``"contiguous"`` or ``"strided"``.
        **kwargs: the keyword arguments of the function, each of them named in `in_axes`.

    Returns:
        One tuple of arguments for each microbatch; with keyword arguments, one pair ``(args,
        kwargs)``.

    Raises:
        ValueError, TypeError: as `value_and_grad` does for the same options.

    Example:
        >>> import numpy as np, jaxaccum
        >>> parts = jaxaccum.partition(None, np.arange(5), num_microbatches=2)
        >>> [rows.tolist() for _, rows in parts]
        [[0, 1, 2], [3, 4]]
    """
    check_keywords(kwargs, in_axes, "partition")
    tree, _ = argument_slots.read(args, kwargs, in_axes)
    _check_keys(tree)
    leaves = jax.tree.leaves((args, kwargs))
    given = [x for i, x in enumerate(leaves) if i not in tree.statics]
    arrays = list(map(Slot.array, tree.slots, given))
    plan = validate.partition(
        argument_slots.batch_size(tree.slots, arrays),
        num_microbatches=num_microbatches,
        microbatch_size=microbatch_size,
        split=split,
    )
    microbatches = []
    for microbatch in _microbatches(plan):
        own = list(map(microbatch.part, tree.slots, arrays))
        pair = tree.build(own)
        microbatches.append(pair if kwargs else pair[0])
    return microbatches


def _check_keys(tree: ArgumentTree) -> None:
    """A key of the batch is for the loop, which traces what is drawn from it."""
    for i in tree.positions(Role.BATCH_KEY):
        raise TypeError(
            f"in_axes declares {tree.slots[i].name} BATCH_KEY, and a microbatch alone cannot tell "
            "which rows it would draw. Draw for the whole batch and pass the numbers as rows, or "
            "pass the key as EXAMPLE_KEY."
        )


def num_examples(args: tuple[PyTree, ...], in_axes: InAxes) -> int:
    """The number of examples in the arguments."""
    tree, arrays = argument_slots.read(args, {}, in_axes)
    return argument_slots.batch_size(tree.slots, arrays)


def in_axes_of_parts(in_axes: Sequence[Axes]) -> tuple[Axes, ...]:
    """The `in_axes` of what `partition` returns, whose keys are already folded or split."""
    folded = {KEY: None, EXAMPLE_KEY: 0}
    return tuple(folded.get(x, x) if isinstance(x, Sentinel) else x for x in in_axes)


class _Microbatch(NamedTuple):
    """One microbatch: its number, its examples, and how many examples the batch has."""

    number: int
    examples: range
    batch_size: int

    def part(self, slot: Slot, x: Array) -> Array:
        """What the microbatch sees of one array of the arguments."""
        match slot.role:
            case Role.ROWS:
                rows = slice(self.examples.start, self.examples.stop, self.examples.step)
                return x[(slice(None),) * slot.axis + (rows,)]
            case Role.KEY:
                return jax.random.fold_in(x, self.number)
            case Role.EXAMPLE_KEY:
                examples = jnp.asarray(self.examples, jnp.int32)
                return example_keys(x, examples, self.batch_size)
            case _:
                return x


def _microbatches(plan: Partition) -> Iterator[_Microbatch]:
    """The microbatches in the order of the loop."""
    if plan.split == "strided":
        for i in range(plan.num_microbatches):
            examples = range(i, plan.batch_size, plan.num_microbatches)
            yield _Microbatch(i, examples, plan.batch_size)
        return
    for group in plan.groups:
        for i in range(group.count):
            start = group.start + i * group.size
            examples = range(start, start + group.size)
            yield _Microbatch(group.first + i, examples, plan.batch_size)


def pad_batch(batch: PyTree, *, to: int, batch_axis: int = 0) -> tuple[PyTree, Array]:
    """The batch padded with zeros to a fixed size, and the mask of its real examples.

    So one compiled program serves every batch up to that size. Put the mask into the weight of a
    `Mean`, and padding counts nowhere. It equals::

        padded = np.concatenate([batch, np.zeros((to - len(batch), *batch.shape[1:]))])
        mask = np.arange(to) < len(batch)

    Args:
        batch: a pytree of arrays with one row per example along `batch_axis`.
        to: the capacity, at least the number of examples.
        batch_axis: the batch axis of every leaf.

    Returns:
        ``(padded, mask)``; `mask` is bool of shape (to,).

    Raises:
        ValueError: if a batch axis is missing, the leaves disagree, or the batch is larger than
            `to`.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> batch, mask = jaxaccum.pad_batch({"x": jnp.array([5.0, 7.0])}, to=3)
        >>> batch["x"].tolist(), mask.tolist()
        ([5.0, 7.0, 0.0], [True, True, False])
    """
    capacity = validate.size(to, "to")
    sizes = []
    for name, leaf in leaves_with_names(batch, "batch"):
        validate.numeric(leaf, name)
        if not is_array(leaf) or not -leaf.ndim <= batch_axis < leaf.ndim:
            raise ValueError(
                f"{name} has no axis {batch_axis}; its shape is {list(jnp.shape(leaf))}. Pass "
                "arrays with one row per example."
            )
        sizes.append((name, leaf.shape[batch_axis]))
    count = validate.batch_size(sizes)
    if count > capacity:
        raise ValueError(
            f"the batch holds {count} examples, more than the capacity to={capacity}; raise `to`, "
            "or split the batch."
        )

    def pad(x: Array) -> Array:
        if (impl := key_impl(x)) is not None:  # keys are padded with the key made of zeros
            return jax.random.wrap_key_data(pad(jax.random.key_data(x)), impl=impl)
        widths = [(0, 0)] * x.ndim
        widths[batch_axis] = (0, capacity - count)
        return jnp.pad(x, widths)

    return jax.tree.map(pad, batch), jnp.arange(capacity) < count
