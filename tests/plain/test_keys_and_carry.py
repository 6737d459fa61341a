"""Keys and carried state: randomness that no partition changes, and state that runs in the batch's
order."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum as ja
from tests.support.covering import covering
from tests.support.helpers import EXACT, INEXACT, data, normwise, refused, same

X, W = data(7, 3), data(3, seed=1)
OPTIONS = [{"num_microbatches": n} for n in (1, 3, 7)] + [
    {"microbatch_size": 3},
    {"num_microbatches": 7, "split": "strided"},
]
IMPLS = ["threefry2x32", "rbg", "unsafe_rbg"]
KEYS = [jax.random.key(0), jax.random.PRNGKey(0)]


def dropped(w, x, keys):
    """Dropout with one key per example: the mask of an example is its own."""
    keep = jax.vmap(lambda key, row: jax.random.bernoulli(key, 0.5, row.shape))(keys, x)
    return jnp.where(keep, x, 0.0) @ w


@pytest.mark.parametrize(("options", "key"), covering(OPTIONS, KEYS))
def test_example_keys_make_dropout_independent_of_the_partition(options, key):
    loss = lambda w, x, keys: jnp.mean(dropped(w, x, keys) ** 2)
    keys = jnp.stack([jax.random.fold_in(key, i) for i in range(7)])
    actual = ja.value_and_grad(loss, in_axes=(None, 0, ja.EXAMPLE_KEY), **options)(W, X, key)
    assert normwise(actual, jax.jit(jax.value_and_grad(loss))(W, X, keys)) < EXACT
    oracle = jax.jit(ja.full_batch(loss, (None, 0, ja.EXAMPLE_KEY)))
    assert normwise(oracle(W, X, key), actual[0]) < EXACT


def drawn_one_by_one(w, x, keys):
    """A loss of numbers that are drawn apart, so that they depend on their key alone."""
    keep = jax.lax.map(lambda key: jax.random.bernoulli(key, 0.5, (3,)), keys)
    return jnp.mean((jnp.where(keep, x, 0.0) @ w - 1) ** 2)


@pytest.mark.parametrize(
    ("kind", "options"), covering(list(itertools.product(IMPLS, [True, False])), OPTIONS[2:4])
)
def test_example_keys_of_every_generator_depend_on_the_example_alone(kind, options):
    impl, typed = kind
    with jax.default_prng_impl(impl):
        key = jax.random.key(7) if typed else jax.random.PRNGKey(7)
        keys = jax.random.split(key, 7)
        axes = (None, 0, ja.EXAMPLE_KEY)
        of = ja.microbatch(lambda x, keys: ja.Concat(keys), in_axes=axes[1:], **options)
        assert same(jax.random.key_data(of(X, key)), jax.random.key_data(keys))
        cut = [own for _, own in ja.partition(X, key, in_axes=axes[1:], num_microbatches=3)]
        assert same(jax.random.key_data(jnp.concatenate(cut)), jax.random.key_data(keys))
        actual = ja.value_and_grad(drawn_one_by_one, in_axes=axes, **options)(W, X, key)
        expected = jax.jit(jax.value_and_grad(drawn_one_by_one))(W, X, keys)
        assert normwise(actual, expected) < EXACT
        oracle = jax.jit(ja.full_batch(drawn_one_by_one, axes))
        assert normwise(oracle(W, X, key), actual[0]) < EXACT
        if impl == "unsafe_rbg":  # which makes other keys where it folds the example's index
            folded = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(7))
            assert not same(jax.random.key_data(folded), jax.random.key_data(keys))


@pytest.mark.parametrize(
    ("kind", "options"), covering(list(itertools.product(IMPLS, [True, False])), OPTIONS[3:])
)
def test_example_keys_are_those_of_split(kind, options):
    """So that the one line changed draws what ``jax.random.split(key, batch_size)`` drew before."""
    impl, partitionable = kind
    with jax.threefry_partitionable(partitionable):
        key = jax.random.key(7, impl=impl)
        expected = jax.random.key_data(jax.random.split(key, 7))
        of = ja.microbatch(lambda x, keys: ja.Concat(keys), in_axes=(0, ja.EXAMPLE_KEY), **options)
        assert same(jax.random.key_data(of(X, key)), expected)
        cut = ja.partition(X, key, in_axes=(0, ja.EXAMPLE_KEY), **options)
        own = [jax.random.key_data(keys) for _, keys in cut]
        rows = [
            rows
            for rows, _ in ja.partition(jnp.arange(7), key, in_axes=(0, ja.EXAMPLE_KEY), **options)
        ]
        assert same(own, [expected[i] for i in rows])
        if partitionable and impl != "unsafe_rbg":
            return
        folded = jnp.stack([jax.random.key_data(jax.random.fold_in(key, i)) for i in range(7)])
        assert not same(folded, expected)  # the rule of the other settings


@INEXACT
def test_the_masks_of_a_loss_that_split_its_key_itself_are_kept():
    """As a user had it: ``jax.random.split`` in the loss of the whole batch."""

    def before(w, x, key):
        return jnp.mean(dropped(w, x, jax.random.split(key, len(x))) ** 2)

    after = lambda w, x, keys: jnp.mean(dropped(w, x, keys) ** 2)
    key, axes = jax.random.key(3), (None, 0, ja.EXAMPLE_KEY)
    expected = jax.jit(jax.value_and_grad(before))(W, X, key)
    for options in OPTIONS:
        assert (
            normwise(ja.value_and_grad(after, in_axes=axes, **options)(W, X, key), expected) < EXACT
        )
    anew = ja.value_and_grad(before, in_axes=(None, 0, None), num_microbatches=3)(W, X, key)
    assert normwise(anew, expected) > 1e-2  # as if each microbatch split the key anew


def differentiated(fun, **options):
    """The other way to the gradient."""
    return jax.grad(ja.microbatch(fun, **options))


@pytest.mark.parametrize("make", [ja.value_and_grad, differentiated])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("role", [ja.KEY, ja.EXAMPLE_KEY])
def test_folded_keys_pass_the_check_for_keys_used_twice(role, n, make):
    def loss(w, x, key):
        keys = key if role is ja.EXAMPLE_KEY else jax.random.split(key, len(x))
        return ja.Mean(jnp.sum(dropped(w, x, keys) ** 2), len(x))

    def twice(w, x, key):
        return loss(w, x, key) * jnp.sum(loss(w, x, key).total)

    with jax.debug_key_reuse(True):
        make(loss, in_axes=(None, 0, role), num_microbatches=n)(W, X, jax.random.key(0))
        with pytest.raises(jax.errors.KeyReuseError):  # the check still sees the loss
            make(twice, in_axes=(None, 0, role), num_microbatches=n)(W, X, jax.random.key(0))


@pytest.mark.parametrize("key", KEYS, ids=["typed", "legacy"])
def test_a_key_is_folded_with_the_microbatch_and_so_depends_on_the_partition(key):
    fun = lambda x, key: ja.Stack(jax.random.uniform(key))
    drawn = jax.jit(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
    for options in OPTIONS:
        draws = ja.microbatch(fun, in_axes=(0, ja.KEY), **options)(X, key)
        assert draws.tolist() == [float(drawn(i)) for i in range(len(draws))]
        assert len(set(draws.tolist())) == len(draws)  # a shared key would repeat itself
    assert ja.full_batch(fun, (0, ja.KEY))(X, key).tolist() == [float(drawn(0))]


def test_keys_in_a_pytree_are_each_folded():
    keys = {"a": jax.random.key(1), "b": jax.random.PRNGKey(2)}
    draws = ja.microbatch(
        lambda x, k: ja.Stack(jax.tree.map(jax.random.uniform, k)),
        in_axes=(0, ja.KEY),
        microbatch_size=4,
    )(X, keys)
    for name, key in keys.items():
        assert draws[name].tolist() == [
            float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(2)
        ]


def running(w, x, state):
    """A running mean, as BatchNorm keeps one, and a loss that reads the state that came in."""
    y = x @ w
    new = {"mean": 0.5 * state["mean"] + 0.5 * jnp.mean(y), "steps": state["steps"] + 1}
    return jnp.mean((y - state["mean"]) ** 2), {
        "state": ja.Carry(new),
        "seen": ja.Stack(state["steps"]),
    }


@INEXACT
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_runs_from_microbatch_to_microbatch(options):
    state = {"mean": jnp.float64(0.25), "steps": jnp.int32(0)}
    axes = (None, 0, ja.CARRY)
    (value, aux), grad = jax.jit(ja.value_and_grad(running, has_aux=True, in_axes=axes, **options))(
        W, X, state
    )
    expected, total, grads = state, 0.0, jnp.zeros(3)
    part = jax.jit(jax.value_and_grad(running, has_aux=True))
    for w, rows, _ in ja.partition(W, X, state, in_axes=axes, **options):
        (loss, new), own = part(w, rows, expected)
        total, grads, expected = (
            total + loss * len(rows) / 7,
            grads + own * len(rows) / 7,
            new["state"].state,
        )
    assert normwise((value, grad), (total, grads)) < EXACT
    assert normwise(aux["state"], expected) < EXACT
    assert aux["seen"].tolist() == list(range(len(aux["seen"])))


@INEXACT
def test_a_carried_state_passes_no_gradient_and_starts_where_it_was_given():
    fun = lambda w, x, state: (ja.Sum(jnp.sum(x @ w) * state), ja.Carry(state * jnp.sum(w)))
    axes, state = (None, 0, ja.CARRY), jnp.float64(2.0)
    moved = lambda w: ja.microbatch(fun, in_axes=axes, num_microbatches=7)(w, X, state)[0]
    expected, factor = jnp.zeros(3), 2.0
    for row in np.asarray(X):
        expected, factor = expected + factor * row, factor * float(jnp.sum(W))
    assert normwise(jax.grad(moved)(W), expected) < EXACT
    assert same(
        ja.microbatch(fun, in_axes=axes, num_microbatches=1)(W, X, state)[1], state * jnp.sum(W)
    )


@INEXACT
def test_a_weight_that_reads_the_state_is_summed_in_order():
    """Denominators come first, in a pass of their own; the state runs through that pass too."""
    fun = lambda w, x, n: (
        {"a": ja.Mean(jnp.sum(x @ w), jnp.sum(jnp.abs(x)) + n), "b": jnp.mean(x @ w)},
        ja.Carry(n + 1.0),
    )
    (value, _), grad = ja.value_and_grad(
        fun, has_aux=True, in_axes=(None, 0, ja.CARRY), num_microbatches=7
    )(W, X, jnp.float64(0))
    loss = lambda w: jnp.sum(X @ w) / (jnp.sum(jnp.abs(X)) + sum(range(7))) + jnp.mean(X @ w)
    assert normwise((value, grad), jax.value_and_grad(loss)(W)) < EXACT


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_typed_key_runs_in_the_state(impl):
    def fun(x, state):
        key, own = jax.random.split(state["key"])
        drawn = jax.random.uniform(own, (len(x),), jnp.float64)
        return {
            "state": ja.Carry({"key": key}),
            "drawn": ja.Concat(drawn),
            "keys": ja.Stack(own),
            "last": ja.Last(own),
        }

    state = {"key": jax.random.key(0, impl=impl)}
    actual = ja.microbatch(fun, in_axes=(0, ja.CARRY), microbatch_size=3)(X, state)
    drawn, keys, carried = [], [], state
    for rows in (X[:3], X[3:6], X[6:]):
        out = fun(rows, carried)
        carried, drawn, keys = out["state"].state, [*drawn, out["drawn"].x], [*keys, out["keys"].x]
    assert same(actual["drawn"], jnp.concatenate(drawn))
    data_of = jax.random.key_data
    assert same(data_of(actual["keys"]), data_of(jnp.stack(keys)))
    assert same(data_of(actual["last"]), data_of(keys[-1]))
    assert same(data_of(actual["state"]["key"]), data_of(carried["key"]))
    assert not same(
        actual["drawn"],
        jnp.concatenate([fun(rows, state)["drawn"].x for rows in (X[:3], X[3:6], X[6:])]),
    )


@pytest.mark.parametrize(
    "tag", [ja.Sum, ja.Max, ja.Min, lambda key: ja.Mean(key, 1)], ids=["Sum", "Max", "Min", "Mean"]
)
def test_keys_are_no_numbers(tag):
    fun = ja.microbatch(lambda x, key: tag(key), in_axes=(0, ja.KEY), microbatch_size=3)
    refused(lambda: fun(X, jax.random.key(0)), "PRNG key", "Stack", error=TypeError)


def test_a_carried_key_keeps_its_implementation():
    fun = lambda x, key: (jnp.mean(x), ja.Carry(jax.random.key(1, impl="rbg")))
    step = ja.microbatch(fun, in_axes=(0, ja.CARRY), microbatch_size=3)
    refused(
        lambda: step(X, jax.random.key(0)), "changes its", "return", error=(TypeError, ValueError)
    )
    plain = ja.microbatch(
        lambda x, s: (jnp.mean(x), ja.Carry(s * 1j)), in_axes=(0, ja.CARRY), microbatch_size=3
    )
    refused(lambda: plain(X, 1.0), "changes its dtype", "astype(float", error=TypeError)


def test_partition_hands_out_a_carried_key():
    rows = [
        x
        for x, _ in ja.partition(
            X, {"key": jax.random.key(0)}, in_axes=(0, ja.CARRY), microbatch_size=4
        )
    ]
    keys = [
        state["key"]
        for _, state in ja.partition(
            X, {"key": jax.random.key(0)}, in_axes=(0, ja.CARRY), microbatch_size=4
        )
    ]
    assert [len(x) for x in rows] == [4, 3]
    assert all(
        same(jax.random.key_data(key), jax.random.key_data(jax.random.key(0))) for key in keys
    )


def test_a_coupled_loss_reads_a_carried_key_as_the_full_batch_does():
    def fun(x, state):
        drawn = jax.random.normal(state["key"], (3,), jnp.float64)
        mean = jax.lax.pmean(jnp.mean(x, axis=0), "microbatch")
        return {
            "value": ja.Mean(jnp.sum(jnp.sin(x - mean[None]) @ drawn), len(x)),
            "state": ja.Carry(state),
        }

    state, rows = {"key": jax.random.split(jax.random.key(0), 2)[0]}, data(8, 3)
    actual = ja.microbatch(fun, in_axes=(0, ja.CARRY), num_microbatches=4)(rows, state)
    assert (
        normwise(actual["value"], ja.full_batch(fun, (0, ja.CARRY))(rows, state)["value"]) < EXACT
    )


def test_an_error_where_one_key_was_wanted_says_that_there_are_many():
    """As of a Flax model that is applied to all examples at once."""
    one_key = lambda w, x, key: jnp.mean((x @ w) ** 2) * jax.random.uniform(key)
    wanted = lambda w, x, key: one_key(w, x, key) if key.shape == () else no_key()

    def no_key():
        raise ValueError("rngs should be a PRNGKey")

    step = ja.grad(wanted, num_microbatches=2, in_axes=(None, 0, ja.EXAMPLE_KEY))
    with pytest.raises(ValueError, match="PRNGKey") as caught:
        step(jnp.ones(3), jnp.ones((4, 3)), jax.random.key(0))
    (note,) = [note for note in caught.value.__notes__ if "EXAMPLE_KEY" in note]
    assert "argument 2" in note
    assert "2 keys, one per example" in note
    assert "jax.vmap" in note
