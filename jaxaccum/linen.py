"""BatchNorm of Flax linen over all microbatches: a layer that counts masked rows, and a context for
the layers of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxaccum._base.types import Array
from jaxaccum._flax import batch_norm

__all__ = ["BatchNorm", "batch_norm_over"]

AxisNames = str | Sequence[str] | None
"""One axis, several, or none."""


class BatchNorm(nn.BatchNorm):
    """``flax.linen.BatchNorm`` whose statistics are those of the whole batch, under any mask.

        n = Σᵢ nᵢ,   μ = Σᵢ nᵢ μᵢ / n,   σ² = (Σᵢ sᵢ + Σᵢ nᵢ (μᵢ − μ)²) / n

    over the microbatches i, where nᵢ, μᵢ and sᵢ are count, mean and sum of squared deviations of
    the entries that are not masked. It equals::

        def batch_norm(x, mask):  # of the whole batch
            kept = x[mask]
            mean, var = kept.mean(0), kept.var(0)
            y = (x - mean) / sqrt(var + epsilon) * scale + bias
            return y, momentum * running + (1 - momentum) * (mean, var)

    Flax's own averages the masked means of the shards, which is wrong where the shards keep unequal
    numbers of entries. Arguments, parameters and collections have Flax's names (``params``: scale,
    bias; ``batch_stats``: mean, var), so it takes the place of ``nn.BatchNorm`` in a model and in a
    checkpoint.

    Args:
        axis_name: the axis, or axes, that the statistics span; by default the microbatches'. Where
            an axis is not bound (initialization, evaluation, a plain call) the batch at hand is the
            whole batch.
        statistics: which variance the running average keeps: ``"flax"`` the one that normalizes,
            σ²; ``"torch"`` the unbiased n / (n − 1) · σ². `momentum` is Flax's under both, the
            share that is kept: torch's is 1 − momentum.
        use_fast_variance: changes nothing: the variance takes one collective and does not cancel.

    All others are those of ``flax.linen.BatchNorm``. ``mask=`` at call is an array of booleans that
    broadcasts to the input; running statistics do not move where nothing is counted.

    Guarantees:
        Equal to the full batch for any mask and any padding, in value, gradient and running
        statistics. Statistics in float32 for inputs of lower precision. A mean far from 0 does not
        spoil the variance.

    Raises:
        ValueError: where `statistics` is neither ``"flax"`` nor ``"torch"``.

    Example:
        >>> import jax, jax.numpy as jnp, jaxaccum.linen
        >>> model = jaxaccum.linen.BatchNorm(use_running_average=False, momentum=0.5)
        >>> x = jnp.array([[0.0], [2.0], [9.0], [4.0]])
        >>> mask = jnp.array([True, True, False, True])[:, None]
        >>> variables = model.init(jax.random.key(0), x)
        >>> apply = lambda x, mask: model.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]
        >>> microbatches = x.reshape(2, 2, 1), mask.reshape(2, 2, 1)
        >>> new = jax.vmap(apply, axis_name="microbatch", out_axes=None)(*microbatches)
        >>> new["batch_stats"]["mean"]  # half the old one, 0, and half the mean of 0, 2 and 4
        Array([1.], dtype=float32)
    """

    # Flax takes several axes, and its types do not say so.
    axis_name: AxisNames = "microbatch"  # pyright: ignore[reportIncompatibleVariableOverride]
    statistics: str = "flax"

    @nn.compact
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
        rule = batch_norm.rule(self.statistics)
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        axes = batch_norm.reduced_axes(x.ndim, self.axis)
        shape = [size for axis, size in enumerate(x.shape) if axis not in axes]
        widen = batch_norm.at_least_float32 if self.force_float32_reductions else jnp.dtype
        kind = batch_norm.mean_dtype(widen(self.param_dtype), x.dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, kind)
        var = self.variable("batch_stats", "var", jnp.ones, shape, widen(self.param_dtype))
        used = mean.value, var.value
        if not use_running_average:
            axis_name = None if self.is_initializing() else self.axis_name
            dtype, groups = widen(self.dtype or x.dtype), self.axis_index_groups
            new = batch_norm.moments(
                x, axes, dtype=dtype, mask=mask, axis_name=axis_name, groups=groups
            )
            used = new.mean, new.variance
            if not self.is_initializing():
                old = mean.value, var.value
                mean.value, var.value = batch_norm.update(
                    old, new, momentum=self.momentum, rule=rule
                )
        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        y = batch_norm.normalize(x, *used, axes=axes, scale=scale, bias=bias, epsilon=self.epsilon)
        return y.astype(self.dtype or batch_norm.output_dtype(x, scale, bias))


@contextlib.contextmanager
def batch_norm_over(axis_name: AxisNames = "microbatch") -> Iterator[None]:
    """A context in which every BatchNorm of linen takes its statistics over a further axis.

    The layers of the model stay as they are. Around ``model.apply`` in the loss, or as a decorator
    of the loss, it equals::

        for layer in the layers of the model that are an nn.BatchNorm:
            layer.axis_name = (the layer's own axes, axis_name)

    Args:
        axis_name: the axis, or axes; by default the microbatches'. One that a layer names itself
            is not added again.

    Guarantees:
        The parameters, the collections and their names are those of the model outside of the
        context. A layer that uses its running averages, or that is initialized, reads no axis.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxaccum.linen
        >>> layers = [nn.Dense(2), nn.BatchNorm(False), nn.Dense(1), nn.BatchNorm(False)]
        >>> model = nn.Sequential(layers)
        >>> def loss(params, x):
        ...     with jaxaccum.linen.batch_norm_over("microbatch"):
        ...         y, stats = model.apply(params, x, mutable=["batch_stats"])
        ...     return jnp.mean(jnp.tanh(y) ** 2), stats
        >>> x = jnp.sin(jnp.arange(24, dtype=jnp.float32)).reshape(8, 3)
        >>> params = model.init(jax.random.key(0), x)
        >>> step = jaxaccum.value_and_grad(loss, num_microbatches=4, has_aux=True)
        >>> (value, stats), grads = step(params, x)
        >>> whole = jnp.mean(jnp.tanh(model.apply(params, x, mutable=["batch_stats"])[0]) ** 2)
        >>> jnp.allclose(value, whole).item()
        True
    """

    def over_axes(
        next_function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        layer = context.module
        if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
            return next_function(*args, **kwargs)
        own = layer.axis_name
        every = tuple(dict.fromkeys([*_names(own), *_names(axis_name)]))
        # Modules of linen are frozen. A copy would have another name, and parameters of its own.
        object.__setattr__(layer, "axis_name", every)
        try:
            return next_function(*args, **kwargs)
        finally:
            object.__setattr__(layer, "axis_name", own)

    with nn.intercept_methods(over_axes):
        yield


def _names(axis_name: AxisNames) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
