"""`microbatch`: a function written for one microbatch, run over the whole batch and differentiable
by JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jaxaccum import _loop
from jaxaccum._audit import at_call
from jaxaccum._base.entries import entries, with_entries
from jaxaccum._base.trees import cast, is_inexact, safe_map
from jaxaccum._base.types import Array, Audit, Fun, InAxes, Memory, PyTree, Split, Tangent, Unroll
from jaxaccum._devices import varying
from jaxaccum._jaxpr import compat
from jaxaccum._program import whole_batch
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.call import Call, Options, read
from jaxaccum._program.finalize import finalized
from jaxaccum._program.prepare import prepare
from jaxaccum._program.program import Program
from jaxaccum._program.reductions import Reduction
from jaxaccum._transforms import engine, explicit_mesh
from jaxaccum.accumulators._record import GradientSum


def microbatch(
    fun: Fun,
    *,
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    in_axes: InAxes = (None, 0),
    split: Split = "contiguous",
    num_examples_argnum: int | None = None,
    axis_name: str = "microbatch",
    mesh_axes: str | Sequence[str] | None = None,
    memory: Memory = None,
    unroll: Unroll = 1,
    audit: Audit = "warn",
) -> Fun:
    """Spread `fun`, written for one microbatch, over the whole batch: ``jax.vmap`` in time.

    Every output combines by its tag, ``Mean(t, w)`` to ``Σ t / Σ w``, ``Sum(x)`` to ``Σ x``,
    ``Concat(x)`` to all rows in order, …; an untagged floating scalar declares a mean over the
    microbatch's examples. What depends on whole arguments alone (a temperature, a regularizer's
    weights) needs no tag: it passes as it is, whatever its shape and dtype, and its gradient counts
    once. It equals::

        def microbatched(params, batch):
            outputs = []
            for _, rows in partition(params, batch, num_microbatches=n):
                outputs.append(fun(params, rows))
            return combine(outputs)  # tag by tag: Σ total / Σ weight, concatenate, …

    Args:
        fun: function of one microbatch; its outputs are tags, floating scalars, or depend on whole
            arguments alone.
        num_microbatches: that many, their sizes differing by at most 1, the larger first. This or
            `microbatch_size`.
        microbatch_size: as many microbatches of this size as fit, and one remainder.
        in_axes: one entry per argument, as in ``jax.vmap``: None (whole), an int or a pytree prefix
            of both, or ``CARRY``, ``BATCH_KEY``, ``EXAMPLE_KEY`` or ``KEY`` for a whole argument. A
            tuple passes keyword arguments whole. A dict has entries by name, ``{"batch": 0}``, and
            passes all others whole.
        split: ``"contiguous"`` or ``"strided"`` (microbatch i holds the examples i, i + n, …; it
            must divide).
        num_examples_argnum: the argument that counts the real examples (a traced int); the rest is
            padding, and microbatches of padding alone are skipped at run time.
        axis_name: the name that ``lax.axis_index`` and collectives use for the loop.
        mesh_axes: inside ``shard_map``, the mesh axes over which totals, weights and gradients are
            also summed.
        memory: only for losses with collectives over the loop's axis. Such a loss runs in stages,
            cut at the collectives. This says what to store for the full batch between stages:
            ``"min"`` nothing, ``"store"`` all, a number of bytes, or None, what is cheap. The rest
            is computed again; above 3 times the operations of the full batch, a warning says so.
            The result is the same up to rounding: a recomputed value can differ in its last digit
            from the one that a collective returned. If you compare or rank the two, take both from
            the collective's result, or pass ``"store"``.
        unroll: how many microbatches are written out per iteration, as ``lax.scan``'s; True is all,
            and ``"last"`` the last one alone, after the loop (see `value_and_grad`).
        audit: what to do where `fun` does not accumulate exactly (see `jaxaccum.audit`): ``"warn"``
            by an `InexactWarning` with the line and what to write, ``"raise"`` an `InexactError`,
            or None, not to look. It traces `fun` once more, for the whole batch.

    Returns:
        A function of the same arguments on the whole batch. It returns `fun`'s own structure with
        each tag resolved.

    Guarantees:
        Equal to `full_batch` in exact arithmetic, for value and derivatives, at one microbatch's
        activation memory. Reverse-mode for any output; one forward pass where one scalar is
        differentiated, else two. Forward-mode where one scalar is differentiated.

    Raises:
        ValueError, TypeError: at trace time, naming the argument, the leaf and what to pass. Also
            for a reverse-mode derivative of a `Max`, `Min`, `Last` or `Carry` that depends on the
            differentiated arguments: that derivative would be 0. The same holds for an output
            without a tag that follows from collectives. In forward mode its tangent is NaN; those
            of these tags are 0.

    Example:
        >>> import jax, jax.numpy as jnp, jaxaccum
        >>> loss = jaxaccum.microbatch(lambda w, x: jnp.mean((w * x) ** 2), microbatch_size=2)
        >>> # The regularizer counts once.
        >>> jax.grad(lambda w: loss(w, jnp.arange(5.0)) + w**2)(1.0).item()
        14.0
    """
    options = Options(
        in_axes=in_axes, num_microbatches=num_microbatches, microbatch_size=microbatch_size,
        split=split, num_examples_argnum=num_examples_argnum, axis_name=axis_name,
        mesh_axes=mesh_axes, memory=memory, unroll=unroll, audit=audit,
    )  # fmt: skip

    @functools.wraps(fun)
    def microbatched(*args: PyTree, **kwargs: PyTree) -> PyTree:
        return explicit_mesh.spread(_output, read(fun, options, args, kwargs))

    return microbatched


def _output(call: Call) -> PyTree:
    """What the call returns: the output of the whole batch."""
    program, arrays = prepare(call)
    summed = safe_map(functools.partial(_of_all_shards, program), program.slots, arrays)
    parts = _differentiable(program, summed)(summed)
    at_call.check(call, program, arrays)
    return finalized(program, arrays, program.over_mesh(parts))


def full_batch(fun: Fun, in_axes: InAxes = (None, 0), axis_name: str = "microbatch") -> Fun:
    """The oracle: the same tagged function in one pass over the whole batch, its tags resolved.

    Args:
        fun: function of one microbatch, as for `microbatch`.
        in_axes: as for `microbatch`; a ``KEY`` is folded with 0, an ``EXAMPLE_KEY`` is split over
            the examples, and a ``BATCH_KEY`` draws as it is.
        axis_name: the name of the axis, bound with size 1.

    Returns:
        A function of the same arguments, differentiable by JAX alone.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> fun = lambda w, x: jaxaccum.Mean(jnp.sum(w * x), x.size)
        >>> jaxaccum.full_batch(fun)(2.0, jnp.arange(5.0)).item()
        4.0
    """
    options = Options(in_axes=in_axes, axis_name=axis_name)

    @functools.wraps(fun)
    def oracle(*args: PyTree, **kwargs: PyTree) -> PyTree:
        return whole_batch.run(read(fun, options, args, kwargs))

    return oracle


def _of_all_shards(program: Program, slot: Slot, x: Array) -> Array:
    """An array whose gradient is that of all shards; rows have their own on each."""
    return x if slot.role is Role.ROWS else varying.sum_cotangents(x, program.mesh_axes)


Loop = Callable[[list[Array]], list[Array]]
"""The combined parts over the batch of one device, of the arrays of all slots."""


def _differentiable(program: Program, arrays: Sequence[Array]) -> Loop:
    """The loop with the derivative that its use asks for. One rule does not fit all:

    * One scalar depends on what is differentiated: its gradient is computed with the value, and
      the tangent is ``Σ g · t``. One forward pass, and forward-mode works.
    * Several outputs or rows do, or a ``custom_vjp`` may treat their cotangents in a way that is
      not linear: the cotangents are not known yet, so the backward pass runs the loop again.
    * The loss has no reverse derivative, or an outer ``vmap`` maps the loop: JAX differentiates the
      loop itself. It maps no derivative of a ``custom_vjp``, and drops the checks of ``checkify``:
      there the loop is a ``custom_vjp`` itself, which JAX maps.
    """

    @jax.custom_jvp
    def forward(arrays: list[Array]) -> list[Array]:
        return engine.run(program, arrays)

    def rule(
        primals: tuple[list[Array]], moved: tuple[list[Tangent]]
    ) -> tuple[list[Array], list[Tangent]]:
        arrays, tangents = primals[0], moved[0]
        wrt = tuple(i for i, t in enumerate(tangents) if _moves(program.slots[i], t))
        if not program.is_reversible(wrt):
            return _jvp(lambda arrays: engine.run(program, arrays), arrays, tangents, wrt)
        if (part := _lone_scalar(program, wrt)) is not None:
            return _gradient_beside_value(program, arrays, tangents, wrt=wrt, part=part)
        if program.under_mapped_axes or any(map(_is_mapped, [*arrays, *tangents])):
            # The backward pass runs when an outer axis is bound no more, and JAX cannot map a rule
            # that it does not run here. So it derives both passes from the forward one, now.
            return _jvp(
                lambda arrays: engine.run(program, arrays, checkpoint=True), arrays, tangents, wrt
            )
        return _jvp(_recomputing(program, wrt), arrays, tangents, wrt)

    forward.defjvp(rule, symbolic_zeros=True)
    if any(map(_is_mapped, arrays)) and (program.has_backward_rule or program.has_checks):
        return _recomputing(program, tuple(_floating(program)))
    return forward


def _jvp(
    fun: Loop, arrays: list[Array], tangents: list[Tangent], wrt: tuple[int, ...]
) -> tuple[list[Array], list[Tangent]]:
    """JAX's own derivative with respect to the slots `wrt`; to JAX the others are constants."""

    def of_moving(*moving: Array) -> list[Array]:
        return fun(with_entries(arrays, wrt, moving))

    return jax.jvp(of_moving, entries(arrays, wrt), entries(tangents, wrt))


def _floating(program: Program) -> list[int]:
    """The slots that can be differentiated."""
    floating: dict[int, None] = {}
    for g, one in enumerate(program.traces):
        for i, v in zip(program.sources(g), one.arguments, strict=True):
            if is_inexact(v.aval) and program.slots[i].differentiable:
                floating[i] = None
    return list(floating)


def _moves(slot: Slot, tangent: Tangent) -> bool:
    if isinstance(tangent, SymbolicZero) or tangent.dtype == jax.dtypes.float0:
        return False
    return slot.differentiable


def _is_mapped(x: Tangent) -> bool:
    """Whether `x` belongs to a `vmap` around this rule, as in ``grad(vmap(f))``."""
    return hasattr(x, "batch_dim")  # JAX exports no type of what `vmap` traces


def _candidates(program: Program) -> list[int]:
    """The parts that can have a derivative."""
    parts = program.outputs.parts
    passes = lambda i, type: parts[i].reduction.differentiable and is_inexact(type)
    return [i for i, type in enumerate(program.types) if passes(i, type)]


def _lone_scalar(program: Program, wrt: tuple[int, ...]) -> int | None:
    """The one summed scalar that depends on the slots `wrt`, where no other part does; or None."""
    reached = [i for i in _candidates(program) if program.depends([i], wrt)]
    if len(reached) != 1 or program.has_backward_rule:
        return None
    (part,) = reached
    type = program.types[part]
    is_scalar = type.shape == () and jnp.issubdtype(type.dtype, jnp.floating)
    is_sum = program.outputs.parts[part].reduction is Reduction.SUM
    return part if is_scalar and is_sum else None


def _gradient_beside_value(
    program: Program,
    arrays: list[Array],
    tangents: list[Tangent],
    *,
    wrt: tuple[int, ...],
    part: int,
) -> tuple[list[Array], list[Tangent]]:
    dtype = program.types[part].dtype
    gradient = _loop.Gradient(wrt, (part,), GradientSum(in_place=True))
    with compat.traced_once(arrays):
        parts, grads = engine.run_with_gradient(program, arrays, gradient, [jnp.ones((), dtype)])
    grads = _loop.next_values(program.slots, arrays, wrt, grads)
    tangent = _zero_tangent(parts[part])
    for i, grad in zip(wrt, grads, strict=True):
        # A real loss of a complex parameter moves by the real part, in JAX's convention without a
        # conjugate.
        share = cast(_product(grad, cast(tangents[i], grad.dtype)), dtype)
        tangent = tangent + varying.sum_over_others(share, varying.varying_axes(tangent))
    still = [SymbolicZero(_tangent_type(x)) for x in parts]
    return parts, with_entries(still, [part], [tangent])


def _product(grad: Array, tangent: Tangent) -> Array:
    """The real part of ``Σ grad · tangent``, by primitives alone, which JAX traces the fastest."""
    total = lax.reduce_sum(lax.mul(grad, tangent), list(range(grad.ndim)))
    return lax.real(total) if jnp.iscomplexobj(total) else total


def _recomputing(program: Program, wrt: tuple[int, ...]) -> Loop:
    """The loop whose backward pass runs it again, with the cotangents that have arrived by then."""
    wanted = _candidates(program)

    @jax.custom_vjp
    def forward(arrays: list[Array]) -> list[Array]:
        return engine.run(program, arrays)

    def save(arrays: list[CustomVJPPrimal]) -> tuple[list[Array], list[Array]]:
        values = [x.value for x in arrays]
        if not program.has_backward_rule:
            return engine.run(program, values), values
        # JAX runs the forward rule of a custom_vjp only where it differentiates: an outer
        # derivative needs that form, not the plain function, which may close over what is
        # differentiated. Nobody reads these gradients.
        gradient = _loop.Gradient(wrt, tuple(wanted), GradientSum(in_place=True))
        result = engine.run_with_gradient(program, values, gradient, _ones(program, wanted))
        return result.parts, values

    def pull(values: list[Array], cotangents: list[Tangent]) -> tuple[list[Array | None]]:
        given = [i for i in wanted if not isinstance(cotangents[i], SymbolicZero)]
        gradient = _loop.Gradient(wrt, tuple(given), GradientSum(in_place=True))
        seeds = entries(cotangents, given)
        _, summed = engine.run_with_gradient(program, values, gradient, seeds)
        found: list[Array | None] = [None] * len(values)
        grads = _loop.next_values(program.slots, values, wrt, summed)
        for i, grad in zip(wrt, grads, strict=True):
            found[i] = cast(grad, values[i].dtype)
        return (found,)

    forward.defvjp(save, pull, symbolic_zeros=True, **compat.mapped_with_shared_outputs())
    return forward


def _ones(program: Program, parts: list[int]) -> list[Array]:
    """Cotangents of the given parts over the whole batch, all of them 1."""

    def one(part: int) -> Array:
        kind = program.outputs.parts[part].reduction
        return varying.full(_loop.whole_shape(program, kind, program.types[part]), 1)

    return list(map(one, parts))


def _tangent_type(x: Array) -> jax.core.AbstractValue:
    return jax.typeof(x).to_tangent_aval()


def _zero_tangent(x: Array) -> Tangent:
    """The tangent of a value that does not move."""
    if not is_inexact(x):
        return np.zeros(x.shape, jax.dtypes.float0)
    return varying.zeros(x)
