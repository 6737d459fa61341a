"""`unroll` changes the program and no value: more microbatches per iteration, or the last one
after the loop."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum.testing import collectives
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, normwise, refused

W = {"a": data(5, 7), "b": data(7, 3)}
X = data(10, 5)
FORMS = [1, 2, 3, 64, True, False, "last"]
"""That divide the number of microbatches, that do not, and that are more."""


def plain(w, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]))


def centred(w, x, mean=lambda h: lax.pmean(h, "microbatch")):
    h = jnp.tanh(x @ w["a"])
    h = h - mean(h.mean(0, keepdims=True))
    return jnp.mean((h @ w["b"]) ** 2)


LOSSES = {
    "plain": (plain, plain),
    "coupled": (centred, functools.partial(centred, mean=lambda h: h)),
}


def loops(fun, *args):
    """How many loops the compiled program holds."""
    return jax.jit(fun).lower(*args).compile().as_text().count(" while(")


@functools.cache
def expected_of(loss):
    return jax.jit(jax.value_and_grad(loss))(W, X)


@pytest.mark.parametrize(("unroll", "name"), covering(FORMS, list(LOSSES)))
def test_every_form_equals_the_full_batch(name, unroll):
    loss, whole = LOSSES[name]
    of = jax.jit(ja.value_and_grad(loss, num_microbatches=5, unroll=unroll))
    assert normwise(of(W, X), expected_of(whole)) < EXACT


@pytest.mark.parametrize("unroll", [2, True, "last"])
def test_microbatches_of_two_sizes(unroll):
    of = ja.value_and_grad(plain, microbatch_size=4, unroll=unroll)
    assert normwise(of(W, X), expected_of(plain)) < EXACT


@pytest.mark.parametrize("unroll", [2, True, "last"])
def test_the_gradient_of_microbatch(unroll):
    rows = lambda w, x: ja.Concat(jnp.tanh(x @ w["a"]))
    whole = lambda w, x: jnp.tanh(x @ w["a"])
    of = lambda f: jax.value_and_grad(lambda w: jnp.sum(f(w, X) ** 3))(W)
    assert normwise(of(ja.microbatch(rows, num_microbatches=5, unroll=unroll)), of(whole)) < EXACT


@pytest.mark.parametrize("unroll", [2, True, "last"])
def test_outputs_and_states_stay_in_order(unroll):
    def loss(w, x, state):
        seen = state + len(x) * jnp.ones(())
        aux = {
            "rows": ja.Concat(x),
            "each": ja.Stack(state),
            "last": ja.Last(x[0]),
            "state": ja.Carry(seen),
        }
        return plain(w, x), aux

    of = ja.value_and_grad(
        loss, has_aux=True, num_microbatches=5, in_axes=(None, 0, ja.CARRY), unroll=unroll
    )
    (_, aux), _ = of(W, X, jnp.zeros(()))
    assert jnp.array_equal(aux["rows"], X)
    assert aux["each"].tolist() == [0, 2, 4, 6, 8]
    assert jnp.array_equal(aux["last"], X[8])
    assert float(aux["state"]) == 10


@pytest.mark.parametrize("unroll", [2, True, "last"])
def test_microbatches_of_padding_are_skipped(unroll):
    """Their rows are NaN, which no mask removes from a gradient."""

    def loss(w, batch, count):
        del count
        x, real = batch
        values = jnp.sum(jnp.tanh(x @ w["a"]), axis=1)
        return ja.Mean(jnp.sum(values * real), jnp.sum(real))

    of = ja.value_and_grad(
        loss, in_axes=(None, 0, None), num_examples_argnum=2, num_microbatches=5, unroll=unroll
    )
    whole = lambda w, x: jnp.mean(jnp.sum(jnp.tanh(x @ w["a"]), axis=1))
    padded = (X.at[6:].set(jnp.nan), (jnp.arange(10) < 6).astype(X.dtype))
    assert normwise(of(W, padded, 6), jax.value_and_grad(whole)(W, X[:6])) < EXACT


@pytest.mark.parametrize("unroll", FORMS)
def test_a_lone_microbatch_is_traced_into_the_program_once(unroll):
    """Two products forward and three backward, whatever the form."""
    of = ja.value_and_grad(plain, num_microbatches=1, unroll=unroll, audit=None)
    assert str(jax.make_jaxpr(of)(W, X)).count("dot_general") == 5


@pytest.mark.parametrize("unroll", [1, 2, True, "last"])
def test_typed_keys_among_the_rows_are_used_once(unroll):
    def noisy(w, batch):
        x, keys = batch
        return jnp.mean(jnp.tanh(x @ w["a"]) * jax.vmap(lambda k: jax.random.normal(k, (7,)))(keys))

    of = ja.value_and_grad(noisy, num_microbatches=5, unroll=unroll, audit=None)
    keys = jax.random.split(jax.random.key(0), 10)
    expected = jax.value_and_grad(noisy)(W, (X, keys))
    with jax.debug_key_reuse(True):
        assert normwise(of(W, (X, jax.random.split(jax.random.key(0), 10))), expected) < EXACT


@pytest.mark.parametrize("transform", ["vmap", "hessian", "jvp"])
def test_transformations_of_the_peeled_loop(transform):
    of = lambda f: {
        "vmap": lambda w: jax.vmap(lambda scale: f({**w, "b": w["b"] * scale}, X))(jnp.arange(3.0)),
        "hessian": lambda w: jax.hessian(lambda b: f({**w, "b": b}, X)[0])(w["b"]),
        "jvp": lambda w: jax.jvp(lambda w: f(w, X)[1], (w,), (w,)),
    }[transform](W)
    peeled = ja.value_and_grad(
        plain, num_microbatches=5, unroll="last", accumulator=ja.accumulators.tree()
    )
    whole = jax.value_and_grad(plain)
    actual, expected = (jax.jit(of, static_argnums=0)(f) for f in (peeled, whole))
    assert normwise(actual, expected) < EXACT


@pytest.mark.parametrize("accumulator", ["tree", "compensated", "skip_nonfinite"])
def test_every_accumulator_takes_it(accumulator):
    made = getattr(ja.accumulators, accumulator)()
    value, grads = ja.value_and_grad(plain, num_microbatches=5, accumulator=made, unroll="last")(
        W, X
    )
    value = value[0] if isinstance(value, tuple) else value
    assert normwise((value, grads), expected_of(plain)) < EXACT


@pytest.mark.optimized
def test_the_loop_is_gone_where_all_is_written_out():
    of = lambda unroll: ja.value_and_grad(plain, num_microbatches=5, unroll=unroll)
    assert [loops(of(form), W, X) for form in (1, 2, True, "last")] == [1, 1, 0, 1]


def test_under_last_the_last_microbatch_is_behind_the_loop():
    """Two products of the forward pass and three of the backward pass, in the loop and behind
    it."""
    of = lambda unroll: ja.value_and_grad(plain, num_microbatches=5, unroll=unroll, audit=None)
    products = lambda unroll: str(jax.make_jaxpr(of(unroll))(W, X)).count("dot_general")
    assert products("last") == 2 * products(1)
    assert products(1) == products(True)  # `lax.scan` unrolls when it is compiled


@pytest.mark.optimized
@pytest.mark.parametrize("unroll", [1, 2, True, "last"])
def test_on_a_mesh_the_gradient_is_sent_once(unroll):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    of = ja.value_and_grad(plain, num_microbatches=5, mesh_axes="data", unroll=unroll)
    step = jax.jit(jax.shard_map(of, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    assert normwise(step(W, X), expected_of(plain)) < EXACT
    sent = collectives(step.lower(W, X).compile())
    assert not any(c.loops for c in sent)
    size = sum(leaf.nbytes for leaf in W.values())
    assert size <= sum(c.bytes * c.times for c in sent) <= size + 64  # and the loss and its weight


@pytest.mark.parametrize("split", ["contiguous", "strided"])
def test_on_an_explicit_mesh(split):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        w, x = jax.device_put(W, P()), jax.device_put(data(20, 5), P("data"))
        of = jax.jit(ja.value_and_grad(plain, num_microbatches=5, split=split, unroll="last"))
        assert normwise(of(w, x), jax.value_and_grad(plain)(W, data(20, 5))) < EXACT


def test_a_plan_of_all_sizes_is_not_written_out():
    call = lambda: ja.plan(plain, W, X, memory_bytes=10**9, unroll=True)
    refused(call, "plan(unroll=True)", "num_microbatches", error=ValueError)


@pytest.mark.parametrize(
    ("unroll", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (1.5, TypeError),
        ("first", TypeError),
        (None, TypeError),
    ],
)
def test_what_it_does_not_take_is_refused(unroll, error):
    call = lambda: ja.grad(plain, num_microbatches=2, unroll=unroll)(W, X)
    refused(call, "unroll must be", repr(unroll), error=error)


@pytest.mark.optimized
def test_the_plan_compiles_the_same_program():
    rows = {
        unroll: ja.plan(
            plain, W, X, num_microbatches=5, memory_bytes=10**9, unroll=unroll
        ).best.temp_bytes
        for unroll in (1, True)
    }
    compiled = {
        unroll: jax.jit(ja.value_and_grad(plain, num_microbatches=5, unroll=unroll))
        .lower(W, X)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for unroll in (1, True)
    }
    assert rows == compiled
