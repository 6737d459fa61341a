"""Flax's float8 layers send their next scales and maxima through the gradient: over microbatches
these are maxima."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.covering import covering
from tests.support.helpers import normwise, refused

MODEL = nn.Dense(16, dot_general_cls=nn.Fp8DotGeneralOp, dtype=jnp.float32)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32).at[0].multiply(10.0)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # Flax says so of the layer itself
STATE = "_overwrite_with_gradient"


@pytest.fixture(scope="module", autouse=True)
def _as_flax_is_written():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def loss(variables, x):
    return jnp.mean((MODEL.apply(variables, x) - 1.0) ** 2)


@functools.cache
def initial():
    return jax.jit(MODEL.init)(jax.random.key(1), X)


def trained(grad, steps=6):
    state = TrainState.create(apply_fn=MODEL.apply, params=initial(), tx=optax.sgd(1e-2))
    step = jax.jit(lambda state: state.apply_gradients(grads=grad(state.params, X)))
    for _ in range(steps):
        state = step(state)
    return state.params


@functools.cache
def trained_on_the_full_batch():
    return trained(jax.grad(loss))


WAYS = {
    "in_place": lambda n: ja.grad(loss, num_microbatches=n),
    "tree": lambda n: ja.grad(loss, num_microbatches=n, accumulator=ja.accumulators.tree()),
    "microbatch": lambda n: jax.grad(ja.microbatch(loss, num_microbatches=n)),
}


@pytest.mark.parametrize(("way", "n"), [*covering(list(WAYS), [1, 3, 4]), ("in_place", 3)])
def test_scales_and_maxima_are_those_of_the_full_batch(way, n):
    ours, full = trained(WAYS[way](n)), trained_on_the_full_batch()
    eps = float(jnp.finfo(jnp.float32).eps)
    assert normwise(ours[STATE], full[STATE]) < 64 * eps
    assert (
        normwise(ours["params"], full["params"]) < 0.05
    )  # a rounding moves a number to another of float8


def test_summed_they_are_the_classic_wrong_answer():
    """Each step multiplies the maxima by the number of microbatches."""
    parts = [X[i : i + 2] for i in range(0, 8, 2)]
    usual = lambda v, _: jax.tree.map(
        lambda *g: sum(g) / 1.0, *[jax.grad(loss)(v, part) for part in parts]
    )
    assert normwise(trained(usual)[STATE], trained_on_the_full_batch()[STATE]) > 0.5


def test_a_custom_accumulator_would_average_them():
    variables, skip = initial(), ja.accumulators.skip_nonfinite()
    refused(
        lambda: ja.grad(loss, num_microbatches=2, accumulator=skip)(variables, X),
        STATE,
        "in_place()",
    )


# -- maxima that the user declares -----------------------------------------------------------------


@jax.custom_vjp
def saturated(x, largest):
    """x, kept below `largest`; the "gradient" of `largest` is the largest |x| that it saw."""
    return largest * jnp.tanh(x / largest)


def _saturated_forward(x, largest):
    return largest * jnp.tanh(x / largest), jnp.max(jnp.abs(x))


saturated.defvjp(_saturated_forward, lambda seen, cotangent: (cotangent, seen))
KERNEL = jnp.linspace(-1.0, 1.0, 48, dtype=jnp.float32).reshape(16, 3)
PARAMS = {"w": KERNEL, "inputs": jnp.float32(30.0), "hidden": jnp.float32(90.0)}
DECLARED = {"w": None, "inputs": ja.MAX_GRAD, "hidden": ja.MAX_GRAD}


def saturated_loss(params, x):
    h = saturated(x, params["inputs"]) @ params["w"]
    return jnp.mean(saturated(h, params["hidden"]) ** 2)


def normalized_loss(params, x, axis=None):
    """The same, with a statistic of the whole batch between the two layers."""
    h = saturated(x, params["inputs"]) @ params["w"]
    mean = jnp.mean(h, 0, keepdims=True)
    h = h - (mean if axis is None else jax.lax.pmean(mean, axis))
    return jnp.mean(jnp.tanh(saturated(h, params["hidden"])) ** 2)


def declared(loss, n, in_axes=(DECLARED, 0), **options):
    return ja.grad(loss, num_microbatches=n, in_axes=in_axes, **options)


@functools.cache
def full_gradient(loss):
    return jax.jit(jax.grad(loss))(PARAMS, X)


def close(actual, expected):
    eps = float(jnp.finfo(jnp.float32).eps)
    return all(normwise(actual[name], expected[name]) < 64 * eps for name in PARAMS)


ACCUMULATORS = [None, ja.accumulators.tree(), ja.accumulators.in_place(jnp.float32)]


@pytest.mark.parametrize(("accumulator", "n"), [*covering(ACCUMULATORS, [1, 3]), (None, 3)])
def test_a_declared_maximum_is_the_full_batchs(accumulator, n):
    full = full_gradient(saturated_loss)
    assert close(declared(saturated_loss, n, accumulator=accumulator)(PARAMS, X), full)
    through_jax = jax.grad(ja.microbatch(saturated_loss, num_microbatches=n, in_axes=(DECLARED, 0)))
    assert close(through_jax(PARAMS, X), full)
    if n > 1:
        summed = ja.grad(saturated_loss, num_microbatches=n, accumulator=accumulator, audit=None)
        assert not close(summed(PARAMS, X), full)


@pytest.mark.parametrize(
    ("accumulator", "memory"), covering([None, ja.accumulators.tree()], ["min", "store"])
)
def test_of_a_coupled_loss_too(accumulator, memory):
    loss = lambda params, x: normalized_loss(params, x, "microbatch")
    options = {"accumulator": accumulator, "memory": memory}
    full = full_gradient(normalized_loss)
    assert close(declared(loss, 4, **options)(PARAMS, X), full)
    assert not close(ja.grad(loss, num_microbatches=4, audit=None, **options)(PARAMS, X), full)


def test_flaxs_layer_behind_a_batch_norm():
    def net(axis_name):
        layer = nn.Dense(16, dot_general_cls=nn.Fp8DotGeneralOp, dtype=jnp.float32)
        return nn.Sequential([nn.BatchNorm(use_running_average=False, axis_name=axis_name), layer])

    def loss(axis_name):
        apply = lambda v, x: net(axis_name).apply(v, x, mutable=["batch_stats"])[0]
        return lambda v, x: jnp.mean((apply(v, x) - 1.0) ** 2)

    variables = jax.jit(net(None).init)(jax.random.key(1), X)
    full = jax.jit(jax.grad(loss(None)))(variables, X)
    ours = ja.grad(loss("microbatch"), num_microbatches=4)(variables, X)
    eps = float(jnp.finfo(jnp.float32).eps)
    assert normwise(ours[STATE], full[STATE]) < 64 * eps
    assert normwise(ours["params"], full["params"]) < 0.05


def test_an_argument_of_its_own_and_where_all_examples_are_padding():
    mean = lambda largest, w, x: saturated_loss(PARAMS | {"inputs": largest, "w": w}, x)
    split = lambda largest, w, x, n: ja.Sum(len(x) * mean(largest, w, x))
    axes = (ja.MAX_GRAD, None, 0, None)
    step = declared(split, 4, axes, argnums=(0, 1), num_examples_argnum=3)
    seen, _ = step(PARAMS["inputs"], PARAMS["w"], X, 3)
    assert seen == jnp.max(
        jnp.abs(X[:4])
    )  # the microbatch with one example of padding sees that too
    kept, nothing = step(PARAMS["inputs"], PARAMS["w"], X, 0)
    assert kept == PARAMS["inputs"]
    assert not jnp.any(nothing)


def test_over_devices_it_is_the_largest_of_all():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = declared(saturated_loss, 2, mesh_axes="data")
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    assert close(jax.jit(sharded)(PARAMS, X), full_gradient(saturated_loss))


def test_other_sentinels_are_for_whole_arguments():
    refused(
        lambda: declared(saturated_loss, 2, ({**DECLARED, "hidden": ja.KEY}, 0))(PARAMS, X),
        "hidden",
        "KEY",
    )
