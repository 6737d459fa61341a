"""The probe compares accumulated gradients with the whole batch's, for every loss that it can."""

import jax
import jax.numpy as jnp
import pytest

import jaxaccum as ja
from tests.support.helpers import INEXACT, data

W, X = data(3, 2), data(12, 3)
HALF = lambda x: x.astype(jnp.bfloat16)
SINGLE = lambda x: x.astype(jnp.float32)


def mean(w, x):
    return jnp.mean((x @ w) ** 2)


def ratio(w, x):
    return jnp.sum((x @ w) ** 2) / jnp.sum(jnp.abs(x))


def probed(loss, *args, **options):
    return ja.audit(loss, *args, probe=True, **options).probe


@pytest.mark.parametrize(
    ("count", "sizes"), [(2, (1, 1)), (3, (2, 1)), (4, (3, 1)), (5, (3, 2)), (12, (7, 5))]
)
def test_it_compares_two_microbatches_of_any_batch(count, sizes):
    right, wrong = probed(mean, W, X[:count]), probed(ratio, W, X[:count])
    assert right.sizes == wrong.sizes == sizes
    assert (right.exact, right.rule) == (True, "MEAN")
    assert (wrong.exact, wrong.rule) == (False, None)


def coupled(w, x):
    return jnp.mean(jnp.tanh(x @ w - jax.lax.pmean(jnp.mean(x @ w), "microbatch")))


def test_it_says_where_there_is_nothing_to_compare():
    assert probed(coupled, W, X).exact
    found = probed(coupled, W, X, num_microbatches=1)
    assert found.exact is None
    assert "nothing to compare" in str(found)


@pytest.mark.parametrize("cast", [SINGLE, HALF], ids=["float32", "bfloat16"])
def test_the_rounding_of_what_the_loss_computes_is_allowed(cast):
    growing = X * jnp.arange(1.0, 13.0)[:, None]
    right = probed(lambda w, x: SINGLE(mean(cast(w), cast(x))), W, growing)
    wrong = probed(lambda w, x: jnp.sqrt(SINGLE(mean(cast(w), cast(x)))), W, growing)
    assert right.exact
    assert f"equal in {cast(W).dtype.name}" in str(right)
    assert max(right.errors.values()) > 1e-9, "a bound for float64 would have done"
    assert not wrong.exact


def dropped(w, x, key):
    return mean(w, jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0))


@INEXACT
def test_it_draws_the_numbers_of_the_batch():
    key = jax.random.key(0)
    found = probed(dropped, W, X, key, in_axes=(None, 0, ja.BATCH_KEY))
    assert found.exact
    assert "needs the others" in str(found)
    assert not probed(dropped, W, X, key, in_axes=(None, 0, ja.KEY)).exact


def test_a_state_is_carried():
    after = lambda w, x, s: (mean(w, x), ja.Carry(s + 1.0))
    read = lambda w, x, s: (mean(w, x) * s, ja.Carry(s + 1.0))
    options = {"has_aux": True, "in_axes": (None, 0, ja.CARRY)}
    assert probed(after, W, X, jnp.ones(()), **options).exact
    assert probed(read, W, X, jnp.ones(()), **options).exact is False
