"""The loss traced at the sizes at which it will run: shapes only, nothing is computed."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxaccum._audit.sources import is_library
from jaxaccum._base.trees import is_array
from jaxaccum._base.types import Fun
from jaxaccum._program import argument_slots, validate
from jaxaccum._program.argument_slots import Layout, Role, Slot
from jaxaccum._program.example_keys import example_keys
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.named_outputs import Output, leaves
from jaxaccum._program.output_parts import loss_and_aux


@dataclasses.dataclass(frozen=True)
class Traced:
    """The program at one size, and the outputs that it computes."""

    closed: Any
    outputs: tuple[Output, ...]
    indexed: bool = False
    """Whether its first argument is the index of the microbatch."""

    @property
    def arguments(self) -> list[Any]:
        """The variables of the arguments of the loss."""
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
    def given(self) -> Sequence[Any]:
        """The arguments, array by array, where they are at hand."""
        ...

    def differentiates(self, argnum: int | str | None) -> bool:
        """Whether a derivative may be taken with respect to the argument."""
        ...

    def keeps_groups(self, size: int) -> bool:
        """Whether every microbatch holds whole groups of `size` adjacent examples."""
        ...

    def trace(self, size: int, count: int) -> Traced:
        """Its program for one of `count` microbatches of `size` examples."""
        ...


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
        return [
            self._resized(slot, x, size) for slot, x in zip(self.slots, self.shapes, strict=True)
        ]

    def _resized(self, slot: Slot, x: Any, size: int) -> Any:
        if slot.role is Role.ROWS:
            return jax.ShapeDtypeStruct(
                (*x.shape[: slot.axis], size, *x.shape[slot.axis + 1 :]), x.dtype
            )
        if slot.role is Role.EXAMPLE_KEY:
            return jax.eval_shape(example_keys, x, jax.ShapeDtypeStruct((size,), jnp.int32))
        return x


def read(
    args: Sequence[Any], kwargs: dict[str, Any], in_axes: Any, num_microbatches: int
) -> Arguments:
    """The arguments, which may be shapes, as `value_and_grad` would read them."""
    args = tuple(jax.tree.map(_as_array, arg) if i == 0 else arg for i, arg in enumerate(args))
    leaves, treedef = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if is_array(x) or isinstance(x, jax.ShapeDtypeStruct)]
    layouts: list[Layout] = []

    def arrays(given: list[Any]) -> list[Any]:
        full = list(leaves)
        for i, x in zip(places, given, strict=True):
            full[i] = x
        own_args, own_kwargs = treedef.unflatten(full)
        layout, read = argument_slots.read(own_args, own_kwargs, in_axes)
        layouts.append(layout)
        return read

    shapes = jax.eval_shape(arrays, [leaves[i] for i in places])
    size = argument_slots.batch_size(layouts[0].slots, shapes)
    partition = validate.partition(
        size, num_microbatches=num_microbatches, microbatch_size=None, split="contiguous"
    )
    return Arguments(layouts[0], tuple(shapes), partition, tuple(leaves))


def _as_array(x: Any) -> Any:
    """A Python number of the first argument is differentiated, and so traced."""
    return jnp.asarray(x) if isinstance(x, float | complex) else x


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
    def given(self) -> Sequence[Any]:
        """The leaves of the arguments as they came."""
        return self.arguments.given

    def differentiates(self, argnum: int | str | None) -> bool:
        """Whether a derivative may be taken with respect to the argument."""
        return argnum == 0

    def keeps_groups(self, size: int) -> bool:
        """Whether every microbatch holds whole groups of `size` adjacent examples."""
        return self.arguments.partition.keeps_groups(size)

    def trace(self, size: int, count: int) -> Traced:
        """Its program for one of `count` microbatches of `size` examples."""
        outputs: list[Output] = []

        def flat(*arrays: Any) -> list[Any]:
            args, kwargs = self.arguments.layout.build(list(arrays))
            loss, aux = loss_and_aux(self.fun(*args, **kwargs), self.has_aux)
            found = [*leaves(loss, "the loss", aux=False), *leaves(aux, "aux", aux=True)]
            outputs.extend(output for output, _ in found)
            return [x for _, parts in found for x in parts]

        try:
            closed = jax.make_jaxpr(flat, axis_env=[(self.axis_name, count)])(
                *self.arguments.at(size)
            )
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
    name = re.search(r"axis name: (\S+?)\.?(\s|$)", str(error))
    axis = f"the axis {name[1]!r}" if name else "an axis"
    raise ValueError(
        f"the loss sums over {axis} (at {where}), and nothing around the audit gives that name to "
        "an axis; call the audit where the loss runs, inside the jax.pmap, jax.vmap or "
        "jax.shard_map with that axis, or leave the name out of the model."
    ) from error
