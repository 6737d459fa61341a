"""The host loop where trees are unusual or numbers leave the range of a low precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum as ja


@pytest.mark.parametrize(
    ("dtype", "kept", "weight"),
    [(jnp.float16, None, 2048), (jnp.float16, jnp.float16, 70000), (jnp.float8_e4m3fn, None, 512)],
)
def test_weights_past_the_range_of_the_sums(dtype, kept, weight):
    opt = ja.MultiSteps(optax.sgd(1.0), 2, accumulator_dtype=kept)
    params = jnp.zeros(1, dtype)
    state = opt.init(params)
    for grad in (96.0, 288.0):
        updates, state = opt.update(
            jnp.full(1, grad, dtype), state, params, weight=np.int32(weight)
        )
    assert updates.astype(jnp.float32).tolist() == [-192.0]
    assert 288.0 * weight > float(jnp.finfo(dtype).max)  # what a sum of products would hold


def test_a_skip_function_sees_integers_as_integers_in_init_and_update():
    def skip(updates, step, params):
        found = jax.tree.map(lambda x: jnp.sum(~jnp.isfinite(x)), updates)
        return found["w"] > 0, found

    params = {"w": jnp.ones(2), "i": jnp.arange(2)}
    inner = optax.masked(optax.sgd(1.0), {"w": True, "i": False})
    opt = ja.MultiSteps(inner, 2, should_skip_update_fn=skip)

    def body(state, x):
        grads = jax.grad(lambda p: jnp.sum(p["w"] * x), allow_int=True)(params)
        updates, state = opt.update(grads, state, params)
        return state, updates["w"]

    state, updates = jax.lax.scan(body, opt.init(params), jnp.asarray([1.0, jnp.nan, 3.0]))
    assert updates.tolist() == [[0.0, 0.0], [0.0, 0.0], [-2.0, -2.0]]
    assert {name: int(x) for name, x in state.skip_state.items()} == {"w": 0, "i": 0}


def test_a_loss_scale_around_no_parameters():
    scaled = ja.dynamic_loss_scale(optax.adam(0.1))
    opt = optax.partition({"a": scaled, "b": optax.sgd(1.0)}, {"w": "b"})
    params = {"w": jnp.ones(2, jnp.float32)}
    updates, _ = opt.update(params, opt.init(params), params)
    assert updates["w"].tolist() == [-1.0, -1.0]
    assert scaled.update({}, scaled.init({}), {})[0] == {}


def test_a_loss_scale_around_an_optimizer_with_parameters_of_its_own():
    params = {"w": jnp.ones(2, jnp.float32)}
    both = optax.LookaheadParams.init_synced(params)
    bare = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    scaled = ja.dynamic_loss_scale(bare)
    state = scaled.init(both)
    grads = jax.tree.map(lambda x: x * state.scale, params)
    updates, _ = scaled.update(grads, state, both)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        expected, _ = bare.update(params, bare.init(both), both)
    assert jax.tree.structure(updates) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert ours.tolist() == theirs.tolist()
