"""The losses whose examples interact, as data parallelism writes them, against their definitions on
the full batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxaccum as ja
from tests.support import jitted
from tests.support.covering import covering
from tests.support.helpers import EXACT, UNDECIDED, data, mean_of_means, normwise, parts_of

pytestmark = pytest.mark.filterwarnings("ignore:memory='min' takes")

AXIS = "microbatch"
EXAMPLES = 8
BATCH = {
    "image": data(EXAMPLES, 5) * jnp.arange(1.0, 9.0)[:, None] / 3,
    "text": data(EXAMPLES, 5, seed=1),
    "action": jnp.arange(EXAMPLES) % 3,
    "reward": data(EXAMPLES, seed=2) * jnp.arange(1.0, 9.0),
    "mask": jnp.arange(4)[None, :] < 1 + (jnp.arange(EXAMPLES) * 3 % 4)[:, None],
    "tokens": data(EXAMPLES, 4, 5, seed=3),
}
PARAMS = {
    "image": data(5, 4, seed=4),
    "text": data(5, 4, seed=5),
    "out": data(4, 3, seed=6),
    "router": data(5, 3, seed=7),
    "experts": data(3, 5, 2, seed=8),
    "scale": jnp.float64(1.5),
    "bias": jnp.float64(-0.5),
}


def gather(x):
    return lax.all_gather(x, AXIS, tiled=True)


def mean(x):
    return lax.pmean(jnp.mean(x, axis=0), AXIS)


def pair(params, batch):
    return jnp.tanh(batch["image"] @ params["image"]), jnp.tanh(batch["text"] @ params["text"])


def directions(params, batch):
    return [z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in pair(params, batch)]


def own_rows(logits, first=0):
    """Cross entropy of each row, whose own column is `first` plus its number."""
    rows = jnp.arange(len(logits))
    return -jax.nn.log_softmax(logits)[rows, first + rows]


def off_diagonal(matrix):
    return jnp.sum(matrix**2) - jnp.sum(jnp.diag(matrix) ** 2)


def clip(params, batch):
    a, b = directions(params, batch)
    logits = jnp.exp(params["scale"]) * a @ b.T
    return (jnp.mean(own_rows(logits)) + jnp.mean(own_rows(logits.T))) / 2


def clip_gathered(params, batch):
    """Every microbatch computes the whole loss, of what all have sent."""
    a, b = map(gather, directions(params, batch))
    logits = jnp.exp(params["scale"]) * a @ b.T
    return (jnp.mean(own_rows(logits)) + jnp.mean(own_rows(logits.T))) / 2


def clip_local(params, batch):
    """Each microbatch scores its own rows against all of the other side."""
    a, b = directions(params, batch)
    first = (lax.axis_index(AXIS) * len(a)).astype(int)
    scale = jnp.exp(params["scale"])
    of = lambda own, other: jnp.mean(own_rows(scale * own @ gather(other).T, first))
    return (of(a, b) + of(b, a)) / 2


def sigmoid_loss(params, a, b, same):
    logits = jnp.exp(params["scale"]) * a @ b.T + params["bias"]
    return -jnp.sum(jax.nn.log_sigmoid(jnp.where(same, 1.0, -1.0) * logits))


def siglip(params, batch):
    a, b = directions(params, batch)
    return sigmoid_loss(params, a, b, jnp.eye(len(a), dtype=bool)) / len(a)


def siglip_in_a_ring(params, batch):
    """The texts go around, one neighbour at a time; no microbatch sees two blocks at once."""
    a, b = directions(params, batch)
    n, total = lax.axis_size(AXIS), 0.0
    for k in range(n):
        moved = lax.ppermute(b, AXIS, [(i, (i + k) % n) for i in range(n)])
        total += sigmoid_loss(params, a, moved, jnp.eye(len(a), dtype=bool) & (k == 0))
    return ja.Mean(total, len(a))


def vicreg_of(a, b, average):
    loss = average(jnp.sum((a - b) ** 2, axis=1))
    for z in (a, b):
        apart = z - average(z)[None]
        covariance = average(apart[:, :, None] * apart[:, None, :])
        deviation = jnp.sqrt(jnp.diag(covariance) + 1e-4)
        loss += jnp.mean(jax.nn.relu(1 - deviation)) + off_diagonal(covariance)
    return loss


def vicreg(params, batch):
    return vicreg_of(*pair(params, batch), lambda x: jnp.mean(x, axis=0))


def vicreg_over_microbatches(params, batch):
    return vicreg_of(*pair(params, batch), mean)


def barlow_of(a, b, average):
    a, b = (
        (z - average(z)[None]) / jnp.sqrt(average((z - average(z)[None]) ** 2) + 1e-5)[None]
        for z in (a, b)
    )
    correlation = average(a[:, :, None] * b[:, None, :])
    return jnp.sum((jnp.diag(correlation) - 1) ** 2) + 5e-3 * off_diagonal(correlation)


def barlow_twins(params, batch):
    return barlow_of(*pair(params, batch), lambda x: jnp.mean(x, axis=0))


def barlow_over_microbatches(params, batch):
    return barlow_of(*pair(params, batch), mean)


def moe_of(params, batch, average):
    """A mixture of three experts, the first alone active, and the balance loss of Switch."""
    probability = jax.nn.softmax(batch["image"] @ params["router"])
    chosen = jax.nn.one_hot(jnp.argmax(probability, axis=1), 3, dtype=jnp.float64)
    outputs = jnp.einsum("bi,eio,be->bo", batch["image"], params["experts"], probability * chosen)
    return outputs, 3 * jnp.sum(average(probability) * average(chosen))


def moe(params, batch):
    outputs, balance = moe_of(params, batch, lambda x: jnp.mean(x, axis=0))
    return jnp.mean(outputs**2) + 10 * balance


def moe_over_microbatches(params, batch):
    """Beside a term that has a denominator of its own."""
    outputs, balance = moe_of(params, batch, mean)
    return {"task": ja.Mean(jnp.sum(outputs**2), outputs.size), "balance": 10 * balance}


def ratio_of(params, batch, total):
    """A ratio whose weights depend on the parameters, and a nonlinear function of it."""
    errors = jnp.mean(jnp.tanh(batch["tokens"] @ params["image"]) ** 2, axis=2)
    weights = jnp.where(batch["mask"], jax.nn.sigmoid(batch["tokens"] @ params["image"][:, 0]), 0.0)
    return jnp.exp(total(jnp.sum(weights * errors)) / total(jnp.sum(weights)))


def token_ratio(params, batch):
    return ratio_of(params, batch, lambda x: x)


def token_ratio_over_microbatches(params, batch):
    return ratio_of(params, batch, lambda x: lax.psum(x, AXIS))


def policy_of(params, batch, average):
    """PPO's clipped objective: advantages normalized over the batch, of a critic that shares the
    policy's features."""
    features = jnp.tanh(batch["image"] @ params["image"])
    advantage = batch["reward"] - features @ params["out"][:, 0]
    deviation = jnp.sqrt(average((advantage - average(advantage)) ** 2))
    normalized = (advantage - average(advantage)) / (deviation + 1e-8)
    log_probability = jax.nn.log_softmax(features @ params["out"])[
        jnp.arange(len(features)), batch["action"]
    ]
    ratio = jnp.exp(log_probability + jnp.log(3.0))
    return -jnp.mean(jnp.minimum(ratio * normalized, jnp.clip(ratio, 0.8, 1.2) * normalized))


def policy(params, batch):
    return policy_of(params, batch, jnp.mean)


def policy_over_microbatches(params, batch):
    return policy_of(params, batch, lambda x: lax.pmean(jnp.mean(x), AXIS))


class Case(NamedTuple):
    fun: Any
    definition: Any


CASES = [
    Case(clip_gathered, clip),
    Case(clip_local, clip),
    Case(siglip_in_a_ring, siglip),
    Case(vicreg_over_microbatches, vicreg),
    Case(barlow_over_microbatches, barlow_twins),
    Case(moe_over_microbatches, moe),
    Case(token_ratio_over_microbatches, token_ratio),
    Case(policy_over_microbatches, policy),
]
BY_NAME = {case.fun.__name__: case for case in CASES}
WAYS = [(2, None), (2, "min"), (4, "store"), (4, 2048), (8, "min"), (8, None)]
IN_TWO_WAYS = covering(2 * list(BY_NAME), WAYS)


@UNDECIDED
@pytest.mark.parametrize(("name", "way"), IN_TWO_WAYS, ids=str)
def test_value_and_gradient_are_those_of_the_definition(name, way):
    case, (n, memory) = BY_NAME[name], way
    step = ja.value_and_grad(case.fun, num_microbatches=n, memory=memory)
    expected = jitted.value_and_grad(case.definition)(PARAMS, BATCH)
    assert normwise(jax.jit(step)(PARAMS, BATCH), expected) < EXACT


@pytest.mark.parametrize(("name", "n"), covering(list(BY_NAME), [2, 4]))
def test_naive_accumulation_is_far_off(name, n):
    case = BY_NAME[name]
    naive = mean_of_means(case.definition, PARAMS, parts_of(BATCH, [EXAMPLES // n] * n))
    assert normwise(naive, jitted.grad(case.definition)(PARAMS, BATCH)) > 0.02
