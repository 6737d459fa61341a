"""Groups of adjacent examples, such as pairs or completions of one prompt, and microbatches of one
example."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxaccum
import jaxaccum.linen
from jaxaccum import Concat, InexactWarning, Mean
from tests.support import jitted
from tests.support.helpers import EXACT, data, normwise, same

W = data(3, 5)
BATCH = {"x": data(16, 3, seed=1), "label": jnp.arange(16) % 5, "reward": data(16, seed=2)}
BATCH["mask"] = jnp.arange(16.0) % 3


def nll(w, b):
    log_probs = jax.nn.log_softmax(b["x"] @ w)
    return jnp.take_along_axis(log_probs, b["label"][:, None], 1)[:, 0]


def advantages(w, b):
    groups = b["reward"].reshape(-1, 4)
    own = groups - jnp.mean(groups, axis=1, keepdims=True)
    return jnp.mean((own / (jnp.std(groups, axis=1, keepdims=True) + 1e-4)).reshape(-1) * nll(w, b))


def masked_advantages(w, b):
    own = b["reward"].reshape(-1, 2)
    own = (own - jnp.mean(own, axis=1, keepdims=True)).reshape(-1)
    return Mean(jnp.sum(own * nll(w, b) * b["mask"]), jnp.sum(b["mask"]))


def pairs_side_by_side(w, b):
    each = nll(w, b)
    return -jnp.mean(jax.nn.log_sigmoid(each[0::2] - each[1::2]))


def pairs_as_rows(w, b):
    each = nll(w, b).reshape(-1, 2)
    return -jnp.mean(jax.nn.log_sigmoid(each[:, 0] - each[:, 1]))


def contrasted_in_groups(w, b):
    z = jnp.tanh(b["x"] @ w).reshape(-1, 4, 5)
    return jnp.mean(jnp.exp(jnp.einsum("gid,gjd->gij", z, z)))


def halves(w, b):
    each, half = nll(w, b), len(b["x"]) // 2
    return -jnp.mean(jax.nn.log_sigmoid(each[:half] - each[half:]))


def over_groups(w, b):
    own = b["reward"].reshape(-1, 4)
    return jnp.mean((own - jnp.mean(own, axis=0, keepdims=True)).reshape(-1) * nll(w, b))


def every_second(w, b):
    return jnp.mean(nll(w, b)[::2]) * jnp.mean(nll(w, b)[1::2])


def thirds_of_pairs(w, b):
    """One row of each three, in groups of two."""
    own = jnp.tanh(b["x"] @ w).reshape(-1, 2, 5).mean(1)
    return jnp.mean(jnp.sin(own[: len(own) // 2] + own[len(own) // 2 :]))


LOSSES = {
    # the loss: the size of its groups, or 0 where no microbatches are right
    "advantages": (advantages, 4),
    "masked advantages": (masked_advantages, 2),
    "pairs side by side": (pairs_side_by_side, 2),
    "pairs as rows": (pairs_as_rows, 2),
    "contrasted in groups": (contrasted_in_groups, 4),
    "halves": (halves, 0),
    "over groups": (over_groups, 0),
    "every second": (every_second, 0),
    "thirds of pairs": (thirds_of_pairs, 0),
}
SPLITS = ["contiguous", "strided"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", LOSSES)
def test_what_the_audit_says_is_what_the_numbers_say(name, split):
    loss, group = LOSSES[name]
    expected = jitted.grad(lambda w: jaxaccum.full_batch(loss)(w, BATCH))(W)
    for number in (2, 4):
        whole_groups = bool(group) and split == "contiguous" and 16 // number % group == 0
        options = {"num_microbatches": number, "split": split}
        silent = jaxaccum.grad(loss, audit=None, **options)(W, BATCH)
        kept_by_chance = (
            loss is halves and split == "strided"
        )  # i and i + 8 stay together; the audit is careful
        assert (normwise(silent, expected) <= EXACT) == (whole_groups or kept_by_chance)
        if whole_groups:
            jaxaccum.grad(loss, audit="raise", **options)(W, BATCH)
        else:
            with pytest.warns(InexactWarning, match="is not exact over microbatches"):
                jaxaccum.grad(loss, **options)(W, BATCH)


def test_the_report_says_what_it_rests_on():
    report = jaxaccum.audit(advantages, W, BATCH, num_microbatches=4)
    assert report.exact
    (finding,) = report.findings
    assert finding.kind == "assumption"
    assert "groups of 4 adjacent ones" in finding.note


def test_rows_come_back_in_their_order():
    def loss(w, b):
        return pairs_as_rows(w, b), Concat(nll(w, b))

    run = jaxaccum.value_and_grad(loss, has_aux=True, num_microbatches=4, audit="raise")
    (_, rows), _ = run(W, BATCH)
    assert normwise(rows, nll(W, BATCH)) <= EXACT


def test_a_size_that_breaks_groups_is_noted():
    with pytest.raises(TypeError) as caught:
        jaxaccum.grad(advantages, num_microbatches=8)(W, BATCH)
    (note, *_) = caught.value.__notes__
    assert "a microbatch of 2 of the batch's 16 examples" in note
    assert "a microbatch_size that is a multiple of the group's size" in note


def test_batch_norm_of_one_device_is_no_batch_norm_of_all():
    mesh = jax.make_mesh(
        (2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )

    def grad(axis_name, audit):
        norm = jaxaccum.linen.BatchNorm(
            use_running_average=False, axis_name=axis_name, param_dtype=jnp.float64
        )
        variables = norm.init(jax.random.key(0), BATCH["x"] @ W)

        def loss(w, x):
            y, _ = norm.apply(variables, x @ w, mutable=["batch_stats"])
            return jnp.mean(jnp.sin(y))

        own = jaxaccum.grad(loss, num_microbatches=2, mesh_axes="devices", audit=audit)
        return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P()))

    with pytest.warns(InexactWarning, match="the statistics are those of one device along devices"):
        grad("microbatch", "warn")(W, BATCH["x"])
    grad(("devices", "microbatch"), "raise")(W, BATCH["x"])


ROWS = {"x": data(6, 4, 3, seed=5), "mask": (jnp.arange(24.0) % 3).reshape(6, 4)}
ONE = {
    # losses written for one example, and the value over all of them by a Python loop
    "mean": (lambda w, b: jnp.mean((b["x"][0] @ w) ** 2), "mean"),
    "root": (lambda w, b: jnp.sqrt(jnp.mean((b["x"][0] @ w) ** 2)), "mean"),
    "sum": (lambda w, b: jaxaccum.Sum(jnp.sqrt(jnp.mean((b["x"][0] @ w) ** 2))), "sum"),
    "tokens": (
        lambda w, b: Mean(jnp.sum((b["x"][0] @ w) ** 2 * b["mask"][0]), jnp.sum(b["mask"][0])),
        "tokens",
    ),
    "a count of its own": (
        lambda w, b: Mean(jnp.sum((b["x"] @ w) ** 2), b["mask"][0, 1] + 1),
        "tokens",
    ),
    "squeezed": (lambda w, b: jnp.mean(jnp.squeeze(b["x"], 0) @ w), "mean"),
}


@pytest.mark.parametrize("name", ONE)
def test_a_loss_that_is_written_for_one_example(name):
    """As of padded graphs, stacked and cut one by one: the microbatch is the example, and ``x[0]``
    is all of it."""
    loss, kind = ONE[name]
    w = data(3, seed=6)

    def looped(w):
        parts = [loss(w, jax.tree.map(lambda x, i=i: x[i : i + 1], ROWS)) for i in range(6)]
        if kind == "tokens":
            return sum(part.total for part in parts) / sum(part.weight for part in parts)
        total = sum(part.x if kind == "sum" else part for part in parts)
        return total / 6 if kind == "mean" else total

    grad = jaxaccum.grad(loss, microbatch_size=1, audit="raise")
    assert normwise(grad(w, ROWS), jitted.grad(looped)(w)) <= EXACT
    if name != "squeezed":
        with pytest.warns(InexactWarning, match="examples are picked by their place"):
            jaxaccum.grad(loss, microbatch_size=2)(w, ROWS)


def test_extrema_that_are_written_for_one_example():
    x, flags = ROWS["x"], ROWS["x"][:, 0, 0] > 0
    fun = lambda x, flag: (jaxaccum.Max(x[0, 0]), jaxaccum.Min(-x[0, 0]), jaxaccum.Max(flag[0]))
    options = {"in_axes": (0, 0), "microbatch_size": 1, "audit": "raise"}
    most, least, any_ = jaxaccum.microbatch(fun, **options)(x, flags)
    assert same((most, least, any_), (jnp.max(x[:, 0], 0), -jnp.max(x[:, 0], 0), jnp.any(flags)))


def test_any_and_all_are_extrema():
    """Of booleans; of integers they are bits."""
    flags = ROWS["x"][:, 0, 0] > 0
    fun = lambda x: (jaxaccum.Max(jnp.any(x)), jaxaccum.Min(jnp.all(x)))
    for n in (2, 3):
        options = {"in_axes": (0,), "num_microbatches": n, "audit": "raise"}
        assert jaxaccum.microbatch(fun, **options)(flags) == (
            bool(jnp.any(flags)),
            bool(jnp.all(flags)),
        )
    bits = lambda x: jaxaccum.Max(jnp.bitwise_or.reduce(x))
    with pytest.warns(InexactWarning, match="not the maximum"):
        jaxaccum.microbatch(bits, in_axes=(0,), num_microbatches=3)(jnp.arange(6))


def test_one_example_beside_all_of_them_is_inexact():
    loss = lambda w, b: jnp.mean(b["x"][0] @ w) * jnp.mean(b["x"] @ w)
    with pytest.warns(InexactWarning, match="may not be exact"):
        jaxaccum.grad(loss, microbatch_size=1)(data(3), ROWS)


TOKENS = {"x": data(6, 4, 3, seed=7), "label": jnp.arange(24).reshape(6, 4) % 5}


def cross_entropy(w, b):
    logits = jax.nn.log_softmax(b["x"] @ w)
    return -jnp.mean(jnp.take_along_axis(logits, b["label"][..., None], axis=-1))


def branching(w, b):
    return cross_entropy(w, b) if len(b["x"]) > 1 else jnp.sqrt(cross_entropy(w, b))


def test_microbatches_of_one_example():
    """JAX writes another program where an axis has size 1; a program that computes something else
    is another one."""
    w = data(3, 5)
    expected = jitted.grad(cross_entropy)(w, TOKENS)
    grad = jaxaccum.grad(cross_entropy, microbatch_size=1, audit="raise")
    assert normwise(grad(w, TOKENS), expected) <= EXACT
    with pytest.warns(InexactWarning, match="may not be exact .* are not the same"):
        wrong = jaxaccum.grad(branching, microbatch_size=1)(w, TOKENS)
    assert normwise(wrong, expected) > EXACT
