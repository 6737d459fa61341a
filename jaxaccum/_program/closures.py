"""What a function closes over: its arrays that are no arguments, by the names that its source gives
them."""

from __future__ import annotations

import dis
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from types import CodeType
from typing import Any

import numpy as np

from jaxaccum._base.source_lines import parameters_of
from jaxaccum._base.trees import is_array, leaves_with_names
from jaxaccum._base.types import Array, Fun

ROWS_ARGUMENT = "make {name} an argument of the loss with 0 in in_axes, or a part of the batch"
"""What to write where an array of the closure has a row for each example."""


def closed_over(fun: Fun | None) -> Iterator[tuple[str, Any]]:
    """The arrays that `fun` reads from its closure and from globals, by name: ``batch['x']``.

    Functions that it closes over are followed, and so are those of its own module that it calls.
    """
    seen, queue = {id(fun)}, [fun]
    while queue:
        for name, value in _variables(queue.pop(0)):
            for leaf_name, leaf in _leaves(value, name):
                if is_array(leaf):
                    yield leaf_name, leaf
                elif callable(leaf) and id(leaf) not in seen:
                    seen.add(id(leaf))
                    queue.append(leaf)


def _leaves(value: Any, name: str) -> list[tuple[str, Any]]:
    """The leaves of a value; none of one that is no pytree, as a dict with keys of two kinds."""
    try:
        return leaves_with_names(value, name)
    except (TypeError, ValueError):  # of the value's own keys or its flattening
        return []


def of_length(fun: Fun, size: int) -> list[tuple[str, Any]]:
    """The arrays that `fun` closes over and that have `size` rows, by name."""
    return [(name, x) for name, x in closed_over(fun) if x.shape[:1] == (size,)]


def explain(
    error: Exception,
    fun: Fun,
    *,
    size: int,
    batch_size: int,
    keys: Sequence[str] = (),
    batch_keys: Sequence[str] = (),
) -> None:
    """Note on an error of the user's function at which size it came up, and what may not fit it.

    That is an argument that holds keys of examples or is a key of the batch, or an array that the
    function closes over.
    """
    if batch_keys:
        error.add_note(
            f"{batch_keys[0]} is declared BATCH_KEY, so fun gets a key of a special type. Some "
            "code needs an ordinary JAX key: jax.random.poisson, jax.random.key_data, and code "
            "that joins the key with another one (jnp.where, jnp.stack, lax.cond). For such code "
            "declare the argument EXAMPLE_KEY, which gives one ordinary key per example, and draw "
            "under jax.vmap."
        )
    if keys:
        error.add_note(
            f"{keys[0]} is declared EXAMPLE_KEY, so it holds {size} keys, one per example. Where "
            "one key is wanted, declare it BATCH_KEY, or call for each example under jax.vmap."
        )
    if size == batch_size:
        return
    name = getattr(fun, "__name__", "the function")
    said = (
        f"jaxaccum called {name} with a microbatch of {size} of the batch's {batch_size} examples."
    )
    if long := of_length(fun, batch_size):
        names = " and ".join(name for name, _ in long)
        shown = " and ".join(f"{name}, {x.dtype}{list(x.shape)}" for name, x in long)
        said += (
            f" It closes over {shown}, a row for each example of the whole batch: "
            f"{ROWS_ARGUMENT.format(name=names)}."
        )
    else:
        said += (
            " Where examples come in groups, pass a microbatch_size that is a multiple of the "
            "group's size and that divides the batch."
        )
    if _is_decorated(fun):
        said += (
            f" {name} is decorated: where a decorator differentiates it, as jax.value_and_grad and "
            "eqx.filter_value_and_grad do, pass the function without it."
        )
    error.add_note(said)


def _is_decorated(fun: Fun) -> bool:
    """Whether the user's function is wrapped, by a wrapper that is not one of jaxaccum's."""
    module = getattr(fun, "__globals__", {}).get("__name__", "")
    return hasattr(fun, "__wrapped__") and not module.startswith("jaxaccum.")


def roots_of(names: Iterable[str]) -> list[str]:
    """The variables that arrays are parts of, each once: ``batch`` of ``batch['x']``."""
    return list(dict.fromkeys(re.split(r"[.\[]", name)[0] for name in names))


def as_arguments(fun: Fun | None) -> str:
    """What to say where arguments are missing: what `fun` closes over, and how to pass it; "" if it
    is nothing."""
    arrays = [(name, x) for name, x in closed_over(fun) if x.shape]
    if not arrays:
        return ""
    roots = filter(str.isidentifier, roots_of(name for name, _ in arrays))
    shown = [f"{name} ({x.dtype}{list(x.shape)})" for name, x in arrays[:_SHOWN]]
    more = f" and {len(arrays) - _SHOWN} more" if len(arrays) > _SHOWN else ""
    name, own = getattr(fun, "__name__", "fun"), [p.name for p in parameters_of(fun)]
    parameters = ", ".join([*own, *roots])
    called, definition = name, f"def {name}({parameters})"
    if name == "<lambda>":
        called, definition = "The function", f"lambda {parameters}: …"
    return (
        f"{called} closes over {', '.join(shown)}{more}. What belongs to the batch must be an "
        f"argument, so that it can be cut into microbatches: write {definition}, pass the same to "
        "the call, and give in_axes one entry for each."
    )


_SHOWN = 4
"""How many arrays an error names."""


def name_of(fun: Fun, array: Array) -> str | None:
    """The name of an array that `fun` closes over; None where it is not found."""
    return next((name for name, x in closed_over(fun) if is_array_of(x, array)), None)


def _variables(fun: Any) -> Iterator[tuple[str, Any]]:
    """What a function reads that is neither an argument nor its own."""
    if isinstance(fun, functools.partial):
        for i, x in enumerate(fun.args):
            yield f"argument {i} of a partial", x
        yield from fun.keywords.items()
        yield "the function of a partial", fun.func
        return
    code = getattr(fun, "__code__", None)
    if code is None:
        inner = getattr(fun, "__wrapped__", None) or getattr(fun, "__func__", None)
        yield from [] if inner is None else _variables(inner)
        return
    for name, cell in zip(code.co_freevars, fun.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in _global_names(code):
        value = fun.__globals__.get(name)
        if not callable(value) or getattr(value, "__module__", None) == fun.__module__:
            yield name, value


def _global_names(code: CodeType) -> Iterator[str]:
    """The global names that a function's code reads, and those of the functions defined in it."""
    read: dict[str, None] = {}
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read[one.argval] = None
    yield from read
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def is_array_of(x: object, array: Array) -> bool:
    """Whether `array`, as JAX has traced it, is `x`; of numpy's arrays JAX keeps a copy."""
    if x is array or not isinstance(x, np.ndarray | np.generic):
        return x is array
    return (x.shape, x.dtype) == (array.shape, array.dtype) and np.array_equal(x, array)
