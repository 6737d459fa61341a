"""Flax nnx: gradients of ``fun(model, batch)`` over microbatches, and a BatchNorm across them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import filterlib

from jaxaccum._audit.report import InexactWarning
from jaxaccum._base.source_lines import callers_depth, line_of_error
from jaxaccum._base.types import CARRY, Array, Audit, Fun, PyTree
from jaxaccum._flax import batch_norm
from jaxaccum._flax.nnx_models import IN_AXES, Models, holds_modules
from jaxaccum._program import entries_of_call, validate
from jaxaccum._program.axes_by_name import ArgumentAxes
from jaxaccum._program.batch_keys import UndividedError
from jaxaccum._transforms.options import GradientOptions, check_known, shows_options_of
from jaxaccum._transforms.value_and_grad import value_and_grad as _value_and_grad
from jaxaccum._transforms.value_and_grad import without_value

__all__ = ["BatchNorm", "grad", "value_and_grad"]


@shows_options_of(_value_and_grad)
def value_and_grad(
    fun: Fun,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    has_aux: bool = False,
    *,
    example_streams: filterlib.Filter = None,
    **options: Unpack[GradientOptions],
) -> Fun:
    """``flax.nnx.value_and_grad`` of the loss on the whole batch, accumulated over microbatches.

    Parameters are differentiated; all other variables (batch statistics, counters) run from
    microbatch to microbatch, and the model holds the last ones afterwards. Except for its
    random streams, which are described below, it equals::

        def accumulated(model, batch):
            grads = 0
            for _, rows in partition(model, batch, num_microbatches=n):
                value, own = nnx.value_and_grad(fun)(model, rows)  # updates the model
                grads += own  # each term over the denominator of the whole batch

    Statistics that collectives over the axis compute, such as those of `BatchNorm`, are the whole
    batch's: they are updated once, and every microbatch starts from the same state.

    From a random stream each example draws what it draws in the whole batch, bit for bit, so that
    the call equals ``nnx.value_and_grad(fun)(model, batch)`` with its masks. A draw is divided by
    its shape: the axis that grows with the microbatch is the examples'. A draw that does not grow
    (noise on a weight, a mask that all examples share) is drawn once for the batch, as the full
    batch draws it. Where a draw cannot be divided, the call warns with the line, and masks depend
    on the partition; `example_streams` chooses among the streams. From a stream that is not
    chosen, the microbatches draw one after the other; if the loss has collectives over
    microbatches, each draws from a key that is folded with the microbatch's index.

    Args:
        fun: the loss of one microbatch, ``fun(model, batch, …)``, as for `jaxaccum.value_and_grad`.
        argnums: the arguments to differentiate, as in nnx: of a model its ``nnx.Param``, or what
            the filter of ``nnx.DiffState(argnum, filter)`` selects.
        has_aux: whether `fun` returns ``(loss, aux)``, its aux tagged.
        num_microbatches: as for `jaxaccum.value_and_grad`, like all that follow.
        microbatch_size: the other way to say the partition.
        in_axes: one entry per argument, None for a model, or a dict of entries by name.
        split: contiguous or strided.
        num_examples_argnum: the argument that counts the real examples.
        axis_name: the name of the loop's axis.
        mesh_axes: the mesh axes to sum over.
        memory: the budget of coupled programs.
        unroll: how many microbatches are written out per iteration, or ``"last"``.
        accumulator: how gradients add up.
        gather: when sharded parameters are gathered.
        audit: whether to warn or raise where `fun` does not accumulate exactly.
        example_streams: the random streams from which each example draws its own numbers. By
            default all, or none, with a warning, where a draw cannot be divided. True for all,
            False for none, or a filter of nnx, such as the tag of a stream, ``"dropout"``; from the
            others each microbatch draws in turn. With a stream `fun` is traced once more for each
            size, at twice the size. With keys of generators other than JAX's default, every
            microbatch makes the numbers of the whole batch.

    Returns:
        A function of the same arguments that updates the models and returns ``(value, grads)`` or
        ``((value, aux), grads)``. The gradient of a model is an ``nnx.State`` with the structure of
        ``nnx.state(model, nnx.Param)``, as an ``nnx.Optimizer`` takes it, in the accumulator's
        dtype. As in nnx, an argument that is no model (a variable, an ``nnx.State``, a list of
        models) has a gradient of its own structure, and what it holds outside of models is
        differentiated.

    Guarantees:
        Where every draw is divided, value and gradient are those of ``nnx.value_and_grad`` on the
        whole batch, for any partition, and for any division among devices (`mesh_axes`, explicit
        meshes). So is the state that adds up sums over examples, as a metric does; that follows
        from collectives over `axis_name`, as that of `BatchNorm` does; or that changes without the
        batch, as a counter does. A parameter that `fun` assigns to is changed once. A state that
        changes in another way changes once per microbatch. The call warns of it, where the update
        is linear arithmetic: write a moving average of sums with ``jax.lax.psum(sum,
        "microbatch")``, and it changes once. The streams advance once, and the model holds ordinary
        keys afterwards.

    Raises:
        ValueError, TypeError: at trace time; also where `fun` adds variables to a model, or assigns
            to a parameter what differs between microbatches; and where streams that
            `example_streams` names draw what cannot be divided among the examples, with the line:
            examples and another axis merged, or a gamma distribution. So it is by default under
            ``audit="raise"``.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jaxaccum.nnx
        >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        >>> loss = lambda model, batch: jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
        >>> batch = {"x": jnp.ones((10, 3), jnp.float32), "y": jnp.zeros((10, 1), jnp.float32)}
        >>> value, grads = jaxaccum.nnx.value_and_grad(loss, microbatch_size=4)(model, batch)
        >>> grads["kernel"].shape
        (3, 1)
        >>> dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))
        >>> noisy = lambda models, x: jnp.mean(models[0](models[1](x)))
        >>> step = jaxaccum.nnx.value_and_grad(noisy, num_microbatches=5)
        >>> value, _ = step([model, nnx.clone(dropout)], batch["x"])
        >>> bool(jnp.allclose(value, noisy([model, dropout], batch["x"])))
        True
    """
    check_known(options, "nnx.value_and_grad")
    in_axes = options.get("in_axes", (None, 0))

    @functools.wraps(fun)
    def accumulated(*args: PyTree, **kwargs: PyTree) -> PyTree:
        axes = entries_of_call.assigned(in_axes, args, kwargs, fun)
        given = argnums if isinstance(argnums, tuple | list) else (argnums,)
        states = list(map(_diff_state, given))
        numbers = validate.argnums([state.argnum for state in states], axes.positional)
        filters = dict(zip(numbers, [state.filter for state in states], strict=True))
        _check_models(axes, args, kwargs)
        # The states come after the arguments; no user writes this form of in_axes.
        own: Any = ArgumentAxes((*axes.positional, *IN_AXES), axes.keywords)
        given_on: GradientOptions = {**options, "in_axes": own}
        raised: list[Exception] = []
        noted = _noting(fun, raised)

        def compute(streams: filterlib.Filter) -> tuple[Models, PyTree]:
            models = Models.among(args, filters, streams)
            pure = models.pure(noted, has_aux=has_aux, draws_declared=streams is not True)
            step = _value_and_grad(pure, numbers, has_aux=True, **given_on)
            return models, step(*models.arguments(args), **kwargs)

        if example_streams is None:
            models, found = _divided_if_possible(compute, raised, options.get("audit", "warn"))
        else:
            models, found = compute(example_streams)
        (value, (aux, state, streams, assigned), *report), grads = found
        models.update(state, streams, assigned)
        values = (value, aux, *report) if has_aux else (value, *report)
        grads = tuple(map(models.gradient, numbers, grads))
        grads = grads if isinstance(argnums, tuple | list) else grads[0]
        return (values if len(values) > 1 else value), grads

    return accumulated


@shows_options_of(_value_and_grad)
def grad(
    fun: Fun,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    has_aux: bool = False,
    *,
    example_streams: filterlib.Filter = None,
    **options: Unpack[GradientOptions],
) -> Fun:
    """``flax.nnx.grad`` of the loss on the whole batch: the gradients of `value_and_grad`.

    Args:
        fun: the loss of one microbatch.
        argnums: the arguments to differentiate: ints or ``nnx.DiffState``.
        has_aux: whether `fun` returns ``(loss, aux)``.
        num_microbatches: as for `jaxaccum.value_and_grad`, like all that follow.
        microbatch_size: the other way to say the partition.
        in_axes: one entry per argument, None for a model, or a dict of entries by name.
        split: contiguous or strided.
        num_examples_argnum: the argument that counts the real examples.
        axis_name: the name of the loop's axis.
        mesh_axes: the mesh axes to sum over.
        memory: the budget of coupled programs.
        unroll: how many microbatches are written out per iteration, or ``"last"``.
        accumulator: how gradients add up.
        gather: when sharded parameters are gathered.
        audit: whether to warn or raise where `fun` does not accumulate exactly.
        example_streams: the random streams from which each example draws its own numbers.

    Returns:
        A function of the same arguments that updates the models and returns ``grads``, or
        ``(grads, aux)``; a report comes last.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jaxaccum.nnx
        >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        >>> loss = lambda model, x: jnp.mean(model(x))
        >>> step = jaxaccum.nnx.grad(loss, microbatch_size=4)
        >>> grads = step(model, jnp.ones((10, 3), jnp.float32))
        >>> grads["bias"].get_value().item()
        1.0
    """
    check_known(options, "nnx.grad")
    own = value_and_grad(fun, argnums, has_aux, example_streams=example_streams, **options)
    return without_value(own)


def _diff_state(argnum: Any) -> nnx.DiffState:
    """An argument to differentiate; a number means the argument's ``nnx.Param``."""
    return argnum if isinstance(argnum, nnx.DiffState) else nnx.DiffState(argnum, nnx.Param)


def _noting(fun: Fun, raised: list[Exception]) -> Fun:
    """`fun`, which notes in `raised` what it raises while it is traced."""

    @functools.wraps(fun)
    def noted(*args: PyTree, **kwargs: PyTree) -> PyTree:
        try:
            return fun(*args, **kwargs)
        except Exception as error:
            raised.append(error)
            raise

    return noted


def _divided_if_possible(
    compute: Callable[[bool], tuple[Models, PyTree]], raised: Sequence[Exception], audit: Audit
) -> tuple[Models, PyTree]:
    """``compute(True)``, which divides the draws of all streams among the examples.

    Where a draw cannot be divided it is ``compute(False)``, in which every microbatch draws from
    the streams in turn, and a warning says why. So it is too where `fun` cannot use the keys, which
    are of a type of their own: then it raises an error, and without division none. Other errors,
    those of the run among them, are the call's.
    """
    if audit == "raise":
        return compute(True)
    try:
        return compute(True)
    except Exception as error:
        if not isinstance(error, UndividedError) and not _is_among(error, raised):
            raise
        reason = error
    try:
        found = compute(False)
    except Exception as error:
        raise (error if _is_among(error, raised) else reason) from None
    if audit == "warn":
        warnings.warn(_undivided(reason), InexactWarning, stacklevel=callers_depth())
    return found


def _is_among(error: Exception, raised: Sequence[Exception]) -> bool:
    return any(error is other for other in raised)


def _undivided(reason: Exception) -> str:
    said, fix = str(reason).partition("\n")[0], "draw as the reason says"
    if not isinstance(reason, UndividedError):  # which names the line itself
        said = f"{said}, at {line_of_error(reason)}"
        fix = "draw outside of fun, one row per example, and pass the numbers in with the batch"
    return (
        "the gradient depends on the partition: what the model draws cannot be divided among the "
        "examples, so each microbatch draws numbers of its own.\n"
        f"  reason: {said}\n"
        f"  fix: {fix}; or accept it by example_streams=False [audit=None silences this]"
    )


def _check_models(axes: ArgumentAxes, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> None:
    if CARRY in axes.keywords.values():
        raise ValueError(
            "in_axes declares a keyword argument CARRY, and the state of the models already runs "
            "through the microbatches; keep that state in an nnx.Variable of the model."
        )
    for number, (axis, arg) in enumerate(zip(axes.positional, args, strict=True)):
        if axis is CARRY:
            raise ValueError(
                f"in_axes declares argument {number} CARRY, and the state of the models already "
                "runs through the microbatches; keep that state in an nnx.Variable of the model."
            )
        if axis is not None and holds_modules(arg):
            raise ValueError(
                f"in_axes gives argument {number} {axis!r}, and it holds an nnx model, which every "
                "microbatch sees whole; pass None for it."
            )
    for name, value in kwargs.items():
        if holds_modules(value):
            raise TypeError(
                f"keyword argument {name} holds an nnx model; pass models as positional arguments."
            )


class BatchNorm(nnx.BatchNorm):
    """``flax.nnx.BatchNorm`` whose statistics are those of the whole batch, under any mask.

    The equations, the program that it equals and the guarantees are those of
    `jaxaccum.linen.BatchNorm`. Arguments and variables have Flax's names (``nnx.Param``: scale,
    bias; ``nnx.BatchStat``: mean, var).

    Args:
        num_features: the size of the feature axis.
        axis_name: the axis, or axes, that the statistics span; by default the microbatches'. Where
            an axis is not bound (evaluation, a plain call) the batch at hand is the whole batch.
        statistics: which variance the running average keeps: ``"flax"`` the one that normalizes,
            σ²; ``"torch"`` the unbiased n / (n − 1) · σ². `momentum` is Flax's under both, the
            share that is kept: torch's is 1 − momentum.
        rngs: the keys of the initial parameters.
        **options: all others are those of ``flax.nnx.BatchNorm``; of these `use_fast_variance`
            changes nothing, since the variance takes one collective and does not cancel.

    Raises:
        ValueError: where `statistics` is neither ``"flax"`` nor ``"torch"``.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jaxaccum.nnx
        >>> layer = jaxaccum.nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
        >>> mask = jnp.array([[True], [True], [False], [True]])
        >>> y = layer(jnp.array([[0.0], [2.0], [9.0], [4.0]]), mask=mask)
        >>> layer.mean.get_value()  # half the old one, 0, and half the mean of 0, 2 and 4
        Array([1.], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis_name: str | Sequence[str] | None = "microbatch",
        statistics: batch_norm.Statistics = "flax",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        # Flax takes several axes, and its types do not say so.
        super().__init__(
            num_features,
            axis_name=axis_name,  # pyright: ignore[reportArgumentType]
            rngs=rngs,
            **options,
        )
        self.statistics: batch_norm.Statistics = batch_norm.rule(statistics)
        dtype = batch_norm.at_least_float32(self.param_dtype)
        self.mean: nnx.BatchStat[Array] = nnx.BatchStat(jnp.zeros((num_features,), dtype))
        self.var: nnx.BatchStat[Array] = nnx.BatchStat(
            jnp.ones((num_features,), jnp.finfo(dtype).dtype)
        )

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalize `x`.

        Args:
            x: the input.
            use_running_average: normalize by the running statistics and leave them as they are.
            mask: which entries of `x` count; an array that broadcasts to it.

        Returns:
            The normalized input, of its shape; masked entries are normalized too.
        """
        running = self.use_running_average if use_running_average is None else use_running_average
        if running is None:
            raise ValueError(
                "BatchNorm was not told whether to normalize by the running statistics; pass "
                "use_running_average= to the constructor or the call, or use nnx.view(model, "
                "use_running_average=…)."
            )
        mean, var = self.mean[...], self.var[...]
        scale, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        with jax.numpy_dtype_promotion("standard"):
            x, _, _, scale, bias = self.promote_dtype((x, mean, var, scale, bias), dtype=self.dtype)
        axes = batch_norm.reduced_axes(x.ndim, self.axis)
        if jnp.iscomplexobj(x) and not jnp.iscomplexobj(self.mean[...]):
            raise TypeError(
                f"BatchNorm keeps its running mean in {self.mean[...].dtype}, and the input is "
                f"{x.dtype}; pass param_dtype=jnp.complex64, or another complex dtype, to the "
                "constructor."
            )
        if not running:
            new = batch_norm.moments(
                x, axes, dtype=batch_norm.at_least_float32(x.dtype), mask=mask,
                axis_name=self.axis_name, groups=self.axis_index_groups,
            )  # fmt: skip
            old, mean, var = (mean, var), new.mean, new.variance
            self.mean[...], self.var[...] = batch_norm.update(
                old, new, momentum=self.momentum, rule=self.statistics
            )
        y = batch_norm.normalize(
            x, mean, var, axes=axes, scale=scale, bias=bias, epsilon=self.epsilon
        )
        return y.astype(self.dtype or batch_norm.output_dtype(x, scale, bias))
