"""Losses of public training code, one per file, each in plain JAX and for microbatches.

`plain` is the loss after its published form. The full batch calls it once, and the usual
accumulation calls it for each microbatch. `tagged` is the same loss for jaxaccum: it differs in how
sums over the batch are handed over, and in nothing else.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum

Params = Any
State = Any  # what a model keeps besides its parameters, such as running statistics
Batch = Any
Plain = Callable[[Params, State, Batch], tuple[jax.Array, State]]
Gradient = Callable[[Params, State, Batch], tuple[Params, State]]


@dataclasses.dataclass(frozen=True)
class PublicLoss:
    """A loss, a model, its data in order, and the three ways to the gradient of a batch."""

    published: str  # where the form is from
    alone: str  # what a microbatch of the usual loop does by itself
    params: Params
    batches: Sequence[Batch]  # one per optimizer step
    whole: Gradient
    usual: Gradient
    exact: Gradient
    evaluate: Callable[[Params, State], jax.Array]
    state: State = None
    optimizer: optax.GradientTransformation = dataclasses.field(default=optax.adam(1e-3))


def stateless(
    plain: Callable[[Params, Batch], jax.Array],
    tagged: Callable[[Params, Batch], Any],
    *,
    num_microbatches: int,
    evaluate: Callable[[Params], jax.Array],
    **fields: Any,
) -> PublicLoss:
    """A loss of parameters and a batch alone, with its three ways."""
    with_state: Plain = lambda params, state, batch: (plain(params, batch), state)
    return PublicLoss(
        whole=whole(with_state),
        usual=usual(with_state, num_microbatches),
        exact=without_state(jaxaccum.grad(tagged, num_microbatches=num_microbatches)),
        evaluate=jax.jit(lambda params, state: evaluate(params)),
        **fields,
    )


def whole(plain: Plain) -> Gradient:
    """The full batch in one pass: JAX alone."""
    return jax.jit(jax.grad(plain, has_aux=True))


def usual(plain: Plain, num_microbatches: int) -> Gradient:
    """What is usually written: the mean of the microbatches' gradients; the state goes through."""
    differentiated = whole(plain)

    def gradient(params: Params, state: State, batch: Batch) -> tuple[Params, State]:
        total = jax.tree.map(jnp.zeros_like, params)
        for i in range(num_microbatches):
            own = jax.tree.map(lambda x, i=i: np.split(x, num_microbatches)[i], batch)
            grads, state = differentiated(params, state, own)
            total = jax.tree.map(jnp.add, total, grads)
        return jax.tree.map(lambda x: x / num_microbatches, total), state

    return gradient


def without_state(gradient: Callable[[Params, Batch], Params]) -> Gradient:
    """A gradient of parameters and a batch in the form of the others, compiled."""
    compiled = jax.jit(gradient)
    return lambda params, state, batch: (compiled(params, batch), state)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of the values that count, of those at hand."""
    return jnp.sum(values * mask) / jnp.sum(mask)


def mean_of_batch(values: jax.Array, mask: jax.Array) -> jaxaccum.Mean:
    """The mean of the values that count in the whole batch: both sums, undivided."""
    return jaxaccum.Mean(jnp.sum(values * mask), jnp.sum(mask))


def cross_entropy(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """−log p of each target, along the last axis of the scores."""
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(scores, axis=-1) - chosen


def initial(init: Callable[..., Any], *inputs: Any) -> Any:
    """A Flax model's variables from seed 0, in float64."""
    return float64(jax.jit(init)(jax.random.key(0), *inputs))


def float64(tree: Any) -> Any:
    """A tree of float32 in float64, so that two ways differ by more than rounding or do not."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
