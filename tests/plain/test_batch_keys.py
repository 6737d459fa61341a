"""Keys of the batch: a microbatch draws its rows of what JAX draws for the whole batch.

This is what we need of ``jax.extend.random``, on every supported version of JAX. The oracle is JAX
itself: it draws for all examples, and the rows are indexed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaccum._program import batch_keys
from jaxaccum._program.batch_keys import Drawn, Larger, Rows
from tests.support.covering import covering
from tests.support.helpers import data, same

SIZE, BATCH = 4, 10
ADJACENT, STRIDED = (0, 1, 2, 3), (0, 2, 4, 6)
SHARED = [(), (2,), (3,), (1, 3), (4, 5), (4, 4), (2, 3)]
"""What as many examples and twice as many draw alike."""
IMPLS = ["threefry2x32", "rbg", "unsafe_rbg"]
DTYPES = [jnp.uint8, jnp.uint16, jnp.uint32, jnp.uint64]
BITS = [("threefry2x32", True, dtype, ADJACENT) for dtype in DTYPES]
BITS += [("threefry2x32", True, dtype, STRIDED) for dtype in DTYPES]
BITS += [("threefry2x32", False, dtype, ADJACENT) for dtype in (jnp.uint8, jnp.uint32)]
BITS += [("rbg", True, jnp.uint32, offsets) for offsets in (ADJACENT, STRIDED)]
BITS += [("unsafe_rbg", True, jnp.uint16, STRIDED)]
"""A generator, whether it draws each number by its place, and what is drawn."""


def keys_of(impl="threefry2x32", *larger, first=2, offsets=ADJACENT, of=()):
    """A key of the batch, and the same in the microbatch whose first example is `first`; `larger`
    are the shapes that twice as many examples draw. `of` makes it an array of keys."""
    key = jax.random.key(3, impl=impl)
    key = jax.random.split(key, of) if of else key
    own = batch_keys.moved(batch_keys.data_of(key), jnp.int32(first))
    shapes = (*larger, *SHARED)
    drawn = frozenset(Drawn(kind, shape) for kind in (False, True) for shape in shapes)
    twice = Larger(drawn, drawn, has_gamma=False)
    impl = batch_keys.generator(jax.random.key_impl(key), Rows(offsets, BATCH), twice)
    return key, jax.random.wrap_key_data(own, impl=impl)


def rows(offsets=ADJACENT, first=2):
    return first + np.asarray(offsets)


@pytest.mark.parametrize(("impl", "by_place", "dtype", "offsets"), BITS)
def test_the_axis_that_grows_holds_the_examples(impl, by_place, dtype, offsets):
    shapes = (8, 3), (2, 8, 3), (4, 5), (4, 4)
    with jax.threefry_partitionable(by_place):
        whole, key = keys_of(impl, *shapes, offsets=offsets)
        bits = lambda shape: functools.partial(jax.random.bits, shape=shape, dtype=dtype)
        first = jax.jit(bits((SIZE, 3)))(key)
        assert same(first, bits((BATCH, 3))(whole)[rows(offsets)])
        assert same(bits((2, SIZE, 3))(key), bits((2, BATCH, 3))(whole)[:, rows(offsets)])
        for shape in ((), (3,), (1, 3), (SIZE, 5), (SIZE, SIZE)):  # the same for twice as many
            assert same(bits(shape)(key), bits(shape)(whole))
        assert not same(first, bits((SIZE, 3))(whole))  # which every microbatch would draw


DISTRIBUTIONS = {
    "bernoulli": lambda key, shape: jax.random.bernoulli(key, 0.3, shape),
    "uniform": lambda key, shape: jax.random.uniform(key, shape, jnp.float32),
    "normal": lambda key, shape: jax.random.normal(key, shape, jnp.float64),
    "complex normal": lambda key, shape: jax.random.normal(key, shape, jnp.complex64),
    "truncated": lambda key, shape: jax.random.truncated_normal(key, -1.0, 1.0, shape),
    "integers": lambda key, shape: jax.random.randint(key, shape, 0, 1000),
    "gumbel": lambda key, shape: jax.random.gumbel(key, shape),
    "categories": lambda key, shape: jax.random.categorical(key, jnp.zeros((*shape, 5))),
    "a key per example": lambda key, shape: jax.vmap(
        lambda own: jax.random.exponential(own, shape[1:])
    )(jax.random.split(key, shape[0])),
}


@pytest.mark.parametrize(("name", "offsets"), covering(list(DISTRIBUTIONS), [ADJACENT, STRIDED]))
def test_numbers_of_any_distribution_are_those_of_the_batch(offsets, name):
    draw = DISTRIBUTIONS[name]
    whole, key = keys_of("threefry2x32", (8, 3), (8, 3, 5), (8,), offsets=offsets)
    actual = draw(key, (SIZE, 3))
    assert same(actual, draw(whole, (BATCH, 3))[rows(offsets)])
    assert not same(actual, draw(whole, (SIZE, 3)))


def through_scan(draw, key):
    return jax.lax.scan(lambda _, own: (None, draw(own)), None, jax.random.split(key, 2))[1][1]


def through_while(draw, key):
    step = lambda state: (state[0] + 1, jax.random.fold_in(state[1], state[0]))
    return draw(jax.lax.while_loop(lambda state: state[0] < 2, step, (0, key))[1])


def through_array(draw, key):
    return draw(jnp.stack([key, jax.random.fold_in(key, 1)])[::-1][0])


WAYS = {
    "split": lambda draw, key: draw(jax.random.split(key, 3)[2]),
    "fold_in": lambda draw, key: draw(jax.random.fold_in(key, 7)),
    "nested splits": lambda draw, key: draw(jax.random.split(key, (2, 3))[1, 2]),
    "clone": lambda draw, key: draw(jax.random.clone(key)),
    "an array of keys": through_array,
    "cond": lambda draw, key: draw(
        jax.lax.cond(True, lambda: jax.random.fold_in(key, 1), lambda: key)
    ),
    "checkpoint": lambda draw, key: jax.checkpoint(draw)(key),
    "scan": through_scan,
    "while_loop": through_while,
}


@pytest.mark.parametrize(("name", "impl"), covering(list(WAYS), IMPLS))
def test_what_acts_on_a_key_acts_on_the_key_of_the_batch(name, impl):
    whole, key = keys_of(impl, (8, 3))
    through = lambda size: jax.jit(
        lambda key: WAYS[name](lambda own: jax.random.uniform(own, (size, 3)), key)
    )
    actual = through(SIZE)(key)
    assert same(actual, through(BATCH)(whole)[rows()])
    assert not same(actual, through(SIZE)(whole))


def test_a_map_over_keys_draws_the_rows_from_each():
    heads = lambda size: (
        lambda key: jax.vmap(lambda own: jax.random.uniform(own, (size, 3)))(
            jax.random.split(key, 2)
        )
    )
    whole, key = keys_of("threefry2x32", (8, 3))
    assert same(heads(SIZE)(key), heads(BATCH)(whole)[:, rows()])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_key_of_the_batch_comes_out(impl):
    whole, key = keys_of(impl)
    assert batch_keys.is_batch_key(key.dtype)
    assert not batch_keys.is_batch_key(whole.dtype)
    assert not batch_keys.is_batch_key(data(1).dtype)
    assert batch_keys.base_of(key.dtype) == impl
    for change in (
        lambda key: key,
        lambda key: jax.random.split(key, 2),
        lambda key: jax.random.fold_in(key, 5),
    ):
        assert same(batch_keys.key_of_batch(change(key)), jax.random.key_data(change(whole)))


def test_each_key_of_an_array_draws_its_rows():
    """Layers with a leading axis have an array of keys."""
    layers, keys = keys_of("threefry2x32", (8, 2), of=(3,))
    assert keys.shape == (3,)
    for own, whole in zip(keys, layers, strict=True):
        draw = lambda key, size: jax.random.uniform(key, (size, 2))
        assert same(draw(own, SIZE), draw(whole, BATCH)[rows()])


def test_equal_keys_have_one_type_so_that_nothing_is_traced_again():
    dtype = lambda *args, **options: keys_of(*args, **options)[1].dtype
    assert dtype("rbg", (8, 3)) == dtype("rbg", (8, 3), first=5)
    others = [
        dtype("rbg", (8, 4)),
        dtype("threefry2x32", (8, 3)),
        dtype("rbg", (8, 3), offsets=STRIDED),
    ]
    assert all(dtype("rbg", (8, 3)) != other for other in others)


def test_no_other_key_is_made_by_this_generator():
    impl = jax.random.key_impl(keys_of()[1])
    with pytest.raises(TypeError, match="made from the key of the call"):
        jax.random.key(0, impl=impl)


# -- places beyond 32 bits, which a large batch has ----------


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_a_product_has_64_bits(x, factor):
    high, low = batch_keys._product(jnp.uint32(x), factor)
    assert (int(high) << 32) + int(low) == x * factor


@pytest.mark.parametrize("before", [1, 3])
@given(st.lists(st.integers(0, 2**21 - 1), min_size=2, max_size=2))
def test_the_place_of_an_entry_is_counted_in_python(before, examples):
    shape, size = (before, 2, 5000), 2**21
    high, low = batch_keys._places(shape, 1, jnp.asarray(examples, jnp.uint32), size)
    places = (high.astype(jnp.uint64) << 32) + low.astype(jnp.uint64)
    for p, r in np.ndindex(before, 2):
        first = (p * size + examples[r]) * 5000
        assert same(places[p, r], jnp.arange(first, first + 5000, dtype=jnp.uint64))


def test_places_that_pass_32_bits_carry():
    """A row of 5000 entries in which the 32 bits end."""
    row = 2**32 // 5000
    high, low = batch_keys._places((1, 5000), 0, jnp.asarray([row], jnp.uint32), 2**20)
    places = row * 5000 + np.arange(5000, dtype=np.uint64)
    assert same(high[0], jnp.asarray(places >> 32, jnp.uint32))
    assert same(low[0], jnp.asarray(places & 0xFFFFFFFF, jnp.uint32))
    assert set(high[0].tolist()) == {0, 1}
    assert batch_keys._places((2, 3), 0, jnp.zeros(2, jnp.uint32), 2**32) is None
