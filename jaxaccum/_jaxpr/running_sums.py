"""Evaluate a program so that its backward pass adds gradients to running sums, without a tree of
gradients.

The problem. A loop over microbatches wants ``sum += gradient``. If the backward pass returns the
gradient as a value, a second array of the parameter's size exists beside the sum: for a scan over
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

Worked example, two microbatches, one scan over two layers ``w = [a, b]``, of which ``dᵢa, dᵢb`` are
the gradients::

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

Cost: nothing in the forward pass, where the sum is an argument that nobody reads and XLA removes.
Known weakness: a parameter that is cast or transposed before it is scanned is read whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.trees import cast
from jaxaccum._base.types import Array
from jaxaccum._jaxpr import derived_once
from jaxaccum._jaxpr.compat import anonymous, opened, scan_arity
from jaxaccum._jaxpr.segments import segments

Places = Mapping[jex.Var, int]
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
    threads = _Threads(list(sums))
    outs = threads.run(jaxpr, values, {jaxpr.invars[i]: place for i, place in places.items()})
    return outs, threads.sums


# -- reading a parameter ---------------------------------------------------------------------------

Add = Callable[[Array, Array, Any], Array]
"""``add(sum, gradient, where) -> sum``."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _read(
    add: Add, places: tuple[int, ...], values: list[Array], sums: list[Array], where: Any
) -> tuple[list[Array], list[Array]]:
    """The values and the sums; backwards, each value's gradient is added to its sum."""
    del add, places, where
    return values, sums


def _read_forward(
    add: Add, places: tuple[int, ...], values: list[Array], sums: list[Array], where: Any
) -> tuple[tuple[list[Array], list[Array]], Any]:
    del add, places
    return (values, sums), where


def _read_backward(
    add: Add, places: tuple[int, ...], where: Any, cotangents: tuple[list[Array], list[Array]]
) -> tuple[None, list[Array], None]:
    gradients, sums = cotangents[0], list(cotangents[1])
    for place, gradient in zip(places, gradients, strict=True):
        sums[place] = add(sums[place], cast(gradient, sums[place].dtype), where)
    return None, sums, None


_read.defvjp(_read_forward, _read_backward)


def _add_whole(total: Array, gradient: Array, where: None) -> Array:
    del where
    return total + gradient


def _add_at_index(total: Array, gradient: Array, where: Array) -> Array:
    """Add to one entry of the leading axis."""
    old = lax.dynamic_index_in_dim(total, where, keepdims=False)
    return lax.dynamic_update_index_in_dim(total, old + gradient, where, 0)


def _add_at_slice(total: Array, gradient: Array, where: list[Array]) -> Array:
    """Add to the block of the gradient's shape that starts at `where`."""
    old = lax.dynamic_slice(total, where, gradient.shape)
    return lax.dynamic_update_slice(total, old + gradient, where)


# -- the evaluator ---------------------------------------------------------------------------------


@dataclasses.dataclass
class _Threads:
    """An evaluation under way: the sums as the last reader passed them on."""

    sums: list[Array]

    def run(self, jaxpr: jex.Jaxpr, values: Sequence[Array], places: Places) -> list[Array]:
        """The outputs of the jaxpr, where the variables of `places` hold parameters."""
        parameters: dict[Any, Array] = dict(zip(jaxpr.invars, values, strict=True))
        env: dict[Any, Array] = parameters | self._read_whole(
            _read_by_value(jaxpr, places), parameters, places
        )
        for step in segments(jaxpr, lambda eqn: bool(_threaded(eqn, places))):
            if isinstance(step, jex.Jaxpr):
                outs = derived_once.evaluate(step, [env[v] for v in step.invars])
            else:
                outs = self._thread(step, [_value(v, env) for v in step.invars], parameters, places)
            env.update(zip(step.outvars, outs, strict=True))
        return [_value(v, env) for v in jaxpr.outvars]

    def _read_whole(
        self, variables: Sequence[jex.Var], parameters: Mapping[jex.Var, Array], places: Places
    ) -> dict[jex.Var, Array]:
        if not variables:
            return {}
        where = tuple(places[v] for v in variables)
        values = self._read(_add_whole, where, [parameters[v] for v in variables], None)
        return dict(zip(variables, values, strict=True))

    def _read(
        self, add: Add, places: tuple[int, ...], values: list[Array], where: Any
    ) -> list[Array]:
        """The values, whose gradients go to the sums at `places`; no other sum takes part."""
        used = sorted(set(places))
        local = tuple(used.index(place) for place in places)
        read: Any = _read(add, local, values, [self.sums[place] for place in used], where)
        for place, total in zip(used, read[1], strict=True):
            self.sums[place] = total
        return read[0]

    def _thread(
        self,
        eqn: jex.JaxprEqn,
        values: list[Array],
        parameters: Mapping[jex.Var, Array],
        places: Places,
    ) -> list[Array]:
        """One equation with its sums: operands that it threads are the parameters, the others as
        they were read."""
        threaded = _threaded(eqn, places)
        for i in threaded:
            values[i] = parameters[_variable(eqn, i)]
        at = {i: places[_variable(eqn, i)] for i in threaded}
        return _RULES[eqn.primitive.name].run(self, eqn, values, at)

    def called(self, jaxpr: Any, values: Sequence[Array], at: Mapping[int, int]) -> list[Array]:
        """An inner jaxpr, in which the operands at the positions of `at` are parameters."""
        inner, consts = opened(jaxpr)
        program = inner.replace(
            constvars=[], invars=[*inner.constvars, *inner.invars], debug_info=anonymous(inner)
        )
        places = {inner.invars[i]: place for i, place in at.items()}
        return self.run(program, [*consts, *values], places)


def _value(v: Any, env: Mapping[jex.Var, Array]) -> Array:
    return v.val if isinstance(v, jex.Literal) else env[v]


def _variable(eqn: jex.JaxprEqn, i: int) -> jex.Var:
    """Operand `i`, which is known to be a variable."""
    v = eqn.invars[i]
    assert isinstance(v, jex.Var)
    return v


def _holds(v: Any, places: Places) -> bool:
    """Whether an operand is a parameter that has a running sum."""
    return not isinstance(v, jex.Literal) and v in places


# -- what is read whole, and what is threaded ------------------------------------------------------


def _threaded(eqn: jex.JaxprEqn, places: Places) -> list[int]:
    """The positions of the operands that the equation threads: parameters, where a rule below says
    so."""
    found = [i for i, v in enumerate(eqn.invars) if _holds(v, places)]
    rule = _RULES.get(eqn.primitive.name)
    return [] if rule is None or not found else rule.threads(eqn, found)


def _read_by_value(jaxpr: jex.Jaxpr, places: Places) -> list[jex.Var]:
    """The parameters that some equation takes whole, or that are outputs themselves."""
    found = {v for v in jaxpr.outvars if _holds(v, places)}
    for eqn in jaxpr.eqns:
        threaded = _threaded(eqn, places)
        whole = [v for i, v in enumerate(eqn.invars) if i not in threaded]
        found |= {v for v in whole if _holds(v, places)}
    return [v for v in places if v in found]


# -- the rules -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How one primitive passes running sums on."""

    threads: Callable[[jex.JaxprEqn, list[int]], list[int]]
    """Of the operands that are parameters, given by position, those that it threads."""
    run: Callable[[_Threads, jex.JaxprEqn, list[Array], dict[int, int]], list[Array]]
    """The outputs, of the operands, with the places of the sums of those that it threads."""


def _threads_if_inside(eqn: jex.JaxprEqn, found: list[int]) -> list[int]:
    """A call is opened where something inside threads a sum; the whole of it, so that nothing is
    computed twice."""
    inner, _ = opened(eqn.params["jaxpr"])
    places = {inner.invars[i]: 0 for i in found}
    return found if any(_threaded(one, places) for one in inner.eqns) else []


def _threads_of_jit(eqn: jex.JaxprEqn, found: list[int]) -> list[int]:
    """A jit that lays its arguments or results out over a mesh stays closed, and reads its
    parameters whole."""
    layouts = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return _threads_if_inside(eqn, found) if all(map(_is_unspecified, layouts)) else []


def _is_unspecified(sharding: Any) -> bool:
    # JAX does not export the type.
    return sharding is None or type(sharding).__name__ == "UnspecifiedValue"


def _run_call(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    return threads.called(eqn.params["jaxpr"], values, at)


def _run_checkpoint(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    used = sorted(set(at.values()))
    local = {i: used.index(place) for i, place in at.items()}

    def body(values: list[Array], sums: list[Array]) -> tuple[list[Array], list[Array]]:
        inner = _Threads(list(sums))
        return inner.called(eqn.params["jaxpr"], values, local), inner.sums

    options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    outs, sums = jax.checkpoint(body, **options)(values, [threads.sums[place] for place in used])
    for place, total in zip(used, sums, strict=True):
        threads.sums[place] = total
    return outs


def _threads_of_scan(eqn: jex.JaxprEqn, found: list[int]) -> list[int]:
    """A scan threads its constants and its scanned rows. The carry it starts from is read whole."""
    num_consts, num_carry = scan_arity(eqn.params)
    rows = [i for i in found if i >= num_consts + num_carry and not _is_divided(eqn.invars[i], 0)]
    return [i for i in found if i < num_consts] + rows


def _is_divided(v: Any, dim: int) -> bool:
    """Whether an explicit mesh divides the axis, so that it cannot be indexed."""
    spec = getattr(getattr(v.aval, "sharding", None), "spec", ())
    return len(spec) > dim and spec[dim] is not None


def _run_scan(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    """The scan that also carries the sums: a step reads rows, and backwards adds to an entry."""
    num_consts, num_carry = scan_arity(eqn.params)
    first_row = num_consts + num_carry
    used = sorted(set(at.values()))
    shared = {i: used.index(place) for i, place in at.items() if i < num_consts}
    scanned = {i: used.index(place) for i, place in at.items() if i >= first_row}

    def body(state: Any, x: Any) -> tuple[Any, list[Array]]:
        (carry, sums), (index, rows) = state, x
        inner, operands = _Threads(list(sums)), [*values[:num_consts], *carry, *rows]
        if scanned:
            read = inner._read(
                _add_at_index, tuple(scanned.values()), [operands[i] for i in scanned], index
            )
            for i, row in zip(scanned, read, strict=True):
                operands[i] = row
        outs = inner.called(eqn.params["jaxpr"], operands, shared)
        return (outs[:num_carry], inner.sums), outs[num_carry:]

    indices = jnp.arange(eqn.params["length"], dtype=jnp.int32)
    state = (values[num_consts:first_row], [threads.sums[place] for place in used])
    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    (carry, sums), ys = lax.scan(body, state, (indices, values[first_row:]), **options)
    for place, total in zip(used, sums, strict=True):
        threads.sums[place] = total
    return [*carry, *ys]


def _threads_operand(eqn: jex.JaxprEqn, found: list[int]) -> list[int]:
    """A read of a part threads what it reads from; its indices are other operands."""
    operand: Any = eqn.invars[0]
    divided = any(_is_divided(operand, dim) for dim in range(operand.aval.ndim))
    strided = set(eqn.params.get("strides") or ()) - {1}
    return [0] if 0 in found and not divided and not strided else []


def _run_slice(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    block = lax.slice(values[0], eqn.params["start_indices"], eqn.params["limit_indices"])
    where = [jnp.int32(start) for start in eqn.params["start_indices"]]
    return threads._read(_add_at_slice, (at[0],), [block], where)


def _run_dynamic_slice(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    block = lax.dynamic_slice(values[0], values[1:], eqn.params["slice_sizes"])
    return threads._read(_add_at_slice, (at[0],), [block], values[1:])


def _run_gather(
    threads: _Threads, eqn: jex.JaxprEqn, values: list[Array], at: dict[int, int]
) -> list[Array]:
    """Rows of a table: the transpose of ``gather`` is ``scatter_add``, here into the sum instead of
    into zeros."""
    table, indices = values
    options = {name: eqn.params[name] for name in _GATHER_OPTIONS}
    read, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    fill = eqn.params["fill_value"]
    rows = lax.gather(table, indices, read, sizes, fill_value=fill, **options)
    written = lax.ScatterDimensionNumbers(
        update_window_dims=read.offset_dims,
        inserted_window_dims=read.collapsed_slice_dims,
        scatter_dims_to_operand_dims=read.start_index_map,
        operand_batching_dims=read.operand_batching_dims,
        scatter_indices_batching_dims=read.start_indices_batching_dims,
    )

    def add(total: Array, gradient: Array, where: Array) -> Array:
        return lax.scatter_add(total, where, gradient, written, **options)

    return threads._read(add, (at[0],), [rows], indices)


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
