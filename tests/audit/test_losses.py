"""Losses as libraries write them: what is exact stays silent, and what is not is said, by the
numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxaccum
from jaxaccum import Max, Mean, Sum
from tests.support.helpers import EXACT, INEXACT, data, normwise

N, FEATURES, CLASSES, STEPS = 12, 3, 4, 5
W = data(FEATURES, CLASSES) / 2
BATCH = {
    "x": data(N, FEATURES, seed=1), "y": data(N, CLASSES, seed=2), "label": jnp.arange(N) % CLASSES,
    "mask": jnp.asarray(jnp.arange(N) % 3 > 0, jnp.float64), "rewards": data(N, STEPS, seed=3),
    "states": data(N, STEPS + 1, FEATURES, seed=4),
    "actions": jnp.arange(N * STEPS).reshape(N, STEPS) % CLASSES,
}  # fmt: skip
PARTS = 5
"""Microbatches of 3, 3, 2, 2 and 2 examples."""


def logits(w, b):
    return jnp.tanh(b["x"] @ w)


def shares(b):
    return jax.nn.softmax(b["y"])


def binary(b):
    return jnp.asarray(b["y"] > 0, jnp.float64)


def errors(w, b):
    return jnp.mean((logits(w, b) - b["y"]) ** 2, axis=-1)


# -- every loss of optax.losses --------------------------------------------------------------------


def ctc(w, b, loss=optax.losses.ctc_loss):
    frames = jnp.tanh(b["states"] @ w)
    return loss(
        frames, jnp.zeros(frames.shape[:2]), b["actions"][:, :2], jnp.zeros((len(frames), 2))
    )


OF_TARGETS = "squared_error l2_loss huber_loss log_cosh cosine_similarity cosine_distance"
OF_SHARES = """softmax_cross_entropy poly_loss_cross_entropy safe_softmax_cross_entropy
    kl_divergence convex_kl_divergence generalized_kl_divergence"""
OF_BINARY = "sigmoid_binary_cross_entropy sigmoid_focal_loss"
OF_SIGNS = "hinge_loss perceptron_loss"
OF_LABELS = """softmax_cross_entropy_with_integer_labels multiclass_hinge_loss
    multiclass_perceptron_loss multiclass_sparsemax_loss"""


def of(name, targets):
    function = getattr(optax.losses, name)
    return lambda w, b: function(logits(w, b), targets(b))


OPTAX = {
    **{name: of(name, lambda b: b["y"]) for name in OF_TARGETS.split()},
    **{name: of(name, shares) for name in OF_SHARES.split()},
    **{name: of(name, binary) for name in OF_BINARY.split()},
    **{name: of(name, lambda b: 2 * binary(b) - 1) for name in OF_SIGNS.split()},
    **{name: of(name, lambda b: b["label"]) for name in OF_LABELS.split()},
    "sparsemax_loss": lambda w, b: optax.losses.sparsemax_loss(logits(w, b), binary(b)),
    "kl_divergence_with_log_targets": lambda w, b: optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits(w, b)), jnp.log(shares(b))
    ),
    "smooth_labels": lambda w, b: optax.losses.softmax_cross_entropy(
        logits(w, b), optax.losses.smooth_labels(jax.nn.one_hot(b["label"], CLASSES), 0.1)
    ),
    "make_fenchel_young_loss": lambda w, b: jax.vmap(
        optax.losses.make_fenchel_young_loss(jax.scipy.special.logsumexp)
    )(logits(w, b), shares(b)),
    "triplet_margin_loss": lambda w, b: optax.losses.triplet_margin_loss(
        logits(w, b), b["y"], jnp.roll(b["y"], 1, axis=1)
    ),
    "ranking_softmax_loss": lambda w, b: optax.losses.ranking_softmax_loss(
        logits(w, b), binary(b), reduce_fn=None
    ),
    "ctc_loss": ctc,
    "ctc_loss_with_forward_probs": lambda w, b: (
        ctc(w, b, optax.losses.ctc_loss_with_forward_probs)[0]
    ),
    "dice_loss": lambda w, b: jax.vmap(functools.partial(optax.losses.dice_loss, axis=0))(
        jnp.tanh(b["states"] @ w), jax.nn.softmax(b["states"] @ jnp.ones((FEATURES, CLASSES)))
    ),
    "binary_dice_loss": lambda w, b: (
        jax.vmap(optax.losses.binary_dice_loss)(logits(w, b), binary(b))
    ),
    "multiclass_generalized_dice_loss": lambda w, b: jax.vmap(
        lambda z, y: optax.losses.multiclass_generalized_dice_loss(z[None], y[None])
    )(logits(w, b), shares(b)),
}  # fmt: skip
COUPLED = {"ntxent": lambda w, b: optax.losses.ntxent(logits(w, b), b["label"])}


def test_the_table_names_every_loss_of_optax():
    public = {name for name in dir(optax.losses) if callable(getattr(optax.losses, name))}
    assert {name for name in public if not name.startswith("_")} == set(OPTAX) | set(COUPLED)


# -- as other libraries write them -----------------------------------------------------------------


def divide_no_nan(x, y):
    """Keras 3's, under its own name."""
    y = jnp.asarray(y, x.dtype)
    return jnp.where(
        y == 0, jnp.zeros_like(x), jnp.divide(x, jnp.where(y == 0, jnp.ones_like(y), y))
    )


def over_batch_size(values):
    """Keras 3's reduction "sum_over_batch_size"."""
    divisor = jnp.prod(jnp.asarray(values.shape, jnp.int32))
    return jnp.divide(jnp.sum(values), divisor.astype(values.dtype))


def returns(rewards, discount=0.9):
    """Discounted sums of rewards, backwards over time as in rlax."""
    step = lambda total, reward: ((total := reward + discount * total), total)
    return lax.scan(step, jnp.zeros(()), rewards, reverse=True)[1]


def td(w, b):
    """rlax's TD(0) of values that are linear in the state, an example at a time."""

    def one(states, rewards):
        values = jnp.tanh(states @ w[:, 0])
        target = rewards + 0.9 * lax.stop_gradient(values[1:])
        return jnp.mean(optax.losses.huber_loss(values[:-1], target))

    return jax.vmap(one)(b["states"], b["rewards"])


def policy_gradient(w, b):
    """rlax's policy gradient with an entropy bonus; weights are per step."""

    def one(states, actions, rewards):
        log_pi = jax.nn.log_softmax(states[:-1] @ w)
        chosen = jnp.take_along_axis(log_pi, actions[:, None], axis=1)[:, 0]
        entropy = -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1)
        return jnp.mean(-chosen * lax.stop_gradient(returns(rewards))) - 0.01 * jnp.mean(entropy)

    return jax.vmap(one)(b["states"], b["actions"], b["rewards"])


def ppo(w, b, normalize):
    """The clipped surrogate."""
    advantages = jax.vmap(returns)(b["rewards"])
    if normalize:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = jnp.exp(jnp.tanh(b["states"][:, :-1] @ w[:, 0]))
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages).mean()


def nll(w, b):
    """Haiku's examples: a sum over a one-hot encoding."""
    return -jnp.sum(jax.nn.one_hot(b["label"], CLASSES) * jax.nn.log_softmax(logits(w, b)))


stopped = lax.stop_gradient


def adaptive(loss, other):
    return loss + other * stopped(loss / other)


def size_of(b):
    return len(b["y"])


def wide(w, b):
    """As many columns as the batch has examples: a microbatch reads the first of them."""
    return jnp.tanh(b["x"] @ jnp.tile(w, (1, N // CLASSES)))


def recurrent(w, b, part):
    """The errors of a network over time, whose state starts the same for all examples."""

    def cell(state, x):
        gate = jnp.sum(part(state @ w), axis=-1, keepdims=True)
        state = jnp.tanh(x + state + gate)
        return state, state

    start = jnp.zeros((size_of(b), FEATURES))
    return jnp.mean(lax.scan(cell, start, b["states"].swapaxes(0, 1))[1] ** 2, axis=(0, 2))


PARTS_OF_A_STATE = {
    "split": lambda x: jnp.split(x, 2, axis=-1)[0],
    "sort": lambda x: jnp.sort(x, axis=-1)[:, :2],
    "rev": lambda x: x[:, ::-1] * jnp.arange(1.0, 5.0)[None],
    "cumsum": lambda x: jnp.cumsum(x, axis=-1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 1))),
    "dynamic_slice": lambda x: lax.dynamic_slice_in_dim(x, 1, 2, axis=1),
    "fft": lambda x: jnp.fft.rfft(x).real,
}


EXACT_LOSSES = {
    **{
        f"recurrent, {name}": lambda w, b, part=part: jnp.mean(recurrent(w, b, part))
        for name, part in PARTS_OF_A_STATE.items()
    },
    **{f"optax {name}": lambda w, b, f=f: jnp.mean(f(w, b)) for name, f in OPTAX.items()},
    "keras": lambda w, b: over_batch_size(errors(w, b)),
    "keras, divide_no_nan": lambda w, b: divide_no_nan(jnp.sum(errors(w, b)), len(b["y"])),
    "keras, weights": lambda w, b: over_batch_size(errors(w, b) * b["mask"]),
    "rlax td": lambda w, b: jnp.mean(td(w, b)),
    "rlax policy gradient": lambda w, b: jnp.mean(policy_gradient(w, b)),
    "ppo": lambda w, b: ppo(w, b, normalize=False),
    "haiku": lambda w, b: nll(w, b) / len(b["label"]) + 1e-4 * 0.5 * jnp.sum(w**2),
    "maximum(n, 1)": lambda w, b: jnp.sum(errors(w, b)) / jnp.maximum(len(b["y"]), 1),
    "clip(n, 1)": lambda w, b: jnp.sum(errors(w, b)) / jnp.clip(len(b["y"]), 1),
    "n + 0": lambda w, b: jnp.sum(errors(w, b)) / (jnp.float64(len(b["y"])) + jnp.float64(0)),
    "where(n > 0)": lambda w, b: jnp.where(
        jnp.asarray(len(b["y"])) > 0, jnp.sum(errors(w, b)) / jnp.maximum(len(b["y"]), 1), 0.0
    ),
    "cond": lambda w, b: lax.cond(
        jnp.asarray(len(b["y"])) > 0, lambda s: s / len(b["y"]), lambda s: 0.0 * s,
        jnp.sum(errors(w, b))
    ),
    "prod(shape)": lambda w, b: jnp.sum(b["y"] * logits(w, b)) / jnp.prod(jnp.array(b["y"].shape)),
    "size of an axis": lambda w, b: jnp.sum(errors(w, b)) / jnp.array(b["y"].shape)[0],
    "nansum / n": lambda w, b: jnp.nansum(errors(w, b)) / len(b["y"]),
    "norm ** 2 / n": lambda w, b: jnp.linalg.norm(logits(w, b) - b["y"]) ** 2 / len(b["y"]),
    "norm ** 2.0 / n": lambda w, b: jnp.linalg.norm(logits(w, b) - b["y"]) ** 2.0 / len(b["y"]),
    "norm * norm / n": lambda w, b: (
        (lambda r: r * r)(jnp.linalg.norm(logits(w, b) - b["y"])) / len(b["y"])
    ),
    "einsum to a scalar": lambda w, b: jnp.einsum("bc,bc->", logits(w, b), b["y"]) / len(b["y"]),
    "einsum of rows": lambda w, b: jnp.einsum("b,b->", errors(w, b), b["mask"]) / len(b["y"]),
    "vdot": lambda w, b: jnp.vdot(logits(w, b) - b["y"], logits(w, b) - b["y"]) / b["y"].size,
    "average": lambda w, b: jnp.average(errors(w, b)),
    "Mean(mean * n, n)": lambda w, b: (
        lambda n: Mean(jnp.sum(errors(w, b) * b["mask"]) / n * n, n)
    )(jnp.sum(b["mask"])),
    "Mean((mean + penalty) * n, n)": lambda w, b: (
        lambda n: Mean((jnp.sum(errors(w, b) * b["mask"]) / n + jnp.sum(w**2)) * n, n)
    )(jnp.sum(b["mask"])),
    "Mean(mean * n, n) of a size": lambda w, b: (
        Mean(jnp.mean(errors(w, b)) * len(b["y"]), len(b["y"]))
    ),
    "Mean by maximum(n, 1)": lambda w, b: Mean(jnp.sum(errors(w, b)), jnp.maximum(len(b["y"]), 1)),
    "Mean of what is no NaN": lambda w, b: (
        lambda e: Mean(jnp.nansum(e), jnp.sum(~jnp.isnan(e)))
    )(jnp.where(b["mask"] > 0, errors(w, b), jnp.nan)),
    "a stopped total as a weight": lambda w, b: Mean(
        jnp.sum(errors(w, b) * stopped(errors(w, b))), stopped(jnp.sum(errors(w, b)))
    ),
    "straight through": lambda w, b: (
        jnp.mean((logits(w, b) + stopped(jnp.round(logits(w, b)) - logits(w, b))) ** 2)
    ),
    "numpy's places beside labels": lambda w, b: (
        -jnp.mean(logits(w, b)[np.arange(size_of(b)), b["label"]])
    ),
}  # fmt: skip
INEXACT_LOSSES = {
    "recurrent, sorted over the examples": lambda w, b: (
        jnp.mean(recurrent(w, b, lambda x: jnp.sort(x, axis=0)))
    ),
    "recurrent, the first examples' state": lambda w, b: jnp.mean(
        recurrent(w, b, lambda x: jnp.cumsum(x, axis=0))
    ),
    # two terms of one size, as VQGAN adapts them: the ratio cancels in the value, and not in the
    # gradient
    "an adaptive weight": lambda w, b: (
        adaptive(jnp.mean(errors(w, b)), jnp.mean(jnp.abs(logits(w, b))))
    ),
    "a stopped sum times a share": lambda w, b: (
        lambda e: jnp.sum(e**2 / jnp.sum(e)) * stopped(jnp.sum(e)) / len(e)
    )(errors(w, b)),
    "a stopped share times the sum": lambda w, b: (
        lambda e: jnp.sum(stopped(e / jnp.sum(e)) * e) * jnp.sum(e) / len(e)
    )(errors(w, b)),
    "the diagonal": lambda w, b: (
        -jnp.mean(wide(w, b)[jnp.arange(size_of(b)), jnp.arange(size_of(b))])
    ),
    "the diagonal written": lambda w, b: jnp.mean(
        wide(w, b).at[jnp.arange(size_of(b)), jnp.arange(size_of(b))].set(-9.0) ** 2
    ),
    # the same forms where a microbatch has another denominator, or other statistics, than the batch
    "optax ntxent": COUPLED["ntxent"],
    "optax dice of the batch": lambda w, b: (
        optax.losses.binary_dice_loss(logits(w, b), binary(b)).mean()
        + jnp.log(jnp.sum(jnp.exp(logits(w, b))))
    ),
    "keras, masked": lambda w, b: over_batch_size(
        errors(w, b) * b["mask"] * (b["mask"].size / (jnp.sum(b["mask"]) + 1e-7))
    ),
    "ppo, normalized advantages": lambda w, b: ppo(w, b, normalize=True),
    "token mean": lambda w, b: jnp.sum(errors(w, b) * b["mask"]) / jnp.sum(b["mask"]),
    "maximum(n, 3)": lambda w, b: jnp.sum(errors(w, b)) / jnp.maximum(len(b["y"]), 3),
    "where(n > 2)": lambda w, b: (
        jnp.sum(errors(w, b)) / jnp.where(jnp.asarray(len(b["y"])) > 2, len(b["y"]), 3)
    ),
    "cond of the size": lambda w, b: lax.cond(
        jnp.asarray(len(b["y"])) > 2, lambda s: s / len(b["y"]), lambda s: s, jnp.sum(errors(w, b))
    ),
    "prod(shape) - 1": lambda w, b: (
        jnp.sum(b["y"] * logits(w, b)) / (jnp.prod(jnp.array(b["y"].shape)) - 1)
    ),
    "nanmean of masked rows": lambda w, b: (
        jnp.nanmean(jnp.where(b["mask"] > 0, errors(w, b), jnp.nan))
    ),
    "norm / n": lambda w, b: jnp.linalg.norm(logits(w, b) - b["y"]) / len(b["y"]),
    "norm ** 3 / n": lambda w, b: jnp.linalg.norm(logits(w, b) - b["y"]) ** 3 / len(b["y"]),
    "root of a square": lambda w, b: jnp.sqrt(jnp.sum(logits(w, b) * b["y"]) ** 2) / len(b["y"]),
    "Mean(mean * n, m)": lambda w, b: Mean(
        jnp.sum(errors(w, b) * b["mask"]) / jnp.sum(b["mask"]) * len(b["y"]), len(b["y"])
    ),
    "Mean(mean * m, n)": lambda w, b: Mean(
        jnp.sum(errors(w, b) * b["mask"]) / jnp.sum(b["mask"]) * jnp.sum(b["mask"] + 1),
        jnp.sum(b["mask"])
    ),
    "Mean(mean * n * n, n)": lambda w, b: (
        lambda n: Mean(jnp.sum(errors(w, b) * b["mask"]) / n * n * n, n)
    )(jnp.sum(b["mask"])),
    "Sum(mean * n) and a penalty": lambda w, b: (
        lambda n: Sum(jnp.sum(errors(w, b) * b["mask"]) / n * n + jnp.sum(w**2))
    )(jnp.sum(b["mask"])),
}  # fmt: skip
LOSSES = {name: (loss, True) for name, loss in EXACT_LOSSES.items()}
LOSSES |= {name: (loss, False) for name, loss in INEXACT_LOSSES.items()}


@pytest.fixture(autouse=True)
def _as_the_libraries_are_used():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@INEXACT
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:The function convex_kl_divergence:DeprecationWarning")
def test_exact_is_what_the_numbers_say(name):
    loss, exact = LOSSES[name]
    report = jaxaccum.audit(loss, W, BATCH, num_microbatches=PARTS)
    assert report.exact == exact, report
    whole = jax.value_and_grad(jaxaccum.full_batch(loss))
    parts = jaxaccum.value_and_grad(loss, num_microbatches=PARTS, audit=None)
    actual, expected = jax.jit(lambda w, b: (parts(w, b), whole(w, b)))(W, BATCH)
    assert (normwise(actual, expected) < EXACT) == exact
    assert (
        {finding.kind for finding in report.findings} <= {"assumption"}
        if exact
        else report.findings
    )


def test_a_ratio_behind_a_recurrent_state_is_called_a_ratio():
    """No alarm about the state hides it."""

    def loss(w, b):
        each = recurrent(w, b, PARTS_OF_A_STATE["split"])
        return jnp.sum(each * b["mask"]) / jnp.sum(b["mask"])

    report = jaxaccum.audit(loss, W, BATCH, num_microbatches=PARTS)
    assert report.verdict == "RATIO"
    assert [finding.kind for finding in report.findings] == ["tag"]


EXTREMA = {
    "of two maxima": (lambda e, x: Max(jnp.maximum(jnp.max(e), jnp.max(x))), True),
    "root of a maximum": (lambda e, x: Max(jnp.sqrt(jnp.max(e))), True),
    "minus a minimum": (lambda e, x: Max(-jnp.min(x)), True),
    "of two extrema": (lambda e, x: Max(jnp.minimum(jnp.max(e), jnp.max(x))), False),
    "cosine of a maximum": (lambda e, x: Max(jnp.cos(jnp.max(e))), False),
    "minus a maximum": (lambda e, x: Max(-jnp.max(x)), False),
}


@pytest.mark.parametrize("name", EXTREMA)
def test_a_function_of_an_extremum_is_one_where_it_increases(name):
    largest, exact = EXTREMA[name]
    loss = lambda w, b: (jnp.mean(errors(w, b)), {"largest": largest(errors(w, b), b["x"])})
    report = jaxaccum.audit(loss, W, BATCH, num_microbatches=PARTS, has_aux=True)
    assert report.exact == exact, report
    step = lambda n: jaxaccum.value_and_grad(loss, has_aux=True, num_microbatches=n, audit=None)(
        W, BATCH
    )[0][1]
    assert (normwise(step(PARTS), step(1)) < EXACT) == exact


LOW = {
    "n - 1": (lambda w, x: jnp.sum((x @ w) ** 2) / (len(x) - 1), 256, False),
    "1 - 1 / n": (lambda w, x: jnp.mean((x @ w) ** 2) * (1 - 1 / len(x)), 64, False),
    "n": (lambda w, x: jnp.sum((x @ w) ** 2) / len(x), 128, True),
    "1 / n": (lambda w, x: jnp.sum((x @ w) ** 2) * (1 / len(x)), 96, True),
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", LOW)
def test_a_size_in_low_precision_is_not_taken_for_its_neighbour(name, dtype):
    loss, size, exact = LOW[name]
    assert (
        jaxaccum.audit(
            loss, jnp.ones(3, dtype), jnp.ones((size, 3), dtype), num_microbatches=2
        ).exact
        == exact
    )


@INEXACT
def test_an_exact_report_says_that_it_rests_on_numbers_that_are_not_nan():
    guarded = lambda value: jnp.where(jnp.isnan(value), 0.0, value)
    loss = lambda w, b: guarded(jnp.mean(errors(w, b)))
    (finding,) = jaxaccum.audit(loss, W, BATCH).findings
    assert finding.kind == "assumption"
    assert "NaN" in finding.note
    assert "after the call" in finding.fix
    missing = BATCH | {"y": BATCH["y"].at[3, 0].set(jnp.nan)}
    assert not jaxaccum.audit(loss, W, missing).exact  # each microbatch replaces its own NaN
    whole, parts = loss(W, missing), jaxaccum.microbatch(loss, num_microbatches=PARTS)(W, missing)
    assert normwise(parts, whole) > EXACT
