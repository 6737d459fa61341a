"""The loss traced at the sizes at which it will run: shapes only, nothing is computed."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxaccum._audit.folding import Constant
from jaxaccum._audit.sources import is_library
from jaxaccum._base.trees import is_array
from jaxaccum._base.types import Array, Fun, InAxes, PyTree
from jaxaccum._program import argument_slots, assignments, validate
from jaxaccum._program.argument_slots import ArgumentTree, Role, Slot
from jaxaccum._program.axes_by_name import ArgumentAxes
from jaxaccum._program.batch_keys import Rows
from jaxaccum._program.example_keys import example_keys
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.named_outputs import Output, leaves
from jaxaccum._program.output_parts import loss_and_aux


@dataclasses.dataclass(frozen=True)
class Traced:
    """The program at one size, and the outputs that it computes."""

    closed: Any
    """A jaxpr with its constants: a type that JAX names differently in its versions."""
    outputs: tuple[Output, ...]
    indexed: bool = False
    """Whether its first argument is the index of the microbatch."""

    @property
    def arguments(self) -> list[Any]:
        """The variables of the arguments of the loss; JAX's type of them knows no shape."""
        return self.closed.jaxpr.invars[1 if self.indexed else 0 :]


class Subject(Protocol):
    """A loss that can be traced at the sizes that the audit asks for."""

    @property
    def fun(self) -> Fun:
        """The loss, as the user wrote it."""
        ...

    @property
    def slots(self) -> Sequence[Slot]:
        """What each array of its arguments is."""
        ...

    @property
    def given(self) -> Sequence[Constant]:
        """The arguments, array by array, where they are at hand."""
        ...

    @property
    def draws_declared(self) -> bool:
        """Whether the call says that draws from a carried state may depend on the partition."""
        ...

    def differentiates(self, argnum: int | str | None) -> bool:
        """Whether a derivative may be taken with respect to the argument."""
        ...

    def keeps_groups(self, size: int) -> bool:
        """Whether every microbatch holds whole groups of `size` adjacent examples."""
        ...

    @property
    def keeps_order(self) -> bool:
        """Whether the microbatches' rows, one microbatch after the other, are the batch."""
        ...

    def trace(self, size: int, count: int) -> Traced:
        """Its program for one of `count` microbatches of `size` examples."""
        ...


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What the loss is called with, as shapes, and how the batch is divided."""

    tree: ArgumentTree
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    """One per slot."""
    partition: Partition
    given: tuple[Constant, ...] = ()
    """The leaves as they came."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """One per array."""
        return self.tree.slots

    def at(self, size: int) -> list[jax.ShapeDtypeStruct]:
        """The shapes of the arrays for a batch of `size` examples."""
        return [_resized(slot, x, size) for slot, x in zip(self.slots, self.shapes, strict=True)]


def _resized(slot: Slot, x: jax.ShapeDtypeStruct, size: int) -> jax.ShapeDtypeStruct:
    """The shape of one array for a batch of `size` examples."""
    if slot.role is Role.ROWS:
        shape = (*x.shape[: slot.axis], size, *x.shape[slot.axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)
    if slot.role is Role.EXAMPLE_KEY:
        return jax.eval_shape(example_keys, x, jax.ShapeDtypeStruct((size,), jnp.int32))
    return x


def read(
    args: Sequence[PyTree], kwargs: dict[str, PyTree], in_axes: ArgumentAxes | InAxes,
    num_microbatches: int,
) -> Arguments:  # fmt: skip
    """The arguments, which may be shapes, as `value_and_grad` would read them."""
    if args and assignments.library_of(args[0]) != "equinox":  # whose numbers are settings
        args = (jax.tree.map(_as_array, args[0]), *args[1:])
    leaves, treedef = jax.tree.flatten((tuple(args), kwargs))
    arrays = {i: x for i, x in enumerate(leaves) if _is_array_or_shape(x)}
    trees: list[ArgumentTree] = []

    def slot_arrays(arrays: dict[int, Array]) -> list[Array]:
        every = [arrays.get(i, x) for i, x in enumerate(leaves)]
        own_args, own_kwargs = treedef.unflatten(every)
        tree, found = argument_slots.read(own_args, own_kwargs, in_axes)
        trees.append(tree)
        return found

    shapes = jax.eval_shape(slot_arrays, arrays)
    size = argument_slots.batch_size(trees[0].slots, shapes)
    partition = validate.partition(
        size, num_microbatches=num_microbatches, microbatch_size=None, split="contiguous"
    )
    return Arguments(trees[0], tuple(shapes), partition, tuple(leaves))


def _as_array(x: PyTree) -> PyTree:
    """A Python number of the first argument is differentiated, and so traced."""
    return jnp.asarray(x) if isinstance(x, float | complex) else x


def _is_array_or_shape(x: object) -> bool:
    return is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and its arguments, traced under an axis of the loop's name."""

    fun: Fun
    arguments: Arguments
    axis_name: str
    has_aux: bool

    @property
    def slots(self) -> Sequence[Slot]:
        """What each array of its arguments is."""
        return self.arguments.slots

    @property
    def given(self) -> Sequence[Constant]:
        """The leaves of the arguments as they came."""
        return self.arguments.given

    @property
    def draws_declared(self) -> bool:
        """A state is declared CARRY."""
        return True

    def differentiates(self, argnum: int | str | None) -> bool:
        """Whether a derivative may be taken with respect to the argument."""
        return argnum == 0

    def keeps_groups(self, size: int) -> bool:
        """Whether every microbatch holds whole groups of `size` adjacent examples."""
        return self.arguments.partition.keeps_groups(size)

    @property
    def keeps_order(self) -> bool:
        """Whether the microbatches' rows, one microbatch after the other, are the batch."""
        return self.arguments.partition.keeps_order

    def trace(self, size: int, count: int) -> Traced:
        """Its program for one of `count` microbatches of `size` examples."""
        outputs: list[Output] = []
        tree = self.arguments.tree.drawing(Rows.all(size))

        def flat(*arrays: Array) -> list[Array]:
            args, kwargs = tree.build(list(arrays))
            loss, aux = loss_and_aux(self.fun(*args, **kwargs), self.has_aux)
            found = [*leaves(loss, "the loss", aux=False), *leaves(aux, "aux", aux=True)]
            results: list[Array] = []
            for output, parts in found:
                outputs.append(output)
                results += parts
            return results

        traced = jax.make_jaxpr(flat, axis_env=[(self.axis_name, count)])
        try:
            closed = traced(*self.arguments.at(size))
        except NameError as error:
            _unbound(error)
            raise
        return Traced(closed, tuple(outputs))


def _unbound(error: NameError) -> None:
    """Say of JAX's error for an axis without a meaning what to do; a name that Python misses is the
    user's."""
    if error.name is not None:  # Python's own errors hold the name
        return
    stack = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in stack if not is_library(frame.filename)]
    where = f"{own[-1].filename}:{own[-1].lineno}" if own else "its program"
    raise ValueError(
        f"the loss sums over an axis that nothing around the audit names (at {where}; JAX says: "
        f"{error}); call the audit where the loss runs, inside the jax.pmap, jax.vmap or "
        "jax.shard_map with that axis, or leave the name out of the model."
    ) from error
