"""The state that a model of nnx updates: the audit calls it exact where it is the whole batch's.

The oracle is `nnx.value_and_grad` on the whole batch, and what its model holds afterwards.
"""

import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxaccum as ja
from tests.support.helpers import EXACT, data, normwise, refused

X = data(6, 4, seed=2)
START = jnp.arange(1.0, 5.0)


class Updated(nnx.Module):
    """A layer with a state that its output does not read."""

    def __init__(self, update):
        self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        self.state, self.update = nnx.Variable(START), update

    def __call__(self, x):
        h = self.layer(x)
        self.state[...] = self.update(self.state[...], h)
        return h


def loss(model, x):
    return jnp.mean(model(x) ** 2)


def updated(update, transform):
    """The state after one call, the gradient, and what was warned of."""
    model = Updated(update)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, grads = transform(loss)(model, X)
    return model.state[...], grads, [str(each.message) for each in caught]


def total(h):
    return jnp.sum(h, axis=0)


def decayed(h, over=lambda sums: sums):
    return lambda v: 0.9 * v + 0.1 * over(total(h))


ADDED = {
    "a sum": lambda v, h: v + total(h),
    "a sum with a factor": lambda v, h: v + 0.1 * total(h),
    "a difference": lambda v, h: v - total(jnp.tanh(h)),
    "a count": lambda v, h: v + len(h),
    "a constant": lambda v, h: jnp.full_like(v, 2.0),
    "as it is": lambda v, h: v,
    "a decay": lambda v, h: v * 0.9,
    "a counter": lambda v, h: v + 1,
}
"""Updates that end as on the whole batch."""
CHANGED = {
    "a moving average": lambda v, h: 0.9 * v + 0.1 * total(h),
    "a moving average as a step": lambda v, h: v + 0.1 * (jnp.mean(h, axis=0) - v),
    "a mean": lambda v, h: v + jnp.mean(h, axis=0),
    "a maximum that is added": lambda v, h: v + jnp.max(h, axis=0),
    "a sum and a constant": lambda v, h: v + (total(h) + 1),
    "the last sum": lambda v, h: total(h),
    "the last maximum": lambda v, h: jnp.max(h, axis=0),
    "the state added twice": lambda v, h: v + v + total(h),
    "a sum times the state": lambda v, h: v + v * total(h),
    "a moving average after a warm-up": lambda v, h: jnp.where(v > 0, decayed(h)(v), v),
    "a compiled moving average": lambda v, h: jax.jit(lambda v, t: 0.9 * v + 0.1 * t)(v, total(h)),
    "a function of a function": lambda v, h: jax.jit(jax.checkpoint(decayed(h)))(v),
}
"""Updates that do not."""
NOT_FOLLOWED = {
    "sums, one after the other": lambda v, h: (v + total(h)) - total(h**2),
    "a maximum": lambda v, h: jnp.maximum(v, jnp.max(h, axis=0)),
    "a table of counts": lambda v, h: v.at[jnp.argmax(h, axis=1)].add(1.0),
    "a call": lambda v, h: jax.checkpoint(lambda v: v + total(h))(v),
    "a compiled sum": lambda v, h: jax.jit(lambda v, t: v + t)(v, total(h)),
    "a sum that is chosen": lambda v, h: jnp.where(jnp.arange(4) > 1, v + total(h), v),
    "a compiled maximum": lambda v, h: jax.jit(jnp.maximum)(v, jnp.max(h, axis=0)),
}
"""Updates of which nothing is said, all of them exact."""


def accumulated(loss, **options):
    return ja.nnx.value_and_grad(loss, num_microbatches=3, **options)


@pytest.mark.parametrize("name", [*ADDED, *NOT_FOLLOWED])
def test_an_update_that_ends_as_on_the_whole_batch_is_exact(name):
    update = (ADDED | NOT_FOLLOWED)[name]
    state, grads, warned = updated(update, accumulated)
    expected, of_whole, _ = updated(update, nnx.value_and_grad)
    assert normwise((state, grads), (expected, of_whole)) < EXACT
    assert not warned


@pytest.mark.parametrize("name", CHANGED)
def test_another_update_warns_with_its_line(name):
    """The gradient is right all the same."""
    state, grads, warned = updated(CHANGED[name], accumulated)
    expected, of_whole, _ = updated(CHANGED[name], nnx.value_and_grad)
    assert normwise(grads, of_whole) < EXACT
    assert normwise(state, expected) > 1e3 * EXACT
    (said,) = warned
    assert said.startswith("the model's state[0] of loss is not exact over microbatches")
    assert __file__ in said


def test_the_fix_of_an_update_makes_it_the_whole_batchs():
    """With a sum over the microbatches, every state is updated once: a counter too."""
    average = lambda over: lambda v, h: decayed(h, over)(v)
    counter = lambda over: lambda v, h: v + (1 + 0 * over(total(h)))
    over_all = lambda sums: jax.lax.psum(sums, "microbatch")
    for update in (average, counter):
        alone, _, (said,) = updated(update(lambda sums: sums), accumulated)
        assert 'jax.lax.psum(sum, "microbatch")' in said
        state, _, warned = updated(update(over_all), accumulated)
        expected, _, _ = updated(update(lambda sums: sums), nnx.value_and_grad)
        assert normwise(state, expected) < EXACT
        assert normwise(alone, expected) > 1e3 * EXACT
        assert not warned


def test_an_update_may_be_an_error_or_be_accepted():
    moving = CHANGED["a moving average"]
    model = Updated(moving)
    call = lambda: accumulated(loss, audit="raise")(model, X)
    refused(call, "the model's state[0]", "each microbatch", error=ja.InexactError)
    _, _, warned = updated(moving, lambda loss: accumulated(loss, audit=None))
    assert not warned


def test_one_microbatch_is_the_whole_batch():
    moving = CHANGED["a moving average"]
    once = lambda loss: ja.nnx.value_and_grad(loss, num_microbatches=1)
    state, _, warned = updated(moving, once)
    assert normwise(state, updated(moving, nnx.value_and_grad)[0]) < EXACT
    assert not warned


class WarmedUp(Updated):
    """Its average begins after a number of examples, which is another state."""

    def __init__(self):
        super().__init__(None)
        self.steps = nnx.Variable(jnp.ones((), jnp.int32))

    def __call__(self, x):
        h, v = self.layer(x), self.state[...]
        self.state[...] = jnp.where(self.steps[...] > 0, 0.9 * v + 0.1 * total(h), v)
        self.steps[...] += jnp.sum(h > 0, dtype=jnp.int32)
        return h


def test_an_average_that_another_state_switches_on_warns():
    with pytest.warns(ja.InexactWarning, match=r"the model's state\[0\] of loss is not exact"):
        accumulated(loss)(WarmedUp(), X)
