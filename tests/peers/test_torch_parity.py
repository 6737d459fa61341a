"""jaxaccum over any partition is PyTorch's full batch and the float64 full batch; the known wrong
rules are neither.

A program, that is a model, a loss, a partition and a route, costs a compilation; so each is run on
about five batches.
"""

import dataclasses
import functools
import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, find, given, settings
from hypothesis import strategies as st

import jaxaccum
from jaxaccum.testing import build_model, linen_model, normwise
from jaxaccum.testing.language import BLOCKS
from jaxaccum.testing.strategies import compose, model_batches, models, partitions
from tests.support.examples import part_of_the_examples
from tests.support.nnx_builder import nnx_model
from tests.support.tagged_losses import LOSSES, loss_fun, loss_terms, losses
from torch_ref import losses as torch_losses
from torch_ref import models as torch_models

IN_AXES = (None, None, 0)  # weights, running statistics, batch
WIDTH = 4
SIZES = (1, 4, 5)
FLOAT64 = 1e-12
STRIDED = {"num_microbatches": 2, "split": "strided"}


class Program(NamedTuple):
    """What is compiled: everything but the numbers."""

    layers: Any
    loss: Any
    size: int
    options: tuple
    builder: str
    route: str

    @property
    def apply(self):
        return (
            linen_model(self.layers) if self.builder == "linen" else nnx_model(self.layers, WIDTH)
        )


def programs(share=10, kinds=tuple(BLOCKS)):
    """One of the first programs of an endless random list: the more examples a profile runs, the
    longer the list."""
    count = max(5, settings.default.max_examples // share)
    return st.integers(0, count - 1).map(lambda index: program(index, kinds))


def program(index, kinds):
    choose = random.Random(index).choice
    layers = compose(choose, WIDTH, kinds=kinds)
    size = choose(SIZES)
    options = choose(
        [
            {"microbatch_size": choose(range(1, size + 1))},
            {"num_microbatches": choose(range(1, size + 1))},
        ]
    )
    options = STRIDED if size == 4 and choose(range(3)) == 0 else options
    routes = choose(["linen", "nnx"]), choose(["value_and_grad", "microbatch"])
    return Program(layers, choose(LOSSES), size, tuple(options.items()), *routes)


def assert_equal(actual, expected, bound=FLOAT64):
    """Value and gradient, each normwise."""
    assert normwise(actual[0], expected[0]) <= bound
    assert normwise(actual[1], expected[1]) <= bound


def differ(actual, expected):
    """Whether `assert_equal` fails: a negative control goes through the comparison of the laws."""
    try:
        assert_equal(actual, expected)
    except AssertionError:
        return True
    return False


def added(loss):
    first, *rest = jax.tree.leaves(loss)
    return sum(rest, start=first)


@functools.cache
def full_batch(apply, loss):
    full = jaxaccum.full_batch(loss_fun(apply, loss), in_axes=IN_AXES)
    return jax.jit(jax.value_and_grad(lambda *args: added(full(*args))))


@functools.cache
def accumulated(each):
    fun, options = loss_fun(each.apply, each.loss), dict(each.options)
    if each.route == "value_and_grad":
        return jax.jit(jaxaccum.value_and_grad(fun, in_axes=IN_AXES, **options))
    spread = jaxaccum.microbatch(fun, in_axes=IN_AXES, **options)
    return jax.jit(jax.value_and_grad(lambda *args: added(spread(*args))))


def drawn(data, each, dtype=np.float64):
    """The program's weights and a batch."""
    model = build_model(each.layers, WIDTH, seed=data.draw(st.integers(0, 2**16))).astype(dtype)
    return model, data.draw(model_batches(WIDTH, sizes=(each.size,), dtype=dtype))


@part_of_the_examples(2)
@given(st.data())
def test_any_partition_is_the_full_batch_in_torch(data):
    each = data.draw(programs())
    model, batch = drawn(data, each)
    actual = accumulated(each)(model.weights, model.state, batch)
    assert_equal(actual, torch_losses.value_and_gradient(model, each.loss, batch))
    assert_equal(actual, full_batch(each.apply, each.loss)(model.weights, model.state, batch))


def rounded(tree, eps, seed):
    """The tree with every number moved by one rounding, up or down."""
    rng = np.random.default_rng(seed)
    floating = lambda leaf: jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
    move = lambda leaf: (
        np.asarray(leaf, np.float64) * (1 + eps * rng.choice([-1, 1], np.shape(leaf)))
    )
    return jax.tree.map(lambda leaf: move(leaf) if floating(leaf) else leaf, tree)


def sensitivity(model, loss, batch, eps):
    """How far value and gradient, in float64, move when weights and features are moved by one to
    three roundings."""
    truth, moved = torch_losses.value_and_gradient(model, loss, batch), []
    for seed in range(12):  # near a tie some directions only lead to the other gradient
        weights, features = (
            rounded(x, (1 + seed % 3) * eps, seed) for x in (model.weights, batch["features"])
        )
        near = dataclasses.replace(model, weights=weights)
        value, grads = torch_losses.value_and_gradient(near, loss, batch | {"features": features})
        moved += [normwise(value, truth[0]), normwise(grads, truth[1])]
    return max(moved)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@part_of_the_examples(4)
@given(data=st.data())
def test_narrow_parameters_stay_within_a_few_roundings_of_their_data(dtype, data):
    """What is computed is exact for data a few roundings away; a wrong rule is wrong by parts of
    the whole."""
    each = data.draw(programs(share=20, kinds=("dense", "attention", "group_norm")))._replace(
        builder="linen"
    )
    model, batch = drawn(data, each, dtype)
    value, grads = accumulated(each)(model.weights, model.state, batch)
    eps = float(jnp.finfo(dtype).eps)
    moved = sensitivity(model, each.loss, batch, eps)
    assume(
        moved < 0.25
    )  # beyond, as where a maximum is nearly a tie, a rounding of the data makes another gradient
    bound = min(8 * (moved + eps), 0.25)
    assert_equal((value, grads), torch_losses.value_and_gradient(model, each.loss, batch), bound)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}


@functools.cache
def microbatch_gradient(apply, loss):
    """Gradient of one microbatch's Σ total / weight, the weights those of the whole batch: for a
    host loop."""

    def fun(weights, state, batch, totals):
        terms = loss_terms(loss, apply(weights, state, batch)[0], batch)
        return sum(total / totals[name] for name, (total, _) in terms.items())

    return jax.jit(jax.grad(fun))


@functools.cache
def multi_steps(count):
    optimizer = optax.MultiSteps(optax.sgd(1.0), count)
    return optimizer.init, jax.jit(optimizer.update)


@part_of_the_examples(4)
@given(st.data())
def test_optax_multi_steps_is_the_full_batch_when_the_weights_are_known(data):
    each = data.draw(programs(share=20))
    model, batch = drawn(data, each)
    microbatches = [rows for _, rows in jaxaccum.partition(None, batch, **dict(each.options))]
    totals = torch_losses.weights(torch_models.build(model), each.loss, [batch])[0]
    init, update = multi_steps(len(microbatches))
    with jax.numpy_dtype_promotion("standard"):
        state = init(model.weights)
        for rows in microbatches:
            grads = microbatch_gradient(each.apply, each.loss)(
                model.weights, model.state, rows, totals
            )
            scaled = jax.tree.map(lambda leaf: -len(microbatches) * leaf, grads)
            updates, state = update(scaled, state, model.weights)
    expected = torch_losses.value_and_gradient(model, each.loss, batch)[1]
    assert normwise(updates, expected) <= 1e-6  # optax accumulates in float32


@part_of_the_examples(2)
@given(st.data())
def test_only_totals_over_the_whole_weight_are_the_full_batch(data):
    """In PyTorch alone: the right loop is the full batch, and each wrong one fails the very same
    comparison."""
    model, loss = data.draw(models()), data.draw(losses())
    batch = data.draw(model_batches(model.width, sizes=(4, 5)))
    microbatches = [
        rows
        for _, rows in jaxaccum.partition(
            None, batch, **data.draw(partitions(len(batch["weight"])))
        )
    ]
    built, count = torch_models.build(model), len(microbatches)
    weights = torch_losses.weights(built, loss, microbatches)
    expected = torch_losses.value_and_gradient(model, loss, batch)

    def mean_of_means(terms, _):
        return sum(total / weight for total, weight in terms.values()) / count

    assert_equal(torch_losses.over_totals(built, loss, microbatches), expected)
    assume(any(len({each[name] for each in weights}) > 1 for name in loss.terms))
    assert differ(
        torch_losses.loop(torch_models.build(model), loss, microbatches, mean_of_means), expected
    )


@part_of_the_examples(2)
@given(st.data())
def test_a_tail_over_k_and_the_last_microbatch_alone_are_wrong(data):
    model, loss = data.draw(models()), data.draw(losses())
    batch = data.draw(model_batches(model.width, sizes=(4, 5)))
    size = data.draw(st.integers(1, len(batch["weight"]) - 1))
    microbatches = [rows for _, rows in jaxaccum.partition(None, batch, microbatch_size=size)]
    built, count = torch_models.build(model), len(microbatches)
    weights = torch_losses.weights(built, loss, microbatches)
    assume(all(each[name] > 0 for each in weights for name in loss.terms))
    totals = {name: sum(each[name] for each in weights) for name in loss.terms}
    expected = torch_losses.value_and_gradient(model, loss, batch)

    def tail_over_k(terms, index):
        return sum(total / totals[name] for name, (total, _) in terms.items()) * count / (count + 1)

    def last_alone(terms, index):
        return sum(total / weight for total, weight in terms.values()) * float(index == count - 1)

    def loop(rule):
        return torch_losses.loop(torch_models.build(model), loss, microbatches, rule)

    tail = loop(tail_over_k)
    assert differ(tail, expected)
    assert normwise(tail[0], expected[0] * count / (count + 1)) <= FLOAT64
    assert differ(loop(last_alone), expected)


def test_a_regularizer_outside_is_counted_once():
    each = program(0, ("dense",))
    batch = find(model_batches(WIDTH, sizes=(each.size,)), lambda batch: batch["mask"].all())
    model = build_model(each.layers, WIDTH, seed=0)
    spread = jaxaccum.microbatch(
        loss_fun(each.apply, each.loss), in_axes=IN_AXES, microbatch_size=1
    )

    def penalty(weights):
        return 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(weights))

    penalized = lambda w: added(spread(w, model.state, batch)) + penalty(w)
    value, grads = jax.jit(jax.value_and_grad(penalized))(model.weights)
    expected_value, expected = torch_losses.value_and_gradient(model, each.loss, batch)
    expected = jax.tree.map(lambda grad, weight: grad + 0.2 * weight, expected, model.weights)
    assert_equal((value, grads), (expected_value + penalty(model.weights), expected))
