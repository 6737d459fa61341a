"""What each leaf of the arguments is to the loop: whole, rows of the batch, a carried state, a key,
or no array."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._base.entries import with_entries
from jaxaccum._base.trees import is_array, is_key, key_impl, leaf_name, leaves_with_names, safe_map
from jaxaccum._base.types import (
    BATCH_KEY,
    CARRY,
    EXAMPLE_KEY,
    KEY,
    MAX_GRAD,
    Array,
    Axes,
    Fun,
    InAxes,
    PyTree,
    Sentinel,
    TreeDef,
)
from jaxaccum._program import assignments, batch_keys, closures, validate
from jaxaccum._program.axes_by_name import ArgumentAxes
from jaxaccum._program.batch_keys import Larger, Rows
from jaxaccum._program.entries_of_call import assigned


class Role(enum.Enum):
    """What the loop does with a leaf at each microbatch."""

    WHOLE = "passed as it is"
    ROWS = "its rows are cut out"
    CARRY = "threaded"
    KEY = "folded with the microbatch's index"
    EXAMPLE_KEY = "folded with each example's index"
    BATCH_KEY = "drawn from as for the whole batch"


_OVERWRITTEN = "['_overwrite_with_gradient']"
"""In the name of a leaf: it is of Flax's collection of variables whose gradients are their next
values."""
_ROLE_OF = {
    CARRY: Role.CARRY,
    KEY: Role.KEY,
    EXAMPLE_KEY: Role.EXAMPLE_KEY,
    BATCH_KEY: Role.BATCH_KEY,
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One array of the arguments: its name in errors, its role, its argument, and its batch axis if
    it has one."""

    name: str
    role: Role
    argnum: int | str | None = None
    """Its argument: a position, or a keyword."""
    axis: int = 0
    key: Hashable | None = None
    """Of a typed key that is carried, and of a key of the batch, which both come as the integers
    that they are made of: its implementation."""
    overwritten: bool = False
    """Whether the "gradient" is the next value, a maximum over examples: Flax's float8 layers
    return their state so."""

    updated_once: bool = False
    """Whether it is a state of which every microbatch sees what it was before the first."""

    @property
    def differentiable(self) -> bool:
        """Whether a derivative may be asked with respect to it."""
        return self.role in (Role.WHOLE, Role.ROWS)

    def is_same(self, *, coupled: bool) -> bool:
        """Whether every microbatch sees the same. A coupled loss updates its state once."""
        return self.role is Role.WHOLE or (coupled and self.role is Role.CARRY)

    def array(self, leaf: Array) -> Array:
        """What the loop carries of the leaf."""
        if self.role is Role.BATCH_KEY:
            return batch_keys.data_of(leaf)
        return leaf if self.key is None else jax.random.key_data(leaf)

    def value(self, array: Array) -> Array:
        """What `fun` sees of the array."""
        return array if self.key is None else jax.random.wrap_key_data(array, impl=self.key)


@dataclasses.dataclass(frozen=True)
class ArgumentTree:
    """The structure of the arguments; what is no array (a flag, a function, a string) is held here
    and never traced."""

    treedef: TreeDef
    slots: tuple[Slot, ...]
    statics: dict[int, object]
    """By their places among the leaves."""
    carry: PyTree
    has_carry: bool
    """Whether an argument is declared CARRY; its state may be empty."""

    @property
    def leaves(self) -> list[int]:
        """The place of each slot among all leaves of the arguments."""
        return [i for i in range(self.treedef.num_leaves) if i not in self.statics]

    def positions(self, role: Role) -> list[int]:
        """The slots that have the role."""
        return positions(self.slots, role)

    def of_arguments(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """The slots of the arguments at these positions, argument by argument."""
        return of_arguments(self.slots, numbers)

    def drawing(self, rows: Rows, larger: Larger | None = None) -> ArgumentTree:
        """The tree in a microbatch of these examples, which its keys of the batch draw for."""

        def drawing(slot: Slot) -> Slot:
            if slot.role is not Role.BATCH_KEY:
                return slot
            return dataclasses.replace(slot, key=batch_keys.generator(slot.key, rows, larger))

        return dataclasses.replace(self, slots=tuple(map(drawing, self.slots)))

    def build(self, arrays: list[Array]) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
        """The positional and keyword arguments that hold `arrays`, one per slot."""
        empty: list[object] = [None] * self.treedef.num_leaves
        statics = with_entries(empty, self.statics.keys(), self.statics.values())
        values = safe_map(Slot.value, self.slots, arrays)
        return self.treedef.unflatten(with_entries(statics, self.leaves, values))


def positions(slots: Sequence[Slot], role: Role) -> list[int]:
    """The slots that have the role."""
    return [i for i, slot in enumerate(slots) if slot.role is role]


def of_arguments(slots: Sequence[Slot], numbers: Iterable[int]) -> tuple[int, ...]:
    """The slots of the arguments at these positions, argument by argument."""
    found: dict[int | str | None, list[int]] = {}
    for i, slot in enumerate(slots):
        found.setdefault(slot.argnum, []).append(i)
    return tuple(itertools.chain(*(found.get(number, ()) for number in numbers)))


class Argument(NamedTuple):
    """One argument: its position or its keyword, what errors call it, and itself."""

    number: int | str
    name: str
    value: PyTree


def every(args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree]) -> list[Argument]:
    """All arguments, in the order of leaves."""
    positional = [Argument(i, f"argument {i}", arg) for i, arg in enumerate(args)]
    names = sorted(kwargs)
    keywords = [Argument(name, f"keyword argument {name}", kwargs[name]) for name in names]
    return [*positional, *keywords]


def read(
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    in_axes: InAxes | ArgumentAxes,
    *,
    differentiated: Collection[int | str] = (),
    counted: int | None = None,
) -> tuple[ArgumentTree, list[Array]]:
    """The tree of the arguments, and their arrays: one per slot, in order.

    A Python scalar is traced where a derivative is asked of it, or where it counts examples
    (argument `counted`).
    """
    given = assigned(in_axes, args, kwargs)
    slots, arrays, statics, states = [], [], {}, []
    for number, called, arg in every(args, kwargs):
        axes = given.of(number)
        if axes is CARRY:
            states.append(arg)
        moves = number in differentiated
        library = assignments.library_of(arg) if moves else None
        for name, leaf, axis in _with_axes(arg, axes, called):
            validate.numeric(leaf, name)
            is_whole = axis in (None, MAX_GRAD)
            if is_whole and not is_array(leaf) and not moves and number != counted:
                statics[len(slots) + len(statics)] = leaf
                continue
            if moves:
                validate.differentiable(leaf, name, library=library)
            slots.append(_slot(name, leaf, axis, number))
            arrays.append(slots[-1].array(leaf))
    treedef, carry = jax.tree.structure((args, kwargs)), states[0] if states else None
    tree = ArgumentTree(treedef, tuple(slots), statics, carry, bool(states))
    return tree, list(map(jnp.asarray, arrays))


def batch_size(slots: Sequence[Slot], arrays: list[Array], fun: Fun | None = None) -> int:
    """The number of examples, on which all leaves with a batch axis agree."""
    rows = positions(slots, Role.ROWS)
    sizes = [(_as_read(slots[i], arrays[i]), arrays[i].shape[slots[i].axis]) for i in rows]
    if not sizes and (missing := closures.as_arguments(fun)):
        raise ValueError(f"no argument has a batch axis. {missing}")
    by_keyword = []
    for slot, x in zip(slots, arrays, strict=True):
        if isinstance(slot.argnum, str) and jnp.ndim(x):
            by_keyword.append(slot.argnum)
    return validate.batch_size(sizes, by_keyword)


def _as_read(slot: Slot, x: Array) -> str:
    """The name of a slot of rows, and whether it looks like a key of the old kind."""
    if is_key(x):
        return f"{slot.name} (if it is a PRNG key, declare it jaxaccum.BATCH_KEY)"
    return slot.name


def counter(slots: tuple[Slot, ...], arrays: list[Array], number: int | None) -> int | None:
    """The slot that counts the examples that are no padding: one whole integer, argument
    `number`."""
    if number is None:
        return None
    found = of_arguments(slots, [number])
    if len(found) == 1:
        (i,) = found
        is_integer = arrays[i].shape == () and jnp.issubdtype(arrays[i].dtype, jnp.integer)
        if slots[i].role is Role.WHOLE and is_integer:
            return i
    shapes = []
    for i in found:
        shapes.append(f"{arrays[i].dtype}{list(arrays[i].shape)} ({slots[i].role.value})")
    raise TypeError(
        f"num_examples_argnum={number!r} names an argument that holds {shapes or 'nothing'}; name "
        "one that holds a single integer, the number of real examples, with None in in_axes."
    )


def _slot(name: str, leaf: Any, axis: Axes, argnum: int | str) -> Slot:
    if axis is None or axis is MAX_GRAD:
        return Slot(name, Role.WHOLE, argnum, overwritten=axis is MAX_GRAD or _OVERWRITTEN in name)
    if isinstance(axis, Sentinel):
        if axis is not CARRY:
            validate.key(leaf, name, axis)
        elif not is_array(leaf) and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"in_axes declares {name} {axis!r}, but it is not an array: it is a "
                f"{type(leaf).__name__}; carry arrays only."
            )
        return Slot(name, _ROLE_OF[axis], argnum, key=_kept_kind(leaf, axis, name))
    if not is_array(leaf):
        raise TypeError(
            f"in_axes gives {name} the batch axis {axis}, but it is not an array: it is a "
            f"{type(leaf).__name__}; pass an array, or None in in_axes."
        )
    if not -leaf.ndim <= axis < leaf.ndim:
        of_key = " Declare a PRNG key jaxaccum.BATCH_KEY." if key_impl(leaf) is not None else ""
        raise ValueError(
            f"in_axes gives {name} the batch axis {axis}, and its shape {list(leaf.shape)} has "
            f"{leaf.ndim} axes; pass one of them, or None for a leaf that every microbatch sees "
            f"whole.{of_key}"
        )
    return Slot(name, Role.ROWS, argnum, axis % leaf.ndim)


def _kept_kind(leaf: Any, axis: Sentinel, name: str) -> Hashable | None:
    """The implementation of a key that comes as integers, and None of other leaves."""
    if axis is not BATCH_KEY:
        return key_impl(leaf) if axis is CARRY else None
    if not isinstance(impl := jax.random.key_impl(leaf), str):  # of a legacy key, too
        raise TypeError(
            f"in_axes declares {name} BATCH_KEY, and it is a key of {impl}; pass one of those "
            "that JAX knows by name, as jax.random.key(seed, impl=name) makes them."
        )
    return impl


class _Leaf(NamedTuple):
    """One leaf of an argument: its name, itself, and its own axis, sentinel or None."""

    name: str
    value: Any
    axis: Axes


def _with_axes(arg: PyTree, axes: Axes, name: str) -> list[_Leaf]:
    """The leaves of one argument."""
    if isinstance(axes, Sentinel):
        return [_Leaf(leaf, x, axes) for leaf, x in leaves_with_names(arg, name)]
    for path, axis in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axis):
        _check_axis(axis, leaf_name(f"in_axes for {name}", path))
    try:
        # Not by jax.tree.map: it would build the user's classes around axes, and some check what
        # they hold.
        parts = jax.tree.structure(axes, is_leaf=_is_axis).flatten_up_to(arg)
    except ValueError:
        raise ValueError(
            f"in_axes for {name} is not a pytree prefix of the argument: in_axes has the structure "
            f"{jax.tree.structure(axes, is_leaf=_is_axis)}, the argument has "
            f"{jax.tree.structure(arg)}; give None or an int for the whole argument, or one for "
            "each of its parts."
        ) from None
    named, found = iter(leaves_with_names(arg, name)), []
    for axis, part in zip(jax.tree.leaves(axes, is_leaf=_is_axis), parts, strict=True):
        for _ in jax.tree.leaves(part):
            found.append(_Leaf(*next(named), axis))
    return found


def _is_axis(x: Axes) -> bool:
    return x is None


def _check_axis(axis: Axes, name: str) -> None:
    if isinstance(axis, Sentinel) and axis is not MAX_GRAD:
        raise TypeError(
            f"{name} is {axis!r} inside a pytree; a sentinel stands for a whole argument: pass "
            "that part as an argument of its own."
        )
    if axis not in (None, MAX_GRAD) and (isinstance(axis, bool) or not isinstance(axis, int)):
        raise TypeError(
            f"{name} must be None, an int, or a sentinel for the whole argument; got {axis!r}."
        )
