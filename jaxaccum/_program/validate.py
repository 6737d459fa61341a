"""Validation: each function returns the fact that it checked, or raises an error that says what to
pass."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, get_args

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxaccum._base.source_lines import frame_of
from jaxaccum._base.trees import dtype_of, is_array, is_inexact, is_key, key_impl
from jaxaccum._base.types import BATCH_KEY, MAX_GRAD, Audit, Gather, Memory, Sentinel, Split, Unroll
from jaxaccum._devices import varying
from jaxaccum._program import microbatches


def size(value: Any, name: str) -> int:
    """A size given by the user, as a positive int."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced, and the number of iterations is fixed when the program is "
            "compiled; pass a Python int."
        )
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {value!r}.")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an int; got {value!r} of type {type(value).__name__}."
        ) from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1; got {number}.")
    return number


def partition(
    batch_size: int, *, num_microbatches: Any, microbatch_size: Any, split: Any
) -> microbatches.Partition:
    """The partition of `batch_size` examples that the given one of the two sizes asks for."""
    if (num_microbatches is None) == (microbatch_size is None):
        given = (
            "neither"
            if num_microbatches is None
            else f"num_microbatches={num_microbatches!r} and microbatch_size={microbatch_size!r}"
        )
        raise ValueError(f"pass exactly one of num_microbatches and microbatch_size; got {given}.")
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}; got {split!r}.")
    if microbatch_size is not None:
        wanted = min(size(microbatch_size, "microbatch_size"), max(batch_size, 1))
    else:
        wanted = size(num_microbatches, "num_microbatches")
    if batch_size == 0:
        raise ValueError(
            "the batch is empty: its batch axis has size 0, so there is no microbatch to run; pass "
            "at least 1 example."
        )
    if num_microbatches is not None and wanted > batch_size:
        raise ValueError(
            f"num_microbatches={wanted} is more than the {batch_size} examples of the batch, and a "
            f"microbatch holds at least one; pass num_microbatches <= {batch_size}, or "
            "microbatch_size=1."
        )
    if split == "strided" and batch_size % wanted:
        name = "num_microbatches" if microbatch_size is None else "microbatch_size"
        raise ValueError(
            f'split="strided" needs equal microbatches, and {name}={wanted} does not divide the '
            f"{batch_size} examples of the batch; pass a divisor, pad the batch, or use "
            'split="contiguous".'
        )
    by = microbatches.by_number if microbatch_size is None else microbatches.by_size
    return by(batch_size, wanted, split)


def audit(value: Any) -> Audit:
    """What to do with an inexact function, as the user gave it."""
    if value not in ("warn", "raise", None):
        raise ValueError(f'audit must be "warn", "raise" or None; got {value!r}.')
    return value


def argnum(value: Any, count: int, name: str) -> int:
    """The position, non-negative, of one of `count` positional arguments; negative ones count from
    the end."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must name arguments by their positions, as ints; got {value!r}.")
    number = operator.index(value)
    if not -count <= number < count:
        raise ValueError(
            f"{name} names argument {number}, and the function was called with "
            f"{counted(count, 'positional argument')}."
        )
    return number % count


def argnums(value: Any, in_axes: tuple[Any, ...]) -> tuple[int, ...]:
    """The positions of the differentiated arguments, non-negative, of arguments that can be
    differentiated."""
    count = len(in_axes)
    given = value if isinstance(value, tuple | list) else (value,)
    numbers = []
    for number in given:
        number = argnum(number, count, f"argnums={value!r}")
        if isinstance(in_axes[number], Sentinel) and in_axes[number] is not MAX_GRAD:
            raise ValueError(
                f"argnums={value!r} names argument {number}, which in_axes declares "
                f"{in_axes[number]!r}: a carried state and keys pass no gradient. Differentiate "
                "another argument, or declare this one None or an int."
            )
        numbers.append(number)
    if not numbers:
        raise ValueError("argnums is empty; name at least one argument to differentiate.")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"argnums={value!r} names an argument twice.")
    return tuple(numbers)


_DIFFERENTIATE_MODULES = {
    "nnx": (
        "it is part of an nnx model. Write jaxaccum.nnx.value_and_grad(fun, …)(model, batch), "
        "which differentiates the parameters of a model and updates the rest."
    ),
    "equinox": (
        "it is part of an Equinox module. Write equinox.filter_value_and_grad("
        "jaxaccum.microbatch(fun, …))(module, batch), which differentiates the floating arrays "
        "of a module; has_aux=True is given to equinox, not to microbatch."
    ),
}


def differentiable(leaf: Any, name: str, *, library: str | None = None) -> None:
    """A leaf that a derivative is asked of is real or complex floating; `library` is that of the
    module that it is part of."""
    if library is not None and not (is_array(leaf) and is_inexact(leaf)):
        is_number = is_array(leaf) or isinstance(leaf, bool | int)
        kind = f"its dtype is {dtype_of(leaf)}" if is_number else f"is a {type(leaf).__name__}"
        raise TypeError(
            f"{name} is to be differentiated, and {kind}: {_DIFFERENTIATE_MODULES[library]}"
        )
    if not is_array(leaf) and not isinstance(leaf, bool | int | float | complex):
        raise TypeError(
            f"{name} is to be differentiated, but it is not an array: it is a "
            f"{type(leaf).__name__}; leave it out of argnums."
        )
    if not is_inexact(leaf):
        raise TypeError(
            f"{name} is to be differentiated, and its dtype is {dtype_of(leaf)}; derivatives need "
            "a floating or complex dtype. Cast it, leave it out of argnums, or move it to an "
            "argument of its own."
        )


def numeric(leaf: Any, name: str) -> None:
    """An array that JAX can hold: of numbers or keys, not of strings or objects."""
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "USOMm":
        raise TypeError(
            f"{name} is an array of {leaf.dtype}, and JAX holds arrays of numbers only; leave it "
            "out of the batch, or replace it by integers, such as the index of each example."
        )


def key(leaf: Any, name: str, sentinel: Sentinel) -> None:
    """A leaf declared a key is one key: typed of shape (), or legacy, uint32 of one axis.

    A key of the batch may be an array of typed keys: what acts on them acts on each of them.
    """
    if is_key(leaf) or (sentinel is BATCH_KEY and key_impl(leaf) is not None):
        return
    raise TypeError(
        f"in_axes declares {name} {sentinel!r}, but it is not a single PRNG key: it is "
        f"{dtype_of(leaf)}{list(jnp.shape(leaf))}; pass jax.random.key(seed), or declare the "
        "argument None or an int."
    )


def batch_size(sizes: Sequence[tuple[str, int]], keywords: Sequence[str] = ()) -> int:
    """The one size of all batch axes, given with the names of their leaves.

    `keywords` are the keyword arguments that hold arrays.
    """
    if not sizes:
        hint = by_keyword(keywords) if keywords else "as in in_axes=(None, 0)."
        raise ValueError(
            "no argument has a batch axis; give in_axes an int for the argument that holds the "
            f"examples{'. ' if keywords else ', '}{hint}"
        )
    first_name, first = sizes[0]
    for name, other in sizes[1:]:
        if other != first:
            raise ValueError(
                f"batch axes disagree: {first_name} holds {first} examples and {name} holds "
                f"{other}. Every leaf with a batch axis needs one row per example; give a leaf "
                "that is not batched None in in_axes."
            )
    if not isinstance(first, int):
        raise ValueError(
            f"the batch axis of {first_name} has the symbolic size {first}, and a partition into "
            "microbatches needs a number. Export one program per batch size, or one for the "
            "largest: pad the batch, and count its examples with num_examples_argnum."
        )
    return first


def by_keyword(names: Sequence[str]) -> str:
    """What to write where the arguments of these names hold arrays and are passed by keyword."""
    entries = ", ".join(f'"{name}": 0' for name in dict.fromkeys(names))
    return (
        f"Write in_axes={{{entries}}}: the keyword arguments that hold examples; leave out the "
        "others."
    )


def counted(number: int, noun: str) -> str:
    """A number and what it counts: ``1 example``, ``2 examples``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def memory(value: Any) -> Memory:
    """The budget of a coupled program."""
    if value is None or (isinstance(value, str) and value in ("min", "store")):
        return value
    if isinstance(value, str | bool) or not hasattr(value, "__index__"):
        raise TypeError(
            f'memory must be None, "min", "store" or a number of bytes; got {value!r}. It says '
            "what a coupled loss may keep of the full batch."
        )
    if operator.index(value) < 0:
        raise ValueError(f"memory must be at least 0 bytes; got {value!r}.")
    return operator.index(value)


def unroll(value: Any) -> Unroll:
    """How much of the loop is written out."""
    if isinstance(value, bool) or (isinstance(value, str) and value == "last"):
        return value
    if isinstance(value, str | jax.core.Tracer) or not hasattr(value, "__index__"):
        raise TypeError(
            "unroll must be a number of microbatches to write out per iteration, True for all of "
            f'them, False for one, or "last" for the last one alone; got {value!r}.'
        )
    if operator.index(value) < 1:
        raise ValueError(f"unroll must be at least 1 microbatch per iteration; got {value!r}.")
    return operator.index(value)


def gather(value: Any) -> str:
    """When sharded parameters are gathered."""
    if value not in get_args(Gather):
        raise ValueError(f"gather must be one of {get_args(Gather)}; got {value!r}.")
    return value


def is_bound(axis_name: str) -> bool:
    """Whether a surrounding loop or `vmap` has given the name to its axis."""
    try:
        lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def coupled(
    coupling: jex.JaxprEqn, name: str, partition: microbatches.Partition, *, shadows: bool
) -> None:
    """All microbatches of a coupled loss have one size, as devices have, and their axis one
    meaning."""
    what = (
        f"the loss is coupled by {coupling.primitive.name} over {name!r} (at {frame_of(coupling)})"
    )
    if shadows:
        raise ValueError(
            f"{what}, and an axis of that name is bound around this loop too, so that it could "
            'mean either; name one of them otherwise, as in axis_name="inner".'
        )
    if len(partition.groups) > 1:
        large, small = partition.groups
        raise ValueError(
            f"{what}, so its microbatches must be equal, and they are not: {large.count} of "
            f"{large.size} examples, {small.count} of {small.size}. Choose a number that divides "
            "the batch. Or pad the batch, jaxaccum.pad_batch(batch, to=…), and mask the padding: "
            "sums of masked values over sums of the mask."
        )


def undivided(arrays: Sequence[tuple[str, frozenset[str]]], axes: frozenset[str]) -> None:
    """A coupled loss runs where JAX tracks no types, and would count what parts of a parameter
    share on each device.

    `arrays` are the names of the arguments, and the mesh axes over which each differs between
    devices.
    """
    for name, own in arrays:
        if others := own - axes:
            raise NotImplementedError(
                f"{name} differs between the devices along {', '.join(map(repr, sorted(others)))}, "
                "the batch does not, and the loss has collectives over microbatches. Inside "
                "shard_map this is not supported. Divide the parameters on an explicit mesh "
                "instead, outside shard_map."
            )


def axis_names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes that an option names: one, several, or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def mesh_axes(
    value: str | Sequence[str] | None, axis_name: str, seen: Sequence[Sequence[str]] = ()
) -> tuple[str, ...]:
    """The mesh axes to sum over, all bound by a surrounding `shard_map`."""
    if not isinstance(axis_name, str):
        raise TypeError(f"axis_name must be a string; got {axis_name!r}.")
    names = axis_names(value)
    mesh = jax.sharding.get_abstract_mesh()
    bound = mesh.manual_axes
    if axis_name in mesh.axis_names or axis_name in itertools.chain(*seen):
        raise ValueError(
            f"the mesh has an axis named {axis_name!r}, which is the name of the loop's own axis; "
            "rename the mesh axis, or pass another axis_name."
        )
    for name in names:
        try:
            lax.axis_size(name)
        except (NameError, TypeError):
            raise ValueError(
                f"mesh_axes names {name!r}, and no such mesh axis is bound here (bound: "
                f"{tuple(bound)}); call the function inside jax.shard_map over a mesh with that "
                "axis, or leave mesh_axes out."
            ) from None
    return names


def divided(mesh_axes: Sequence[str], batch: Sequence[frozenset[str]]) -> None:
    """Every mesh axis that is summed over divides the batch; `batch` are the axes over which its
    leaves vary."""
    if not mesh_axes or not varying.checked(mesh_axes):
        return
    for name in mesh_axes:
        if lax.axis_size(name) > 1 and not any(name in axes for axes in batch):
            raise ValueError(
                f"mesh_axes names {name!r}, and the batch is not divided over it (but over "
                f"{sorted(frozenset().union(*batch)) or 'no axis'}), so each of its "
                f"{lax.axis_size(name)} devices would count the same examples; divide the batch "
                "over it in the in_specs of shard_map, or leave it out of mesh_axes."
            )
