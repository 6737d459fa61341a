"""Losses that the audit once called exact, and whose numbers depend on the partition: of the order
of gathered rows, of weights of another step, of backward passes, and of places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum import Concat, Max, Mean, Sum
from tests.audit.partitions import BATCH, W, gathered, is_called_exact, nll, off, own
from tests.audit.test_parts_alike import THREE, each
from tests.support.helpers import EXACT, data

TABLE = data(24, seed=11)
SIGNS = np.asarray([0.0, -0.0, 0.0])
FIRST = lax.ScatterDimensionNumbers(
    update_window_dims=(0,), inserted_window_dims=(), scatter_dims_to_operand_dims=()
)


def with_cotangent(of):
    """The identity, whose backward pass gives another cotangent."""

    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, g: (of(g),))
    return identity


a_table = with_cotangent(lambda g: jnp.broadcast_to(THREE[:, None], g.shape))
its_place = with_cotangent(lambda g: jnp.arange(len(g)).astype(g.dtype))


def weight(w, b):
    return jnp.sum(jax.nn.sigmoid(b["x"] @ w))


def divided(b, t):
    return jnp.sum(jnp.exp(b["x"][:, 0] * t))


def of_the_step_before(w, b):
    """Each step divides by a total, and the next one multiplies by another."""

    def step(state, t):
        ratio, total = state
        return (jnp.sum(nll(w, b)) / divided(b, t), total + ratio * divided(b, t)), None

    return Sum(lax.scan(step, (0.0, 0.0), THREE)[0][1])


def of_a_total_carried(w, b):
    def step(state, t):
        weight, total = state
        new = divided(b, t)
        return (new, total + jnp.sum(nll(w, b)) / weight * new), None

    return Sum(lax.scan(step, (jnp.sum(b["mask"]), 0.0), THREE)[0][1])


def in_a_for_loop(w, b):
    def step(i, state):
        ratio, total = state
        new = divided(b, THREE[i])
        return jnp.sum(nll(w, b)) / new, total + ratio * new

    return Sum(lax.fori_loop(0, 3, step, (0.0, 0.0))[1])


def but_the_last(b):
    """1 for each example but the last."""
    n = len(b["y"])
    return jnp.zeros(n + 1).at[jnp.arange(n)].set(1.0)[1:]


def the_first_of(array, n):
    """The array with ones at the first n places."""
    return lax.scatter(array, jnp.zeros((0,), jnp.int32), jnp.ones(n), FIRST)


def twice(w, b):
    """Two entries for each example."""
    return jnp.stack([nll(w, b), 2 * nll(w, b)], 1).reshape(-1)


def moved_sign(w, b):
    """The sign of a number that changes with the batch's size, less a constant."""
    return jnp.mean(nll(w, b) * jnp.sign(nll(w, b) / len(b["y"]) - 0.06))


UNLIKE = {
    "a sign of what is moved": moved_sign,
    "a cotangent for each part": lambda w, b: Sum(jnp.sum(a_table(each(w, b)))),
    "a cotangent that is a place": lambda w, b: Sum(jnp.sum(its_place(nll(w, b)))),
    "a weight without its gradient": lambda w, b: Sum(
        jnp.sum(nll(w, b)) * lax.stop_gradient(1 / weight(w, b)) * weight(w, b)
    ),
    "a total of the step before": of_the_step_before,
    "a total that is carried": of_a_total_carried,
    "a total of the step before, counted": in_a_for_loop,
    "a place left out": lambda w, b: Sum(jnp.sum(nll(w, b) * but_the_last(b))),
    "the first places": lambda w, b: Sum(
        jnp.sum(twice(w, b) * the_first_of(jnp.zeros(2 * len(b["y"])), len(b["y"])))
    ),
    "the first rows": lambda w, b: Sum(jnp.sum(the_first_of(twice(w, b), len(b["y"])))),
    "an integer that wraps": lambda w, b: Mean(
        jnp.sum(nll(w, b)), jnp.sum(b["y"] * 20).astype(jnp.int8).astype(float)
    ),
    "a truth that is counted": lambda w, b: Mean(
        jnp.sum(nll(w, b)),
        lax.scan(
            lambda c, t: (c.astype(bool).astype(int) + jnp.sum(b["x"][:, 0] > t), None),
            0,
            THREE / 4,
        )[0].astype(float),
    ),
    "zeros of two signs": lambda w, b: jnp.mean(jnp.copysign(each(w, b), SIGNS[:, None])),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_depends_on_the_partition_is_found(name):
    assert not jaxaccum.audit(UNLIKE[name], W, BATCH, num_microbatches=2).exact
    assert off(UNLIKE[name]) > 1e-3


def adversarial(size):
    """The loss at examples that a step along the sign of a gradient has moved."""

    def loss(w, b):
        inner = lambda x: size(nll(w, {**b, "x": x}))
        step = jnp.sign(lax.stop_gradient(jax.grad(inner)(b["x"])))
        return jnp.mean(nll(w, {**b, "x": b["x"] + 0.1 * step}))

    return loss


ALIKE = {
    "a sign of a mean's gradient": adversarial(jnp.mean),
    "every place written": lambda w, b: Sum(
        jnp.sum(nll(w, b) * jnp.zeros(len(b["y"])).at[jnp.arange(len(b["y"]))].set(1.0))
    ),
    "a count of 32 bits": lambda w, b: Mean(
        jnp.sum(nll(w, b)), jnp.sum(b["y"]).astype(jnp.int32).astype(float)
    ),
    "a weight without any gradient": lambda w, b: Mean(
        jnp.sum(nll(w, b)), lax.stop_gradient(weight(w, b))
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_their_neighbours_are_exact(name):
    assert jaxaccum.audit(ALIKE[name], W, BATCH, num_microbatches=2).exact
    assert off(ALIKE[name]) < EXACT


@pytest.mark.parametrize(
    "aux",
    [
        lambda b: Concat(jnp.arange(len(b["y"]))),
        lambda b: Max(lax.axis_index("microbatch")),
    ],
)
def test_a_place_is_no_output(aux):
    loss = lambda w, b: (jnp.mean(nll(w, b)), aux(b))
    assert not jaxaccum.audit(loss, W, BATCH, num_microbatches=2, has_aux=True).exact
    (_, ours), _ = jaxaccum.value_and_grad(loss, num_microbatches=2, has_aux=True, audit=None)(
        W, BATCH
    )
    (_, whole), _ = jaxaccum.value_and_grad(loss, num_microbatches=1, has_aux=True)(W, BATCH)
    assert (jnp.asarray(ours) != jnp.asarray(whole)).any()


# -- the order of the microbatches -----------------------------------------------------------------


def contrastive(w, b):
    logits = b["x"] @ w @ gathered(w, b).T
    picked = jnp.take_along_axis(logits, own(b)[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, 1) - picked)


def decayed(w, b):
    return lax.scan(lambda c, row: (0.5 * c + row, None), jnp.zeros(4), gathered(w, b))[0]


OF_PLACES = {
    "a table at its place": lambda w, b: Sum(jnp.sum(nll(w, b) * TABLE[own(b)])),
    "a function of its place": lambda w, b: Sum(jnp.sum(nll(w, b) * jnp.cos(own(b).astype(float)))),
    "a table for the gathered": lambda w, b: jnp.mean(
        b["x"] @ w * jnp.mean(gathered(w, b) * TABLE[:, None])
    ),
    "one of the gathered": lambda w, b: jnp.mean(b["x"] @ w * gathered(w, b)[1][None]),
    "a table for a branch of the gathered": lambda w, b: jnp.mean(
        b["x"]
        @ w
        * jnp.mean(
            lax.cond(jnp.sum(w) > -1e9, lambda z: 2 * z, jnp.zeros_like, gathered(w, b))
            * TABLE[:, None]
        )
    ),
    "a loop over the gathered": lambda w, b: jnp.mean(b["x"] @ w * decayed(w, b)[None]),
}
OF_NO_PLACE = {
    "contrastive": contrastive,
    "pairs": lambda w, b: jnp.mean(jnp.sum(b["x"] @ w * gathered(w, b)[own(b)], 1)),
    "merged": lambda w, b: jnp.mean(
        b["x"] @ w @ lax.all_gather(b["x"] @ w, "microbatch").reshape(-1, 4).T
    ),
    "squared": lambda w, b: jnp.mean(b["x"] @ w * jnp.sum(gathered(w, b) ** 2, 0)[None]),
    "hinge": lambda w, b: jnp.mean(jax.nn.relu(1 + b["x"] @ w @ gathered(w, b).T)),
    "rectified": lambda w, b: jnp.mean(
        b["x"] @ w * jnp.sum(jax.nn.relu(gathered(w, b)), axis=0)[None]
    ),
}


@pytest.mark.parametrize("split", ["contiguous", "strided"])
@pytest.mark.parametrize("name", OF_NO_PLACE)
def test_what_asks_for_no_order_is_exact_in_any(name, split):
    loss = OF_NO_PLACE[name]
    assert is_called_exact(loss, split=split)
    assert off(loss, split=split) < EXACT


@pytest.mark.parametrize("name", OF_PLACES)
def test_a_strided_split_has_another_order(name):
    loss = OF_PLACES[name]
    assert is_called_exact(loss, split="contiguous")
    assert off(loss) < EXACT
    assert not is_called_exact(loss, split="strided")
    assert off(loss, split="strided") > 1e-3


def test_rows_in_the_order_of_the_microbatches_are_no_output():
    loss = lambda w, b: (jnp.mean(nll(w, b)), Concat(b["x"] @ w @ gathered(w, b).T))
    assert is_called_exact(loss, split="contiguous", has_aux=True)
    assert not is_called_exact(loss, split="strided", has_aux=True)


# -- what is known of another call, or another try -------------------------------------------------


def test_a_long_constant_that_changes_is_audited_anew():
    batch = {"x": data(400, 3, seed=1), "y": jnp.arange(400) % 4}
    weights = [np.ones, lambda n: np.linspace(0, 1, n)]
    made = weights[0]
    loss = lambda w, b: jnp.mean(nll(w, b) * made(len(b["y"])))
    step = jaxaccum.grad(loss, num_microbatches=2, audit="raise")
    step(W, batch)
    made = weights[1]
    with pytest.raises(jaxaccum.InexactError):
        step(W, batch)


def test_a_gathered_parameter_is_told_of_where_examples_come_in_pairs():
    """Where JAX tracks no types, and the audit tries groups of examples."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))

    def loss(w, x):
        rows = jnp.sum(jnp.tanh(x @ lax.all_gather(w, "data", axis=0, tiled=True)) ** 2, 1)
        return Sum(jnp.sum(jnp.max(rows.reshape(-1, 2), 1)))

    step = jaxaccum.grad(loss, num_microbatches=2, mesh_axes="data", audit="raise")
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P(), check_vma=False
    )
    with pytest.raises(jaxaccum.InexactError, match="gathered"):
        sharded(data(4, 3), data(16, 4, seed=1))


@pytest.mark.parametrize(
    "of_one",
    [
        lambda b: b if len(b["y"]) > 1 else {**b, "y": (b["y"] + 1) % 4},
        lambda b: b if len(b["y"]) > 1 else {**b, "y": jnp.minimum(b["y"], 1)},
        lambda b: b if len(b["y"]) > 1 else {**b, "y": jnp.zeros_like(b["y"])},
    ],
)
def test_integers_of_a_microbatch_of_one_are_compared(of_one):
    loss = lambda w, b: jnp.mean(nll(w, of_one(b)))
    assert not jaxaccum.audit(loss, W, BATCH, num_microbatches=24).exact
    assert off(loss, num_microbatches=24) > 1e-3
    assert jaxaccum.audit(lambda w, b: jnp.mean(nll(w, b)), W, BATCH, num_microbatches=24).exact


def test_labels_of_one_position_are_the_same_for_a_microbatch_of_one():
    """JAX drops their axis of length 1 where there is one example, by a reshape of integers."""

    def loss(w, b):
        logs = jax.nn.log_softmax(b["x"] @ w)[:, None]
        return -jnp.mean(jnp.take_along_axis(logs, b["y"][:, None, None], axis=-1))

    assert jaxaccum.audit(loss, W, BATCH, num_microbatches=24).exact
    assert off(loss, num_microbatches=24) < EXACT
