"""Evaluate a program so that its backward pass adds gradients to running sums, without a tree of
gradients.

The problem. A loop over microbatches wants ``sum += gradient``. If the backward pass returns the
gradient as a value, a second array of the parameter's size exists next to the sum: for a scan over
layers that is a copy of the whole model, although each step of the scan finishes only one layer's
slice.

The idea. Thread the sum through the program: an argument that every reader of the parameter passes
on unchanged. The cotangent of that argument then runs through the backward pass in the opposite
direction, and every reader adds its share to it::

    read:      (w, s)    ->  (w, s)              identity
    backward:  (dw, ds)  ->  (nothing, ds + dw)  the gradient of w goes into the sum

So ``vjp`` with the sum so far as the cotangent of the last ``s`` returns the new sum as the
cotangent of the first. A scan that reads a slice of the parameter at every step carries ``s``, and
adds to one slice: XLA does so in place.

Worked example: two microbatches, one scan over two layers ``w = [a, b]``. In microbatch i their
gradients are ``dᵢa`` and ``dᵢb``::

    the sum before           [0, 0]
    microbatch 1, step b     [0, d₁b]
    microbatch 1, step a     [d₁a, d₁b]
    microbatch 2, step b     [d₁a, d₁b + d₂b]
    microbatch 2, step a     [d₁a + d₂a, d₁b + d₂b]

Why it is right. Only ``jax.custom_vjp`` and the derivatives of JAX are used, and the rule above
holds for each reader alone. A parameter that is read twice passes its sum through both readers.
Nothing depends on the order of operands.

Where the sum goes inside: ``jit``, ``checkpoint``, ``scan`` (as a constant or as scanned rows), and
reads of a part (slices and rows of a table). Every other reader takes the parameter whole, and its
gradient is added in one piece.

Cost: nothing in the forward pass. There no equation reads the sums, and XLA removes them. Known
weakness: a parameter that is cast or transposed before it is scanned is read whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.entries import entries, part_of, with_entries
from jaxaccum._base.trees import cast
from jaxaccum._base.types import Array
from jaxaccum._jaxpr import derived_once
from jaxaccum._jaxpr.compat import ClosedJaxpr, opened, scan_arity
from jaxaccum._jaxpr.equations import constants_first
from jaxaccum._jaxpr.segments import segments
from jaxaccum._jaxpr.variables import Atom, Env, Var, among, bound, read, type_of, variables

Sums = dict[int, Array]
"""Running sums, by their place in the list that `evaluate` was given. Where only some of them are
needed, as in the body of a scan, a smaller dict goes in and comes out."""
Places = Mapping[Var, int]
"""The variables that hold a parameter with a running sum, and the place of that sum."""


def evaluate(
    jaxpr: jex.Jaxpr, values: Sequence[Array], sums: Sequence[Array], places: Mapping[int, int]
) -> tuple[list[Array], list[Array]]:
    """The outputs of ``jaxpr(*values)``, and `sums` as they came.

    In reverse, the cotangent of each sum comes back with the gradient of its parameter added to it.
    The parameters themselves receive no gradient.

    Args:
        jaxpr: a program without constants.
        values: its arguments.
        sums: the running sums, of the shapes of their parameters and of any floating dtype.
        places: for the arguments that have a sum, their position and the position of the sum.
    """
    threads = _Threads(dict(enumerate(sums)))
    outs = threads.run(jaxpr, values, _by_variable(jaxpr.invars, places))
    return outs, list(threads.sums.values())


# -- reading a parameter ---------------------------------------------------------------------------

Where = Any
"""Which part of the parameter a reader takes: an index, the start of a block, or None for all."""
Add = Callable[[Array, Array, Where], Array]
"""``add(sum, gradient, where) -> sum``."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read(
    add: Add, places: tuple[int, ...], values: list[Array], sums: Sums, where: Where
) -> tuple[list[Array], Sums]:
    """The values and the sums; backwards, each value's gradient is added to its sum."""
    del add, places, where
    return values, sums


def _read_forward(
    add: Add, places: tuple[int, ...], values: list[Array], sums: Sums, where: Where
) -> tuple[tuple[list[Array], Sums], Where]:
    del add, places
    return (values, sums), where


def _read_backward(
    add: Add, places: tuple[int, ...], where: Where, cotangents: tuple[list[Array], Sums]
) -> tuple[None, Sums, None]:
    gradients, sums = cotangents[0], dict(cotangents[1])
    for place, gradient in zip(places, gradients, strict=True):
        sums[place] = add(sums[place], cast(gradient, sums[place].dtype), where)
    return None, sums, None


_read.defvjp(_read_forward, _read_backward)


def _add_whole(total: Array, gradient: Array, where: Where) -> Array:
    del where
    return total + gradient


def _add_at_index(total: Array, gradient: Array, where: Where) -> Array:
    """Add to one entry of the leading axis."""
    old = lax.dynamic_index_in_dim(total, where, keepdims=False)
    return lax.dynamic_update_index_in_dim(total, old + gradient, where, 0)


def _add_at_slice(total: Array, gradient: Array, where: Where) -> Array:
    """Add to the block of the gradient's shape that starts at `where`."""
    old = lax.dynamic_slice(total, where, gradient.shape)
    return lax.dynamic_update_slice(total, old + gradient, where)


# -- the evaluator ---------------------------------------------------------------------------------


@dataclasses.dataclass
class _Threads:
    """An evaluation under way: the sums as the last reader passed them on."""

    sums: Sums

    def run(self, jaxpr: jex.Jaxpr, values: Sequence[Array], places: Places) -> list[Array]:
        """The outputs of the jaxpr, where the variables of `places` hold parameters."""
        parameters: Env = bound(jaxpr.invars, values)
        env = parameters | self._read_whole(_read_by_value(jaxpr, places), parameters, places)
        for step in segments(jaxpr, lambda eqn: bool(_threaded(eqn, places))):
            operands = read(env, step.invars)
            if isinstance(step, jex.Jaxpr):
                outs = derived_once.evaluate(step, operands)
            else:
                outs = self._thread(step, operands, parameters, places)
            env |= bound(variables(step.outvars), outs)
        return read(env, jaxpr.outvars)

    def _read_whole(self, whole: Sequence[Var], parameters: Env, places: Places) -> Env:
        """The parameters that an equation takes whole, read at once, before the first of them."""
        if not whole:
            return {}
        where = [places[v] for v in whole]
        return bound(whole, self.read(_add_whole, where, read(parameters, whole), None))

    def read(
        self, add: Add, places: Sequence[int], values: list[Array], where: Where
    ) -> list[Array]:
        """The values, whose gradients go to the sums at `places`; no other sum takes part."""
        read: Any = _read(add, tuple(places), values, self.only(places), where)
        self.sums |= read[1]
        return read[0]

    def only(self, places: Sequence[int]) -> Sums:
        """The sums at the given places."""
        return {place: self.sums[place] for place in sorted(set(places))}

    def _thread(
        self, eqn: jex.JaxprEqn, values: list[Array], parameters: Env, places: Places
    ) -> list[Array]:
        """One equation with its sums: operands that it threads are the parameters, the others as
        they were read."""
        threaded = _threaded(eqn, places)
        held = variables(entries(eqn.invars, threaded))
        operands = with_entries(values, threaded, read(parameters, held))
        at = {i: places[v] for i, v in zip(threaded, held, strict=True)}
        return _RULES[eqn.primitive.name].run(self, eqn, operands, at)

    def called(
        self, jaxpr: jex.Jaxpr | ClosedJaxpr, values: Sequence[Array], at: Mapping[int, int]
    ) -> list[Array]:
        """An inner jaxpr, in which the operands at the positions of `at` are parameters."""
        program, consts = constants_first(jaxpr)
        places = _by_variable(program.invars[len(consts) :], at)
        return self.run(program, [*consts, *values], places)


def _by_variable(arguments: Sequence[Var], at: Mapping[int, int]) -> Places:
    """The places of sums, given by the positions of arguments."""
    return {arguments[i]: place for i, place in at.items()}


# -- what is read whole, and what is threaded ------------------------------------------------------


def _threaded(eqn: jex.JaxprEqn, places: Places) -> list[int]:
    """The positions of the operands that the equation threads: parameters, where a rule below says
    so."""
    found = [i for i, v in enumerate(eqn.invars) if _holds(v, places)]
    rule = _RULES.get(eqn.primitive.name)
    return [] if rule is None or not found else rule.threads(eqn, found)


def _holds(v: Atom, places: Places) -> bool:
    """Whether an operand is a parameter that has a running sum."""
    return not isinstance(v, jex.Literal) and v in places


def _read_by_value(jaxpr: jex.Jaxpr, places: Places) -> list[Var]:
    """The parameters that some equation takes whole, or that are outputs themselves."""
    found = set(variables(jaxpr.outvars))
    for eqn in jaxpr.eqns:
        threaded = _threaded(eqn, places)
        found.update(variables(v for i, v in enumerate(eqn.invars) if i not in threaded))
    return among(places, found)


# -- the rules -------------------------------------------------------------------------------------


class _Run(Protocol):
    def __call__(
        self, threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
    ) -> list[Array]:
        """The outputs, of the operands, with the places of the sums of those that are threaded."""
        ...


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How one primitive passes running sums on."""

    threads: Callable[[jex.JaxprEqn, list[int]], list[int]]
    """Of the operands that are parameters, given by position, those that it threads."""
    run: _Run


def _threads_if_inside(eqn: jex.JaxprEqn, found: list[int]) -> list[int]:
    """A call is opened where something inside threads a sum; the whole of it, so that nothing is
    computed twice."""
    inner, _ = opened(eqn.params["jaxpr"])
    places = dict.fromkeys(entries(inner.invars, found), 0)
    return found if any(_threaded(one, places) for one in inner.eqns) else []


def _threads_of_jit(eqn: jex.JaxprEqn, found: list[int]) -> list[int]:
    """A jit that lays its arguments or results out over a mesh stays closed, and reads its
    parameters whole."""
    layouts = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return _threads_if_inside(eqn, found) if all(map(_is_unspecified, layouts)) else []


def _is_unspecified(sharding: object) -> bool:
    # JAX does not export the type.
    return sharding is None or type(sharding).__name__ == "UnspecifiedValue"


def _run_call(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    return threads.called(eqn.params["jaxpr"], values, at)


def _run_checkpoint(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    def body(values: list[Array], sums: Sums) -> tuple[list[Array], Sums]:
        inner = _Threads(dict(sums))
        return inner.called(eqn.params["jaxpr"], values, at), inner.sums

    options = part_of(eqn.params, ("prevent_cse", "policy"))
    outs, sums = jax.checkpoint(body, **options)(values, threads.only([*at.values()]))
    threads.sums |= sums
    return outs


def _threads_of_scan(eqn: jex.JaxprEqn, found: list[int]) -> list[int]:
    """A scan threads its constants and its scanned rows. The carry it starts from is read whole."""
    num_consts, num_carry = scan_arity(eqn.params)
    threaded: list[int] = []
    for i in found:
        is_row = i >= num_consts + num_carry and not _is_divided(eqn.invars[i], 0)
        if i < num_consts or is_row:
            threaded.append(i)
    return threaded


def _is_divided(v: Atom, dim: int) -> bool:
    """Whether an explicit mesh divides the axis, so that it cannot be indexed."""
    spec = getattr(getattr(v.aval, "sharding", None), "spec", ())
    return len(spec) > dim and spec[dim] is not None


def _run_scan(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    """The scan that also carries the sums: a step reads rows, and backwards adds to an entry."""
    num_consts, num_carry = scan_arity(eqn.params)
    first_row = num_consts + num_carry
    shared = {i: place for i, place in at.items() if i < num_consts}
    scanned = {i: place for i, place in at.items() if i >= first_row}

    def body(
        state: tuple[list[Array], Sums], x: tuple[Array, list[Array]]
    ) -> tuple[tuple[list[Array], Sums], list[Array]]:
        (carry, sums), (index, rows) = state, x
        inner, operands = _Threads(dict(sums)), [*values[:num_consts], *carry, *rows]
        if scanned:
            own = entries(operands, scanned)
            read = inner.read(_add_at_index, [*scanned.values()], own, index)
            operands = with_entries(operands, scanned, read)
        outs = inner.called(eqn.params["jaxpr"], operands, shared)
        return (outs[:num_carry], inner.sums), outs[num_carry:]

    indices = jnp.arange(eqn.params["length"], dtype=jnp.int32)
    state = (values[num_consts:first_row], threads.only([*at.values()]))
    options = part_of(eqn.params, ("length", "reverse", "unroll"))
    (carry, sums), ys = lax.scan(body, state, (indices, values[first_row:]), **options)
    threads.sums |= sums
    return [*carry, *ys]


def _threads_operand(eqn: jex.JaxprEqn, found: list[int]) -> list[int]:
    """A read of a part threads what it reads from; its indices are other operands."""
    operand = eqn.invars[0]
    divided = any(_is_divided(operand, dim) for dim in range(type_of(operand).ndim))
    strided = set(eqn.params.get("strides") or ()) - {1}
    return [0] if 0 in found and not divided and not strided else []


def _run_slice(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    starts = eqn.params["start_indices"]
    block = lax.slice(values[0], starts, eqn.params["limit_indices"])
    return threads.read(_add_at_slice, [at[0]], [block], list(map(jnp.int32, starts)))


def _run_dynamic_slice(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    block = lax.dynamic_slice(values[0], values[1:], eqn.params["slice_sizes"])
    return threads.read(_add_at_slice, [at[0]], [block], values[1:])


def _run_gather(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    """Rows of a table: the transpose of ``gather`` is ``scatter_add``, here into the sum instead of
    into zeros."""
    table, indices = values
    options = part_of(eqn.params, _GATHER_OPTIONS)
    taken, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    fill = eqn.params["fill_value"]
    rows = lax.gather(table, indices, taken, sizes, fill_value=fill, **options)
    written = lax.ScatterDimensionNumbers(
        update_window_dims=taken.offset_dims,
        inserted_window_dims=taken.collapsed_slice_dims,
        scatter_dims_to_operand_dims=taken.start_index_map,
        operand_batching_dims=taken.operand_batching_dims,
        scatter_indices_batching_dims=taken.start_indices_batching_dims,
    )

    def add(total: Array, gradient: Array, where: Where) -> Array:
        return lax.scatter_add(total, where, gradient, written, **options)

    return threads.read(add, [at[0]], [rows], indices)


_GATHER_OPTIONS = ("unique_indices", "indices_are_sorted", "mode")

_CALL = _Rule(_threads_of_jit, _run_call)
_CHECKPOINT = _Rule(_threads_if_inside, _run_checkpoint)
_RULES = {
    "jit": _CALL,
    "pjit": _CALL,
    "checkpoint": _CHECKPOINT,
    "remat": _CHECKPOINT,
    "remat2": _CHECKPOINT,
    "scan": _Rule(_threads_of_scan, _run_scan),
    "slice": _Rule(_threads_operand, _run_slice),
    "dynamic_slice": _Rule(_threads_operand, _run_dynamic_slice),
    "gather": _Rule(_threads_operand, _run_gather),
}
