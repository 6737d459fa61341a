"""One call of a transformation: its function, its options, and its arguments as slots and
arrays."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from jaxaccum._base.types import Array, Audit, Fun, InAxes, Memory, PyTree, Split, Unroll
from jaxaccum._program import argument_slots, entries_of_call, validate
from jaxaccum._program.argument_slots import ArgumentTree


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that every transformation shares, as the user gave them."""

    in_axes: InAxes = (None, 0)
    num_microbatches: int | None = None
    microbatch_size: int | None = None
    split: Split = "contiguous"
    num_examples_argnum: int | None = None
    axis_name: str = "microbatch"
    mesh_axes: str | Sequence[str] | None = None
    memory: Memory = None
    unroll: Unroll = 1
    audit: Audit = "warn"
    device_axes: tuple[str, ...] = ()
    """The axes of an explicit mesh over which the call runs device by device."""
    blocks: int = 1
    """In how many blocks, one on each device, the rows of a batch of global arrays lie."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call whose arguments have been read."""

    fun: Fun
    options: Options
    tree: ArgumentTree
    arrays: list[Array]
    """One per slot of the tree."""
    argnums: tuple[int, ...] = ()
    """The positional arguments that are differentiated, none of them negative."""
    one_argnum: bool = False
    """Whether `argnums` was given as one int, so that gradients come without a tuple."""
    counted: int | None = None
    """The positional argument that counts the real examples."""

    @property
    def batch_size(self) -> int:
        """The number of examples."""
        return argument_slots.batch_size(self.tree.slots, self.arrays, self.fun)

    @property
    def differentiated(self) -> tuple[int, ...]:
        """The slots that are differentiated, argument by argument."""
        return self.tree.of_arguments(self.argnums)

    def of_arrays(self, arrays: Iterable[Array]) -> Call:
        """The same call of other arrays, one per slot."""
        return dataclasses.replace(self, arrays=list(arrays))

    def as_arguments(self, grads: Sequence[Array]) -> PyTree:
        """Arrays for the differentiated slots, in the structures of their arguments: a tuple, or
        where `argnums` is one int the one tree."""
        positional, _ = self.tree.treedef.children()
        arguments, rest = positional.children(), iter(grads)
        trees = []
        for number in self.argnums:
            leaves = itertools.islice(rest, arguments[number].num_leaves)
            trees.append(arguments[number].unflatten(leaves))
        return trees[0] if self.one_argnum else tuple(trees)


def read(
    fun: Fun,
    options: Options,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    argnums: int | Sequence[int] | None = None,
) -> Call:
    """The call ``fun(*args, **kwargs)``; None differentiates nothing."""
    axes = entries_of_call.assigned(options.in_axes, args, kwargs, fun)
    numbers = () if argnums is None else validate.argnums(argnums, axes.positional)
    counted = options.num_examples_argnum
    if counted is not None:
        counted = validate.argnum(counted, len(args), f"num_examples_argnum={counted!r}")
    tree, arrays = argument_slots.read(args, kwargs, axes, differentiated=numbers, counted=counted)
    one = not isinstance(argnums, tuple | list)
    return Call(fun, options, tree, arrays, numbers, one, counted)
