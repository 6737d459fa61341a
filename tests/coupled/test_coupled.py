"""Coupled programs: collectives over the loop's axis, against the same function under
`jax.vmap(axis_name=…)`."""

import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxaccum as ja
from tests.support import jitted
from tests.support.covering import covering
from tests.support.helpers import EXACT, INEXACT, UNDECIDED, data, normwise, refused

AXIS = "microbatch"
W = {"a": data(4, 5), "b": data(5, 5), "scale": data(5)}
X = data(8, 4, seed=1) * jnp.arange(1.0, 9.0)[:, None] / 4
SETTINGS = ["min", "store", None, 800]
pytestmark = pytest.mark.filterwarnings(
    "ignore:memory="
)  # of the slow schedules, tested by name elsewhere


def normalize(h):
    """Batch normalization over all microbatches; returns its mean too."""
    mean = lax.pmean(jnp.mean(h, axis=0), AXIS)
    var = lax.pmean(jnp.mean(h**2, axis=0), AXIS) - mean**2
    return (h - mean[None]) * lax.rsqrt(var + 1e-3)[None], mean


def network(w, x):
    """Two normalizations and a skip connection."""
    h, first = normalize(jnp.tanh(x @ w["a"]))
    g, second = normalize(jax.nn.relu(h @ w["b"]) * w["scale"][None])
    return g + h, (first, second)


def loss(w, x):
    """An untagged mean, and one output of every kind."""
    h, means = network(w, x)
    aux = {
        "means": ja.Last(means),
        "rows": ja.Concat(h),
        "total": ja.Sum(jnp.sum(x)),
        "max": ja.Max(jnp.max(h)),
    }
    return jnp.mean(h**3) + jnp.mean(h @ w["b"]), aux


def full(fun, **options):
    return jax.jit(jax.value_and_grad(ja.full_batch(fun), has_aux=True, **options))


PARTITIONS = [
    {"num_microbatches": 2},
    {"microbatch_size": 1},
    {"num_microbatches": 4, "split": "strided"},
]


@functools.cache
def of_the_full_batch():
    return full(loss, argnums=(0, 1))(W, X)


@pytest.mark.parametrize(("memory", "options"), covering(SETTINGS, PARTITIONS), ids=str)
def test_value_gradient_and_aux_are_the_full_batchs(memory, options):
    ours = ja.value_and_grad(loss, argnums=(0, 1), has_aux=True, memory=memory, **options)
    (value, aux), grads = jax.jit(ours)(W, X)
    (truth, expected), wanted = of_the_full_batch()
    assert normwise(value, truth) < EXACT
    assert normwise(grads, wanted) < EXACT
    assert normwise(aux, expected) < EXACT


# -- every collective, tags, keys ------------------------------------------------------------------

MIXERS = {
    "normalize": lambda w, h: jax.nn.relu(normalize(h @ w["b"])[0]) * w["scale"][None] + h,
    "center": lambda w, h: h - lax.pmean(jnp.mean(h, axis=0), AXIS)[None],
    "attend": lambda w, h: jnp.tanh(
        jax.nn.softmax(h @ lax.all_gather(h, AXIS, tiled=True).T)
        @ lax.all_gather(h @ w["b"], AXIS, tiled=True)
    ),
    "shift": lambda w, h: jnp.sin(
        h + lax.ppermute(h @ w["b"], AXIS, [(i, (i + 1) % N) for i in range(N)])
    ),
    "exchange": lambda w, h: h * lax.psum_scatter(jnp.tile(h @ w["b"], (N, 1)), AXIS, tiled=True),
    "bound": lambda w, h: (
        h / (1.0 + lax.pmax(lax.stop_gradient(jnp.max(jnp.abs(h @ w["b"]))), AXIS))
    ),
    "weigh": lambda w, h: h * (1.0 + lax.axis_index(AXIS).astype(h.dtype)) * w["scale"][None],
}
N = 4
Y = data(16, 3, 4, seed=2)


def over_microbatches(fun, w, *batch):
    """The oracle: devices in space, and every tag resolved by hand."""
    parts = [x.reshape(N, len(x) // N, *x.shape[1:]) for x in batch]
    return jax.vmap(fun, (None, *[0] * len(batch)), axis_name=AXIS)(w, *parts)


def collectives(w, x):
    """Each collective once, some of another's result."""
    z = jnp.tanh(x @ w)
    shifted = jnp.sin(z * lax.ppermute(z, AXIS, [(i, (i + 1) % N) for i in range(N)]))
    scattered = lax.psum_scatter(shifted, AXIS, tiled=True)
    exchanged = lax.all_to_all(shifted, AXIS, 0, 0)
    most = lax.pmax(lax.stop_gradient(jnp.max(shifted)), AXIS)
    logsum = most + jnp.log(lax.psum(jnp.sum(jnp.exp(shifted - most)), AXIS))
    gathered = (
        jnp.sum(lax.all_gather(shifted, AXIS), axis=0)
        + lax.all_gather(shifted, AXIS, tiled=True)[: len(z)]
    )
    index = 1.0 + lax.axis_index(AXIS).astype(z.dtype)
    loss = lax.pmean(jnp.sum(scattered**2) + jnp.sum(exchanged * shifted), AXIS) + logsum
    return loss + index * jnp.sum(gathered * z), index * jnp.sum(shifted, axis=(1, 2))


@pytest.mark.parametrize("memory", ["min", "store"])
def test_who_receives_nothing_in_a_permutation_has_zeros(memory):
    def fun(w, x):
        z = jnp.tanh(x @ w)
        return jnp.mean((z - lax.ppermute(z, AXIS, [(0, 2), (3, 1)])) ** 2)

    def truth(w, x):
        z = jnp.tanh(x @ w).reshape(N, -1, *x.shape[1:-1], w.shape[-1])
        received = jnp.zeros_like(z).at[2].set(z[0]).at[1].set(z[3])
        return jnp.mean((z - received) ** 2)

    ours = ja.value_and_grad(fun, num_microbatches=N, memory=memory, audit=None)(W["a"], Y)
    wanted = jitted.value_and_grad(truth)(W["a"], Y)
    assert normwise(ours, wanted) < EXACT
    refused(
        lambda: ja.grad(fun, num_microbatches=2, memory=memory, audit=None)(W["a"], Y),
        "ppermute over 'microbatch'",
        "microbatches up to 3",
        "there are 2",
    )
    twice = lambda w, x: jnp.mean(lax.ppermute(jnp.tanh(x @ w), AXIS, [(0, 1), (0, 2)]))
    refused(lambda: ja.grad(twice, num_microbatches=N, audit=None)(W["a"], Y), "sends to one")


@UNDECIDED
@pytest.mark.parametrize("memory", ["min", "store"])
def test_every_collective(memory):
    def ours(w, x):
        loss, rows = collectives(w, x)
        return ja.Sum(loss), ja.Concat(rows)

    def truth(w, x):
        loss, rows = over_microbatches(collectives, w, x)
        return jnp.sum(loss), rows.reshape(-1)

    actual = jax.jit(ja.value_and_grad(ours, (0, 1), True, num_microbatches=N, memory=memory))(
        W["a"], Y
    )
    assert normwise(actual, jitted.value_and_grad(truth, (0, 1), has_aux=True)(W["a"], Y)) < EXACT


@INEXACT
@given(
    st.lists(st.sampled_from(sorted(MIXERS)), min_size=1, max_size=3),
    st.sampled_from(["min", "store", None]),
)
@settings(max_examples=settings.default.max_examples // 10)  # each draw compiles twice
def test_drawn_programs(mixers, memory):
    """Any sequence of layers that mix examples, values of several stages read again at the end."""

    def fun(w, x):
        h, seen = jnp.tanh(x @ w["a"]), []
        for mixer in mixers:
            h = MIXERS[mixer](w, h)
            seen.append(h)
        return {
            "last": ja.Mean(jnp.sum(h**2), h.size),
            "all": ja.Sum(sum(jnp.sum(h) for h in seen)),
        }, ja.Concat(h)

    def flat(w, x):
        terms, rows = fun(w, x)
        return terms["last"].total, terms["all"].x, rows.x

    def truth(w, x):
        last, every, rows = over_microbatches(flat, w, x)
        return jnp.sum(last) / rows.size + jnp.sum(every), rows.reshape(-1, rows.shape[-1])

    actual = jax.jit(ja.value_and_grad(fun, has_aux=True, num_microbatches=N, memory=memory))(W, X)
    assert normwise(actual, jax.jit(jax.value_and_grad(truth, has_aux=True))(W, X)) < EXACT


@UNDECIDED
def test_extrema_are_differentiated_as_reduce_max():
    """Ties included: every equal maximum gets its share."""
    x = X.at[3].set(X[5]).at[0].set(jnp.minimum(X[0], 0))

    def fun(w, x):
        h = jnp.tanh(x @ w["a"])
        return jnp.mean((h * (lax.pmax(h[0], AXIS) - lax.pmin(h[0], AXIS))[None]) ** 2)

    def truth(w, x):
        h = jnp.tanh(x @ w["a"])
        return jnp.mean((h * (jnp.max(h, axis=0) - jnp.min(h, axis=0))[None]) ** 2)

    actual = ja.value_and_grad(fun, argnums=(0, 1), microbatch_size=1)(W, x)
    assert normwise(actual, jitted.value_and_grad(truth, argnums=(0, 1))(W, x)) < EXACT


def test_a_weight_that_depends_on_collectives():
    """A term over its own denominator, which other microbatches move."""

    def fun(w, x):
        h, _ = normalize(x @ w["a"])
        return {
            "a": ja.Mean(jnp.sum(h**3), jnp.sum(jnp.exp(h))),
            "b": ja.Mean(jnp.sum(h), jnp.sum(h > 0)),
        }

    terms = lambda w, x: sum(jax.tree.leaves(ja.full_batch(fun)(w, x)))
    actual = ja.value_and_grad(fun, num_microbatches=4)(W, X)
    assert normwise(actual, jitted.value_and_grad(terms)(W, X)) < EXACT


@UNDECIDED
def test_a_shifted_parameter_is_the_parameter():
    """A collective of what every microbatch has alike."""
    ring = [(i, (i + 1) % N) for i in range(N)]
    fun = lambda w, x: jnp.mean(jnp.tanh(x @ lax.ppermute(w, AXIS, ring)))
    actual = ja.value_and_grad(fun, num_microbatches=N)(W["a"], X)
    plain = jitted.value_and_grad(lambda w: jnp.mean(jnp.tanh(X @ w)))
    assert normwise(actual, plain(W["a"])) < EXACT


def test_a_statistic_that_two_stages_read():
    """A matrix, so that no broadcast of its own stands between the statistic and either product."""

    def fun(w, x):
        h = x @ w["a"]
        covariance = lax.psum(h.T @ h, AXIS) / X.size
        g = jnp.tanh(h @ covariance)
        return jnp.mean((g @ (lax.psum(g.T @ g, AXIS) / X.size) @ covariance) ** 2)

    actual = jax.jit(ja.value_and_grad(fun, num_microbatches=4, memory="min"))(W, X)
    assert normwise(actual, jax.jit(jax.value_and_grad(ja.full_batch(fun)))(W, X)) < EXACT


@INEXACT
@pytest.mark.parametrize(("n", "memory"), covering([2, 4, 8], ["min", "store"]))
def test_a_rank_is_that_among_all_examples(n, memory):
    def ranked(w, x, *, everywhere=True):
        score = jnp.sum(x @ w["a"], axis=1)
        all_scores = lax.all_gather(score, AXIS, tiled=True) if everywhere else score
        if (
            memory == "min" and everywhere
        ):  # what is computed again may differ from what was gathered
            score = lax.dynamic_slice_in_dim(
                all_scores, lax.axis_index(AXIS) * len(score), len(score)
            )
        rank = jnp.searchsorted(jnp.sort(all_scores), score)
        return jnp.mean(score * rank.astype(score.dtype))

    value, grads = jax.jit(ja.value_and_grad(ranked, num_microbatches=n, memory=memory))(W, X)
    scores = jnp.sum(X @ W["a"], axis=1)
    ranks = jnp.argsort(jnp.argsort(scores))
    truth, wanted = jitted.value_and_grad(
        lambda w: jnp.mean(jnp.sum(X @ w["a"], axis=1) * ranks.astype(scores.dtype))
    )(W)
    assert normwise(value, truth) < EXACT
    assert normwise(grads, wanted) < EXACT
    own = functools.partial(ranked, everywhere=False)
    apart, _ = ja.value_and_grad(own, num_microbatches=n)(W, X)
    assert normwise(apart, truth) > 0.1  # the rank within the microbatch


def test_example_keys_do_not_depend_on_the_partition():
    def fun(w, x, keys):
        first, second = jnp.moveaxis(
            jax.vmap(jax.random.split)(keys), 1, 0
        )  # the second crosses a cut
        dropped = lambda h, keys: jnp.where(
            jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (5,)))(keys), h, 0.0
        )
        h, _ = normalize(dropped(x @ w["a"], first))
        return jnp.mean(normalize(dropped(h, second))[0] ** 3)

    axes, key = (None, 0, ja.EXAMPLE_KEY), jax.random.key(3)
    expected = jitted.value_and_grad(ja.full_batch(fun, in_axes=axes))(W, X, key)
    for n in (2, 8):
        assert (
            normwise(ja.value_and_grad(fun, in_axes=axes, num_microbatches=n)(W, X, key), expected)
            < EXACT
        )


def test_padding_that_is_masked_counts_nowhere():
    def fun(w, batch, mask, count):
        weight = mask.astype(float)[:, None]
        h, total = batch @ w["a"], lax.psum(jnp.sum(weight), AXIS)
        mean = lax.psum(jnp.sum(h * weight, axis=0), AXIS) / total
        return ja.Mean(jnp.sum(((h - mean[None]) ** 3) * weight), jnp.sum(mask))

    batch, mask = ja.pad_batch(X[:5], to=8)
    options = {"in_axes": (None, 0, 0, None), "num_examples_argnum": 3, "num_microbatches": 4}
    actual = ja.value_and_grad(fun, **options)(W, batch, mask, 5)
    whole = lambda w: jnp.sum((X[:5] @ w["a"] - jnp.mean(X[:5] @ w["a"], axis=0)[None]) ** 3) / 5
    assert normwise(actual, jitted.value_and_grad(whole)(W)) < EXACT


def test_gradients_of_low_precision_parameters_are_summed_in_float32():
    w = jax.tree.map(lambda x: x.astype(jnp.bfloat16), W)
    fun = lambda w, x: jnp.mean(normalize((x @ w["a"].astype(x.dtype)) ** 2)[0] ** 3)
    for sums in (ja.accumulators.in_place(jnp.float32), ja.accumulators.tree(jnp.float32)):
        grads = ja.grad(fun, num_microbatches=4, accumulator=sums)(w, X)
        assert grads["a"].dtype == jnp.float32
    widened = jitted.grad(ja.full_batch(fun))(jax.tree.map(lambda x: x.astype(X.dtype), w), X)
    assert normwise(grads, widened) < 4 * jnp.finfo(jnp.bfloat16).eps


@UNDECIDED
def test_adjoints_of_low_precision_statistics_are_summed_in_float32():
    """1024 microbatches each add 1 to the cotangent of one bfloat16 number, which stalls at 256."""
    n, one = 1024, jnp.bfloat16(1)
    fun = lambda w, x: ja.Sum(x[0] * lax.pmean(w * x[0], AXIS))
    assert ja.grad(fun, num_microbatches=n)(one, jnp.ones(n, jnp.bfloat16)) == n
    assert lax.fori_loop(0, n, lambda _, total: total + one, jnp.bfloat16(0)) == 256


def test_the_classic_wrong_answer_is_far():
    """Each microbatch's own statistics, as accumulation usually computes them."""
    apart = lambda w: sum(ja.full_batch(loss)(w, x)[0] for x in X.reshape(4, 2, 4)) / 4
    assert normwise(jitted.grad(apart)(W), full(loss)(W, X)[1]) > 0.1


def test_side_effects_happen_and_results_stay():
    seen = []

    def fun(w, x):
        jax.debug.callback(lambda v: seen.append(float(v)), jnp.sum(x))
        return jnp.mean(normalize(x @ w["a"])[0] ** 3)

    actual = ja.value_and_grad(fun, num_microbatches=2)(W, X)
    jax.effects_barrier()
    assert len(seen) >= 2
    plain = lambda w, x: jnp.mean(normalize(x @ w["a"])[0] ** 3)
    assert normwise(actual, jitted.value_and_grad(ja.full_batch(plain))(W, X)) < EXACT
