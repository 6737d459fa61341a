"""How a batch divides into microbatches, how its rows are cut out, and how they are put back in
order."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaccum._base.types import Array, Split


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive microbatches of one size: `count` of them, the first with index `first` at
    example `start`."""

    count: int
    size: int
    first: int
    start: int

    @property
    def examples(self) -> int:
        """How many examples the group holds."""
        return self.count * self.size


@dataclasses.dataclass(frozen=True)
class Partition:
    """The division of a batch into microbatches: at most two groups, the larger microbatches first.

    Contiguous: microbatch i holds the examples that follow those of microbatch i - 1. Strided: the
    examples i, i + n, i + 2n, …, so that a batch whose rows are sharded in blocks is cut inside
    every shard.

    A batch that lies in several blocks, one on each device, is cut contiguously inside every block:
    of two blocks of 4 examples, two microbatches hold the examples 0, 1, 4, 5 and 2, 3, 6, 7.
    """

    batch_size: int
    groups: tuple[Group, ...]
    split: Split = "contiguous"
    blocks: int = 1
    """The number of shards of a batch that is cut in place; the microbatches are equal where there
    are several."""

    @property
    def num_microbatches(self) -> int:
        """The number of iterations of the loop."""
        return sum(group.count for group in self.groups)

    @property
    def keeps_order(self) -> bool:
        """Whether the microbatches' rows, one microbatch after the other, are the batch."""
        return self.num_microbatches == 1 or (self.split == "contiguous" and self.blocks == 1)

    def keeps_groups(self, size: int) -> bool:
        """Whether every microbatch holds whole groups of `size` adjacent examples."""
        adjacent = self.split == "contiguous"
        return adjacent and all(group.size % (size * self.blocks) == 0 for group in self.groups)

    def first_example(self, group: Group, index: Array) -> Array:
        """The index in the batch of the first example of microbatch `index`."""
        if self.split == "strided":
            return index
        return group.start + (index - group.first) * (group.size // self.blocks)

    def offsets(self, size: int) -> np.ndarray:
        """Of the examples of a microbatch of `size`, from its first."""
        step = self.num_microbatches if self.split == "strided" else 1
        own = step * np.arange(size // self.blocks, dtype=np.int32)
        starts = np.arange(self.blocks, dtype=np.int32) * (self.batch_size // self.blocks)
        return (starts[:, None] + own).reshape(size)

    def examples(self, group: Group, index: Array) -> Array:
        """The indices in the batch of the examples of microbatch `index`, int32 of shape
        (size,)."""
        return self.first_example(group, index) + self.offsets(group.size)

    def split_rows(self, x: Array, axis: int) -> list[Array]:
        """One array per group, (count, …) over its microbatches; `axis` of the rest holds the
        microbatch's rows."""
        if self.split == "strided":
            (group,) = self.groups
            shape = (*x.shape[:axis], group.size, group.count, *x.shape[axis + 1 :])
            return [jnp.moveaxis(x.reshape(shape), axis + 1, 0)]
        if self.blocks > 1:
            return [self._split_blocks(x, axis)]
        return [self._split_group(x, group, axis) for group in self.groups]

    def _split_blocks(self, x: Array, axis: int) -> Array:
        (group,) = self.groups
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        parts = (*before, self.blocks, group.count, group.size // self.blocks, *after)
        return jnp.moveaxis(x.reshape(parts), axis + 1, 0).reshape(
            group.count, *before, group.size, *after
        )

    def _split_group(self, x: Array, group: Group, axis: int) -> Array:
        if group.examples != self.batch_size:
            x = lax.slice_in_dim(x, group.start, group.start + group.examples, axis=axis)
        shape = (*x.shape[:axis], group.count, group.size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def merge_rows(self, stacked: list[Array], axis: int = 0) -> Array:
        """The inverse of `split_rows`: the rows of the whole batch, in the batch's order."""
        if self.blocks > 1:
            return self._merge_blocks(stacked[0], axis)
        after = axis + 1 if self.split == "strided" else axis
        rows = [jnp.moveaxis(x, 0, after) for x in stacked]
        rows = [
            x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
            for x in rows
        ]
        return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis)

    def _merge_blocks(self, stacked: Array, axis: int) -> Array:
        (group,) = self.groups
        before, after = stacked.shape[1 : axis + 1], stacked.shape[axis + 2 :]
        parts = (group.count, *before, self.blocks, group.size // self.blocks, *after)
        return jnp.moveaxis(stacked.reshape(parts), 0, axis + 1).reshape(
            *before, self.batch_size, *after
        )


def by_number(batch_size: int, num_microbatches: int, split: Split) -> Partition:
    """`num_microbatches` microbatches whose sizes differ by at most one, the larger first."""
    size, larger = divmod(batch_size, num_microbatches)
    return _of_groups(batch_size, ((larger, size + 1), (num_microbatches - larger, size)), split)


def by_size(batch_size: int, microbatch_size: int, split: Split) -> Partition:
    """As many microbatches of `microbatch_size` as fit, and one remainder."""
    count, remainder = divmod(batch_size, microbatch_size)
    return _of_groups(batch_size, ((count, microbatch_size), (min(remainder, 1), remainder)), split)


def _of_groups(
    batch_size: int, counts_and_sizes: tuple[tuple[int, int], ...], split: Split
) -> Partition:
    groups, first, start = [], 0, 0
    for count, size in counts_and_sizes:
        if count:
            groups.append(Group(count, size, first, start))
            first, start = first + count, start + count * size
    return Partition(batch_size, tuple(groups), split)
