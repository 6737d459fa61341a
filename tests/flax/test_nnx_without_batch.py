"""States and parameters that a model of nnx changes without its batch: once, as on the whole
batch.

The oracle is `nnx.value_and_grad` on the whole batch, and what its model holds afterwards. The
wrong answer is a loop in Python, in which every microbatch changes the model that the last one
left.
"""

import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.helpers import EXACT, data, normwise, refused

X = data(6, 4, seed=2)
WIDE = {"param_dtype": jnp.float64}


class Model(nnx.Module):
    """A layer whose `update` changes variables before the output is made of them."""

    def __init__(self, update):
        self.layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0), **WIDE)
        self.scale = nnx.Param(jnp.float64(5.0))
        self.count, self.rate = nnx.Variable(jnp.float64(1.0)), nnx.Variable(jnp.float64(0.5))
        self.teacher = nnx.Variable(2 * self.layer.kernel[...])
        self.update = update

    def __call__(self, x):
        self.update(self, x)
        h = jnp.tanh(self.layer(x)) * self.scale[...] * (self.count[...] + self.rate[...])
        return h + x @ self.teacher[...]


class Normed(nnx.Module):
    """A layer of Flax that normalizes its weights, and assigns them to the layer inside it."""

    def __init__(self, norm, **options):
        rngs = nnx.Rngs(0)
        self.norm = norm(nnx.Linear(4, 3, rngs=rngs, **WIDE), rngs=rngs, **WIDE)
        self.last, self.options = nnx.Linear(3, 1, rngs=rngs, **WIDE), options

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(x, **self.options)))


def set_all(**changes):
    """An update that sets variables by name, each to a function of the old model."""

    def update(model, x):
        del x
        new = {name: change(model) for name, change in changes.items()}
        for name, value in new.items():
            getattr(model, name)[...] = value

    return update


def in_turn(*updates):
    def update(model, x):
        for one in updates:
            one(model, x)

    return update


def halved(model, x):
    del x
    model.layer.kernel[...] = model.layer.kernel[...] / 2


MODELS = {
    "a counter": lambda: Model(set_all(count=lambda m: m.count[...] + 1)),
    "a decay": lambda: Model(set_all(rate=lambda m: m.rate[...] * 0.9)),
    "a teacher": lambda: Model(
        set_all(teacher=lambda m: 0.9 * m.teacher[...] + 0.1 * m.layer.kernel[...])
    ),
    "states that read one another": lambda: Model(
        set_all(count=lambda m: m.count[...] + m.rate[...], rate=lambda m: m.count[...] * 2)
    ),
    "states in a call": lambda: Model(nnx.jit(set_all(count=lambda m: m.count[...] + 1))),
    "a clipped parameter": lambda: Model(set_all(scale=lambda m: jnp.clip(m.scale[...], 0, 4))),
    "a parameter of a state": lambda: Model(
        in_turn(
            set_all(count=lambda m: m.count[...] * 2),
            set_all(scale=lambda m: m.scale[...] * m.count[...]),
        )
    ),
    "a parameter that shrinks": lambda: Model(halved),
    "spectral normalization": lambda: Normed(nnx.SpectralNorm, update_stats=True),
}
"""Of these a second microbatch makes something else, if it begins where the first ended."""
IDEMPOTENT = {
    "weight normalization": lambda: Normed(nnx.WeightNorm),
    "a constant": lambda: Model(set_all(count=lambda m: jnp.float64(3.0))),
    "a constant parameter": lambda: Model(set_all(scale=lambda m: jnp.float64(3.0))),
    "places that change": lambda: Model(
        set_all(count=lambda m: m.rate[...], rate=lambda m: m.count[...])
    ),
}
"""Of these it may make the same."""
OPTIONS = [
    {"num_microbatches": 3},
    {"microbatch_size": 4},
    {"num_microbatches": 2, "split": "strided"},
]


def loss(model, x):
    return jnp.mean(model(x) ** 2)


def after(model, transform, fun=loss):
    """Value, gradient and the model after one call."""
    return transform(fun)(model, X), nnx.state(model)


def looped(loss):
    """The usual loop over two microbatches."""

    def step(model, x):
        steps = [nnx.value_and_grad(loss)(model, part) for part in (x[:3], x[3:])]
        return jax.tree.map(lambda a, b: (a + b) / 2, *steps)

    return step


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", [*MODELS, *IDEMPOTENT])
def test_it_changes_once(name, options):
    make = (MODELS | IDEMPOTENT)[name]
    actual = after(make(), lambda loss: ja.nnx.value_and_grad(loss, audit="raise", **options))
    expected = after(make(), nnx.value_and_grad)
    assert normwise(actual, expected) < EXACT
    if name in MODELS:
        assert normwise(after(make(), looped), expected) > 1e3 * EXACT


class Centered(nnx.Module):
    """A normalized layer, and the batch's mean, of which it keeps an average."""

    def __init__(self, over_all):
        self.first, self.over_all = Normed(nnx.SpectralNorm, update_stats=True), over_all
        self.mean = nnx.BatchStat(jnp.float64(1.0))

    def __call__(self, x):
        h = self.first(x) ** 3
        mean = self.over_all(jnp.mean(h))
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
        return h - mean


def test_it_changes_once_beside_collectives():
    step = lambda loss: ja.nnx.value_and_grad(loss, num_microbatches=3, audit="raise")
    actual = after(Centered(lambda mean: jax.lax.pmean(mean, "microbatch")), step)
    expected = after(Centered(lambda mean: mean), nnx.value_and_grad)
    assert normwise(actual, expected) < EXACT


def on_devices(loss, num_microbatches):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = ja.nnx.value_and_grad(loss, num_microbatches=num_microbatches, mesh_axes="data")

    def on_mesh(model, x):
        graphdef, state = nnx.split(model)

        def own(state, x):
            inner = nnx.merge(graphdef, state)
            return step(inner, x), nnx.state(inner)

        specs = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P()}
        out, new = jax.shard_map(own, check_vma=False, **specs)(state, x)
        nnx.update(model, new)
        return out

    return on_mesh


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_it_changes_once_over_devices(num_microbatches):
    """Where a state that runs from microbatch to microbatch is refused."""
    make = lambda: Model(
        set_all(count=lambda m: m.count[...] + 1, scale=lambda m: m.scale[...] / 2)
    )
    actual = after(make(), lambda loss: on_devices(loss, num_microbatches))
    assert normwise(actual, after(make(), nnx.value_and_grad)) < EXACT


def test_a_state_of_the_device_is_refused():
    update = set_all(count=lambda m: m.count[...] + jnp.float64(jax.lax.axis_index("data")))
    refused(lambda: on_devices(loss, 3)(Model(update), X), "CARRY", "mesh_axes")


@pytest.mark.parametrize("name", ["weight normalization", "spectral normalization", "a counter"])
def test_it_changes_once_where_microbatches_of_padding_are_skipped(name):

    def masked(model, x, mask, n):
        del n
        return ja.Mean(jnp.sum(jnp.mean(model(x) ** 2, axis=1) * mask), jnp.sum(mask))

    step = ja.nnx.value_and_grad(
        masked, num_microbatches=4, in_axes=(None, 0, 0, None), num_examples_argnum=3
    )
    make = (MODELS | IDEMPOTENT)[name]
    model, twin = make(), make()
    padded, mask = jnp.concatenate([X, 9 * X]), jnp.repeat(jnp.array([1.0, 0.0]), len(X))
    actual = step(model, padded, mask, len(X)), nnx.state(model)
    assert normwise(actual, (nnx.value_and_grad(loss)(twin, X), nnx.state(twin))) < EXACT


def test_it_changes_once_beside_dropout():
    """A stream draws for each example what it draws in the whole batch."""

    class Noisy(nnx.Module):
        def __init__(self):
            self.inner = Model(set_all(count=lambda m: m.count[...] + 1))
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=3))

        def __call__(self, x):
            return self.drop(self.inner(x))

    step = lambda loss: ja.nnx.value_and_grad(loss, num_microbatches=3, audit="raise")
    actual, new = after(Noisy(), step)
    expected, twin = after(Noisy(), nnx.value_and_grad)
    assert normwise(actual, expected) < EXACT
    assert float(new["inner"]["count"][...]) == float(twin["inner"]["count"][...]) == 2


def test_a_rule_that_reads_a_variable_late_runs_beside_it():
    """The loss is called again inside of the loop, where its states are in another order."""

    def late(model, x):
        slope = [jnp.float64(1.0)]
        double = jax.custom_vjp(lambda h: 2 * h)
        double.defvjp(lambda h: (2 * h, ()), lambda _, cotangent: (slope[0] * cotangent,))
        h = double(model.layer(x)) * model.count[...]
        model.count[...] = model.count[...] + 1
        model.rate[...] = model.rate[...] + jnp.sum(x)
        slope[0] = jnp.float64(7.0)
        return jnp.mean(h**2)

    step = lambda loss: ja.nnx.value_and_grad(loss, num_microbatches=3, audit=None)
    expected = after(Model(None), nnx.value_and_grad, late)
    assert normwise(after(Model(None), step, late), expected) < EXACT


def test_it_changes_once_in_a_call_that_draws():
    """A call is looked into: its states are not drawn from, and its stream is."""

    class Noisy(nnx.Module):
        def __init__(self):
            self.inner = Normed(nnx.SpectralNorm, update_stats=True)
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=3))

        def __call__(self, x):
            return nnx.jit(lambda m, x: m.drop(m.inner(x)))(self, x)

    step = lambda loss: ja.nnx.value_and_grad(loss, num_microbatches=3, audit="raise")
    actual, new = after(Noisy(), step)
    expected, twin = after(Noisy(), nnx.value_and_grad)
    assert normwise(actual, expected) < EXACT
    assert normwise(new["inner"], twin["inner"]) < EXACT


@pytest.mark.parametrize("name", ["spectral normalization", "the mean of the batch"])
def test_one_microbatch_may_assign_what_it_likes(name):
    """It is the whole batch."""

    def centered(model, x):
        model.scale[...] = jnp.mean(x)

    make = (MODELS | {"the mean of the batch": lambda: Model(centered)})[name]
    actual = after(make(), lambda loss: ja.nnx.value_and_grad(loss, num_microbatches=1))
    assert normwise(actual, after(make(), nnx.value_and_grad)) < EXACT


# -- what runs from microbatch to microbatch ---------------------------------------------------


def counted(model, x):
    model.count[...] = model.count[...] + len(x)


def drawn(model, x):
    del x
    model.count[...] = model.count[...] + 1
    key = jax.random.fold_in(jax.random.key(0), jnp.int32(model.count[...]))
    model.rate[...] = jax.random.uniform(key, dtype=jnp.float64)


def of_count(model, x):
    model.rate[...] = model.rate[...] + model.count[...]
    counted(model, x)


def unread(model, x):
    """A loss that does not read the states of its model."""
    model.update(model, x)
    return jnp.mean(model.layer(x) ** 2)


def seen(update):
    """The model after such a loss, and what was warned of."""
    model = Model(update)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ja.nnx.grad(unread, num_microbatches=3)(model, X)
    return model, caught


def test_a_count_of_examples_adds_up():
    model, caught = seen(counted)
    assert float(model.count[...]) == 1 + len(X)
    assert not caught


def test_a_state_of_such_a_count_runs_with_it():
    model, _ = seen(of_count)
    assert float(model.rate[...]) == 0.5 + 1 + 3 + 5


def test_a_state_of_a_state_of_the_batch_runs_with_both():
    """As a loop in Python leaves them: none of the three is the same in every microbatch."""
    update = set_all(
        teacher=lambda m: m.teacher[...] + m.rate[...],
        rate=lambda m: m.rate[...] + m.count[...],
    )
    model, _ = seen(in_turn(update, counted))
    count, rate, teacher = 1.0, 0.5, 2 * model.layer.kernel[...]
    for _ in range(3):
        count, rate, teacher = count + 2, rate + count, teacher + rate
    states = model.count[...], model.rate[...], model.teacher[...]
    assert normwise(states, (count, rate, teacher)) < EXACT


def test_microbatches_do_not_draw_the_same_numbers():
    """A state that a key is made of runs from microbatch to microbatch."""
    model, _ = seen(drawn)
    assert float(model.count[...]) == 1 + 3


def test_a_loss_that_runs_at_one_size_alone_counts_its_microbatches():
    def sized(model, x):
        assert len(x) == 2
        model.count[...] = model.count[...] + 1

    model, _ = seen(sized)
    assert float(model.count[...]) == 1 + 3


def test_streams_that_are_not_divided_leave_all_states_to_the_loop():
    model = Model(set_all(count=lambda m: m.count[...] + 1))
    ja.nnx.grad(loss, num_microbatches=3, example_streams=False, audit=None)(model, X)
    assert float(model.count[...]) == 1 + 3


def test_a_state_that_only_the_smaller_microbatches_change_runs():
    def small(model, x):
        if len(x) != 4:
            model.count[...] = model.count[...] + 1
            model.rate[...] = model.rate[...] + jnp.sum(x)

    model = Model(small)
    ja.nnx.grad(unread, microbatch_size=4, audit=None)(model, X)
    assert normwise((model.count[...], model.rate[...]), (2.0, 0.5 + jnp.sum(X[4:]))) < EXACT


def test_a_state_that_depends_on_a_size_beyond_runs():
    """At the size of no microbatch, and not at twice that size, but at the whole batch's."""

    def many(model, x):
        model.count[...] = model.count[...] + jnp.float64(len(x) > 4)

    model, caught = seen(many)
    assert float(model.count[...]) == 1
    assert len(caught) == 1


def test_a_coupled_loss_does_not_count_the_examples_of_a_microbatch():
    def centered(model, x):
        h = unread(model, x)
        return h - jax.lax.pmean(h, "microbatch") + jnp.mean(model.layer(x) ** 2)

    over_all = lambda x: jax.lax.psum(len(x), "microbatch")
    counting = lambda number: lambda m, x: m.count.set_value(m.count[...] + number(x))
    step = ja.nnx.grad(centered, num_microbatches=3)
    refused(lambda: step(Model(counting(len)), X), "number of examples", "lax.psum(len(x)")
    model = Model(counting(over_all))
    step(model, X)
    assert float(model.count[...]) == 1 + len(X)


def test_a_parameter_may_follow_from_a_state_that_stays_as_it_is():
    """Whatever the call says of streams."""
    step = lambda loss: ja.nnx.value_and_grad(loss, num_microbatches=3, example_streams=False)
    make = IDEMPOTENT["weight normalization"]
    assert normwise(after(make(), step), after(make(), nnx.value_and_grad)) < EXACT


def test_a_parameter_of_a_state_that_every_microbatch_changes_is_refused():
    """The message names what makes it change in each."""
    step = ja.nnx.grad(loss, num_microbatches=3, example_streams=False)
    model = MODELS["spectral normalization"]()
    says = "a state that every microbatch changes (with example_streams=False"
    refused(lambda: step(model, X), "assigns a value", "['kernel']", says)


OF_BATCH = {
    "its mean": lambda m, x: jnp.mean(x),
    "its size": lambda m, x: m.scale[...] * len(x),
}


@pytest.mark.parametrize("name", OF_BATCH)
def test_a_parameter_that_depends_on_the_batch_is_refused(name):
    def update(model, x):
        model.scale[...] = OF_BATCH[name](model, x)

    step = ja.nnx.grad(loss, num_microbatches=3)
    refused(lambda: step(Model(update), X), "['scale']", "the value depends on the batch")
