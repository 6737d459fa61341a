"""Models whose draws cannot be divided among the examples: they run as before, and it is said."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.flax.streaming import state, step
from tests.support.helpers import EXACT, INEXACT, data, normwise, refused

X = data(8, 3)
SAYS = r"depends on the partition(.|\n)*reason: .*{}(.|\n)*fix: draw (as|outside) .*=False"


class Drawing(nnx.Module):
    """A model that draws in ways that belong to no example, or not at all."""

    def __init__(self, how):
        self.how, self.rngs = how, nnx.Rngs(1)
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)

    def __call__(self, x):
        return self.linear(x) * DRAWS[self.how](self.rngs(), x)


def fixed(key, x):
    """A draw in a model that knows one size of microbatch."""
    return jax.random.uniform(key, (4, 3), x.dtype) * jnp.ones((4, 3), x.dtype)


DRAWS = {
    "gamma": lambda key, x: jax.random.gamma(key, 1.0, x.shape, x.dtype),
    "poisson": lambda key, x: jax.random.poisson(key, 1.0, x.shape).astype(x.dtype),
    "merged": lambda key, x: jax.random.uniform(key, (x.size,), x.dtype).reshape(x.shape),
    "of one size": fixed,
}


def loss(model, x):
    return jnp.mean(model(x) ** 2)


@INEXACT
@pytest.mark.parametrize("how", DRAWS)
def test_a_draw_that_cannot_be_divided_is_each_microbatchs_own_and_the_call_warns(how):
    threaded, model = Drawing(how), Drawing(how)
    expected = step(loss, num_microbatches=2, audit=None, example_streams=False)(threaded, X)
    reason = "run on 8" if how == "of one size" else __file__
    with pytest.warns(ja.InexactWarning, match=SAYS.format(reason)) as caught:
        actual = step(loss, num_microbatches=2)(model, X)
    assert {one.filename for one in caught} == {__file__}
    assert normwise(actual, expected) == 0
    assert normwise(state(model), state(threaded)) == 0
    assert normwise(step(loss, num_microbatches=2, audit=None)(Drawing(how), X), expected) == 0


@pytest.mark.parametrize("how", DRAWS)
def test_who_asks_for_errors_gets_the_reason(how):
    model = Drawing(how)
    with pytest.raises((ValueError, TypeError, NotImplementedError)):
        step(loss, num_microbatches=2, audit="raise")(model, X)
    assert normwise(state(model), state(Drawing(how))) == 0


def test_one_microbatch_draws_what_the_full_batch_draws():
    for how in set(DRAWS) - {"of one size"}:
        expected = nnx.jit(nnx.value_and_grad(loss))(Drawing(how), X)
        assert normwise(step(loss, num_microbatches=1)(Drawing(how), X), expected) < EXACT


def test_a_model_of_one_size_that_does_not_draw_is_exact():
    fun = lambda model, x: jnp.mean(model.linear(x) * jnp.ones((4, 3), x.dtype))
    expected = nnx.value_and_grad(lambda model, x: jnp.mean(model.linear(x)))(Drawing("gamma"), X)
    actual = step(fun, num_microbatches=2, audit=None)(Drawing("gamma"), X)
    assert normwise(actual, expected) < EXACT


def test_an_error_of_the_function_comes_as_it_is():
    wrong = lambda model, x: loss(model, x) + jnp.mean(x @ jnp.ones((4, 4), x.dtype))
    with pytest.raises(TypeError, match="contracting dimensions") as info:
        step(wrong, num_microbatches=2)(Drawing("gamma"), X)
    assert info.value.__context__ is None


def test_a_warning_about_the_loss_is_not_taken_for_one_about_streams():
    """Where warnings are errors: with numbers of the microbatch's own it would not come again."""

    def of_noise(model, x):
        noise = jax.random.normal(model.rngs(), x.shape, x.dtype)
        return jnp.mean(model.linear(x)) * jnp.mean(noise)

    step(of_noise, num_microbatches=2, example_streams=False)(Drawing("merged"), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ja.InexactWarning, match=r"^of_noise is not exact over microbatches"):
            step(of_noise, num_microbatches=2)(Drawing("merged"), X)


@INEXACT
@pytest.mark.parametrize("audit", ["warn", None])
def test_errors_of_the_run_are_the_calls(audit):
    """A host that fails once is not asked again, for the numbers of other masks."""
    asked = []

    def host(x):
        asked.append(1)
        if len(asked) == 1:
            raise OSError("the disk is full")
        return x

    def hosted(model, x):
        kept = jax.random.bernoulli(model.rngs(), 0.5, x.shape)
        same = jax.pure_callback(host, jax.ShapeDtypeStruct((), x.dtype), jnp.float64(1))
        return jnp.mean(jnp.where(kept, model.linear(x), 0.0)) * jax.lax.stop_gradient(same)

    model = Drawing("merged")
    with pytest.raises(jax.errors.JaxRuntimeError, match="the disk is full"):
        step(hosted, num_microbatches=2, audit=audit)(model, X)
    assert normwise(state(model), state(Drawing("merged"))) == 0


def test_where_the_warning_is_an_error_the_model_is_as_it_was():
    model = Drawing("gamma")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ja.InexactWarning, match="gamma"):
            step(loss, num_microbatches=2)(model, X)
    assert normwise(state(model), state(Drawing("gamma"))) == 0


def test_on_devices_the_reason_is_said():
    """There a state that runs through the microbatches is refused as well."""
    graphdef, variables = nnx.split(Drawing("gamma"))

    def own(variables, x):
        model = nnx.merge(graphdef, variables, copy=True)
        return step(loss, num_microbatches=2, mesh_axes="data")(model, x)[0]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    refused(lambda: jax.jit(mapped)(variables, X), "gamma distribution", __file__)


# -- keys that nnx does not know ----------


class Plain(nnx.Module):
    """A model that keeps its key as integers, in a variable of its own."""

    def __init__(self):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        self.key = nnx.Variable(jax.random.PRNGKey(1))

    def __call__(self, x):
        key, own = jax.random.split(self.key.get_value())
        self.key.set_value(key)
        return jnp.where(jax.random.bernoulli(own, 0.5, x.shape), self.linear(x), 0.0)


def test_a_key_that_is_a_plain_variable_is_named():
    with pytest.warns(ja.InexactWarning, match="a variable of the model changes.*\n.*\n.*RngKey"):
        step(loss, num_microbatches=2)(Plain(), X)
    expected = nnx.value_and_grad(loss)(Plain(), X)
    chosen = step(loss, num_microbatches=2, example_streams=False)(Plain(), X)  # in silence
    assert normwise(chosen, expected) > 1e-2


def test_a_key_that_is_carried_is_declared():
    """Who writes CARRY says that the numbers are the microbatch's own."""

    def fun(params, x, key):
        key, own = jax.random.split(key)
        kept = jax.random.bernoulli(own, 0.5, x.shape)
        return jnp.mean(jnp.where(kept, x @ params, 0.0)), ja.Carry(key)

    options = {"in_axes": (None, 0, ja.CARRY), "has_aux": True, "num_microbatches": 2}
    ja.value_and_grad(fun, **options)(data(3, 3), X, jax.random.PRNGKey(1))
