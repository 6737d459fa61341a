"""What each argument of the loss is to the walk, before its first equation."""

from __future__ import annotations

import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._audit import states
from jaxaccum._audit.lattice import Fault, FaultKind, Index, Layout, Value, fixed, rows
from jaxaccum._audit.traces import Subject, Traced
from jaxaccum._audit.walk import Walk
from jaxaccum._program.argument_slots import Role, Slot


def input_values(walk: Walk, subject: Subject, whole: Traced) -> list[Value]:
    """The values of the program's arguments; the first may be the index of the microbatch."""
    values: list[Value] = []
    if whole.indexed:
        values.append(fixed(index=Index.MICROBATCH, scalar=True, number=walk.fresh()))
    changing = {before for _, before, _ in states.states(subject.slots, whole)}
    for slot, v in zip(subject.slots, whole.arguments, strict=True):
        params = subject.differentiates(slot.argnum) and jnp.issubdtype(v.aval.dtype, jnp.inexact)
        changes = v in changing
        faults = _of_state(slot, declared=subject.draws_declared) if changes else frozenset()
        value = _value(walk, slot, v, params=params, faults=faults)
        values.append(value.like(never_nan=True))
    return values


def _of_state(slot: Slot, *, declared: bool) -> frozenset[Fault]:
    name = slot.name if declared else "a variable of the model"
    note = f"{name} changes from microbatch to microbatch"
    return frozenset([Fault(FaultKind.STATE, None, None, note, declared=declared)])


def _value(walk: Walk, slot: Slot, v: jex.Var, *, params: bool, faults: frozenset[Fault]) -> Value:
    number, scalar = walk.fresh(), getattr(v.aval, "shape", None) == ()
    match slot.role:
        case Role.ROWS:
            return rows(Layout((slot.axis,), inner=walk.group), number=number)
        case Role.EXAMPLE_KEY:
            return rows(Layout((0,), inner=walk.group), number=number)
        case Role.KEY:
            note = f"{slot.name} is folded with the microbatch's index"
            fault = Fault(FaultKind.RANDOM, None, None, note, declared=True)
            return fixed(faults=frozenset([fault]), number=number, scalar=scalar)
        case Role.CARRY:
            return fixed(faults=faults, number=number, scalar=scalar)
        case _:
            of_maxima = slot.overwritten
            return fixed(number=number, scalar=scalar, params=params, overwritten=of_maxima)
