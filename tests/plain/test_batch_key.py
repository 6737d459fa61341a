"""BATCH_KEY: a loss that draws has the gradient of the whole batch, with the whole batch's numbers.

The oracle is `jax.value_and_grad` of the same function, whose key is an ordinary one.
"""

import itertools

import hypothesis
import jax
import jax.extend.core as jex
import jax.extend.random
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum.testing.strategies import partitions
from tests.plain.test_batch_keys import keys_of
from tests.support.covering import covering
from tests.support.helpers import EXACT, INEXACT, data, normwise, refused, same

X, W = data(12, 3), data(3, 3, seed=1)
AXES = (None, 0, ja.BATCH_KEY)
EXAMPLES = hypothesis.settings.default.max_examples
IMPLS = ["threefry2x32", "rbg", "unsafe_rbg"]
OPTIONS = [
    {"num_microbatches": 1},
    {"num_microbatches": 4},
    {"microbatch_size": 5},
    {"num_microbatches": 3, "split": "strided"},
]
EVERY = pytest.mark.parametrize("options", OPTIONS, ids=str)


# -- what a loss draws ----------


def dropout(key, h):
    return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), 2 * h, 0.0)


def noise(key, h):
    return h + jax.random.normal(key, h.shape, h.dtype)


def drop_path(key, h):
    return jnp.where(jax.random.bernoulli(key, 0.5, (len(h), 1)), h, 0.0)


def a_weight(key, h):
    return h @ (1 + jax.random.normal(key, (3, 3), h.dtype))


def chosen(key, h):
    """An entry of each row, drawn by the row's own numbers."""
    return h * jax.nn.one_hot(
        jax.random.categorical(key, jax.lax.stop_gradient(h)), 3, dtype=h.dtype
    )


def time_major(key, h):
    return jnp.mean(dropout(key, jnp.stack([h, 2 * h])), 0)


def a_key_per_example(key, h):
    return jax.vmap(noise)(jax.random.split(key, len(h)), h)


def a_number(key, h):
    return h * jax.random.uniform(key, (), h.dtype)


DRAWS = {
    draw.__name__: draw
    for draw in (
        dropout, noise, drop_path, a_weight, chosen, time_major, a_key_per_example, a_number
    )
}  # fmt: skip


def scanned(draw):
    def fun(key, h):
        step = lambda h, key: (jnp.sin(draw(key, h)), None)
        return jax.lax.scan(step, h, jax.random.split(key, 2))[0]

    return fun


def in_order(draw):
    """A loop that folds its index into the key."""
    body = lambda i, h, key: jnp.sin(draw(jax.random.fold_in(key, i), h))
    return lambda key, h: jax.lax.fori_loop(0, 2, lambda i, h: body(i, h, key), h)


WAYS = {
    "as it is": lambda draw: draw,
    "split": lambda draw: lambda key, h: draw(jax.random.split(key, 3)[1], h),
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "cond": lambda draw: (
        lambda key, h: jax.lax.cond(
            jnp.sum(W) > 0, lambda: draw(key, h), lambda: draw(jax.random.fold_in(key, 1), h)
        )
    ),
    "scan": scanned,
    "fori_loop": in_order,
    "heads": lambda draw: (
        lambda key, h: jnp.mean(jax.vmap(draw, (0, None))(jax.random.split(key, 2), h), 0)
    ),
}


def loss_of(*layers):
    def loss(w, x, key):
        h = x
        for i, layer in enumerate(layers):
            h = layer(jax.random.fold_in(key, i), jnp.sin(h @ w))
        return jnp.mean((h - 1) ** 2)

    return loss


def error(loss, key, args=(W, X), in_axes=AXES, **options):
    expected = jax.jit(jax.value_and_grad(loss))(*args, key)
    actual = jax.jit(ja.value_and_grad(loss, in_axes=in_axes, **options))(*args, key)
    return normwise(actual, expected)


layers = st.builds(
    lambda draw, way: (f"{draw}, {way}", WAYS[way](DRAWS[draw])),
    st.sampled_from(sorted(DRAWS)),
    st.sampled_from(sorted(WAYS)),
)


@hypothesis.settings(max_examples=EXAMPLES // 5)
@given(st.lists(layers, min_size=1, max_size=2), partitions(12), st.integers(0, 3))
def test_the_gradient_is_that_of_the_whole_batch_with_its_numbers(layers, options, seed):
    loss = loss_of(*(layer for _, layer in layers))
    refusal = None
    try:
        found = error(loss, jax.random.key(seed), audit="raise", **options)
    except ValueError as error_of_size:  # a weight, or a number of keys, is as long as a microbatch
        refusal = str(error_of_size)
        found = error(loss, jax.random.key(seed), audit="raise", microbatch_size=4)
    assert found < EXACT
    assert refusal is None or "cannot be told apart" in refusal


@pytest.mark.parametrize(
    ("kind", "options"), covering(list(itertools.product(IMPLS, [False, True])), OPTIONS)
)
def test_every_generator_draws_the_whole_batch(kind, options):
    impl, legacy = kind
    loss = loss_of(dropout, noise)
    with jax.default_prng_impl(impl):
        key = jax.random.PRNGKey(3) if legacy else jax.random.key(3)
        assert error(loss, key, audit="raise", **options) < EXACT


@INEXACT
@pytest.mark.parametrize("sentinel", [ja.KEY, None], ids=str)
def test_another_key_draws_other_numbers(sentinel):
    """The negative control: what a loop usually passes."""
    key, options = jax.random.key(3), OPTIONS[1]
    assert error(loss_of(dropout), key, in_axes=(None, 0, sentinel), **options) > 1e-2


@EVERY
def test_the_function_of_the_whole_batch_draws_its_numbers(options):
    loss, key = loss_of(dropout), jax.random.key(3)
    whole = ja.microbatch(loss, in_axes=AXES, **options)
    oracle = jax.jit(jax.value_and_grad(loss))
    expected = oracle(W, X, key)
    assert normwise(jax.jit(jax.value_and_grad(whole))(W, X, key), expected) < EXACT
    assert normwise(jax.jit(ja.full_batch(loss, AXES))(W, X, key), expected[0]) < EXACT
    seeds = jax.random.split(key, 2)
    both = jax.jit(jax.vmap(jax.grad(whole), (None, None, 0)))(W, X, seeds)
    assert normwise(both[1], oracle(W, X, seeds[1])[1]) < EXACT


@EVERY
def test_a_pytree_of_keys_and_an_array_of_keys_draw(options):
    def loss(w, x, keys):
        h = noise(keys["noise"], x @ w)
        for own in keys["layers"]:
            h = jnp.sin(dropout(own, h))
        return jnp.mean(h**2)

    key = jax.random.key(3)
    assert error(loss, {"noise": key, "layers": jax.random.split(key, 2)}, **options) < EXACT


@EVERY
def test_padding_that_is_skipped_leaves_the_numbers_of_the_batch(options):
    def loss(w, x, key, count):
        error = jnp.sum(dropout(key, x["x"] @ w) ** 2, 1)
        mask = x["i"] < count
        return ja.Mean(jnp.sum(jnp.where(mask, error, 0.0)), jnp.sum(mask))

    key, axes, batch = jax.random.key(3), (*AXES, None), {"x": X, "i": jnp.arange(12)}
    whole = lambda w: ja.full_batch(loss, axes)(w, batch, key, 7)
    step = ja.value_and_grad(loss, in_axes=axes, num_examples_argnum=3, **options)
    assert normwise(step(W, batch, key, 7), jax.jit(jax.value_and_grad(whole))(W)) < EXACT


@EVERY
def test_a_key_that_is_returned_is_that_of_the_batch(options):
    def loss(w, x, key, old):
        value = jnp.mean(dropout(key, x @ w) ** 2)
        key = jax.random.fold_in(key, 1)
        return value, (ja.Last(key), ja.Concat(jax.random.split(key, len(x))), ja.Carry(key))

    key, axes = jax.random.key(3), (*AXES, ja.CARRY)
    step = ja.value_and_grad(loss, has_aux=True, in_axes=axes, **options)
    (_, keys), _ = step(W, X, key, key)
    after = jax.random.fold_in(key, 1)
    for actual, expected in zip(keys, (after, jax.random.split(after, 12), after), strict=True):
        assert actual.dtype == key.dtype
        assert same(jax.random.key_data(actual), jax.random.key_data(expected))


# -- coupled losses and devices ----------


def normalized(axis):
    def loss(w, x, key):
        h = dropout(key, x @ w)
        mean = jnp.mean(h, 0) if axis is None else jax.lax.pmean(jnp.mean(h, 0), axis)
        return jnp.mean(jnp.sin(h - mean[None]) ** 2)

    return loss


@pytest.mark.parametrize("memory", ["min", "store"])
def test_a_coupled_loss_draws_the_numbers_of_the_batch(memory):
    key = jax.random.key(3)
    expected = jax.jit(jax.value_and_grad(normalized(None)))(W, X, key)
    for options in OPTIONS[0], OPTIONS[1], OPTIONS[3]:
        step = ja.value_and_grad(normalized("microbatch"), in_axes=AXES, memory=memory, **options)
        assert normwise(jax.jit(step)(W, X, key), expected) < EXACT


MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))


@pytest.mark.parametrize(
    ("case", "check_vma"),
    covering(list(itertools.product([1, 3], [False, True])), [True, False]),
)
def test_devices_draw_the_numbers_of_the_whole_batch(case, check_vma):
    (n, coupled), key = case, jax.random.key(3)
    draws = dropout, time_major, a_key_per_example
    loss = normalized(("data", "microbatch")) if coupled else loss_of(*draws)
    expected = jax.jit(jax.value_and_grad(normalized(None) if coupled else loss))(W, X, key)
    step = ja.value_and_grad(loss, num_microbatches=n, in_axes=AXES, mesh_axes="data")
    specs = {"mesh": MESH, "in_specs": (P(), P("data"), P()), "out_specs": P()}
    actual = jax.jit(jax.shard_map(step, check_vma=check_vma, **specs))(W, X, key)
    assert normwise(actual, expected) < EXACT


@EVERY
def test_an_explicit_mesh_draws_the_numbers_of_the_whole_batch(options):
    options = {"microbatch_size": 4} if "microbatch_size" in options else options
    options = {"num_microbatches": 6} if options == OPTIONS[1] else options
    loss, key = loss_of(dropout, noise), jax.random.key(3)
    x = jax.device_put(X, NamedSharding(EXPLICIT, P("data")))
    with jax.set_mesh(EXPLICIT):
        actual = jax.jit(ja.value_and_grad(loss, in_axes=AXES, **options))(W, x, key)
    expected = jax.jit(jax.value_and_grad(loss))(W, X, key)
    assert normwise(jax.device_get(actual), expected) < EXACT


# -- what it costs ----------


@pytest.mark.optimized
def test_a_microbatch_draws_its_own_rows_alone():
    """Under JAX's default generator."""
    x, w = jnp.ones((4096, 64), jnp.float32), jnp.ones((64, 64), jnp.float32)
    loss, key = loss_of(dropout, noise), jax.random.key(3)

    def temporary(sentinel):
        step = ja.grad(loss, num_microbatches=64, in_axes=(None, 0, sentinel), audit=None)
        return jax.jit(step).lower(w, x, key).compile().memory_analysis().temp_size_in_bytes

    of_batch = temporary(ja.BATCH_KEY)
    assert of_batch < 1.1 * temporary(ja.KEY)
    assert of_batch < x.nbytes


# -- what cannot be told ----------


def generator_of_its_own():
    threefry = jax.extend.random.threefry_prng_impl
    return jax.extend.random.define_prng_impl(
        key_shape=(2,), seed=threefry.seed, split=threefry.split,
        random_bits=threefry.random_bits, fold_in=threefry.fold_in, name="own", tag="own",
    )  # fmt: skip


def test_draws_that_cannot_be_divided_are_refused():
    def call(draw, size=4, key=None):
        key = jax.random.key(3) if key is None else key
        step = ja.value_and_grad(loss_of(draw), microbatch_size=size, in_axes=AXES, audit=None)
        return lambda: step(W, X, key)

    merged = lambda key, h: h * jnp.mean(jax.random.uniform(key, (3 * len(h),), h.dtype))
    refused(call(merged), "draw at", __file__, "[12] for 4 examples", "[24] for 8", "jaxaccum.KEY")
    one_more = lambda key, h: jax.vmap(noise)(jax.random.split(key, len(h) + 1)[1:], h)
    refused(call(one_more), "[5] for 4 examples", "[9] for 8", "split(key, len(x))", "EXAMPLE_KEY")
    both = lambda key, h: a_weight(key, dropout(key, h))
    refused(call(both, 3), "cannot be told apart", "another microbatch size")
    call(both)()
    halves = lambda key, h: a_key_per_example(jax.random.split(key)[0], h)
    refused(call(halves, 2), "[2] for 2 examples", "microbatch size, or", "fold_in(key, 1)")
    call(halves, 3)()
    gamma = lambda key, h: h * jax.random.gamma(key, 2.0, h.shape, h.dtype)
    refused(call(gamma), "gamma", "EXAMPLE_KEY")
    own_gamma = lambda key, h: jax.vmap(gamma)(jax.random.split(key, len(h)), h)
    refused(call(own_gamma), "gamma", "EXAMPLE_KEY")
    call(lambda key, h: h * jax.random.gamma(key, 2.0, (1, 3), h.dtype))()
    refused(
        call(a_key_per_example, key=jax.random.key(3, impl="rbg")),
        "'rbg'",
        "jax.lax.map",
        "threefry",
    )
    refused(lambda: call(dropout, key=X)(), "not a single PRNG key", "BATCH_KEY", error=TypeError)
    own = jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl=generator_of_its_own())
    refused(lambda: call(dropout, key=own)(), "argument 2 BATCH_KEY", "by name", error=TypeError)
    refused(
        lambda: ja.partition(W, X, jax.random.key(3), in_axes=AXES, num_microbatches=2),
        "argument 2 BATCH_KEY", "which rows", "EXAMPLE_KEY", error=TypeError,
    )  # fmt: skip


@jax.custom_vjp
def rounded(key, h):
    return h


def rounded_back(key, g):
    return None, noise(key, g)


rounded.defvjp(lambda key, h: (h, key), rounded_back)


def test_what_no_program_shows_is_refused():
    """A rule for derivatives draws only when it is traced, which is too late to compare it."""
    key = jax.random.key(3)
    for options in OPTIONS[1:]:
        step = ja.value_and_grad(loss_of(rounded), in_axes=AXES, **options)
        refused(lambda step=step: step(W, X, key), "custom_vjp", "Draw outside", __file__)
    assert error(loss_of(rounded), key, num_microbatches=1) < EXACT
    whole, own = keys_of("threefry2x32", (8, 3))
    draw = lambda key: jax.jit(lambda key: jax.random.bits(key, (4, 7)))(key)
    assert draw(whole).shape == (4, 7)
    refused(lambda: draw(own), "a draw of shape [4, 7] is not in the traced program")


@pytest.mark.parametrize("draw", [
    lambda key, h: h * jax.random.poisson(key, 2.0, h.shape),
    lambda key, h: dropout(jnp.where(jnp.sum(h) > 0, key, jax.random.key(0)), h),
    lambda key, h: dropout(jax.random.wrap_key_data(jax.random.key_data(key)), h),
], ids=["poisson", "where", "integers"])  # fmt: skip
def test_what_asks_for_an_ordinary_key_is_told_so(draw):
    step = ja.value_and_grad(loss_of(draw), num_microbatches=2, in_axes=AXES)
    with pytest.raises((NotImplementedError, TypeError, ValueError)) as caught:
        step(W, X, jax.random.key(3))
    (note,) = [note for note in caught.value.__notes__ if "BATCH_KEY" in note]
    assert "EXAMPLE_KEY" in note


def by_place(key, h):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(h)))
    return jax.vmap(dropout)(keys, h)


def mapped_by_place(key, h):
    own = lambda row: noise(jax.random.fold_in(key, row[1]), row[0])
    return jax.lax.map(own, (h, jnp.arange(len(h))))


def counting(key, h):
    step = lambda i, row: (i + 1, noise(jax.random.fold_in(key, i), row))
    return jax.lax.scan(step, 0, h)[1]


def carried(key, h):
    return jax.lax.scan(lambda key, row: (jax.random.split(key)[0], noise(key, row)), key, h)[1]


PLACED = {
    "a place": by_place,
    "a place in a map": mapped_by_place,
    "a count": counting,
    "a key that is carried": carried,
    "how many": lambda key, h: dropout(jax.random.fold_in(key, len(h)), h),
    "the microbatch": lambda key, h: dropout(
        jax.random.fold_in(key, jax.lax.axis_index("microbatch")), h
    ),
}


@pytest.mark.parametrize("name", PLACED)
def test_keys_that_are_made_by_place_are_not_exact(name):
    """A microbatch counts its own examples, and would draw other numbers than the batch."""
    key, options = jax.random.key(3), {"microbatch_size": 5, "in_axes": AXES}
    step = ja.value_and_grad(loss_of(PLACED[name]), audit="raise", **options)
    with pytest.raises(ja.InexactError, match="keys are made from places") as caught:
        step(W, X, key)
    assert "jax.random.split(key, len(x))" in str(caught.value)
    if name != "the microbatch":
        assert error(loss_of(PLACED[name]), key, audit=None, **options) > 1e-2


def by_layer(key, h):
    """A key that is carried from layer to layer."""
    step = lambda state, _: ((jax.random.fold_in(state[0], 1), dropout(*state)), None)
    return jax.lax.scan(step, (key, h), jnp.arange(3))[0][1]


def test_a_key_that_is_carried_from_layer_to_layer_is_exact():
    assert error(loss_of(by_layer), jax.random.key(3), audit="raise", **OPTIONS[2]) < EXACT


def test_the_audit_tells_draws_of_the_batch_from_others():
    def meeting(key, h):
        return h * jnp.mean(jax.random.uniform(key, h.shape, h.dtype))

    key = jax.random.key(3)
    for draw in DRAWS.values():
        report = ja.audit(loss_of(draw), W, X, key, in_axes=AXES)
        assert report.exact, (draw, report)
    assert not ja.audit(loss_of(meeting), W, X, key, in_axes=AXES).exact
    report = ja.audit(loss_of(dropout), W, X, key, in_axes=(None, 0, None))
    assert "jaxaccum.BATCH_KEY" in str(report)


SAMPLERS = {
    "multivariate_normal": lambda key: jax.random.multivariate_normal(
        key, jnp.zeros(3), jnp.eye(3)
    ),
    "permutation": lambda key: jax.random.permutation(key, 5),
    "choice": lambda key: jax.random.choice(key, 5, (3,), replace=False),
    "poisson": lambda key: jax.random.poisson(key, 2.0, (3,)),
    "binomial": lambda key: jax.random.binomial(key, 5, 0.5, (3,)),
    "beta": lambda key: jax.random.beta(key, 1.0, 2.0, (3,)),
    "orthogonal": lambda key: jax.random.orthogonal(key, 3),
    "ball": lambda key: jax.random.ball(key, 3),
    "cauchy": lambda key: jax.random.cauchy(key, (3,)),
    "laplace": lambda key: jax.random.laplace(key, (3,)),
    "rademacher": lambda key: jax.random.rademacher(key, (3,)),
    "geometric": lambda key: jax.random.geometric(key, 0.5, (3,)),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_draw_of_jax_is_seen_in_the_program(name):
    """What JAX draws only when it compiles, as a gamma distribution, would not be compared."""
    seen, queue = set(), [jax.make_jaxpr(SAMPLERS[name])(jax.random.key(0)).jaxpr]
    while queue:
        for eqn in queue.pop().eqns:
            inner = list(jex.jaxprs_in_params(eqn.params))
            queue += inner
            of_keys = any(jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key) for v in eqn.invars)
            if of_keys and not inner:
                seen.add(eqn.primitive.name)
    drawing = {"random_bits", "random_split", "random_fold_in", "random_gamma"}
    shaping = {
        "slice",
        "squeeze",
        "reshape",
        "broadcast_in_dim",
        "dynamic_slice",
        "gather",
        "select_n",
        "unstack",
    }
    assert seen & drawing
    assert seen <= drawing | shaping
