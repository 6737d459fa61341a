"""Which entry of ``in_axes`` each argument of a call has; an error suggests entries that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax

from jaxaccum._base.trees import is_array, is_key
from jaxaccum._base.types import CARRY, Axes, Fun, InAxes, PyTree
from jaxaccum._program import closures, validate
from jaxaccum._program.axes_by_name import ArgumentAxes, by_name

_DEFAULT = (None, 0)  # of every public function: parameters, and a batch


def assigned(
    in_axes: InAxes | ArgumentAxes,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    fun: Fun | None = None,
) -> ArgumentAxes:
    """The entry of `in_axes` for every argument of the call ``fun(*args, **kwargs)``."""
    if isinstance(in_axes, ArgumentAxes):
        return in_axes
    if isinstance(in_axes, Mapping):
        given = by_name(in_axes, len(args), kwargs, fun)
    else:
        _check_keywords(in_axes, args, kwargs)
        given = ArgumentAxes(per_argument(in_axes, args, fun), dict.fromkeys(kwargs))
    if sum(axes is CARRY for axes in [*given.positional, *given.keywords.values()]) > 1:
        raise ValueError(
            "in_axes declares CARRY twice; one argument holds the state: put both states into one "
            "pytree."
        )
    return given


def _check_keywords(
    in_axes: Sequence[Axes], args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> None:
    """A tuple with too many entries was perhaps meant for arguments that are passed by keyword."""
    names = [name for name, x in kwargs.items() if _may_be_cut(x)]
    if names and isinstance(in_axes, tuple | list) and len(in_axes) > len(args):
        raise ValueError(
            f"in_axes={in_axes!r} has {len(in_axes)} entries, and the function was called with "
            f"{validate.counted(len(args), 'positional argument')} and, by keyword, "
            f"{', '.join(kwargs)}. A tuple has one entry per positional argument. "
            f"{validate.by_keyword(names)}"
        )


def _may_be_cut(tree: PyTree) -> bool:
    """Whether it holds an array with an axis."""
    return any(is_array(leaf) and leaf.ndim for leaf in jax.tree.leaves(tree))


def per_argument(
    in_axes: Sequence[Axes], args: tuple[PyTree, ...], fun: Fun | None = None
) -> tuple[Axes, ...]:
    """`in_axes`, checked to have one entry for each of the positional arguments of `fun`."""
    count = len(args)
    if not isinstance(in_axes, tuple | list):
        raise TypeError(
            f"in_axes must be a tuple with one entry per argument; got {in_axes!r}. For one "
            f"argument write ({in_axes!r},)."
        )
    if len(in_axes) != count:
        given = validate.counted(count, "positional argument")
        missing = closures.as_arguments(fun) if count < len(in_axes) else ""
        if missing:
            raise ValueError(
                f"the function was called with {given}, and in_axes={in_axes!r} has {len(in_axes)} "
                f"entries. {missing}"
            )
        by_default = ", the default," if tuple(in_axes) == _DEFAULT else ""
        raise ValueError(
            f"in_axes={in_axes!r}{by_default} has {len(in_axes)} entries and the function was "
            f"called with {given}; pass one entry per argument, as in_axes=({_suggested(args)}): "
            "None (whole), an int (its batch axis), or CARRY, BATCH_KEY, EXAMPLE_KEY or KEY. "
            "Keyword arguments have no entry, and are passed whole."
        )
    return tuple(in_axes)


def _suggested(args: tuple[PyTree, ...]) -> str:
    """Entries that fit these arguments: the first are parameters, and of what has rows the batch is
    the argument with the most axes."""
    if len(args) == 1:
        return "0,"
    rows: dict[int, int] = {}
    for i, arg in enumerate(args[1:], start=1):
        if not _looks_like_key(arg) and (size := _num_rows(arg)):
            rows[i] = size
    most_axes = lambda i: max(leaf.ndim for leaf in jax.tree.leaves(args[i]))
    batch_size = rows[max(rows, key=most_axes)] if rows else 0
    entries = ["None"]
    for i, arg in enumerate(args[1:], start=1):
        if _looks_like_key(arg):
            entries.append("BATCH_KEY")
        else:
            entries.append("0" if batch_size and rows.get(i) == batch_size else "None")
    return ", ".join(entries)


def _num_rows(arg: PyTree) -> int | None:
    """The size of the first axis, if all leaves are arrays that share one."""
    leaves = jax.tree.leaves(arg)
    sizes = {leaf.shape[0] if is_array(leaf) and leaf.ndim else None for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 else None


def _looks_like_key(arg: PyTree) -> bool:
    """Whether it is a key, and no batch of integers: legacy keys have two or four."""
    return is_array(arg) and is_key(arg) and arg.size <= 4
