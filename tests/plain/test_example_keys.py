"""Keys that hold one key per example: what JAX does with them, and whose numbers come out.

This is what we need of ``jax.extend.random.define_prng_impl``, on every supported version of JAX.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from jaxaccum._program import example_keys
from tests.support.helpers import data, same

SIZE = 4
IMPLS = pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])


def keys_of(impl):
    """The key of a stream, and one for each example."""
    stream = jax.random.key(3, impl=impl)
    return stream, jax.random.split(stream, SIZE)


def joined(impl, *larger):
    """The key that holds them; `larger` are the shapes that twice as many examples draw."""
    return example_keys.joined(*keys_of(impl), frozenset(larger))


def one_by_one(draw, keys, axis=0):
    """A Python loop: each example draws from its own key."""
    return jnp.stack([draw(key) for key in keys], axis)


@IMPLS
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64])
def test_the_axis_that_grows_holds_the_examples(dtype, impl):
    stream, keys = keys_of(impl)
    key = joined(impl, (8, 3), (2, 8, 3), (4, 5), (4, 4))
    bits = lambda shape: jax.jit(functools.partial(jax.random.bits, shape=shape, dtype=dtype))
    first, second = bits((SIZE, 3))(key), bits((2, SIZE, 3))(key)
    assert same(first, one_by_one(bits((3,)), keys))
    assert same(second, one_by_one(bits((2, 3)), keys, axis=1))
    for shape in (
        (),
        (3,),
        (1, 3),
        (SIZE, 5),
        (SIZE, SIZE),
    ):  # as many numbers for twice as many examples
        assert same(bits(shape)(key), bits(shape)(stream))
    assert not same(first, bits((SIZE, 3))(stream))


DISTRIBUTIONS = {
    "bernoulli": lambda key, shape: jax.random.bernoulli(key, 0.3, shape),
    "uniform": lambda key, shape: jax.random.uniform(key, shape, jnp.float32),
    "normal": lambda key, shape: jax.random.normal(key, shape, jnp.float64),
    "complex normal": lambda key, shape: jax.random.normal(key, shape, jnp.complex64),
    "truncated": lambda key, shape: jax.random.truncated_normal(key, -1.0, 1.0, shape),
    "integers": lambda key, shape: jax.random.randint(key, shape, 0, 1000),
    "gumbel": lambda key, shape: jax.random.gumbel(key, shape),
    "categories": lambda key, shape: jax.random.categorical(key, jnp.zeros((*shape, 5))),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_numbers_of_any_distribution_are_those_of_the_example_alone(name):
    draw, (stream, keys) = DISTRIBUTIONS[name], keys_of("threefry2x32")
    key = joined("threefry2x32", (8, 3), (8, 3, 5))
    actual = draw(key, (SIZE, 3))
    assert same(actual, one_by_one(lambda own: draw(own, (3,)), keys))
    assert not same(actual, draw(stream, (SIZE, 3)))


def through_scan(draw, key):
    return jax.lax.scan(lambda _, own: (None, draw(own)), None, jax.random.split(key, 2))[1][1]


def through_while(draw, key):
    step = lambda state: (state[0] + 1, jax.random.fold_in(state[1], state[0]))
    return draw(jax.lax.while_loop(lambda state: state[0] < 2, step, (0, key))[1])


WAYS = {
    "split": lambda draw, key: draw(jax.random.split(key, 3)[2]),
    "fold_in": lambda draw, key: draw(jax.random.fold_in(key, 7)),
    "nested splits": lambda draw, key: draw(jax.random.split(key, (2, 3))[1, 2]),
    "clone": lambda draw, key: draw(jax.random.clone(key)),
    "an array of keys": lambda draw, key: draw(
        jnp.stack([key, jax.random.fold_in(key, 1)])[::-1][0]
    ),
    "cond": lambda draw, key: draw(
        jax.lax.cond(True, lambda: jax.random.fold_in(key, 1), lambda: key)
    ),
    "checkpoint": lambda draw, key: jax.checkpoint(draw)(key),
    "scan": through_scan,
    "while_loop": through_while,
}


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("name", WAYS)
def test_what_acts_on_a_key_acts_on_the_key_of_every_example(name, impl):
    stream, keys = keys_of(impl)
    rows = lambda key: jax.random.uniform(key, (SIZE, 3))
    actual = jax.jit(lambda key: WAYS[name](rows, key))(joined(impl, (8, 3)))
    alone = jax.jit(lambda key: WAYS[name](lambda own: jax.random.uniform(own, (3,)), key))
    assert same(actual, one_by_one(alone, keys))
    assert not same(actual, jax.jit(lambda key: WAYS[name](rows, key))(stream))


def test_a_map_over_keys_maps_those_of_every_example():
    heads = lambda shape: (
        lambda key: jax.vmap(lambda own: jax.random.uniform(own, shape))(jax.random.split(key, 2))
    )
    actual = heads((SIZE, 3))(joined("threefry2x32", (8, 3)))
    assert same(actual, one_by_one(heads((3,)), keys_of("threefry2x32")[1], axis=1))


@IMPLS
def test_the_key_of_the_stream_comes_out(impl):
    stream, _ = keys_of(impl)
    key = joined(impl)
    assert example_keys.is_joined(key.dtype)
    assert not example_keys.is_joined(stream.dtype)
    assert not example_keys.is_joined(data(1).dtype)
    data_of = jax.random.key_data
    assert same(example_keys.stream_data(key), data_of(stream))
    assert same(
        example_keys.stream_data(jax.random.split(key, 2)), data_of(jax.random.split(stream, 2))
    )
    assert same(
        example_keys.stream_data(jax.random.fold_in(key, 5)),
        data_of(jax.random.fold_in(stream, 5)),
    )


def test_arrays_of_keys_hold_those_of_every_example():
    """Layers with a leading axis have an array of keys."""
    stream, _ = keys_of("threefry2x32")
    layers = jax.random.split(stream, 3)
    keys = jnp.stack([jax.random.split(key, SIZE) for key in layers])
    key = example_keys.joined(layers, keys, frozenset([(8, 2)]))
    assert key.shape == (3,)
    for own, alone in zip(key, keys, strict=True):
        assert same(
            jax.random.uniform(own, (SIZE, 2)),
            one_by_one(lambda key: jax.random.uniform(key, (2,)), alone),
        )


def test_equal_keys_have_one_type_so_that_nothing_is_traced_again():
    assert joined("rbg", (8, 3)).dtype == joined("rbg", (8, 3)).dtype
    others = [joined("rbg", (8, 4)), joined("threefry2x32", (8, 3))]
    assert all(joined("rbg", (8, 3)).dtype != other.dtype for other in others)


def test_no_other_key_is_made_by_this_generator():
    impl = jax.random.key_impl(joined("threefry2x32"))
    with pytest.raises(TypeError, match="made from a stream"):
        jax.random.key(0, impl=impl)
