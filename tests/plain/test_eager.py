"""Calls outside of ``jax.jit``: compiled once for a function and its shapes, and never stale."""

import contextlib
import functools
import gc

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxaccum as ja
import jaxaccum.nnx
from jaxaccum import accumulators
from jaxaccum._jaxpr import derived_once
from jaxaccum._transforms import eager
from tests.support.helpers import EXACT, data, normwise, same

W, X = {"a": data(3, 4), "b": data(4, seed=1)}, data(10, 3, seed=2)
OPTIONS = {"microbatch_size": 4, "audit": None}


@contextlib.contextmanager
def compilations():
    """Counts what XLA compiles."""
    seen, active = [], True

    def listen(event, duration, **_):
        if active and event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    active = False


def predicted(w, x):
    return jax.nn.relu(x @ w["a"]) @ w["b"]


def loss(w, x):
    return jnp.mean((predicted(w, x) - 1) ** 2)


def tokens(w, x):
    weight = x[:, 0] ** 2
    return ja.Mean(jnp.sum(predicted(w, x) ** 2 * weight), jnp.sum(weight))


def centred(w, x):
    y = predicted(w, x)
    return jnp.mean((y - lax.pmean(jnp.mean(y), "microbatch")) ** 2)


@jax.custom_vjp
def halved(x):
    return x


halved.defvjp(lambda x: (x, None), lambda _, g: (0.5 * g,))
CALLS = {
    "value_and_grad": lambda: ja.value_and_grad(loss, **OPTIONS)(W, X),
    "grad": lambda: ja.grad(tokens, **OPTIONS)(W, X),
    "microbatch": lambda: ja.microbatch(tokens, **OPTIONS)(W, X),
    "grad of microbatch": lambda: jax.grad(ja.microbatch(loss, **OPTIONS))(W, X),
    "coupled": lambda: ja.value_and_grad(centred, **OPTIONS | {"microbatch_size": 5})(W, X),
    "custom rule": lambda: ja.grad(lambda w, x: jnp.mean(halved(predicted(w, x))), **OPTIONS)(W, X),
    "batch": lambda: ja.grad(loss, argnums=(0, 1), **OPTIONS)(W, X),
    **{
        name: lambda name=name: ja.grad(loss, accumulator=getattr(accumulators, name)(), **OPTIONS)(
            W, X
        )
        for name in ("tree", "compensated", "skip_nonfinite", "noise_scale")
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_compiles_nothing(name):
    """Of the same function and shapes; the transformation may be another object."""
    first = CALLS[name]()
    CALLS[name]()  # what finalizes outputs may be compiled by the first calls
    with compilations() as seen:
        again = CALLS[name]()
    assert not seen
    assert same(again, first)


def test_a_loop_by_hand_compiles_at_every_call():
    """Negative control: what is counted is what a scan of a new body costs."""

    def by_hand():
        step = lambda total, x: (total + loss(W, x[None]), None)
        return lax.scan(step, 0.0, X)[0]

    by_hand()
    with compilations() as seen:
        by_hand()
    assert seen


@pytest.mark.parametrize("name", CALLS)
def test_numbers_are_those_under_jit(name):
    """XLA may order sums in another way where more is compiled at once."""
    assert normwise(CALLS[name](), jax.jit(CALLS[name])()) < EXACT


def test_an_nnx_model_and_a_linen_model():
    class Net(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(3, 1, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.relu(self.a(x))

    model, linen = Net(), nn.Dense(2, param_dtype=jnp.float64)
    params = linen.init(jax.random.key(0), X)
    of_nnx = lambda: jaxaccum.nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2), **OPTIONS)(
        model, X
    )
    of_linen = lambda: ja.value_and_grad(
        lambda p, x: jnp.mean(nn.gelu(linen.apply(p, x))), **OPTIONS
    )(params, X)
    for call in (of_nnx, of_linen):
        call(), call()
        with compilations() as seen:
            call()
        assert not seen


@pytest.mark.parametrize("name", ["value_and_grad", "grad", "microbatch"])
def test_on_an_explicit_mesh(name):
    """The whole call is one program, that of all devices."""
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2]
    )
    put = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    w, x = put(W, jax.sharding.PartitionSpec()), put(X[:8], jax.sharding.PartitionSpec("data"))
    step = getattr(ja, name)(tokens, num_microbatches=2, audit=None)
    first = step(w, x)
    step(w, x)
    with compilations() as seen:
        assert same(step(w, x), first)
    assert not seen
    assert (
        normwise(first, getattr(ja, name)(tokens, num_microbatches=2, audit=None)(W, X[:8])) < EXACT
    )


# -- never stale -----------------------------------------------------------------------------------


def test_what_the_function_reads_may_change_between_calls():
    """A number, an array and a branch of its closure: the function is traced at every call, as by
    JAX."""
    scale, rows, squared = 1.0, jnp.ones(3), True

    def changing(w, x):
        y = predicted(w, x * rows[None]) * scale
        return jnp.mean(y**2 if squared else jnp.abs(y))

    step = ja.value_and_grad(changing, **OPTIONS)
    plain = jax.value_and_grad(changing)
    assert normwise(step(W, X), plain(W, X)) < EXACT
    scale = -0.5
    assert normwise(step(W, X), plain(W, X)) < EXACT
    rows = jnp.arange(3.0)
    assert normwise(step(W, X), plain(W, X)) < EXACT
    squared = False
    assert normwise(step(W, X), plain(W, X)) < EXACT


@pytest.mark.parametrize("rows", [4, 4000])
def test_an_array_of_numpy_may_change_in_place(rows):
    """Of any size, read by the loss or inside a loop of it."""
    table = np.ones((rows, 3))
    direct = lambda w, x: jnp.mean(predicted(w, x * jnp.asarray(table)[0, 0]))
    looped = lambda w, x: lax.fori_loop(
        0, 2, lambda _, y: y * jnp.sum(jnp.asarray(table)[1]), direct(w, x)
    )
    inner = lambda w, x: jax.jit(lambda y: y * jnp.asarray(table)[2, 1])(direct(w, x))
    for loss in (direct, looped, inner):
        step = ja.microbatch(loss, **OPTIONS)
        for factor in (1.0, 2.0, -3.0):
            table[:] = factor
            assert normwise(step(W, X), loss(W, X)) < EXACT


def test_settings_of_jax_may_change_between_calls():
    """How numbers are drawn, and in which precision products are taken."""
    draw = lambda x, key: ja.Concat(jax.random.normal(key, (len(x),)))
    step = ja.microbatch(draw, in_axes=(0, ja.KEY), num_microbatches=2, audit=None)
    by_hand = lambda key: jnp.concatenate(
        [jax.random.normal(jax.random.fold_in(key, i), (5,)) for i in range(2)]
    )
    key = jax.random.key(0)
    for partitionable in (True, False, True):
        with jax.threefry_partitionable(partitionable):
            assert same(step(X, key), by_hand(key))


def test_an_axis_of_an_outer_map_that_no_argument_is_mapped_over():
    """The axis is bound outside, in two sizes; what is compiled under one is not run under the
    other."""
    loss = lambda w, x: jnp.mean(predicted(w, x)) * lax.axis_index("models").astype(x.dtype)
    outer = lambda _: ja.value_and_grad(loss, **OPTIONS)(W, X)
    jax.vmap(outer, axis_name="models")(jnp.arange(2))
    value, grads = jax.vmap(outer, axis_name="models")(jnp.arange(3))
    one = jax.value_and_grad(lambda w: jnp.mean(predicted(w, X)))(W)
    for i in range(3):
        assert (
            normwise(
                (value[i], jax.tree.map(lambda g, i=i: g[i], grads)),
                jax.tree.map(lambda g, i=i: i * g, one),
            )
            < EXACT
        )


def test_the_sign_of_zero_is_seen():
    """Two numbers that Python takes for equal."""
    of = lambda c: ja.microbatch(
        lambda x: ja.Max(jnp.max(1 / (x**2 * c))), in_axes=(0,), num_microbatches=2
    )
    assert of(0.0)(X) == jnp.inf
    assert of(-0.0)(X) == -jnp.inf


def test_a_rule_of_the_users_may_change():
    """The backward rule is no part of the loss's own program, and it is run all the same."""

    def with_rule(factor):
        @jax.custom_vjp
        def scaled(x):
            return x

        scaled.defvjp(lambda x: (x, None), lambda _, g: (factor * g,))
        return ja.grad(lambda w, x: jnp.mean(scaled(predicted(w, x))), **OPTIONS)(W, X)

    assert normwise(with_rule(3.0)["b"], 3 * with_rule(1.0)["b"]) < EXACT


def test_other_shapes_and_dtypes_are_other_programs():
    step = ja.value_and_grad(loss, **OPTIONS)
    for x in (X, X[:7], X[:4]):
        assert normwise(step(W, x), jax.value_and_grad(loss)(W, x)) < EXACT
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), (W, X))
    assert step(*narrow)[0].dtype == jnp.float32


def test_callbacks_run_at_every_call():
    seen = []

    def noted(w, x):
        jax.debug.callback(lambda n: seen.append(int(n)), jnp.int32(len(x)))
        return loss(w, x)

    step = ja.value_and_grad(noted, **OPTIONS)
    for calls in (1, 2, 3):
        step(W, X)
        jax.effects_barrier()
        assert sorted(seen) == sorted([4, 4, 2] * calls)


@pytest.mark.parametrize("name", CALLS)
def test_without_jit_the_numbers_are_the_same(name):
    expected = CALLS[name]()
    derived_once._call.cache_clear()
    with jax.disable_jit():
        actual = CALLS[name]()
    assert normwise(actual, expected) < EXACT


# -- what is kept ----------------------------------------------------------------------------------


def test_as_many_programs_are_kept_as_is_said(monkeypatch):
    """Of three, which compile faster than as many as are kept."""
    assert eager._compiled.cache_info().maxsize == eager._KEPT
    kept = functools.lru_cache(maxsize=3)(eager._compiled.__wrapped__)
    monkeypatch.setattr(eager, "_compiled", kept)
    calls = [
        lambda n=n: ja.microbatch(
            lambda x: ja.Sum(n * jnp.sum(x)), in_axes=(0,), num_microbatches=2
        )(X[:, 0])
        for n in range(6)
    ]
    for n, call in enumerate(calls):
        assert call() == pytest.approx(n * float(jnp.sum(X[:, 0])))
    assert kept.cache_info().currsize == 3


def test_a_thousand_calls_keep_one_program():
    """Memory does not grow: what a call traced is gone after it."""
    eager._compiled.cache_clear()
    step = ja.grad(lambda w, x: jnp.mean((x @ w) ** 2), num_microbatches=2, audit=None)
    w = jnp.ones(3)
    step(w, X)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        step(w, X)
    gc.collect()
    assert eager._compiled.cache_info().currsize == 1
    assert len(gc.get_objects()) - before < 2000


def test_a_training_loop_without_jit():
    """Three steps of AdamW, eager throughout."""
    opt = optax.adamw(1e-2)
    with jax.numpy_dtype_promotion("standard"):
        states = []
        for grad in (ja.grad(loss, **OPTIONS), jax.grad(loss)):
            w, state = W, opt.init(W)
            for _ in range(3):
                updates, state = opt.update(grad(w, X), state, w)
                w = optax.apply_updates(w, updates)
            states.append(w)
    assert normwise(*states) < EXACT
