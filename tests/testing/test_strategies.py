"""The strategies draw what they promise, and reach the cases that break naive accumulation."""

import numpy as np
import pytest
from hypothesis import find, given
from hypothesis import strategies as st

import jaxaccum
from jaxaccum.testing import (
    batches,
    masks,
    model_batches,
    models,
    normwise,
    partitions,
    sum_bound,
    weights,
)
from tests.support.tagged_losses import losses

EXAMPLE = {"x": np.zeros(2, np.float32), "flag": np.zeros((), bool), "id": np.zeros((), np.int32)}


@given(batches(EXAMPLE, min_size=2, max_size=4))
def test_batches_look_like_the_example(batch):
    size = len(batch["x"])
    assert 2 <= size <= 4
    for name, leaf in EXAMPLE.items():
        assert batch[name].shape == (size, *leaf.shape)
        assert batch[name].dtype == leaf.dtype
    assert batch["id"].min() >= 0


@given(batches({"label": lambda rng, size: rng.integers(7, 9, size)}))
def test_a_function_draws_its_own_leaf(batch):
    assert np.isin(batch["label"], [7, 8]).all()


@given(st.data())
def test_masks_and_weights_are_never_all_zero(data):
    size = data.draw(st.integers(1, 6))
    assert data.draw(masks(size, 3)).any()
    weight = data.draw(weights(size))
    assert weight.sum() > 0
    assert weight.dtype == np.float32


@pytest.mark.parametrize(
    "hidden",
    [
        lambda mask: not mask[:2].any(),  # the first microbatch of two
        lambda mask: not mask[2:].any(),  # the last
        lambda mask: mask.all(),
        lambda mask: mask.sum() == 1,
        lambda mask: mask.any(axis=1).all() and not mask.all(),
    ],
)
def test_masks_reach(hidden):
    assert hidden(find(masks(4, 3), hidden))


@given(st.data())
def test_partitions_divide_every_batch(data):
    size = data.draw(st.integers(1, 7))
    options = data.draw(partitions(size))
    microbatches = jaxaccum.partition(0.0, np.arange(size), **options)
    assert sorted(np.concatenate([rows for _, rows in microbatches])) == list(range(size))


@given(st.data())
def test_equal_partitions_are_equal(data):
    size = data.draw(st.integers(1, 7))
    options = data.draw(partitions(size, equal=True))
    assert len({len(rows) for _, rows in jaxaccum.partition(0.0, np.arange(size), **options)}) == 1


@pytest.mark.parametrize(
    "reached",
    [
        lambda options: options.get("microbatch_size") == 4,  # leaves a remainder of 1
        lambda options: options.get("num_microbatches") == 2,
        lambda options: options.get("split") == "strided",
    ],
)
def test_partitions_reach(reached):
    assert reached(find(partitions(5), reached))


@given(st.data())
def test_models_and_losses_read_the_batches(data):
    model = data.draw(models(max_blocks=1))
    batch = data.draw(model_batches(model.width))
    assert batch["features"].shape[-1] == model.width
    assert not model.coupled
    assert data.draw(losses()).terms


TERMS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=200)


@given(TERMS, st.sampled_from([np.float32, np.float16]))
def test_a_sum_never_leaves_its_bound(terms, dtype):
    terms = np.asarray(terms, dtype)
    total = dtype(0)
    for term in terms:
        total = dtype(total + term)
    magnitude = np.abs(terms.astype(np.float64)).sum()
    error = abs(float(total) - terms.astype(np.float64).sum())
    assert error <= sum_bound(len(terms), magnitude, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "num_terms"), [(np.float32, 1000), (np.float64, 1000), (np.float16, 100)]
)
def test_some_sum_comes_near_its_bound(dtype, num_terms):
    """One, and then terms of just half an eps: each of them is lost."""
    terms = np.full(num_terms, np.finfo(dtype).eps / 2, dtype)
    terms[0] = 1
    total = dtype(0)
    for term in terms:
        total = dtype(total + term)
    magnitude = 1 + (num_terms - 1) * float(np.finfo(dtype).eps) / 2
    error = magnitude - float(total)
    bound = sum_bound(num_terms, magnitude, dtype=dtype)
    assert error <= bound <= 100 * error


def test_normwise_is_over_all_leaves():
    expected = {"a": np.array([0.0, 0.0]), "b": np.array([-4.0])}
    assert normwise(expected, expected) == 0
    assert normwise({"a": np.array([0.0, 1.0]), "b": np.array([-4.0])}, expected) == 0.25
    assert normwise(np.array([1 + 1j]), np.array([1.0])) == 1
    assert normwise({}, {}) == 0


@pytest.mark.parametrize("actual", [np.nan, np.inf, 1.0])
def test_normwise_is_infinite_where_nothing_compares(actual):
    assert normwise(np.array([actual]), np.array([0.0])) == np.inf


def test_normwise_names_a_leaf_of_another_shape():
    with pytest.raises(ValueError, match=r"\['a'\] has shape \(1,\), but \(2,\)"):
        normwise({"a": np.zeros(1)}, {"a": np.zeros(2)})
