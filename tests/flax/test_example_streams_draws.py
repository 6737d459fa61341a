"""Where a model with example streams draws: behind transformations, from several streams, for
all."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxaccum as ja
from tests.flax.streaming import state, step
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, normwise, refused

WIDE = {"param_dtype": jnp.float64}
X = data(8, 3)
OPTIONS = [{"num_microbatches": 1}, {"microbatch_size": 3}]
PLAIN = {"num_microbatches": 2, "audit": None, "example_streams": False}
MEAN = lambda model, x: jnp.mean(model(x) ** 2)


class Drawing(nnx.Module):
    """A model that draws behind a transformation of nnx, or from streams of several kinds."""

    def __init__(self, how):
        self.how, rngs = how, nnx.Rngs(0)
        self.linear, self.rngs = nnx.Linear(3, 3, rngs=rngs, **WIDE), nnx.Rngs(noise=5)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.key = nnx.RngKey(jax.random.key(2), tag="own")
        layer = lambda rngs: nnx.Dropout(0.5, rngs=rngs)
        self.layers = nnx.vmap(layer, in_axes=0, out_axes=0)(nnx.Rngs(7).split(3))

    def __call__(self, x):
        return DRAWS[self.how](self, self.linear(x))


def noise(key, x):
    return x * (1 + jax.random.normal(key, x.shape, x.dtype))


def splitting(model, x):
    key, own = jax.random.split(model.key.get_value())
    model.key.set_value(key)
    return noise(own, x)


def layered(body):
    return lambda model, x: nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
        x, model.layers
    )


def drop_path(model, x):
    """One number per example, as stochastic depth draws it."""
    return jnp.where(jax.random.bernoulli(model.rngs.noise(), 0.5, (len(x), 1)), x, 0.0)


def time_major(model, x):
    """Dropout where the examples lie on the second axis, as recurrent layers have them."""
    x = jnp.stack([x, 2 * x])
    return jnp.mean(model.dropout(x), 0)


def forked(model, x):
    return noise(model.rngs.fork().noise(), noise(model.rngs.noise(), x))


DRAWS = {
    "checkpoint": lambda model, x: nnx.remat(lambda m, x: m.dropout(x))(model, x),
    "jit": lambda model, x: nnx.jit(lambda m, x: m.dropout(x))(model, x),
    "layers in a scan": layered(lambda x, layer: jnp.sin(layer(x))),
    "checkpointed layers": layered(nnx.remat(lambda x, layer: jnp.sin(layer(x)))),
    "a key that is split": splitting,
    "a fork": forked,
    "one number per example": drop_path,
    "the second axis": time_major,
    "two streams": lambda model, x: noise(model.rngs.noise(), model.dropout(x)),
    "given to the layer": lambda model, x: model.dropout(x, rngs=model.rngs.noise()),
}


THREADED = ("jit", "two streams")


@pytest.mark.parametrize("how", DRAWS)
def test_wherever_a_model_draws_the_gradient_is_that_of_nnx(how):
    """And what it draws matters: other numbers have another gradient."""
    whole, of_nnx = Drawing(how), nnx.jit(nnx.value_and_grad(MEAN))
    expected = of_nnx(whole, X)
    for options in OPTIONS if how in THREADED else OPTIONS[1:]:
        model = Drawing(how)
        assert normwise(step(MEAN, **options)(model, X), expected) < EXACT
        assert normwise(state(model), state(whole)) == 0
    assert normwise(of_nnx(whole, X), expected) > 1e-2
    if how in THREADED:
        assert normwise(step(MEAN, **PLAIN)(Drawing(how), X), expected) > 1e-2


# -- draws that all examples share ----------


class Sharing(nnx.Module):
    """A model whose draws are the batch's: noise on a weight, or one mask for all examples."""

    def __init__(self, how):
        self.how, rngs = how, nnx.Rngs(0)
        self.linear, self.rngs = nnx.Linear(4, 4, rngs=rngs, **WIDE), nnx.Rngs(1)
        self.dropout = nnx.Dropout(0.5, broadcast_dims=(0,), rngs=rngs)
        heads = {
            "num_heads": 2,
            "in_features": 4,
            "decode": False,
            "dropout_rate": 0.5,
            "deterministic": False,
        }
        self.attention = nnx.MultiHeadAttention(**heads, rngs=rngs, **WIDE)

    def __call__(self, x):
        match self.how:
            case "a weight":
                kernel = self.linear.kernel[...]
                return x @ (
                    kernel * (1 + jax.random.normal(self.rngs(), kernel.shape, kernel.dtype))
                )
            case "a number":
                return self.linear(x) * jax.random.uniform(self.rngs(), (), jnp.float64)
            case "gamma":
                return (
                    self.linear(x)
                    * jax.random.gamma(self.rngs(), 2.0, (4,), jnp.float64)[None, None]
                )
            case "a mask":
                return self.dropout(self.linear(x))
            case _:  # Flax shares the mask of attention by default
                return self.attention(x)


# Of one example JAX broadcasts nothing, which the audit cannot follow.
ONE = {"num_microbatches": 8, "audit": None}
SHARED = covering(
    ["a weight", "a number", "gamma", "a mask", "attention"],
    [ONE, {"num_microbatches": 2}, {"microbatch_size": 3}],
)


@pytest.mark.parametrize(("how", "options"), [*SHARED, ("a weight", SHARED[1][1])], ids=str)
def test_what_all_examples_share_is_drawn_once_for_the_batch(how, options):
    """Also where a microbatch is as long as the weight, or has one example."""
    tokens, whole, model = data(8, 4, 4), Sharing(how), Sharing(how)
    of_nnx = nnx.jit(nnx.value_and_grad(MEAN))
    expected = of_nnx(whole, tokens)
    assert normwise(step(MEAN, **options)(model, tokens), expected) < EXACT
    assert normwise(state(model), state(whole)) == 0
    assert normwise(of_nnx(whole, tokens), expected) > 1e-2  # other numbers
    if how == "a weight":
        assert normwise(step(MEAN, **PLAIN)(Sharing(how), tokens), expected) > 1e-2


def twice_the_layers(model, x):
    """Masks that all examples share, of scans over 4 layers and over 8."""
    for count in (4, 8):
        keys = jax.random.split(model.rngs(), count)
        layer = lambda h, key: (h * jax.random.uniform(key, (4,), h.dtype)[None], None)
        x, _ = jax.lax.scan(layer, x, keys)
    return jnp.mean(model.linear(x) ** 2)


def twice_the_numbers(model, x):
    """A mask of the rows, and noise that all examples share, of shapes that look like it."""
    noise = [jax.random.normal(model.rngs(), (n, 1), x.dtype) for n in (4, 8)]
    keep = jax.random.bernoulli(model.rngs(), 0.5, (len(x), 3, 1, 1))
    scaled = x * jnp.mean(noise[0]) * jnp.mean(noise[1])
    return jnp.mean(jnp.where(keep[:, 0, :, 0], model.linear(scaled), 0.0) ** 2)


TWICE = [(twice_the_layers, 4), (twice_the_numbers, 4), (twice_the_numbers, 2)]


@pytest.mark.parametrize(("fun", "size"), TWICE)
def test_shared_draws_of_twice_the_size_are_told_apart(fun, size):
    """In microbatches of 4: what twice as many examples draw has a shape of 8 as well."""
    x = data(8, 4)
    expected = nnx.jit(nnx.value_and_grad(fun))(Sharing("a weight"), x)
    assert normwise(step(fun, microbatch_size=size)(Sharing("a weight"), x), expected) < EXACT


# -- which streams ----------


def test_a_filter_says_which_streams():
    alone = {"num_microbatches": 4, "audit": None}
    for selected in ("noise", nnx.PathContains("rngs"), lambda path, x: x.tag == "noise"):
        model = Drawing("two streams")
        step(MEAN, **alone, example_streams=selected)(model, X)
        assert model.rngs.noise.count.get_value() == 1
        assert model.dropout.rngs.count.get_value() == (
            1 if isinstance(selected, nnx.PathContains) else 4
        )
    both = step(MEAN, num_microbatches=4, example_streams=("noise", "default"))(
        Drawing("two streams"), X
    )
    expected = nnx.jit(nnx.value_and_grad(MEAN))(Drawing("two streams"), X)
    assert normwise(both, expected) < EXACT
    model = Drawing("two streams")
    step(MEAN, **alone, example_streams=False)(model, X)
    assert model.rngs.noise.count.get_value() == model.dropout.rngs.count.get_value() == 4
    wrong = step(MEAN, num_microbatches=2, example_streams="dropout")
    says = "'dropout'", "none", "'default', 'noise', 'own'"
    refused(lambda: wrong(Drawing("two streams"), X), *says)


def test_a_model_without_streams_has_none():
    fun = lambda model, x: jnp.mean(model(x) ** 2)
    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0), **WIDE)
    assert (
        normwise(step(fun, num_microbatches=4)(linear, X), nnx.value_and_grad(fun)(linear, X))
        < EXACT
    )


def test_streams_may_be_an_argument_and_aux_comes_out():
    model, rngs = nnx.Linear(3, 3, rngs=nnx.Rngs(0), **WIDE), nnx.Rngs(dropout=1)

    def fun(model, x, rngs):
        y = noise(rngs.dropout(), model(x))
        return jnp.mean(y**2), ja.Concat(y)

    key = jax.random.fold_in(rngs.dropout.key.get_value(), 0)
    draws = jax.random.normal(key, (8, 3), jnp.float64)
    for options in OPTIONS:
        (_, rows), _ = step(fun, **options, has_aux=True, in_axes=(None, 0, None))(
            model, X, nnx.Rngs(dropout=1)
        )
        assert normwise(rows, model(X) * (1 + draws)) < EXACT
    grads, rows = ja.nnx.grad(
        fun, num_microbatches=4, has_aux=True, in_axes=(None, 0, None), example_streams="dropout"
    )(model, X, rngs)
    assert normwise(rows, model(X) * (1 + draws)) < EXACT
    assert rngs.dropout.count.get_value() == 1
    assert set(grads) == {"kernel", "bias"}
