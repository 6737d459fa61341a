"""Calls outside of ``jax.jit``: what they run is compiled once for equal programs, and kept.

The problem. Outside of jit JAX compiles each ``lax.scan`` by itself, and keeps what it compiled for
this one body. The body here is made anew at each call, since the user's function may have changed,
so each call would compile: half a second in place of some milliseconds.

The idea. The user's function is traced at every call, as by ``jax.grad``. If the program that comes
out is one that was compiled before, that is what runs.

    program = trace of the loop and its gradient   # at every call
    compiled = kept[key of the program]            # jax.jit, the first time
    compiled(arrays)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.core
import jax.extend.core as jex

from jaxaccum._jaxpr import compat
from jaxaccum._jaxpr.structure import key_of

_KEPT = 64
"""How many compiled programs are kept; the least recently used goes first."""


def once(fun: Callable[..., Any], *operands: Any) -> Any:
    """``fun(*operands)``; where all operands are arrays, compiled once for all functions that trace
    to one program."""
    arrays, treedef = jax.tree.flatten(operands)
    if compat.is_jit_disabled() or not all(map(_is_array, arrays)):
        return fun(*operands)
    closed, shapes = jax.make_jaxpr(
        lambda *arrays: fun(*treedef.unflatten(arrays)), return_shape=True
    )(*arrays)
    jaxpr, consts = compat.opened(closed)
    try:
        run = _compiled(_Keyed(key_of(jaxpr), jaxpr))
    except TypeError:  # something in it has no hash
        return fun(*operands)
    return jax.tree.unflatten(jax.tree.structure(shapes), run(consts, arrays))


def _is_array(x: Any) -> bool:
    """Whether it is an array and no tracer: under a transformation JAX decides what is compiled."""
    return not isinstance(x, jax.core.Tracer) and not compat.is_reference(jax.typeof(x))


@dataclasses.dataclass(frozen=True)
class _Keyed:
    """A program that equals every other with its key."""

    key: Hashable
    jaxpr: jex.Jaxpr = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=_KEPT)
def _compiled(keyed: _Keyed) -> Callable[[list[Any], list[Any]], list[Any]]:
    return jax.jit(lambda consts, arrays: jax.core.eval_jaxpr(keyed.jaxpr, consts, *arrays))
