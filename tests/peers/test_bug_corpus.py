"""Bugs that made the news: for each, our answer is the full batch's, and the peer's rule is off by
what was reported.

A rule is written as its peer applies it, in a few lines; peers that install are run themselves, in
`test_bug_corpus_peers.py`. Data are small integers, so that a wrong factor is exact.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.helpers import EXACT, data, normwise, same


def linear(w, x):
    """The loss whose gradient is the mean of the batch."""
    return jnp.mean(w * x)


def gradient(x, **options):
    return float(ja.grad(linear, **options)(0.0, jnp.asarray(x)))


def test_tail_logic_makes_no_extra_steps():
    """timm: once the tail begins, the loop counts to the tail's length instead of k, and divides by
    it."""

    def timm(num_microbatches, k):
        tail, updates, held, divisor = num_microbatches % k, [], 0, k
        for i in range(num_microbatches):
            update = i + 1 == num_microbatches or (i + 1) % divisor == 0
            divisor = tail if i >= num_microbatches - tail else k
            held += 1
            if update:
                updates.append((held, held / divisor))
                held = 0
        return updates

    assert timm(7, k=4) == [(4, 1), (2, 2 / 3), (1, 1 / 3)]
    x = np.arange(7.0)
    assert [gradient(batch, microbatch_size=1) for batch in (x[:4], x[4:])] == [
        x[:4].mean(),
        x[4:].mean(),
    ]


def test_an_auxiliary_loss_keeps_its_own_denominator():
    """MaxText #3311: the gradient of the sum of both terms is divided by the number of tokens."""
    tokens, balance = jnp.arange(256.0).reshape(4, 64), jnp.array([3.0, 9.0, 5.0, 7.0])
    w = {"nll": 1.0, "balance": 1.0}

    def loss(w, batch):
        tokens, balance = batch
        nll = ja.Mean(jnp.sum(w["nll"] * tokens), tokens.size)
        return {"nll": nll, "balance": ja.Mean(jnp.sum(w["balance"] * balance), len(balance))}

    def undivided(w):
        return jnp.sum(w["nll"] * tokens) + jnp.mean(w["balance"] * balance)

    maxtext = jax.tree.map(lambda g: float(g) / tokens.size, jax.grad(undivided)(w))
    ours = jax.tree.map(float, ja.grad(loss, num_microbatches=4)(w, (tokens, balance)))
    assert ours == {"nll": np.mean(tokens), "balance": 6.0}
    assert maxtext == {"nll": np.mean(tokens), "balance": 6 / 256}


@pytest.mark.parametrize("k", [2, 4])
def test_a_replay_adds_its_share_and_not_the_whole_loss(k):
    """open_clip --accum-freq: every replay back-propagates the loss of all rows, and the logit
    scale sees them all."""
    w, scale, x = data(3, 2), jnp.float64(1.5), data(8, 3, seed=1)
    encode = lambda w, x: jnp.tanh(x @ w)
    contrast = lambda scale, z: jnp.mean(
        jax.nn.logsumexp(scale * z @ z.T, axis=1) - scale * jnp.sum(z * z, axis=1)
    )

    def replay(w, scale, i):
        live = (
            jnp.zeros(len(x), bool).at[i * len(x) // k : (i + 1) * len(x) // k].set(True)[:, None]
        )
        return contrast(scale, jnp.where(live, encode(w, x), jax.lax.stop_gradient(encode(w, x))))

    full = jax.grad(lambda w, scale: contrast(scale, encode(w, x)), argnums=(0, 1))(w, scale)
    rows = ja.microbatch(lambda w, x: ja.Concat(encode(w, x)), num_microbatches=k)
    ours = jax.grad(lambda w, scale: contrast(scale, rows(w, x)), argnums=(0, 1))(w, scale)
    each = [jax.grad(replay, argnums=(0, 1))(w, scale, i) for i in range(k)]
    open_clip = jax.tree.map(lambda *g: sum(g), *each)
    assert normwise(ours, full) < EXACT
    assert normwise(open_clip, (full[0], k * full[1])) < EXACT


def test_gradients_of_low_precision_do_not_stall():
    """A bfloat16 accumulator holds 8 bits: to 256 it adds 1 in vain."""
    ones, w = jnp.ones(4096, jnp.bfloat16), jnp.bfloat16(1)
    loss = lambda w, x: ja.Sum(jnp.sum(w * x))
    add = lambda g, x: (g + jax.grad(lambda w: w * x)(w), None)
    assert float(jax.lax.scan(add, jnp.bfloat16(0), ones)[0]) == 256
    assert float(ja.grad(loss, microbatch_size=1)(w, ones)) == 4096


@pytest.mark.parametrize("kind", [ja.KEY, ja.EXAMPLE_KEY])
def test_every_microbatch_draws_from_a_key_of_its_own(kind):
    """MaxText: a key folded with a number read off the data repeats where the data do; two rows
    here sum to 6."""
    key, tokens = jax.random.key(0), jnp.array([[1, 2, 3], [4, 5, 6], [3, 2, 1], [7, 8, 9]])
    distinct = lambda keys: len(
        {tuple(k) for k in np.asarray(jax.random.key_data(keys)).reshape(4, -1).tolist()}
    )
    assert distinct(jnp.stack([jax.random.fold_in(key, jnp.sum(row)) for row in tokens])) == 3
    keys = ja.microbatch(
        lambda rows, key: ja.Stack(jax.random.key_data(key)), in_axes=(0, kind), num_microbatches=4
    )
    assert distinct(jax.random.wrap_key_data(keys(tokens, key).reshape(4, -1))) == 4


@pytest.mark.parametrize("m", [2, 4])
def test_statistics_keep_the_variance_between_microbatches(m):
    """AccumBatchNormalization averages the variances within microbatches. All m-tuples of ±1: 1 −
    1/m of the whole."""
    x = jnp.array(list(itertools.product([-1.0, 1.0], repeat=m))).reshape(-1)
    moments = ja.microbatch(
        lambda x: [ja.Mean(jnp.sum(x**p), len(x)) for p in (1, 2)], in_axes=(0,), microbatch_size=m
    )
    mean, square = moments(x)
    assert float(square - mean**2) == float(np.var(x)) == 1
    assert float(np.mean([np.var(rows) for rows in x.reshape(-1, m)])) == 1 - 1 / m


def test_counters_advance_once_an_optimizer_step():
    """Keras 3, GradientAccumulator: schedules, weight decay and averages of parameters move at
    every microbatch."""
    k, steps, decay = 4, 3, 0.5
    halved = optax.chain(optax.add_decayed_weights(decay), optax.scale_by_schedule(lambda _: -1.0))
    x = jnp.zeros(k)  # no gradient: whatever moves is decay

    def train(gradients):
        w, state = jnp.float64(1), halved.init(jnp.float64(1))
        for g in gradients:
            with jax.numpy_dtype_promotion("standard"):
                updates, state = halved.update(g, state, w)
                w = optax.apply_updates(w, updates)
        return int(optax.tree.get(state, "count")), float(w)

    per_microbatch = [jax.grad(linear)(0.0, rows) for _ in range(steps) for rows in x.reshape(k, 1)]
    per_batch = [ja.grad(linear, num_microbatches=k)(0.0, x) for _ in range(steps)]
    assert train(per_batch) == (steps, decay**steps)
    assert train(per_microbatch) == (k * steps, decay ** (k * steps))


@pytest.mark.parametrize(
    ("x", "clipped_each"), [((3.0, -1.0), 0.0), ((9.0, 1.0), 1.0), ((3.0, 0.5), 0.75)]
)
def test_clipping_is_of_the_accumulated_gradient(x, clipped_each):
    """Praxis, GradientAccumulator: a microbatch's gradient is clipped before it is added; how
    wrong, the data say."""
    clip = lambda g: float(
        optax.clip_by_global_norm(1.0).update(jnp.float64(g), optax.EmptyState())[0]
    )
    assert clip(gradient(x, num_microbatches=2)) == min(np.mean(x), 1) == 1
    assert np.mean([clip(g) for g in x]) == clipped_each


def test_denominators_are_the_number_of_targets():
    """HF #46204 counts the labels before the shift, one per row too many: 4/5 of the gradient.

    unsloth #1217: a count can fall below 0, and turns the sign; here it takes the shift off rows
    without a target too.
    """
    full, ignored = np.full((1, 5), 3), np.full((3, 5), -100)
    answered = np.array([[-100, -100, -100, -100, 3]])

    def loss(w, labels):
        mask = labels[:, 1:] != -100
        return ja.Mean(jnp.sum(jnp.where(mask, w * labels[:, 1:], 0.0)), jnp.sum(mask))

    labels = np.concatenate([full, full])
    total = labels[:, 1:].sum()
    assert float(ja.grad(loss, num_microbatches=2)(1.0, jnp.array(labels, float))) == 3
    assert math.isclose(total / (labels != -100).sum() / 3, 4 / 5)

    labels = np.concatenate([answered, ignored])
    assert float(ja.grad(loss, num_microbatches=4)(1.0, jnp.array(labels, float))) == 3
    assert 3 / sum((row != -100).sum() - 1 for row in labels) < 0


def test_padding_that_is_no_number_reaches_nothing():
    """Masking by multiplication, as in optax.MultiSteps' 0/1 flag: 0 · NaN is NaN."""
    x, mask = jnp.array([1.0, 3.0, jnp.nan, jnp.nan]), jnp.array([1.0, 1.0, 0.0, 0.0])
    loss = lambda w, batch, count: ja.Mean(jnp.sum(w * batch[0] * batch[1]), jnp.sum(batch[1]))
    options = {"in_axes": (None, 0, None), "microbatch_size": 2}
    assert np.isnan(ja.grad(loss, **options)(1.0, (x, mask), 2))
    assert float(ja.grad(loss, **options, num_examples_argnum=2)(1.0, (x, mask), 2)) == 2


@pytest.mark.optimized
def test_a_strided_split_moves_no_rows_between_devices():
    """Levanter, T5X: microbatches of consecutive rows of a sharded batch are gathered or exchanged
    first."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    w, x = data(3, 2), data(16, 3, seed=1)
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)

    def moves(split):
        """The collectives that carry rows; the sum of gradients is none of them."""
        fun = jax.jit(
            ja.grad(loss, num_microbatches=4, split=split),
            in_shardings=(whole, rows),
            out_shardings=whole,
        )
        assert normwise(fun(w, x), jax.grad(loss)(w, x)) < EXACT
        return set(
            re.findall(
                r"(all-gather|all-to-all|collective-permute)\(", fun.lower(w, x).compile().as_text()
            )
        )

    assert not moves("strided")
    assert moves("contiguous")


def test_a_batch_after_a_poisoned_one_is_clean():
    """Nothing is carried from one batch to the next, so nothing poisons it."""
    poisoned, clean = jnp.array([1.0, jnp.nan, 3.0, 4.0]), jnp.array([1.0, 2.0, 3.0, 4.0])
    step = jax.jit(ja.grad(linear, num_microbatches=2))
    assert np.isnan(step(0.0, poisoned))
    assert same(step(0.0, clean), np.mean(clean))
