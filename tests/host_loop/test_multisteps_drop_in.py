"""MultiSteps in the place of optax's: keys, integers, shards, Flax's states, memory and time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.helpers import EXACT, data, normwise, refused, same

COMPILED = pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


# -- keys in the optimizer's state -----------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_key_moves_once_a_window(impl, wrap):
    """noisy_sgd draws from a typed key that it keeps in its state."""
    opt, params = optax.noisy_sgd(0.1, key=jax.random.key(3, impl=impl)), data(3)
    multi, grads = ja.MultiSteps(opt, 2), [data(3, seed=i) for i in range(4)]
    state, inner, update = multi.init(params), opt.init(params), wrap(multi.update)
    for first, second in zip(grads[::2], grads[1::2], strict=True):
        waiting, state = update(first, state, params)
        updates, state = update(second, state, params)
        expected, inner = opt.update((first + second) / 2, inner, params)
        assert not np.any(waiting)
        assert normwise(updates, expected) < EXACT
    keys = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    expected = [x for x in jax.tree.leaves(inner) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    assert [jax.random.key_impl(key) for key in keys] == [impl]
    assert same(*(jax.tree.map(jax.random.key_data, each) for each in (keys, expected)))


@COMPILED
def test_a_key_under_a_loss_scale(wrap):
    opt, params = optax.noisy_sgd(0.1, key=jax.random.key(3)), data(3)
    scaled, finite = ja.dynamic_loss_scale(opt), data(3, seed=1)
    state, inner, update = scaled.init(params), opt.init(params), wrap(scaled.update)
    updates, state = update(finite.at[1].set(jnp.inf), state, params)
    assert not np.any(updates)
    updates, state = update(finite * state.scale, state, params)
    expected, _ = opt.update(finite, inner, params)
    assert normwise(updates, expected) < EXACT


# -- integer parameters ----------------------------------------------------------------------------

MIXED = {"w": data(3), "n": jnp.arange(2)}
LOSS = lambda p: jnp.sum(p["w"] ** 2 * p["n"][1].astype(float))
WITH_INTEGERS = jax.grad(LOSS, allow_int=True)(MIXED)
LABELS = {"w": "train", "n": "leave"}


@COMPILED
@pytest.mark.parametrize("dtype", [jnp.float32, None], ids=str)
@pytest.mark.parametrize("skip", [None, optax.skip_not_finite], ids=["", "skip"])
def test_gradients_of_integers_reach_the_optimizer_as_they_came(skip, dtype, wrap):
    opt = optax.partition({"train": optax.adam(0.1), "leave": optax.identity()}, LABELS)
    multi = ja.MultiSteps(opt, 2, should_skip_update_fn=skip, accumulator_dtype=dtype)
    state = multi.init(MIXED)
    expected, _ = opt.update(WITH_INTEGERS, opt.init(MIXED), MIXED)
    for call in (multi.update, multi.update, multi.update):
        updates, state = wrap(call)(WITH_INTEGERS, state, MIXED)
        assert updates["n"].dtype == expected["n"].dtype == jax.dtypes.float0
        assert updates["w"].dtype == expected["w"].dtype
        assert not np.any(updates["w"]) or normwise(updates["w"], expected["w"]) < EXACT
        assert bool(multi.has_updated(state)) == bool(np.any(updates["w"]))
    updates, state = wrap(multi.flush)(state, MIXED)
    assert updates["n"].dtype == jax.dtypes.float0
    assert np.any(updates["w"])


@COMPILED
def test_an_optimizer_that_computes_with_them_says_what_to_do(wrap):
    multi = ja.MultiSteps(optax.sgd(0.1), 2)
    call = lambda: wrap(multi.update)(WITH_INTEGERS, multi.init(MIXED), MIXED)
    refused(call, "updates['n']", "float0", "optax.masked")


# -- low precision ---------------------------------------------------------------------------------

EVEN = lambda step: step % 2 == 0
WITH_COND = {
    "apply_if_finite": lambda opt: optax.apply_if_finite(opt, 3),
    "conditionally_mask": lambda opt: optax.conditionally_mask(opt, EVEN),
    "conditionally_transform": lambda opt: optax.conditionally_transform(opt, EVEN),
}


@pytest.mark.parametrize("params", [jnp.float16, jnp.bfloat16, jnp.float32], ids=jnp.dtype)
@pytest.mark.parametrize("grads", [jnp.float16, jnp.bfloat16], ids=jnp.dtype)
@pytest.mark.parametrize("name", WITH_COND)
def test_a_cond_inside_a_loss_scale(name, grads, params):
    """What the cond sees is all in float32: the gradient, the parameters, and the states."""
    opt = WITH_COND[name](optax.adam(0.1))
    w, g = data(3, dtype=params), data(3, seed=1, dtype=grads)
    scaled = ja.dynamic_loss_scale(opt, initial=2.0**4)
    state, inner = scaled.init(w), opt.init(w.astype(jnp.float32))
    for _ in range(2):
        updates, state = jax.jit(scaled.update)(g * grads(2.0**4), state, w)
        expected, inner = opt.update(g.astype(jnp.float32), inner, w.astype(jnp.float32))
        assert updates.dtype == params
        assert normwise(updates, expected) < 8 * float(jnp.finfo(params).eps)
    assert dtypes(state.inner_opt_state) == dtypes(opt.init(w))


def test_a_gradient_below_float16_reaches_adam_in_float32():
    """Divided by its scale it is 2⁻³⁰, 0 in float16; Adam's step is still the learning rate."""
    opt, w = ja.dynamic_loss_scale(optax.adam(0.125, eps=2.0**-60)), jnp.ones(2, jnp.float16)
    updates, _ = opt.update(jnp.full(2, 2.0**-15, jnp.float16), opt.init(w), w)
    assert same(updates, jnp.full(2, -0.125, jnp.float16))


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


# -- shards ----------------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_sums_and_updates_are_sharded_as_the_parameters(kind, wrap):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    multi = ja.MultiSteps(optax.adamw(0.1), 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(data(8, 3), NamedSharding(mesh, P("x")))
        state = multi.init(params)
        seen = [state.acc_grads]
        for call in (multi.update, multi.update, multi.update, lambda _, *rest: multi.flush(*rest)):
            updates, state = wrap(call)(params, state, params)
            seen += [updates, state.acc_grads]
    assert {x.addressable_shards[0].data.shape for x in seen} == {(2, 3)}
    assert {len(x.sharding.device_set) for x in seen} == {4}


# -- memory and calls ------------------------------------------------------------------------------

LAYERS, WIDTH = 8, 128
SIZE = LAYERS * WIDTH**2 * 4
"""The bytes of the parameters."""


def training_step(opt):
    """A compiled step, its parameters and state donated."""
    params = {f"l{i}": jnp.ones((WIDTH, WIDTH), jnp.float32) for i in range(LAYERS)}

    def loss(params, x):
        for w in params.values():
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def step(params, state, x):
        updates, state = opt.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    args = params, opt.init(params), jnp.ones((4, WIDTH), jnp.float32)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


def temporary(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.optimized
@pytest.mark.parametrize("skip", [None, optax.skip_not_finite], ids=["", "skip"])
def test_a_donated_step_needs_no_more_memory_than_optax(skip):
    opt = optax.adamw(1e-3)
    theirs = temporary(training_step(optax.MultiSteps(opt, 4, should_skip_update_fn=skip)))
    ours = temporary(training_step(ja.MultiSteps(opt, 4, should_skip_update_fn=skip)))
    assert ours <= theirs
    assert theirs > SIZE  # updates beside the sums; ours are in their place
    if skip is None:
        assert ours < temporary(training_step(opt)) + SIZE / 10


@pytest.mark.optimized
def test_a_step_copies_no_parameter():
    """Where a branch of a cond passes a leaf through, XLA may copy it: the old form copied each."""
    copy = re.compile(rf"= f32\[{WIDTH},{WIDTH}\]\S* copy\(")
    copies = lambda opt: len(copy.findall(training_step(opt).as_text()))
    assert copies(optax.MultiSteps(optax.adamw(1e-3), 4)) > LAYERS
    assert copies(ja.MultiSteps(optax.adamw(1e-3), 4)) == 0


@pytest.mark.parametrize("every_k", [4, lambda step: 4 + 0 * step], ids=["constant", "schedule"])
def test_a_checked_weight_leaves_the_program_without_effects(every_k):
    """A program with an effect is dispatched from Python: a call takes 5 to 10 times as long."""
    multi, params = ja.MultiSteps(optax.sgd(0.1), every_k), data(3)
    step = lambda state, weight: multi.update(params, state, params, weight=weight)
    assert not jax.make_jaxpr(step)(multi.init(params), 2.0).effects


# -- states that Flax holds ------------------------------------------------------------------------


def test_flush_of_a_train_state():
    opt, params = ja.MultiSteps(optax.adam(0.1), 4), {"w": data(3)}
    grads = [{"w": data(3, seed=i)} for i in range(2)]
    held = TrainState.create(apply_fn=None, params=params, tx=opt)
    for grad in grads:
        held = held.apply_gradients(grads=grad)
    assert same(held.params, params)
    updates, opt_state = opt.flush(held.opt_state, held.params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    expected, _ = optax.adam(0.1).update(mean, optax.adam(0.1).init(params), params)
    assert normwise(updates, expected) < EXACT
    held = held.replace(params=optax.apply_updates(held.params, updates), opt_state=opt_state)
    assert opt.has_updated(held.opt_state)
    assert int(held.apply_gradients(grads=grads[0]).opt_state.mini_step) == 1


def test_flush_of_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    opt = ja.MultiSteps(optax.adam(0.1), 4)
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    of = lambda seed: jax.tree.map(lambda x: data(*x.shape, seed=seed), nnx.state(model, nnx.Param))
    grads = [of(seed) for seed in range(2)]
    for grad, weight in zip(grads, (1.0, 3.0), strict=True):
        optimizer.update(model, grad, weight=weight)
    assert same(nnx.as_pure(nnx.state(model, nnx.Param)), before)
    assert not opt.has_updated(optimizer.opt_state)
    updates, opt_state = opt.flush(optimizer.opt_state, nnx.state(model, nnx.Param))
    mean = jax.tree.map(lambda a, b: (a + 3 * b) / 4, *map(nnx.as_pure, grads))
    expected, _ = optax.adam(0.1).update(mean, optax.adam(0.1).init(before), before)
    assert normwise(updates, expected) < EXACT
    nnx.update(model, optax.apply_updates(before, updates))
    nnx.update(optimizer.opt_state, nnx.state(opt_state))
    assert opt.has_updated(optimizer.opt_state)
    optimizer.update(model, grads[0])
    assert int(optimizer.opt_state.mini_step) == 1
    assert int(optimizer.opt_state.gradient_step) == 1


def test_an_nnx_state_in_a_loop_of_your_own():
    """The window holds the gradients as nnx gives them, in variables, before and after a flush."""
    params = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64), nnx.Param)
    opt = ja.MultiSteps(optax.sgd(1.0), 2)
    state = opt.init(params)
    for call in (opt.update, lambda _, *rest: opt.flush(*rest), opt.update, opt.update):
        updates, state = call(params, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.structure(state.acc_grads) == jax.tree.structure(params)
    assert normwise(updates, jax.tree.map(jnp.negative, params)) < EXACT


# -- derivatives ---------------------------------------------------------------------------------


@COMPILED
@pytest.mark.parametrize("k", [1, 2, 3])
def test_updates_are_differentiable_as_those_of_optax(k, wrap):
    """Of three microbatches, through windows that end and windows that do not."""

    def last(multi, grads):
        params, state = data(3), multi.init(data(3))
        for grad in grads:
            updates, state = multi.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(jnp.sin(params))

    grads = [data(3, seed=i) for i in range(3)]
    opt = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))
    ours = wrap(jax.grad(lambda g: last(ja.MultiSteps(opt, k), g)))(grads)
    theirs = optax.MultiSteps(opt, k, accumulator_dtype=jnp.float64)
    truth = wrap(jax.grad(lambda g: last(theirs, g)))(grads)
    assert normwise(ours, truth) < EXACT
    assert np.any(ours[0])


@COMPILED
def test_updates_are_differentiable_in_the_weights(wrap):
    grads, multi = [data(3, seed=i) for i in range(2)], ja.MultiSteps(optax.sgd(1.0), 2)

    def last(weights):
        state = multi.init(grads[0])
        for grad, weight in zip(grads, weights, strict=True):
            updates, state = multi.update(grad, state, grads[0], weight=weight)
        return jnp.sum(updates**2)

    plain = lambda w: jnp.sum((w[0] * grads[0] + w[1] * grads[1]) ** 2) / (w[0] + w[1]) ** 2
    weights = [jnp.float64(2.0), jnp.float64(3.0)]
    assert normwise(wrap(jax.grad(last))(weights), jax.grad(plain)(weights)) < EXACT
