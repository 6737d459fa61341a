"""Random numbers: rows from one key per example, and draws by the split from one key for all."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._audit import fixes
from jaxaccum._audit.lattice import Fault, FaultKind, Layout, Value, faults_of, fixed, rows
from jaxaccum._audit.registry import RULES, Settled, rule
from jaxaccum._audit.rules.operands import (
    Faults,
    all_fixed,
    all_unscaled,
    any_place,
    any_summary,
    faulty,
    kinds_of,
    layout_of,
    same_layout,
    summaries_among,
)
from jaxaccum._audit.walk import Op, Walk, beyond, varying
from jaxaccum._program.batch_keys import base_of, is_batch_key

_ONE_KEY = "one key draws for the whole microbatch, so the numbers depend on the split"
_BY_INTEGERS = "the integers of a key of the batch tell which examples the microbatch holds"
_BY_PLACE = "keys are made from places or numbers of examples, which differ by microbatch"
_CLOSED_OVER = "the loss closes over the key `{name}`, so every microbatch draws the same numbers"
_WITHOUT_BITS = {"random_seed", "random_wrap", "random_unwrap", "random_clone"}
_FOR_EACH_KEY = {
    "threefry2x32": None,
    "rbg": {*_WITHOUT_BITS, "random_split", "random_fold_in"},
    "unsafe_rbg": _WITHOUT_BITS,
}
"""What JAX computes for each key by itself under `jax.vmap`, by generator; None is everything.

The rest makes all numbers from the first key: what an example gets depends on the others.
"""


@rule(
    """
        random_bits random_seed random_split random_fold_in random_wrap random_unwrap random_clone
        random_gamma threefry2x32 rng_bit_generator rng_uniform
    """,
    uniform=True,
)
def draw(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Keys and bits: one function of each key."""
    if (drawn := _by_example(walk, op, ins)) is not None:
        return drawn
    layout = layout_of(ins)
    if any_summary(ins):
        return walk.couple(op, summaries_among(ins), layout=layout)
    if layout is not None:
        alone = same_layout(ins) and (op.name != "rng_bit_generator" or not layout.axes)
        if any(beyond(op.out_shapes(i), rows(layout)) for i in range(op.num_outs)):
            return walk.unknown(op, "each example draws as many numbers as the batch has examples")
        if not alone:
            return RULES["*"].apply(walk, op, ins)
        return rows(layout, faults=_mixed_keys(walk, op) if layout.axes else frozenset())
    faults = {_as_stream(walk, op, f) for f in faults_of(ins)}
    if _by_split(op, ins):
        faults = {f for f in faults if f.kind is not FaultKind.POSITION}
        if not any(f.declared for f in faults):
            faults.add(_one_key(walk, op, ins))
    return Settled([fixed(faults=frozenset(faults))] * op.num_outs)


def _by_example(walk: Walk, op: Op, ins: list[Value]) -> Settled | None:
    """A draw from a key of the batch: rows along the axis that grows with the examples."""
    dtypes = _dtypes([*op.eqn.invars, *op.eqn.outvars])
    if not any(map(is_batch_key, dtypes)) or not all_fixed(ins) or _by_place(ins):
        return None
    faults = faults_of(ins)
    if op.name == "random_unwrap":
        faults |= {walk.fault(op, FaultKind.RANDOM, _BY_INTEGERS)}
    axes = varying(op.out_shapes()) if op.name in ("random_bits", "random_split") else []
    return Settled([rows(Layout(tuple(axes)), faults=faults) if axes else fixed(faults=faults)])


def _as_stream(walk: Walk, op: Op, fault: Fault) -> Fault:
    """A draw from a carried state is the next one of a random stream."""
    if fault.kind is not FaultKind.STATE:
        return fault
    note = f"{fault.note}, and numbers are drawn from it"
    if fault.declared:
        return walk.declared(op, FaultKind.RANDOM, note)
    return walk.fault(op, FaultKind.RANDOM, note, fix=fixes.KEY_OF_MODEL)


def _one_key(walk: Walk, op: Op, ins: list[Value]) -> Fault:
    """That one key draws for all examples; a key that the loss closes over is named."""
    if any(map(is_batch_key, _dtypes([*op.eqn.invars, *op.eqn.outvars]))):
        return walk.fault(op, FaultKind.RANDOM, _BY_PLACE, fix=fixes.BY_SPLIT)
    name = next((v.closure for v in ins if v.closure), "")
    if not name:
        return walk.fault(op, FaultKind.RANDOM, _ONE_KEY)
    note, fix = _CLOSED_OVER.format(name=name), fixes.KEY_ARGUMENT.format(name=name)
    return walk.fault(op, FaultKind.RANDOM, note, fix=fix)


def _mixed_keys(walk: Walk, op: Op) -> Faults:
    """That the generator does not keep the keys of a `jax.vmap` apart."""
    keys = list(filter(_is_key, _dtypes([*op.eqn.invars, *op.eqn.outvars])))
    name = _generators().get(keys[0], base_of(keys[0])) if keys else "threefry2x32"
    if name is None:
        note = f"draws from keys of the type {keys[0]} have no rule"
        return faulty(walk, op, FaultKind.UNKNOWN, note)
    apart = _FOR_EACH_KEY.get(name, _WITHOUT_BITS)
    if apart is None or op.name in apart:
        return frozenset()
    note = (
        f"under jax.vmap, the generator {name!r} draws for all keys at once, so the numbers depend "
        "on how the batch is split"
    )
    return frozenset([walk.fault(op, FaultKind.RANDOM, note, fix=fixes.ONE_BY_ONE)])


def _dtypes(variables: list[Any]) -> list[jnp.dtype]:
    return [v.aval.dtype for v in variables]


def _is_key(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


@functools.cache
def _generators() -> dict[object, str]:
    """The names of JAX's own generators, by the dtype of their keys."""
    key = lambda name: jax.eval_shape(lambda: jax.random.key(0, impl=name))
    return {key(name).dtype: name for name in _FOR_EACH_KEY}


def _by_split(op: Op, ins: list[Value]) -> bool:
    """Whether the draw has the batch's size, or its key is made of an example's place."""
    grows = any(map(varying, map(op.out_shapes, range(op.num_outs))))
    grown = any(map(varying, map(op.shapes, range(len(ins)))))
    return _by_place(ins) or (grows and not grown)


def _by_place(ins: list[Value]) -> bool:
    """Whether an operand is made of an example's place, or of how many examples there are."""
    placed = any_place(ins) or FaultKind.POSITION in kinds_of(faults_of(ins))
    return placed or not all_unscaled(ins)
