"""Metrics as training loops hold them: one tag around the whole tree, and the metrics that nnx
keeps in an object.

The oracle is the metric of the whole batch, by numpy.
"""

import dataclasses
import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxaccum as ja
import jaxaccum.nnx
from tests.support.helpers import EXACT, data, normwise, same, sizes_of

W, X = data(3, 4), data(10, 3, seed=1)
LABELS = jnp.asarray(np.arange(10) % 4)
MASK = jnp.asarray(np.arange(10) % 3 > 0, jnp.float64)
OPTIONS = [{"num_microbatches": 3}, {"microbatch_size": 4}, {"num_microbatches": 1}]


@flax.struct.dataclass
class Average:
    """A metric as libraries of metrics write it: what is added up, what is divided by, and how two
    are merged."""

    total: Any
    count: Any

    @classmethod
    def of(cls, values, mask):
        return cls(jnp.sum(values.astype(mask.dtype) * mask), jnp.sum(mask))

    def merge(self, other):
        return type(self)(self.total + other.total, self.count + other.count)

    def compute(self):
        return self.total / self.count


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Metrics:
    """A collection of them."""

    loss: Average
    accuracy: Average


def metrics_of(w, x, labels, mask):
    logits = x @ w
    return Metrics(
        loss=Average.of(
            -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0], mask
        ),
        accuracy=Average.of(jnp.argmax(logits, 1) == labels, mask),
    )


def loss(w, x, labels, mask):
    metrics = metrics_of(w, x, labels, mask)
    return ja.Mean(metrics.loss.total, metrics.loss.count), ja.Sum(metrics)


def expected_numbers():
    """Loss and accuracy of the whole batch, by numpy."""
    logits = np.asarray(X @ W)
    logs = logits - np.log(np.sum(np.exp(logits), 1, keepdims=True))
    mask = np.asarray(MASK)
    nll = -logs[np.arange(10), np.asarray(LABELS)]
    right = np.argmax(logits, 1) == np.asarray(LABELS)
    return np.sum(nll * mask) / np.sum(mask), np.sum(right * mask) / np.sum(mask)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_tag_around_a_collection_of_metrics(options):
    step = jax.jit(
        ja.value_and_grad(loss, has_aux=True, in_axes=(None, 0, 0, 0), audit="raise", **options)
    )
    (value, metrics), _ = step(W, X, LABELS, MASK)
    assert isinstance(metrics, Metrics)
    nll, accuracy = expected_numbers()
    assert (
        normwise((value, metrics.loss.compute(), metrics.accuracy.compute()), (nll, nll, accuracy))
        < EXACT
    )


def test_the_mean_of_the_microbatches_metrics_is_another_number():
    """The classic wrong answer: compute each, then average."""
    sizes = sizes_of(10, microbatch_size=4)
    bounds = np.cumsum([0, *sizes])
    parts = [
        metrics_of(W, *(y[a:b] for y in (X, LABELS, MASK))) for a, b in itertools.pairwise(bounds)
    ]
    means = [
        sum(m.compute() for m in column) / 3
        for column in zip(*((p.loss, p.accuracy) for p in parts), strict=True)
    ]
    assert normwise(tuple(means), expected_numbers()) > 0.01


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_tag_takes_a_whole_tree(options):
    """Dicts, tuples, dataclasses and None inside; the structure comes back."""

    def outputs(x, mask):
        tree = lambda *leaves: {"a": (leaves[0], None), "b": Average(*leaves[1:])}
        return {
            "sum": ja.Sum(tree(jnp.sum(x), jnp.sum(mask), jnp.sum(x, 0))),
            "mean": ja.Mean(tree(jnp.sum(x), jnp.sum(mask), jnp.sum(x, 0)), len(x)),
            "own": ja.Mean(
                {"a": jnp.sum(x[:, 0] * mask), "b": jnp.sum(mask)},
                {"a": jnp.sum(mask), "b": len(x)},
            ),
            "max": ja.Max(tree(jnp.max(x), jnp.max(mask), jnp.max(x, 0))),
            "min": ja.Min(tree(jnp.min(x), jnp.min(mask), jnp.min(x, 0))),
            "rows": ja.Concat(tree(x, mask, 2 * x)),
        }

    actual = ja.microbatch(outputs, in_axes=(0, 0), audit="raise", **options)(X, MASK)
    whole = ja.full_batch(outputs, in_axes=(0, 0))(X, MASK)
    assert jax.tree.structure(actual) == jax.tree.structure(whole)
    assert normwise(actual, whole) < EXACT
    assert normwise(actual["mean"]["a"][0], np.sum(X) / 10) < EXACT


# -- metrics that nnx keeps in an object -----------------------------------------------------------


ROUNDING = 64 * float(jnp.finfo(jnp.float32).eps)
"""In float32, the dtype of nnx's own sums: a few dozen roundings of numbers of one sign."""
X32 = X.astype(jnp.float32)


class Net(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]


def fresh():
    return nnx.MultiMetric(
        accuracy=nnx.metrics.Accuracy(),
        loss=nnx.metrics.Average("loss"),
        own=nnx.metrics.Welford("loss"),
    )


def updating(model, metrics, x, labels):
    logits = model(x)
    each = cross_entropy(logits, labels)
    metrics.update(logits=logits, labels=labels, loss=each)
    return jnp.mean(each)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_metrics_of_nnx_are_updated_by_every_microbatch(options):
    """An argument of its own: its counts run through the microbatches, as through a host loop's."""
    model, whole, ours = Net(), fresh(), fresh()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(2):  # two steps of an epoch
            expected = nnx.value_and_grad(updating)(model, whole, X32, LABELS)
            step = jaxaccum.nnx.value_and_grad(updating, in_axes=(None, None, 0, 0), **options)
            actual = step(model, ours, X32, LABELS)
            assert normwise(jax.tree.leaves(actual), jax.tree.leaves(expected)) < ROUNDING
        ran, one = ours.compute(), whole.compute()
    assert same(ran["accuracy"], one["accuracy"])
    assert normwise((ran["loss"], ran["own"].mean), (one["loss"], one["own"].mean)) < ROUNDING
    assert normwise(ran["own"].standard_deviation, one["own"].standard_deviation) < ROUNDING


def test_metrics_of_nnx_are_computed_once_from_the_logits_of_all_rows():
    """The other way: rows of all microbatches come back, and the metrics are updated once,
    outside."""
    model, whole, ours = Net(), fresh(), fresh()

    def loss(model, x, labels):
        logits = model(x)
        return jnp.mean(cross_entropy(logits, labels)), ja.Concat(logits)

    step = jaxaccum.nnx.value_and_grad(
        loss, has_aux=True, in_axes=(None, 0, 0), microbatch_size=4, audit="raise"
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        (_, logits), _ = step(model, X32, LABELS)
        for metrics, rows in ((ours, logits), (whole, model(X32))):
            metrics.update(logits=rows, labels=LABELS, loss=cross_entropy(rows, LABELS))
        assert same(ours.compute()["accuracy"], whole.compute()["accuracy"])
        assert normwise(ours.compute()["loss"], whole.compute()["loss"]) < ROUNDING
