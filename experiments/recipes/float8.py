"""float8 layers of Flax: their scales come through the gradient, and are not averaged.

Command   python -m experiments.recipes.float8
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import jaxaccum
from experiments.recipes import _check, _texts

MODEL: Any = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp, dtype=jnp.float32)


def loss_fn(variables, x):
    """How far the outputs are from 1, a mean."""
    return jnp.mean((MODEL.apply(variables, x) - 1.0) ** 2)


def plain(state, x):
    """The training step as anybody would write it."""
    grads = jax.grad(loss_fn)(state.params, x)
    return state.apply_gradients(grads=grads)


def accumulated(state, x):
    """The same step in 4 microbatches."""
    grads = jaxaccum.grad(loss_fn, num_microbatches=4)(state.params, x)
    return state.apply_gradients(grads=grads)


def usual(state, x):
    """The usual loop: whatever the gradient holds is averaged."""
    grads = _check.mean([jax.grad(loss_fn)(state.params, part) for part in _check.parts(x, 4)])
    return state.apply_gradients(grads=grads)


def check() -> _check.Errors:
    """Three steps on 8 texts: the scales and maxima that the layer keeps, in float32."""
    x = _texts.letters(8)["x"].astype(jnp.float32)
    variables, ends = MODEL.init(jax.random.key(1), x), []
    for step in map(jax.jit, (plain, accumulated, usual)):
        state = TrainState.create(apply_fn=MODEL.apply, params=variables, tx=optax.sgd(1e-2))
        for _ in range(3):
            state = step(state, x)
        ends.append(state.params["_overwrite_with_gradient"])
    bound = 64 * float(jnp.finfo(jnp.float32).eps)
    return _check.errors(
        start=_check.zeros(ends[0]), full=ends[0], ours=ends[1], usual=ends[2], bound=bound
    )


if __name__ == "__main__":
    _check.main(check)
