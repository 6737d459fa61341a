"""Flax's float8 layers send their next scales and maxima through the gradient: over microbatches these are maxima."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from helpers import normwise, refused

import jaxaccum as ja

MODEL = nn.Dense(16, dot_general_cls=nn.Fp8DotGeneralOp, dtype=jnp.float32)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32).at[0].multiply(10.0)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Flax says so of the layer itself
STATE = "_overwrite_with_gradient"


@pytest.fixture(scope="module", autouse=True)
def _as_flax_is_written():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def loss(variables, x):
    return jnp.mean((MODEL.apply(variables, x) - 1.0) ** 2)


def trained(grad, steps=6):
    state = TrainState.create(apply_fn=MODEL.apply, params=MODEL.init(jax.random.key(1), X), tx=optax.sgd(1e-2))
    step = jax.jit(lambda state: state.apply_gradients(grads=grad(state.params, X)))
    for _ in range(steps):
        state = step(state)
    return state.params


WAYS = {
    "in_place": lambda n: ja.grad(loss, num_microbatches=n),
    "tree": lambda n: ja.grad(loss, num_microbatches=n, accumulator=ja.accumulators.tree()),
    "microbatch": lambda n: jax.grad(ja.microbatch(loss, num_microbatches=n)),
}


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_scales_and_maxima_are_those_of_the_full_batch(way, n):
    ours, full = trained(WAYS[way](n)), trained(jax.grad(loss))
    eps = float(jnp.finfo(jnp.float32).eps)
    assert normwise(ours[STATE], full[STATE]) < 64 * eps
    assert normwise(ours["params"], full["params"]) < 0.05  # a rounding moves a number to another of float8


def test_summed_they_are_the_classic_wrong_answer():
    """Each step multiplies the maxima by the number of microbatches."""
    parts = [X[i : i + 2] for i in range(0, 8, 2)]
    usual = lambda v, _: jax.tree.map(lambda *g: sum(g) / 1.0, *[jax.grad(loss)(v, part) for part in parts])
    assert normwise(trained(usual)[STATE], trained(jax.grad(loss))[STATE]) > 0.5


def test_a_custom_accumulator_would_average_them():
    variables, skip = MODEL.init(jax.random.key(1), X), ja.accumulators.skip_nonfinite()
    refused(lambda: ja.grad(loss, num_microbatches=2, accumulator=skip)(variables, X), STATE, "in_place()")
