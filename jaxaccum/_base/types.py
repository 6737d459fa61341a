"""The names that every module shares: type aliases and the sentinels of ``in_axes``."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

Array = jax.Array
PyTree = Any
KeyPath = tuple[Any, ...]
"""Where a leaf is in a pytree, as ``jax.tree_util`` gives it."""
Tangent = Any
"""A tangent or a cotangent in a rule of JAX's: an array, or a ``SymbolicZero``."""
TreeDef = Any
"""The structure of a pytree; JAX exports its class as a variable, which is not a type."""
Fun = Callable[..., Any]
Axes = Any
"""One entry of ``in_axes``: None, an int, a sentinel, or a pytree prefix of None and ints."""
InAxes = Sequence[Axes] | Mapping[str, Axes]
"""``in_axes``: a tuple, one entry per positional argument, or a dict of entries by names of
arguments."""
Split = Literal["contiguous", "strided"]
Unroll = int | bool | Literal["last"]
"""What is written out instead of looped over: so many microbatches per iteration, all, or the last
one alone."""
Memory = int | Literal["min", "store"] | None
"""What a coupled program keeps of the full batch at its cuts: nothing, everything, bytes, what is
cheap."""
Audit = Literal["warn", "raise"] | None
"""What a transformation does where the audit finds its function inexact: warn, raise an error, or
not ask it."""
Gather = Literal["each", "once"]
"""When parameters sharded over the batch's mesh axes are gathered: at every microbatch, or before
the loop."""


class Sentinel(enum.Enum):
    """What a whole argument is to the loop, where neither "whole" nor "batched" says it.

    CARRY is a state threaded from microbatch to microbatch, KEY a PRNG key folded with the index of
    the microbatch. From BATCH_KEY each example draws what it draws in the whole batch, and
    EXAMPLE_KEY reaches `fun` as an array of keys, ``jax.random.split(key, batch_size)[i]`` for
    example i. MAX_GRAD is also for a part of an argument: it is passed whole, and its gradients
    combine by maximum.
    """

    CARRY = "CARRY"
    KEY = "KEY"
    EXAMPLE_KEY = "EXAMPLE_KEY"
    BATCH_KEY = "BATCH_KEY"
    MAX_GRAD = "MAX_GRAD"

    def __repr__(self) -> str:
        return f"jaxaccum.{self.name}"


CARRY = Sentinel.CARRY
"""A state threaded from microbatch to microbatch; `fun` returns the new one as ``Carry(state)``.

A coupled loss updates it once, from the state that the call was given, which every microbatch
reads: from a key in it all draw the same numbers. Pass a key for draws as BATCH_KEY.
"""
KEY = Sentinel.KEY
"""A PRNG key, folded with the index of the microbatch: the draws depend on the partition."""
BATCH_KEY = Sentinel.BATCH_KEY
"""A PRNG key, or a pytree of keys, from which each example draws what it draws in the whole batch.

`fun` draws from it for all rows of its input at once, as it does without microbatches. Each draw
has the rows of the whole batch's draw, bit for bit, under every partition, generator and setting of
``jax_threefry_partitionable``; under ``mesh_axes`` the batch is that of all devices. So masks and
noise are those of the full batch, and the gradient is exact. With keys of rbg and unsafe_rbg, every
microbatch makes the numbers of the whole batch and takes its rows. It reaches `fun` as a typed
key::

    mask = jax.random.bernoulli(key, 0.9, (batch_size, features))
    # in fun(params, batch[rows], key): bernoulli(key, 0.9, (len(rows), features)) is mask[rows]
"""
EXAMPLE_KEY = Sentinel.EXAMPLE_KEY
"""A PRNG key that reaches `fun` as one key per example: ``jax.random.split(key, batch_size)``, bit
for bit.

So a loss that split its key over the examples itself keeps its masks, under every partition,
generator and setting of ``jax_threefry_partitionable``. Under ``mesh_axes`` `batch_size` counts the
examples of all devices. With keys of rbg and unsafe_rbg, what is drawn under `jax.vmap` depends on
how many keys are drawn from at once, and so on the partition: use `jax.lax.map`.
"""
MAX_GRAD = Sentinel.MAX_GRAD
"""A whole argument, or a part of one, whose "gradient" is a maximum over examples: its own next
value.

Quantized layers return their scales and histories of maxima so. Over microbatches and devices such
gradients combine by maximum, and where every example is padding the value stays what it is. Flax's
collection ``_overwrite_with_gradient`` is recognised without it::

    in_axes = ({"params": None, "fp8": jaxaccum.MAX_GRAD}, 0)
"""
