"""The law of tags: each combines over any partition as a host loop over the microbatches would
combine it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxaccum as ja
from jaxaccum.testing.bounds import sum_bound
from tests.support.helpers import EXACT, INEXACT, data, normwise, parts_of, refused, sizes_of

OPTIONS = st.sampled_from(
    [{"num_microbatches": n} for n in (1, 3, 5, 7)]
    + [{"microbatch_size": m} for m in (2, 3, 4, 9)],
)


def every_tag(x, weight):
    """One of each tag, of a microbatch's rows."""
    return {
        "mean": ja.Mean({"a": jnp.sum(x * weight), "b": jnp.sum(x**2 * weight)}, jnp.sum(weight)),
        "elementwise": ja.Mean(
            jnp.sum(x[:, None] * jnp.ones((1, 2)), axis=0), jnp.full(2, float(len(x)))
        ),
        "sum": ja.Sum(jnp.sum(x)) / 2,
        "count": ja.Sum(jnp.sum(x > 0)),
        "max": ja.Max(jnp.max(x)),
        "min": ja.Min((jnp.min(x), jnp.min(jnp.int32(3)))),
        "any": ja.Max(jnp.any(x > 0)),
        "all": ja.Min(jnp.all(x > 0)),
        "rows": ja.Concat(2 * x),
        "stack": ja.Stack(jnp.sum(x)),
        "last": ja.Last(x),
        "scalar": jnp.mean(x),
    }


def host(x, weight, sizes):
    """The same by numpy, over the whole batch or over the host's own microbatches."""
    cut = parts_of(x, sizes)
    return {
        "mean": {
            "a": np.sum(x * weight) / np.sum(weight),
            "b": np.sum(x**2 * weight) / np.sum(weight),
        },
        "elementwise": np.full(2, np.mean(x)),
        "sum": np.sum(x) / 2,
        "count": np.sum(x > 0),
        "max": np.max(x),
        "min": (np.min(x), 3),
        "any": np.any(x > 0),
        "all": np.all(x > 0),
        "rows": 2 * x,
        "stack": np.array([np.sum(part) for part in cut]),
        "last": cut[-1],
        "scalar": np.mean(x),
    }


@functools.cache
def compiled(options):
    """One compilation for each partition, however many batches are drawn."""
    return jax.jit(ja.microbatch(every_tag, in_axes=(0, 0), **dict(options)))


@INEXACT
@given(OPTIONS, st.integers(0, 50))
def test_every_tag_over_any_partition(options, seed):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=7), rng.integers(0, 3, 7).astype(float) + np.eye(7)[0]
    actual = compiled(tuple(options.items()))(x, weight)
    expected = host(x, weight, sizes_of(7, **options))
    assert jax.tree.map(np.shape, actual) == jax.tree.map(np.shape, expected)
    assert (
        max(
            float(np.max(np.abs(np.float64(a) - np.float64(e))))
            for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        )
        < EXACT
    )


def test_the_oracle_finalizes_as_one_microbatch():
    x, weight = data(7), jnp.arange(7.0)
    one = ja.microbatch(every_tag, in_axes=(0, 0), num_microbatches=1)(x, weight)
    assert normwise(ja.full_batch(every_tag, in_axes=(0, 0))(x, weight), one) < EXACT


def test_concat_and_stack_keep_the_order_of_a_strided_split():
    rows, stacked = ja.microbatch(
        lambda x: (ja.Concat(x), ja.Stack(x)), in_axes=(0,), num_microbatches=3, split="strided"
    )(jnp.arange(6))
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert stacked.tolist() == [
        [0, 3],
        [1, 4],
        [2, 5],
    ]  # unpermuted, as a concatenation would leave them


@pytest.mark.parametrize("tag", [lambda x: ja.Mean(x, 2.0), ja.Sum])
def test_linear_tags_scale_and_refuse_addition(tag):
    value = lambda t: float(ja.full_batch(lambda x: t, in_axes=(0,))(np.zeros(1)))
    three = tag(jnp.float64(3.0))
    assert (
        value(2 * three)
        == value(three * np.float64(2))
        == value(np.float64(2) * three)
        == 2 * value(three)
    )
    assert value(three / 2) == value(three * jnp.float64(0.5)) == value(three) / 2
    assert value(-three) == -value(three)
    for wrong in (
        lambda: three + three,
        lambda: sum([three, three]),
        lambda: three - three,
        lambda: 1.0 + three,
    ):
        refused(wrong, "dict", error=TypeError)
    refused(lambda: three * jnp.ones(3), "number", error=TypeError)
    refused(lambda: three / three, "number", error=TypeError)


def test_a_total_weight_of_zero_gives_value_and_gradient_zero():
    fun = lambda w, x, m: ja.Mean(jnp.sum(jnp.sin(w * x) * m), jnp.sum(m))
    value, grad = ja.value_and_grad(fun, num_microbatches=3, in_axes=(None, 0, 0))(
        1.0, data(6), jnp.zeros(6)
    )
    assert (float(value), float(grad)) == (0.0, 0.0)
    assert (
        float(
            jax.grad(ja.microbatch(fun, num_microbatches=3, in_axes=(None, 0, 0)))(
                1.0, data(6), jnp.zeros(6)
            )
        )
        == 0.0
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_sums_of_low_precision_do_not_stall(dtype):
    """4096 ones sum to 256 in bfloat16; here totals are summed in float32 and returned in their own
    dtype."""
    ones = jnp.ones(4096, dtype)
    outputs = ja.microbatch(
        lambda x: (ja.Sum(jnp.sum(x)), jnp.mean(x), ja.Mean(x[0], dtype(1))),
        in_axes=(0,),
        microbatch_size=1,
    )(ones)
    assert [x.dtype for x in outputs] == [dtype] * 3
    assert [float(x) for x in outputs] == [4096.0, 1.0, 1.0]
    stalled = jax.lax.scan(
        lambda total, x: (total + x, None),
        jnp.zeros((), jnp.bfloat16),
        jnp.ones(4096, jnp.bfloat16),
    )[0]
    assert float(stalled) == 256.0


@functools.cache
def summed(count):
    """The sum of `count` terms, three at a time."""
    return (
        jax.jit(ja.microbatch(lambda x: ja.Sum(jnp.sum(x)), in_axes=(0,), microbatch_size=3))
        .lower(jnp.zeros(count, jnp.float32))
        .compile()
    )


@given(st.sampled_from([1, 7, 64]), st.integers(0, 1000))
def test_a_sum_of_given_terms_is_within_its_rounding_bound(count, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=count) * 10.0 ** rng.integers(-3, 4, count)).astype(np.float32)
    total = summed(count)(jnp.asarray(x))
    wide = x.astype(np.float64)
    assert abs(float(total) - wide.sum()) <= sum_bound(count, np.abs(wide).sum(), dtype=np.float32)


@INEXACT
def test_integer_counts_stay_integers_and_their_mean_is_floating():
    fun = lambda x: (ja.Sum(jnp.sum(x > 1)), ja.Mean(jnp.sum(x > 1), x.size), ja.Sum(x > 1))
    total, mean, own = ja.microbatch(fun, in_axes=(0,), num_microbatches=4)(np.arange(4))
    assert total.dtype == jnp.int64
    assert float(mean) == 0.5
    assert own.tolist() == [2]  # booleans are counted
