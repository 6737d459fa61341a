"""What a loss closes over: a key, or an array that belongs to the batch, is named by the audit."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum
from jaxaccum import Mean, Sum
from jaxaccum._program.closures import closed_over, name_of
from tests.support import jitted
from tests.support.helpers import EXACT, data, normwise

W, X = data(3), data(6, 3, seed=1)
WEIGHT = jnp.arange(1.0, 7.0)
KEY = jax.random.key(3)


def weighted(weight):
    return lambda w, x: Mean(jnp.sum((x @ w) ** 2 * weight), jnp.sum(weight))


def in_a_dict(weight):
    batch = {"weight": weight}
    return lambda w, x: Mean(jnp.sum((x @ w) ** 2 * batch["weight"]), jnp.sum(batch["weight"]))


def in_a_helper(weight):
    def error(w, x):
        return jnp.sum((x @ w) ** 2 * weight)

    return lambda w, x: Mean(error(w, x), jnp.sum(weight))


def with_a_global(w, x):
    return Mean(jnp.sum((x @ w) ** 2 * WEIGHT), jnp.sum(WEIGHT))


LOSSES = {
    # loss: the name of the array
    "closure": (weighted(WEIGHT), "weight"),
    "numpy": (weighted(np.asarray(WEIGHT)), "weight"),
    "dict": (in_a_dict(WEIGHT), "batch['weight']"),
    "helper": (in_a_helper(WEIGHT), "weight"),
    "global": (with_a_global, "WEIGHT"),
    "partial": (functools.partial(weighted(WEIGHT)), "weight"),
    "compiled": (jax.jit(weighted(WEIGHT)), "weight"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_an_array_as_long_as_the_batch_is_named(name, number):
    loss, called = LOSSES[name]
    report = jaxaccum.audit(loss, W, X, num_microbatches=number)
    assert not report.exact
    cause = report.findings[0]
    assert cause.kind == "closure"
    assert f"closes over {called}, float64[6]" in cause.note
    assert f"make {called} an argument" in cause.fix


@pytest.mark.parametrize("tagged", [jnp.asarray, Sum], ids=["a mean", "a sum"])
def test_a_loss_that_reads_an_outer_batch_in_place_of_its_argument_is_told(tagged):
    """A slip of the closure's form: the mean is exact, and each microbatch computes all of it."""
    batch = {"x": X, "weight": WEIGHT}

    def loss(w, microbatch):
        return tagged(jnp.mean((batch["x"] @ w) ** 2 * batch["weight"]))

    step = jaxaccum.value_and_grad(loss, num_microbatches=3)
    with pytest.warns(UserWarning, match="reads no argument that is cut") as told:
        _, grads = step(W, batch)
    (warning,) = told
    assert "batch['weight'] and batch['x'], 6 rows" in str(warning.message)
    assert "fix: make batch an argument of the loss with 0" in str(warning.message)
    expected = jitted.grad(jaxaccum.full_batch(loss))(W, batch)
    assert (normwise(grads, expected) <= EXACT) == (tagged is not Sum)


def test_a_loss_that_closes_over_a_table_as_long_as_the_batch_is_not():
    step = jaxaccum.value_and_grad(
        lambda w, b: jnp.mean(X[b["label"]] @ w), num_microbatches=3, audit="raise"
    )
    step(W, {"label": jnp.asarray([0, 5, 2, 2, 1, 4])})


def test_microbatches_of_one_example_repeat_it():
    """JAX stretches one row to the length of the array: a number comes out, and it is wrong."""
    for loss in (weighted(WEIGHT), lambda w, x: Sum(jnp.sum((x @ w) ** 2 * WEIGHT))):
        full = jaxaccum.full_batch(loss)(W, X)
        assert (
            normwise(jaxaccum.microbatch(loss, microbatch_size=1, audit=None)(W, X), full) > EXACT
        )
        assert not jaxaccum.audit(loss, W, X, num_microbatches=6).exact


def test_an_array_that_only_happens_to_be_as_long_is_no_finding():
    """A table with a row for each class, and weights of the features of every example."""
    table, label = data(6, 3, seed=2), jnp.asarray([0, 5, 2, 2, 1, 4])
    looked_up = lambda w, b: jnp.mean((b["x"] * table[b["label"]]) @ w)
    crossed = lambda w, b: jnp.mean((b["x"] @ w)[:, None] * WEIGHT[None])
    for loss in (looked_up, crossed):
        for number in (2, 6):
            report = jaxaccum.audit(loss, W, {"x": X, "label": label}, num_microbatches=number)
            assert report.exact
            assert not report.findings


labels = np.arange(6.0)


class Rows(NamedTuple):
    """A batch with a field whose name a global array has too."""

    x: Any
    labels: Any


def test_a_field_is_not_taken_for_the_global_of_its_name():
    """And numpy's arrays are found by what they hold: the program of this loss has none."""
    shape_of = lambda b: 0.0 if len(b.labels) > 2 else 0.0 * jnp.sum(W)
    loss = lambda w, b: jnp.mean((b.x @ w - b.labels) ** 2) + shape_of(b)
    report = jaxaccum.audit(loss, W, Rows(X, jnp.ones(6)), num_microbatches=3)
    assert not [finding for finding in report.findings if finding.kind == "closure"]
    assert "labels" not in [name for name, _ in closed_over(loss)]
    reads = lambda w, b: jnp.mean((b.x @ w - labels[: len(b.x)]) ** 2)
    assert [name for name, _ in closed_over(reads)] == ["labels"]


def test_it_is_found_inside_jit_too():
    reports = []

    @jax.jit
    def step(w, x, weight, key, scale):
        noisy = lambda w, x: jnp.mean((x @ w + jax.random.normal(key, x.shape[:1], x.dtype)) ** 2)
        scaled = lambda w, x: jnp.mean((x @ w) ** 2) * scale
        reports.extend(jaxaccum.audit(loss, w, x) for loss in (weighted(weight), noisy, scaled))
        return w

    step(W, X, WEIGHT, KEY, jnp.float64(2))
    assert "closes over weight" in reports[0].findings[0].note
    assert "closes over the key `key`" in reports[1].findings[0].note
    assert reports[2].exact  # a number of the closure is the same at every size


# -- keys ------------------------------------------------------------------------------------------

LEGACY = jax.random.PRNGKey(5)


def noisy(draw):
    return lambda w, x: jnp.mean((x @ w + draw(x.shape[:1])) ** 2)


def with_keys(key, keys):
    normal = functools.partial(jax.random.normal, dtype=jnp.float64)
    return {
        # draw: the name of the key
        "typed": (lambda shape: normal(key, shape), "key"),
        "split": (lambda shape: normal(jax.random.split(key)[1], shape), "key"),
        "folded": (lambda shape: normal(jax.random.fold_in(key, 3), shape), "key"),
        "in a dict": (lambda shape: normal(keys["dropout"], shape), "keys['dropout']"),
        "compiled": (jax.jit(lambda shape: normal(key, shape), static_argnums=0), "key"),
        "legacy": (lambda shape: normal(LEGACY, shape), "LEGACY"),
    }


KEYS = with_keys(KEY, {"dropout": jax.random.key(9)})


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_named_where_every_microbatch_draws_the_same_numbers(name):
    draw, called = KEYS[name]
    loss = noisy(draw)
    report = jaxaccum.audit(loss, W, X)
    assert report.random
    assert not report.exact
    (finding,) = report.findings
    assert finding.kind == "random"
    assert (
        f"closes over the key `{called}`, so every microbatch draws the same numbers"
        in finding.note
    )
    assert f"make {called} an argument" in finding.fix
    full = jaxaccum.full_batch(loss)(W, X)
    assert normwise(jaxaccum.microbatch(loss, num_microbatches=2, audit=None)(W, X), full) > EXACT


def test_a_key_of_the_parameters_own_noise_is_no_finding():
    loss = lambda w, x: jnp.mean(x @ (w + jax.random.normal(KEY, w.shape, w.dtype)))
    report = jaxaccum.audit(loss, W, X)
    assert report.exact
    assert not report.findings


def test_a_key_made_inside_is_not_called_a_closure():
    loss = lambda w, x: jnp.mean(
        (x @ w + jax.random.normal(jax.random.key(0), x.shape[:1], x.dtype)) ** 2
    )
    (finding,) = jaxaccum.audit(loss, W, X).findings
    assert "closes over" not in finding.note


# -- names -----------------------------------------------------------------------------------------


def test_names_are_those_of_the_source():
    here, unset = {"a": [X, W]}, None
    loss = lambda w: here["a"][0] @ w + later
    later = data(6, seed=9)
    found = dict(closed_over(loss))
    assert set(found) == {"here['a'][0]", "here['a'][1]", "later"}
    assert name_of(loss, W) == "here['a'][1]"
    assert name_of(loss, data(2)) is None
    assert dict(closed_over(lambda: (unset, KEY)))["KEY"] is KEY
    assert list(closed_over(jnp.tanh)) == []
    partial = dict(closed_over(functools.partial(loss, X, scale=WEIGHT)))
    assert {"argument 0 of a partial", "scale", "later"} <= set(partial)


# -- too few arguments -----------------------------------------------------------------------------


def test_a_batch_that_is_closed_over_is_named_with_the_line_to_write():
    batch = {"image": X, "label": jnp.arange(6)}

    def loss_fn(params):
        return jnp.mean((batch["image"] @ params) * batch["label"])

    said = (
        r"loss_fn closes over batch\['image'\] \(float64\[6, 3\]\), batch\['label'\] \(int64\[6\]\)"
    )
    for options, first in (
        ({}, r"called with 1 positional argument, and in_axes=\(None, 0\) has 2 entries"),
        ({"in_axes": (None,)}, "no argument has a batch axis"),
    ):
        for call in (jaxaccum.value_and_grad, jaxaccum.grad, jaxaccum.microbatch):
            with pytest.raises(ValueError, match=rf"{first}. {said}") as caught:
                call(loss_fn, num_microbatches=2, **options)(W)
            assert "write def loss_fn(params, batch)" in str(caught.value)


def test_a_lambda_and_nothing_closed_over():
    with pytest.raises(ValueError, match=r"The function closes over x .* write lambda w, x: …"):
        jaxaccum.grad((lambda x: lambda w: jnp.mean(x @ w))(X), num_microbatches=2)(W)
    with pytest.raises(ValueError, match="pass one entry per argument"):
        jaxaccum.grad(lambda w: jnp.mean(w), num_microbatches=2)(W)


def test_what_is_no_pytree_hides_no_error_of_the_loss():
    """A dict whose keys have no order, beside an array that is named."""
    table, rows = {None: X, "a": X}, jnp.arange(6.0)

    def loss(w, x):
        return jnp.mean(x @ w * rows) * len(table)

    with pytest.raises(TypeError, match="incompatible shapes") as caught:
        jaxaccum.grad(loss, num_microbatches=2)(W, X)
    assert "It closes over rows" in " ".join(caught.value.__notes__)
    shared = lambda w, x: jnp.sum(w) * len(table)
    assert jaxaccum.grad(shared, num_microbatches=2)(W, X).tolist() == [2.0, 2.0, 2.0]
