"""What is refused of an output: arrays without a tag, rows of another number, states of another
structure."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._base.trees import (
    dtype_of,
    is_array,
    key_impl,
    leaves_with_names,
)
from jaxaccum._base.types import PyTree
from jaxaccum._program.tags import TAGS, Carry, Tag, spelled

_FIRST, _LAST = TAGS[:-1], TAGS[-1]
_TAGS = f"{', '.join(map(spelled, _FIRST))} or {spelled(_LAST)}"


def described(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)}"
    return f"an array of shape {list(jnp.shape(x))}" if is_array(x) else f"a {type(x).__name__}"


def check_array(name: str, x: Any) -> None:
    if isinstance(x, Tag):
        raise TypeError(
            f"{name} is a {type(x).__name__}, and a tag holds arrays, not other tags; remove the "
            "inner tag, or return it as an output of its own."
        )
    if not is_array(x) and not isinstance(x, bool | int | float | complex):
        raise TypeError(
            f"{name} is not an array: it is a {type(x).__name__}; return arrays and scalars only."
        )


def check_combines_keys(name: str, tag: Tag) -> None:
    if not tag.reduction.moves:
        raise TypeError(
            f"{name} is a PRNG key, and a {type(tag).__name__} combines numbers, not keys; return "
            "it as Concat, Stack, Last or in the Carry."
        )


def padding_refused(name: str) -> str:
    return (
        f"{name} has no tag, so it would count padding as examples: with num_examples_argnum "
        "return Mean(total, weight), with the mask of real examples in both."
    )


def untagged_refused(name: str, x: Any, size: int) -> str:
    shape = jnp.shape(x)
    rows = shape[:1] == (size,)
    first, second = (
        ("jaxaccum.Concat(x) for one row per example", "jaxaccum.Sum(x) for a sum over examples")
        if rows
        else ("jaxaccum.Sum(x) for a sum over examples", "jaxaccum.Mean(total, weight) for a mean")
    )
    return (
        f"{name} is {dtype_of(x)}{list(shape)} without a tag, so nothing says how it combines over "
        f"microbatches. Wrap it in {first}, in {second}, or in another of jaxaccum's tags: "
        f"{_TAGS}. Only three kinds of output need no tag: a floating-point scalar, which is taken "
        "as a mean over examples; a value computed only from arguments that are not cut; and "
        "one that is the same for every microbatch because it follows from collectives over them. "
        "A sum, a maximum or a minimum needs a tag, even if it is a scalar. For the new state of a "
        'BatchNorm give the layer axis_name="microbatch" (in Haiku cross_replica_axis): it is then '
        "the same for every microbatch."
        f"{_OF_GRADIENT if name.startswith('output[1]') else ''}"
    )


_OF_GRADIENT = (
    " If it is a gradient, remove the decorator that differentiates the loss, and differentiate "
    "afterwards: jax.value_and_grad(jaxaccum.microbatch(loss, …)), or Equinox's "
    "eqx.filter_value_and_grad(jaxaccum.microbatch(loss, …))."
)


def check_rows(name: str, x: Any, size: int) -> None:
    if jnp.ndim(x) == 0 or jnp.shape(x)[0] != size:
        raise ValueError(
            f"{name} has shape {list(jnp.shape(x))}, and Concat needs one row for each of the "
            f"microbatch's {size} examples along axis 0; use Stack for one entry per microbatch, "
            "or Sum or Mean for one value."
        )


def check_carries(carries: list[Carry], carry: PyTree, has_carry: bool) -> None:
    if not has_carry:
        if carries:
            raise ValueError(
                "fun returns a Carry, and no argument is declared jaxaccum.CARRY in in_axes; "
                "declare the argument that holds the old state."
            )
        return
    if not carries and not jax.tree.leaves(carry):
        return  # an empty state needs no tag
    if len(carries) != 1:
        raise ValueError(
            f"in_axes declares an argument CARRY, and fun returns {len(carries)} Carry tags; "
            "return the new state once, as Carry(state), anywhere in its output."
        )
    new, old = carries[0].state, carry
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            f"the carried state changes its structure from {jax.tree.structure(old)} to "
            f"{jax.tree.structure(new)}; return the structure that came in."
        )
    pairs = zip(leaves_with_names(new, "the carried state"), jax.tree.leaves(old), strict=True)
    for (name, x), before in pairs:
        check_array(name, x)
        if jnp.shape(x) != jnp.shape(before):
            raise ValueError(
                f"{name} changes its shape from {list(jnp.shape(before))} to {list(jnp.shape(x))}; "
                "return the shape that came in."
            )
        if dtype_of(x) != dtype_of(before):
            is_key = any(key_impl(leaf) is not None for leaf in (x, before))
            mend = (
                "return a key of the same kind"
                if is_key
                else f"cast it back with .astype({dtype_of(before)})"
            )
            raise TypeError(
                f"{name} changes its dtype from {dtype_of(before)} to {dtype_of(x)}; {mend}."
            )
