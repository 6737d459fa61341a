"""Parts of the batch that a reshape cuts by place: exact where all are treated alike, by the
numbers."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxaccum
import jaxaccum.linen
from jaxaccum import Mean, Sum
from tests.audit.partitions import BATCH, W, nll, off
from tests.support import jitted
from tests.support.helpers import EXACT, normwise

THREE = jnp.asarray([1.0, 2.0, 3.0])


def parts(batch):
    """Three parts, whatever the size of the batch."""
    return jax.tree.map(lambda x: x.reshape(3, -1, *x.shape[1:]), batch)


def each(w, batch):
    """The losses of all examples, three parts after one another."""
    return lax.map(lambda rows: nll(w, rows), parts(batch))


def added(add, start=0.0, wrap=lambda f: f):
    """A loss that a loop over the parts adds up; `add` makes the new state of the old one."""
    step = lambda w: lambda state, rows: (add(w, state, rows), None)
    return lambda w, batch: lax.scan(wrap(step(w)), start, parts(batch))[0]


def of_totals(w, state, rows):
    return state[0] + jnp.sum(nll(w, rows) * rows["mask"]), state[1] + jnp.sum(rows["mask"])


total = added(lambda w, state, rows: state + jnp.sum(nll(w, rows)))
remat = added(lambda w, state, rows: state + jnp.sum(nll(w, rows)), wrap=jax.checkpoint)


def table(losses):
    """A number for each part."""
    return jnp.broadcast_to(THREE[:, None], losses.shape)


def thrice(w, rows):
    """As many entries as the batch has examples, of a third of them."""
    return lax.map(lambda factor: factor * nll(w, rows), THREE).reshape(-1)


def halves(number):
    """The two halves of its bits, which are different numbers."""
    return lax.bitcast_convert_type(number, jnp.uint32).astype(float)


def centred(losses):
    return losses - lax.pmean(jnp.mean(losses), "microbatch")


ALIKE = {
    "a total": lambda w, b: Sum(total(w, b)),
    "a mean": lambda w, b: total(w, b) / len(b["x"]),
    "checkpointed": lambda w, b: remat(w, b) / len(b["x"]),
    "a total and its weight": lambda w, b: Mean(*added(of_totals, (0.0, 0.0))(w, b)),
    "a mean of means": lambda w, b: (
        added(lambda w, state, rows: state + jnp.mean(nll(w, rows)))(w, b) / 3
    ),
    "a mean of all": lambda w, b: jnp.mean(each(w, b)),
    "merged": lambda w, b: Mean(jnp.sum(each(w, b).reshape(-1) * b["mask"]), jnp.sum(b["mask"])),
    "masked": lambda w, b: Mean(jnp.sum(each(w, b) * b["mask"].reshape(3, -1)), jnp.sum(b["mask"])),
    "named": lambda w, b: jnp.mean(checkpoint_name(each(w, b), "losses")),
    "in a branch": lambda w, b: jnp.mean(
        lax.cond(jnp.sum(w) > 0, lambda losses: 2 * losses, jnp.zeros_like, each(w, b))
    ),
    "in groups of three": lambda w, b: jnp.mean(each(w, b).reshape(-1, 3) * THREE[None]),
}
UNLIKE = {
    "a factor for each": lambda w, b: jnp.mean(each(w, b) * THREE[:, None]),
    "a weight for each": lambda w, b: jnp.mean(
        lax.map(lambda rows: nll(w * rows[1], rows[0]), (parts(b), THREE))
    ),
    "a matrix for each": lambda w, b: jnp.mean(
        jnp.einsum("knd,kde->kne", parts(b["x"]), jnp.stack([w, 2 * w, 3 * w])) ** 2
    ),
    "a count": lambda w, b: (
        lax.fori_loop(
            0, 3, lambda i, state: state + (i + 1.0) * jnp.sum(each(w, b)[i]), jnp.float64(0)
        )
        / len(b["x"])
    ),
    "a decay": added(lambda w, state, rows: 0.9 * state + jnp.sum(nll(w, rows)) / len(rows["x"])),
    "a state beside": lambda w, b: (
        added(
            lambda w, state, rows: (state[0] / 2, state[1] + state[0] * jnp.sum(nll(w, rows))),
            (1.0, 0.0),
        )(w, b)[1]
        / len(b["x"])
    ),
    "squares": lambda w, b: (
        added(lambda w, state, rows: state + jnp.sum(nll(w, rows)) ** 2)(w, b) / len(b["x"])
    ),
    "ratios": added(
        lambda w, state, rows: state + jnp.sum(nll(w, rows) * rows["mask"]) / jnp.sum(rows["mask"])
    ),
    "the largest": added(lambda w, state, rows: jnp.maximum(state, jnp.mean(nll(w, rows)))),
    "the first": lambda w, b: jnp.mean(each(w, b)[0]),
    "one another": lambda w, b: jnp.mean(each(w, b) * each(w, b)[::-1]),
    "the best of the parts": lambda w, b: jnp.mean(jnp.max(each(w, b), axis=0)),
    "sums so far": lambda w, b: jnp.mean(jnp.cumsum(each(w, b), axis=0)),
    "totals so far": lambda w, b: (
        jnp.sum(lax.scan(lambda t, rows: (t + jnp.sum(nll(w, rows)), t), 0.0, parts(b))[1])
        / len(b["x"])
    ),
    "totals weighed": lambda w, b: jnp.sum(
        lax.map(lambda rows: jnp.mean(nll(w, rows)), parts(b)) * THREE
    ),
    "rows added up": lambda w, b: (
        jnp.sum(
            added(lambda w, state, rows: state + nll(w, rows), jnp.zeros(len(b["y"]) // 3))(w, b)
            ** 2
        )
        / len(b["x"])
    ),
    "a table in a branch": lambda w, b: jnp.mean(
        each(w, b) * lax.cond(jnp.sum(w) > -1e9, table, lambda losses: losses, each(w, b))
    ),
    "a table at first": lambda w, b: jnp.mean(
        each(w, b) * lax.scan(lambda _, x: (each(w, b), x), table(each(w, b)), None, length=0)[0]
    ),
    "a table carried": lambda w, b: (
        lax.scan(
            lambda state, _: ((each(w, b), state[1] + jnp.sum(state[0] * each(w, b))), None),
            (table(each(w, b)), 0.0),
            None,
            length=2,
        )[0][1]
        / len(b["x"])
    ),
    "a statistic of parts": lambda w, b: (
        added(lambda w, state, rows: state + jnp.sum(centred(nll(w, rows)) ** 2))(w, b)
        / len(b["x"])
    ),
    "statistics for each": lambda w, b: (
        jnp.sum(
            lax.map(lambda rows: lax.pmean(jnp.mean(nll(w, rows)), "microbatch"), parts(b)) * THREE
        )
        + jnp.mean(nll(w, b))
    ),
    "parts of groups": lambda w, b: jnp.mean(
        nll(w, b).reshape(-1, 2).reshape(3, -1) * THREE[:, None]
    ),
    "columns first": lambda w, b: jnp.mean(nll(w, b) * jnp.ravel(each(w, b), order="F")),
    "columns of a batch first": lambda w, b: jnp.mean(
        jnp.ravel(b["x"] @ w, order="F") * jnp.tanh(jnp.ravel(b["x"] @ w))
    ),
    "stacked in a step": lambda w, b: (
        added(lambda w, state, rows: state + jnp.sum(thrice(w, rows) * nll(w, b)))(w, b)
        / len(b["x"])
    ),
    "bits of a number": lambda w, b: jnp.mean(
        nll(w, b).reshape(2, -1) * halves(w[0, 0])[:, None] / 2.0**32
    ),
    "in another order": lambda w, b: jnp.mean(each(w, b).T.reshape(-1) * b["mask"]),
    "places in a part": lambda w, b: jnp.mean(
        lax.map(lambda rows: nll(w, rows) * jnp.arange(1.0, 1 + len(rows["y"])), parts(b))
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_parts_that_are_treated_alike_are_exact(name):
    report = jaxaccum.audit(ALIKE[name], W, BATCH)
    assert report.exact, report
    assert off(ALIKE[name]) < EXACT


@pytest.mark.parametrize("name", UNLIKE)
def test_what_tells_parts_apart_is_found(name):
    assert not jaxaccum.audit(UNLIKE[name], W, BATCH).exact
    assert off(UNLIKE[name]) > 1e-3


def test_a_strided_split_may_take_neighbours_together_and_add_them_up():
    """Chunks of two neighbours hold other examples where microbatches are strided."""

    def chunks(w, b, of_two=lambda x: x):
        twos = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), b)
        return lax.map(lambda rows: of_two(nll(w, rows)), twos)

    options = {"num_microbatches": 2, "split": "strided", "audit": "raise"}
    alike = lambda w, b: jnp.mean(chunks(w, b))
    ours = jax.jit(jaxaccum.grad(alike, **options))(W, BATCH)
    assert normwise(ours, jitted.grad(alike)(W, BATCH)) < EXACT
    apart = lambda w, b: jnp.mean(chunks(w, b, lambda losses: losses - losses[::-1]) ** 2)
    with pytest.raises(jaxaccum.InexactError):
        jaxaccum.grad(apart, **options)(W, BATCH)


def test_as_many_totals_as_the_batch_is_long_are_not_totals_of_the_batch():
    """The loop has one step for each two examples, and a total of two is none of the batch."""

    def squared(w, b):
        twos = jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), b)
        step = lambda state, rows: (state + jnp.sum(nll(w, rows)), None)
        return lax.scan(step, 0.0, twos)[0] / len(b["x"]) ** 2

    options = {"num_microbatches": 2, "split": "strided"}
    with pytest.raises(jaxaccum.InexactError):
        jaxaccum.grad(squared, **options, audit="raise")(W, BATCH)
    ours = jax.jit(jaxaccum.grad(squared, **options, audit=None))(W, BATCH)
    assert normwise(ours, jitted.grad(squared)(W, BATCH)) > 1e-3


@pytest.mark.parametrize("name", ["microbatch", ("microbatch",)])
def test_our_batch_norm_of_a_chunk_has_no_statistics_of_the_batch(name):
    norm = jaxaccum.linen.BatchNorm(
        use_running_average=False, axis_name=name, param_dtype=jnp.float64
    )
    variables = norm.init(jax.random.key(0), BATCH["x"] @ W)

    def chunked(w, b):
        normalized = lambda rows: norm.apply(variables, rows["x"] @ w, mutable=["batch_stats"])[0]
        step = lambda state, rows: (state + jnp.sum(jnp.tanh(normalized(rows))), None)
        return lax.scan(step, 0.0, parts(b))[0] / len(b["x"])

    assert not jaxaccum.audit(chunked, W, BATCH).exact
    assert off(chunked) > 1e-3
