"""A microbatch of weight 0 whose total is not 0: rows of the background, in a loss that is divided
by the number of positives."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum import accumulators as acc
from tests.support.helpers import EXACT, data, normwise

W, X = data(3), data(8, 3, seed=1)
POSITIVE = jnp.asarray([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
"""The second of four microbatches has no positive row."""
SIGNED = jnp.asarray([1.0, 2.0, 1.0, -1.0, 1.0, 1.0, 0.5, 1.0])
"""The weights of the second cancel."""


def loss(w, x, weights):
    return ja.Mean(jnp.sum((x @ w) ** 2 * (1 + weights)), jnp.sum(weights))


def whole(w, x, weights):
    return jnp.sum((x @ w) ** 2 * (1 + weights)) / jnp.sum(weights)


def call(accumulator, **options):
    options = {"in_axes": (None, 0, 0), "microbatch_size": 2, "audit": "raise"} | options
    return jax.jit(ja.value_and_grad(loss, accumulator=accumulator, **options))


@pytest.mark.parametrize("weights", [POSITIVE, SIGNED], ids=["none is positive", "they cancel"])
@pytest.mark.parametrize("made", [acc.in_place, acc.tree, acc.compensated])
def test_its_gradient_counts(made, weights):
    value, grad = call(made())(W, X, weights)
    expected, same = jax.value_and_grad(whole)(W, X, weights)
    total = lambda w: jnp.sum((X @ w)[2:4] ** 2 * (1 + weights[2:4]))
    without = same - jax.grad(total)(W) / jnp.sum(weights)
    assert not normwise(without, same) < EXACT  # what a sum of means times weights gives
    assert normwise(grad, same) < EXACT
    assert normwise(value, expected) < EXACT


def test_it_counts_with_padding_and_on_devices_of_weight_zero():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    weights = jnp.concatenate([POSITIVE, jnp.zeros(4), POSITIVE[:4]])
    x = jnp.concatenate([X, X])
    step = call(acc.compensated(), mesh_axes="data", audit=None)
    spread = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    (_, grad), (_, same) = spread(W, x, weights), jax.value_and_grad(whole)(W, x, weights)
    assert float(jnp.sum(weights[8:12])) == 0.0  # the third device
    assert normwise(grad, same) < EXACT

    padded = ja.value_and_grad(
        lambda w, x, weights, count: loss(w, x, weights),
        in_axes=(None, 0, 0, None), microbatch_size=2, num_examples_argnum=3,
        accumulator=acc.compensated(),
    )  # fmt: skip
    masked = jnp.where(jnp.arange(8) < 5, POSITIVE, 0.0)
    rows = jnp.where((jnp.arange(8) < 5)[:, None], X, 0.0)
    _, grad = padded(W, rows, masked, 5)
    assert normwise(grad, jax.grad(whole)(W, rows, masked)) < EXACT


TERMS = {
    "several terms": lambda w, x, m: {
        "masked": loss(w, x, m), "mean": jnp.mean(jnp.sin(x @ w)), "penalty": 0.1 * jnp.sum(w**2),
    },
    "a sum": lambda w, x, m: ja.Sum(jnp.sum((x @ w) ** 2 * m)),
    "a weight of parameters": lambda w, x, m: ja.Mean(
        jnp.sum((x @ w) ** 2 * m), jnp.sum(jnp.exp(x @ w))
    ),
}  # fmt: skip
WHOLE = {
    "several terms": lambda w, x, m: (
        whole(w, x, m) + jnp.mean(jnp.sin(x @ w)) + 0.1 * jnp.sum(w**2)
    ),
    "a sum": lambda w, x, m: jnp.sum((x @ w) ** 2 * m),
    "a weight of parameters": lambda w, x, m: jnp.sum((x @ w) ** 2 * m) / jnp.sum(jnp.exp(x @ w)),
}


@pytest.mark.parametrize("on_devices", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_a_linear_accumulator_takes_any_loss(name, on_devices):
    fun = TERMS[name]
    options = {"in_axes": (None, 0, 0), "microbatch_size": 2, "accumulator": acc.compensated()}
    if on_devices:
        options["mesh_axes"] = "data"
    step = ja.value_and_grad(fun, **options)
    if on_devices:
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        specs = P(), P("data"), P("data")
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
    value, grad = jax.jit(step)(W, X, POSITIVE)
    expected, same = jax.value_and_grad(WHOLE[name])(W, X, POSITIVE)
    assert normwise(value, expected) < EXACT
    assert normwise(grad, same) < EXACT
    parts = zip(jnp.split(X, 4), jnp.split(POSITIVE, 4), strict=True)
    means = [jax.grad(WHOLE[name])(W, x, m) for x, m in parts]
    assert not normwise(sum(means) / 4, same) < EXACT  # the mean of means


def test_a_mean_of_it_is_infinite_and_so_it_is_reported():
    (value, report), grad = call(acc.skip_nonfinite(), audit=None)(W, X, POSITIVE)
    kept = jnp.asarray([0, 1, 4, 5, 6, 7])
    expected, same = jax.value_and_grad(whole)(W, X[kept], POSITIVE[kept])
    assert report.microbatches.tolist() == [False, True, False, False]
    assert normwise(grad, same) < EXACT
    assert normwise(value, expected) < EXACT
    _, grad = call(acc.noise_scale(), audit=None)(W, X, POSITIVE)
    assert jnp.isnan(grad).all()  # and not the gradient of the others


@pytest.mark.parametrize("made", [acc.skip_nonfinite, acc.noise_scale, acc.compensated])
def test_a_sum_in_float16_takes_weights_past_its_range(made):
    inner = (
        acc.compensated(jnp.float16) if made is acc.compensated else made(acc.in_place(jnp.float16))
    )
    x, weights = jnp.asarray([[1.0], [3.0]], jnp.float32), jnp.full(2, 70000.0, jnp.float32)
    mean = lambda w, x, m: ja.Mean(jnp.sum(x @ w * m), jnp.sum(m))
    step = ja.value_and_grad(
        mean, in_axes=(None, 0, 0), microbatch_size=1, accumulator=inner, audit=None
    )
    _, grad = step(jnp.ones(1, jnp.float32), x, weights)
    assert grad.tolist() == [2.0]
