"""`partition` and `pad_batch`: the microbatches that the loop would see, and a batch of any size at
one capacity."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._base.trees import is_array, key_impl, leaves_with_names
from jaxaccum._base.types import Array, InAxes, PyTree, Split
from jaxaccum._program import argument_slots, validate
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.axes_by_name import check_keywords
from jaxaccum._program.example_keys import example_keys


def partition(
    *args: Any,
    in_axes: InAxes = (None, 0),
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    split: Split = "contiguous",
    **kwargs: Any,
) -> list[tuple[Any, ...]]:
    """The arguments of every microbatch, as the loop would see them: to rerun one alone, or to feed
    a host loop.

    Microbatch i holds the rows that follow those of microbatch i - 1; strided, the rows i, i + n,
    …. It equals::

        for i, rows in enumerate(np.split(np.arange(batch_size), bounds)):
            yield params, jax.tree.map(lambda x: x[rows], batch)

    Args:
        *args: the arguments of the function.
        in_axes: one entry per argument; a ``KEY`` and an ``EXAMPLE_KEY`` come folded, ``CARRY`` is
            the initial state. A dict names keyword arguments, and passes positional ones whole.
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
    layout, _ = argument_slots.read(args, kwargs, in_axes)
    leaves = jax.tree.leaves((args, kwargs))
    given = [x for i, x in enumerate(leaves) if i not in layout.statics]
    arrays = [slot.array(x) for slot, x in zip(layout.slots, given, strict=True)]
    plan = validate.partition(
        argument_slots.batch_size(layout.slots, arrays),
        num_microbatches=num_microbatches,
        microbatch_size=microbatch_size,
        split=split,
    )
    microbatches = []
    for group in plan.groups:
        for index in range(group.first, group.first + group.count):
            start = (
                index if split == "strided" else group.start + (index - group.first) * group.size
            )
            examples = (
                range(start, plan.batch_size, plan.num_microbatches)
                if split == "strided"
                else range(start, start + group.size)
            )
            own = [
                _take(slot, x, examples=examples, index=index, batch_size=plan.batch_size)
                for slot, x in zip(layout.slots, arrays, strict=True)
            ]
            pair = layout.build(own)
            microbatches.append(pair if kwargs else pair[0])
    return microbatches


def pad_batch(batch: PyTree, *, to: int, batch_axis: int = 0) -> tuple[PyTree, Array]:
    """Pad a batch with zeros to a capacity, with the mask of its real rows: one compilation for
    every batch up to it.

    The mask belongs into the weight of a `Mean`, so that padding counts nowhere. It equals::

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
                "arrays with one row an example."
            )
        sizes.append((name, leaf.shape[batch_axis]))
    count = validate.batch_size(sizes)
    if count > capacity:
        raise ValueError(
            f"the batch holds {count} examples, more than the capacity to={capacity}; raise `to`, "
            "or split the batch."
        )

    def pad(x: Array) -> Array:
        if (
            impl := key_impl(x)
        ) is not None:  # a key has no zero; its padding is the key made of zeros
            return jax.random.wrap_key_data(pad(jax.random.key_data(x)), impl=impl)
        widths = [(0, 0)] * x.ndim
        widths[batch_axis] = (0, capacity - count)
        return jnp.pad(x, widths)

    return jax.tree.map(pad, batch), jnp.arange(capacity) < count


def _take(
    slot: argument_slots.Slot, x: Any, *, examples: range, index: int, batch_size: int
) -> Any:
    match slot.role:
        case Role.ROWS:
            return x[
                (slice(None),) * slot.axis + (slice(examples.start, examples.stop, examples.step),)
            ]
        case Role.KEY:
            return jax.random.fold_in(x, index)
        case Role.EXAMPLE_KEY:
            return example_keys(x, jnp.asarray(examples, jnp.int32), batch_size)
        case _:
            return x
