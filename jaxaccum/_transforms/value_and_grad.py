"""`value_and_grad` and `grad`: JAX's own results on the whole batch, at one microbatch's memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Unpack

from jaxaccum._audit import at_call
from jaxaccum._base.entries import entries
from jaxaccum._base.trees import safe_map
from jaxaccum._base.types import Array, Audit, Fun, Gather, InAxes, Memory, PyTree, Split, Unroll
from jaxaccum._loop import Gradient, Result
from jaxaccum._program import output_parts
from jaxaccum._program.call import Call, Options, read
from jaxaccum._program.finalize import finalized
from jaxaccum._program.prepare import prepare
from jaxaccum._program.program import Program
from jaxaccum._transforms import (
    cotangents,
    custom_accumulator,
    engine,
    explicit_mesh,
    over_shards,
)
from jaxaccum._transforms.eager import once
from jaxaccum._transforms.options import GradientOptions, check_known, shows_options_of
from jaxaccum.accumulators._record import AccumulatorLike, GradientSum, in_place, returned


def value_and_grad(
    fun: Fun,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
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
    accumulator: AccumulatorLike | None = None,
    gather: Gather = "each",
    audit: Audit = "warn",
) -> Fun:
    """``jax.value_and_grad`` of the same loss on the whole batch, accumulated over microbatches and
    equal to it.

    The loss is a sum of terms, each over its own denominator, ``L = Σₜ (Σᵢ totalₜᵢ) / (Σᵢ
    weightₜᵢ)`` over the microbatches i. It equals::

        def accumulated(params, batch):
            loss = lambda params: sum(full_batch(fun)(params, batch).values())  # of a dict of terms
            return jax.value_and_grad(loss)(params)

        # and runs as: W = Σ weight; then for each microbatch: grads += vjp(fun)(1 / W)

    Args:
        fun: the loss of one microbatch: a floating scalar (a mean over its examples), a `Mean`, a
            `Sum`, or a dict of them; with `has_aux` the pair ``(loss, aux)`` whose aux is tagged.
        argnums: the arguments to differentiate, as in JAX; one with a batch axis gives the whole
            batch's gradient.
        has_aux: whether `fun` returns ``(loss, aux)``.
        num_microbatches: that many, their sizes differing by at most 1, the larger first. This or
            `microbatch_size`.
        microbatch_size: as many microbatches of this size as fit, and one remainder.
        in_axes: one entry per argument: None (whole), an int (batch axis), a pytree prefix of both,
            or ``CARRY``, ``BATCH_KEY``, ``EXAMPLE_KEY`` or ``KEY`` for a whole argument.
            ``MAX_GRAD``, also in a prefix, passes arrays whole and combines their gradients by
            maximum, not by sum. A tuple has one entry per positional argument, and passes keyword
            arguments whole. A dict has entries by name: ``{"batch": 0}`` cuts the argument `batch`,
            by position or by keyword, and passes all others whole.
        split: ``"contiguous"`` or ``"strided"`` (microbatch i holds the examples i, i + n, …; it
            must divide).
        num_examples_argnum: the argument that counts the real examples (a traced int); the rest is
            padding.
        axis_name: the name of the loop's axis.
        mesh_axes: inside ``shard_map``, the mesh axes over which everything is also summed, once,
            after the loop. Parameters may be divided over further axes (tensor parallelism), or
            over these and gathered in `fun`. That needs ``check_vma=True``: without it jaxaccum
            cannot tell whether a parameter is divided or the same on all devices.
        memory: only for losses with collectives over the loop's axis. Such a loss runs in stages,
            cut at the collectives. This says what to store for the full batch between stages:
            ``"min"`` nothing, ``"store"`` all, a number of bytes, or None, what is cheap. The rest
            is computed again; above 3 times the operations of the full batch, a warning says so.
            The result is the same up to rounding: a recomputed value can differ in its last digit
            from the one that a collective returned. If you compare or rank the two, take both from
            the collective's result, or pass ``"store"``.
        unroll: how many microbatches are written out per iteration, as ``lax.scan``'s; True is all.
            It changes the program, and the value by rounding at most. Without a loop some steps are
            faster (untied layers, few tokens per microbatch), most are not; it compiles longer, and
            may need the memory of the whole batch. ``"last"`` writes out the last microbatch after
            the loop: inside ``shard_map`` each layer's gradient can then be sent while the layers
            below are differentiated. Beside `num_examples_argnum` it changes nothing.
        accumulator: how gradients add up: one of ``jaxaccum.accumulators``, or an `Accumulator` of
            your own; None is ``in_place()``. One that sees each microbatch's mean gradient needs a
            loss with one denominator.
        gather: on an explicit mesh, when parameters divided over the batch's axes are gathered.
            ``"each"``: at every microbatch, and its gradients are scattered, so that the sums are
            sharded like the parameters: n gathers and n scatters. ``"once"``: before the loop; the
            gathered parameters are kept, and after the loop the sum of whole gradients is
            scattered: one gather and one scatter, but two whole copies in memory. To hold one layer
            at a time, gather inside `fun`, in ``shard_map``.
        audit: what to do where `fun` does not accumulate exactly (see `jaxaccum.audit`): ``"warn"``
            by an `InexactWarning` with the line and what to write, ``"raise"`` an `InexactError`,
            or None, not to look. It traces `fun` once more, for the whole batch.

    Returns:
        A function of the same arguments that returns ``(value, grads)``, or ``((value, aux),
        grads)``. Gradients have the dtype of their parameters, as those of ``jax.value_and_grad``;
        they are summed in float32 where that is lower. An accumulator with an explicit dtype, as
        ``in_place(jnp.float32)``, returns that dtype. A report of the accumulator comes last:
        ``((value, report), grads)``, or ``((value, aux, report), grads)``.

    Guarantees:
        Equal to the full batch in exact arithmetic for any partition; the rounding is that of one
        sum. `fun` is traced once per size, and once for the audit; once more where a derivative
        rule that is defined in it closes over the batch. One forward and one backward pass over
        each microbatch. Differentiable in reverse mode.

    Raises:
        ValueError, TypeError: at trace time, naming the argument, the leaf and what to pass.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> loss = lambda w, batch: jnp.mean((w * batch["x"] - batch["y"]) ** 2)
        >>> batch = {"x": jnp.array([4.0, 2.0]), "y": jnp.array([8.0, 4.0])}
        >>> value, grad = jaxaccum.value_and_grad(loss, num_microbatches=2)(1.0, batch)
        >>> float(value), float(grad)
        (10.0, -20.0)
    """
    options = Options(
        in_axes=in_axes, num_microbatches=num_microbatches, microbatch_size=microbatch_size,
        split=split, num_examples_argnum=num_examples_argnum, axis_name=axis_name,
        mesh_axes=mesh_axes, memory=memory, unroll=unroll, audit=audit,
    )  # fmt: skip
    rule = in_place() if accumulator is None else accumulator
    run = functools.partial(_value_and_grad, rule, has_aux)

    @functools.wraps(fun)
    def accumulated(*args: PyTree, **kwargs: PyTree) -> PyTree:
        _check_record(rule)
        call = read(fun, options, args, kwargs, argnums)
        return explicit_mesh.spread(run, call, gather=gather)

    return accumulated


def _value_and_grad(
    accumulator: AccumulatorLike, has_aux: bool, call: Call
) -> tuple[PyTree, PyTree]:
    """What the call returns: the value, with what comes with it, and the gradients."""
    program, arrays = prepare(call, loss=True, has_aux=has_aux)
    wrt = call.differentiated
    if isinstance(accumulator, GradientSum):
        parts, summed = _summed(program, arrays, wrt, accumulator)
        own = entries(arrays, wrt)
        grads = call.as_arguments(safe_map(functools.partial(returned, accumulator), summed, own))
        reports = []
    else:
        run = functools.partial(
            custom_accumulator.value_and_grad, program, wrt, accumulator, call.as_arguments
        )
        parts, grads, report = once(run, arrays)
        reports = [] if report is None else [report]
    at_call.check(call, program, arrays)
    loss, aux = finalized(program, arrays, parts)
    value = (output_parts.value(loss), *([aux] if has_aux else []), *reports)
    return (value if len(value) > 1 else value[0]), grads


def _summed(
    program: Program, arrays: list[Array], wrt: tuple[int, ...], accumulator: GradientSum
) -> Result:
    """The parts of the value and the sums of gradients, over the whole batch and all devices.

    Denominators first. They give each term its cotangent, and every microbatch back-propagates its
    share of it.
    """
    known = cotangents.known_first(program, arrays, wrt)
    seeds = cotangents.of_terms(program, wrt, known)
    gradient = Gradient(wrt, seeds.parts, accumulator)
    own = engine.run_with_gradient(program, arrays, gradient, seeds.values)
    return over_shards.combined(program, arrays, wrt, own, known)


@shows_options_of(value_and_grad)
def grad(
    fun: Fun,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Unpack[GradientOptions],
) -> Fun:
    """``jax.grad`` of the same loss on the whole batch: the gradients of `value_and_grad`, with its
    options.

    Args:
        fun: the loss of one microbatch, as for `value_and_grad`.
        argnums: the arguments to differentiate.
        has_aux: whether `fun` returns ``(loss, aux)``.
        num_microbatches: as for `value_and_grad`, like all that follow.
        microbatch_size: the other way to say the partition.
        in_axes: one entry per argument, or a dict of entries by name.
        split: contiguous or strided.
        num_examples_argnum: the argument that counts the real examples.
        axis_name: the name of the loop's axis.
        mesh_axes: the mesh axes to sum over.
        memory: the budget of coupled programs.
        unroll: how many microbatches are written out per iteration, or ``"last"``.
        accumulator: how gradients add up.
        gather: when sharded parameters are gathered.
        audit: whether to warn or raise where `fun` does not accumulate exactly.

    Returns:
        A function of the same arguments that returns ``grads``, or ``(grads, aux)``; a report comes
        last.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> loss = lambda w, x: jaxaccum.Mean(jnp.sum(w * x), x.size)
        >>> jaxaccum.grad(loss, microbatch_size=2)(1.0, jnp.arange(5.0)).item()
        2.0
    """
    check_known(options, "grad")
    return without_value(value_and_grad(fun, argnums, has_aux, **options))


def without_value(both: Fun) -> Fun:
    """Of a function that returns value and gradients, the gradients, and what comes with the
    value."""

    @functools.wraps(both)
    def gradient(*args: PyTree, **kwargs: PyTree) -> PyTree:
        value, grads = both(*args, **kwargs)
        return (grads, *value[1:]) if isinstance(value, tuple) else grads

    return gradient


def _check_record(accumulator: object) -> None:
    functions = ("init", "update", "finalize")
    missing = [name for name in functions if not callable(getattr(accumulator, name, None))]
    if missing:
        raise TypeError(
            "accumulator must be one of jaxaccum.accumulators, as in_place() or tree(), or a "
            f"record of functions init, update and finalize; got {accumulator!r}, without "
            f"{missing}."
        )
