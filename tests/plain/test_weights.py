"""Denominators: of the index, of a device, of integers, and beside padding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.covering import covering
from tests.support.helpers import EXACT, INEXACT, data, normwise, parts_of, refused, sizes_of

W, X = data(3), data(12, 3, seed=1)
INTEGERS = [
    "bool",
    "int2",
    "uint2",
    "int4",
    "uint4",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
]
OF_INDEX = {
    "powers": lambda i: 0.5 ** i.astype(jnp.float64),
    "integers": lambda i: 1 + i,
    "bytes": lambda i: (1 + i).astype(jnp.uint8),
}


def error(w, x):
    return jnp.sum((x @ w - 1) ** 2)


def weighted(weight_of):
    """A mean over examples, each microbatch of which weighs as its index says."""

    def loss(w, x):
        weight = weight_of(jax.lax.axis_index("microbatch"))
        return ja.Mean(error(w, x) * weight.astype(jnp.float64), len(x) * weight)

    return loss


def by_hand(weight_of, sizes):
    """The same by a Python loop over the microbatches."""

    def loss(w, x):
        weights = [weight_of(jnp.int32(i)).astype(jnp.float64) for i in range(len(sizes))]
        total = sum(
            error(w, rows) * weight
            for rows, weight in zip(parts_of(x, sizes), weights, strict=True)
        )
        return total / sum(size * weight for size, weight in zip(sizes, weights, strict=True))

    return loss


@INEXACT
@pytest.mark.parametrize(
    ("name", "options"),
    covering(list(OF_INDEX), [{"num_microbatches": 4}, {"microbatch_size": 5}]),
)
def test_a_weight_of_the_index_is_that_of_each_microbatch(name, options):
    weight_of, sizes = OF_INDEX[name], sizes_of(12, **options)
    expected = jax.jit(jax.value_and_grad(by_hand(weight_of, sizes)))(W, X)
    loss = weighted(weight_of)
    assert normwise(ja.value_and_grad(loss, **options)(W, X), expected) < EXACT
    assert normwise(jax.value_and_grad(ja.microbatch(loss, **options))(W, X), expected) < EXACT
    first = by_hand(lambda i: weight_of(0 * i), sizes)
    of_the_first = jax.jit(jax.value_and_grad(first))(W, X)
    assert normwise(of_the_first, expected) > EXACT


@INEXACT
def test_a_weight_of_the_index_in_a_coupled_loss():
    """The collective is in the total, and the weight has none."""
    decay = OF_INDEX["powers"]

    def loss(w, x):
        y = x @ w
        y = y - jax.lax.pmean(jnp.mean(y), "microbatch")
        weight = decay(jax.lax.axis_index("microbatch"))
        return ja.Mean(jnp.sum(y**2) * weight, len(x) * weight)

    def expected(w, x):
        y = x @ w
        weights = jnp.repeat(decay(jnp.arange(4)), 3)
        return jnp.sum(weights * (y - jnp.mean(y)) ** 2) / jnp.sum(weights)

    actual = ja.value_and_grad(loss, num_microbatches=4)(W, X)
    assert normwise(actual, jax.value_and_grad(expected)(W, X)) < EXACT
    assert normwise(actual, jax.value_and_grad(lambda w, x: jnp.var(x @ w))(W, X)) > EXACT


@pytest.mark.parametrize(("coupled", "check_vma"), covering([False, True], [True, False]))
def test_a_weight_of_the_device_is_that_of_each_device(coupled, check_vma):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    both = ("data", "microbatch")

    def loss(w, x):
        weight = 1.0 + jax.lax.axis_index("data").astype(jnp.float64)
        y = x @ w
        y = y - jax.lax.pmean(jnp.mean(y), both) if coupled else y
        return ja.Mean(jnp.sum(y**2) * weight, len(x) * weight)

    def expected(w, x):
        y, weights = x @ w, jnp.repeat(1.0 + jnp.arange(4.0), 4)
        y = y - jnp.mean(y) if coupled else y
        return jnp.sum(weights * y**2) / jnp.sum(weights)

    x, step = data(16, 3), ja.value_and_grad(loss, num_microbatches=2, mesh_axes="data")
    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": check_vma}
    actual = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(W, x)
    assert normwise(actual, jax.value_and_grad(expected)(W, x)) < EXACT
    plain = jax.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2))(W, x)
    assert normwise(actual, plain) > EXACT  # as if all devices weighed as the first


# -- padding ----------

PADDED, MASK = ja.pad_batch(X[:5], to=12)
PADDING = {"in_axes": (None, 0, 0, None), "num_examples_argnum": 3}


TAGS = [lambda x, mask: ja.Mean(x, jnp.sum(mask)), lambda x, mask: ja.Sum(x / 5)]


@pytest.mark.parametrize(("n", "tag"), covering([1, 3, 6, 12], TAGS))
def test_constant_weights_count_as_often_as_their_totals_do(n, tag):
    """A regularizer is a term with a constant weight, which padding does not add either."""

    def loss(w, x, mask, count):
        nll = jnp.sum(jnp.where(mask, (x @ w - 1) ** 2, 0.0))
        return {
            "nll": tag(nll, mask),
            "decay": ja.Mean(jnp.sum(w**2), 1),
            "half": ja.Mean(w[0], 2.0),
        }

    expected = jax.value_and_grad(lambda w: error(w, X[:5]) / 5 + jnp.sum(w**2) + w[0] / 2)(W)
    options = {**PADDING, "num_microbatches": n}
    assert normwise(ja.value_and_grad(loss, **options)(W, PADDED, MASK, 5), expected) < EXACT
    terms = ja.microbatch(loss, **options)
    assert (
        normwise(jax.value_and_grad(lambda w: sum(terms(w, PADDED, MASK, 5).values()))(W), expected)
        < EXACT
    )


@INEXACT
def test_a_weight_of_the_index_beside_padding():
    def loss(w, x, mask, count):
        weight = 1 + jax.lax.axis_index("microbatch")
        nll = jnp.sum(jnp.where(mask, (x @ w - 1) ** 2, 0.0)) * weight.astype(jnp.float64)
        return ja.Mean(nll, jnp.sum(mask, dtype=weight.dtype) * weight)

    actual = ja.value_and_grad(loss, num_microbatches=6, **PADDING)(W, PADDED, MASK, 5)
    expected = by_hand(lambda i: 1 + i, [2, 2, 1])
    assert normwise(actual, jax.value_and_grad(expected)(W, X[:5])) < EXACT


@pytest.mark.parametrize(
    "weight", [lambda x: len(x), lambda x: 1 + jax.lax.axis_index("microbatch")]
)
@pytest.mark.parametrize("make", [ja.value_and_grad, ja.microbatch])
def test_a_weight_that_counts_padding_is_refused(make, weight):
    """It is the capacity, or counts the rows that run: neither is the number of examples."""
    loss = lambda w, x, mask, count: ja.Mean(jnp.sum(jnp.where(mask, (x @ w) ** 2, 0.0)), weight(x))
    step = make(loss, num_microbatches=6, **PADDING)
    refused(lambda: step(W, PADDED, MASK, 5), "Mean.weight", "num_examples_argnum", "mask", "Sum(")


# -- integers ----------


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_any_width_are_counted(name):
    """300 microbatches of one example: every count of 8 bits or fewer would wrap."""
    x = jnp.ones((300, 2))
    counts = jnp.ones(300, jnp.bool_ if name == "bool" else jnp.dtype(name))

    def loss(w, x, n):
        n = n[0]
        return ja.Mean(jnp.sum(x @ w), n), {
            "count": ja.Sum(n),
            "mean": ja.Mean(n, n),
            "max": ja.Max(n),
        }

    options = {"microbatch_size": 1, "in_axes": (None, 0, 0)}
    (value, aux), grad = ja.value_and_grad(loss, has_aux=True, **options)(jnp.ones(2), x, counts)
    assert normwise((value, grad), (2.0, jnp.ones(2))) < EXACT
    assert (int(aux["count"]), float(aux["mean"]), int(aux["max"])) == (300, 1.0, 1)
    assert aux["count"].dtype == (jnp.uint64 if name.startswith("u") else jnp.int64)
    assert aux["max"].dtype == counts.dtype
    assert (
        int(np.sum(np.ones(300, np.uint8), dtype=np.uint8)) == 44
    )  # the classic wrong denominator


@pytest.mark.parametrize("x64", [True, False])
def test_token_counts_beyond_32_bits(x64):
    """Four microbatches of 2^30 tokens are 2^32, which is 0 in 32 bits."""
    with jax.enable_x64(x64):
        x, tokens = jnp.ones((4, 1), jnp.float32), jnp.full(4, 2**30, jnp.int32)
        loss = lambda w, x, n: ja.Mean(jnp.sum(x @ w) * jnp.float32(2**30), n[0])
        value, grad = ja.value_and_grad(loss, microbatch_size=1, in_axes=(None, 0, 0))(
            jnp.ones(1, "f4"), x, tokens
        )
        mean = ja.microbatch(loss, microbatch_size=1, in_axes=(None, 0, 0))(
            jnp.ones(1, "f4"), x, tokens
        )
        assert (float(value), grad.tolist(), float(mean)) == (1.0, [1.0], 1.0)
        total = ja.microbatch(lambda n: ja.Sum(n[0]), microbatch_size=1, in_axes=(0,))(tokens)
        assert total.dtype == jnp.sum(tokens).dtype
        assert int(total) == (
            2**32 if x64 else int(jnp.sum(tokens))
        )  # as the full batch: JAX has no wider integer


FLOATS = [
    "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e3m4", "float8_e4m3fnuz",
    "float8_e5m2fnuz", "float8_e4m3b11fnuz", "bfloat16", "float16", "float32",
]  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_extrema_of_dtypes_without_an_infinity(name):
    x = jnp.asarray(np.array([-3.0, -2.0, -4.0, -2.5]).astype(jnp.dtype(name)))
    highest, lowest = ja.microbatch(
        lambda x: (ja.Max(x[0]), ja.Min(-x[0])), in_axes=(0,), microbatch_size=1
    )(x)
    assert (float(highest), float(lowest)) == (-2.0, 2.0)
    assert highest.dtype == lowest.dtype == x.dtype
    if name == "float8_e4m3fn":
        assert np.isnan(
            np.float64(-np.inf).astype(ml_dtypes.float8_e4m3fn)
        )  # what a maximum may not start from


def test_means_of_eight_bits_have_a_weight_of_any_dtype():
    x = jnp.asarray([1.0, 2.0, 3.0], jnp.float8_e4m3fn)
    fun = lambda x, n: (ja.Mean(x[0], n[0]), ja.Mean(x[0].astype(jnp.float32), x[0]), ja.Sum(x[0]))
    count, own, total = ja.microbatch(fun, in_axes=(0, 0), microbatch_size=1)(
        x, jnp.asarray([1.0, 1.0, 2.0], "f4")
    )
    assert [float(y) for y in (count, own, total)] == [1.5, 1.0, 6.0]


# -- JAX's own checks ----------


@pytest.mark.parametrize(
    "loss",
    [
        lambda w, x: jnp.mean((x @ w) ** 2),
        lambda w, x: ja.Mean(jnp.sum((x @ w) ** 2), len(x)),
        lambda w, x: {"a": ja.Sum(jnp.sum(x @ w)), "b": ja.Mean(jnp.sum(w**2), np.float32(1))},
        lambda w, x: ja.Mean(jnp.sum(x @ w), jnp.sum(jnp.ones_like(x))),
    ],
)
def test_under_the_checks_of_jax(loss):
    expected = jax.value_and_grad(lambda w: sum(jax.tree.leaves(ja.full_batch(loss)(w, X))))(W)
    with jax.enable_checks(True):
        for options in ({"num_microbatches": 4}, {"microbatch_size": 5}):
            assert normwise(ja.value_and_grad(loss, **options)(W, X), expected) < EXACT
