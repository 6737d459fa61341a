"""Low precision: float16 under one dynamic loss scale, bfloat16 parameters with sums that do not
drift."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum as ja
from tests.support.helpers import normwise, refused, same

pytestmark = pytest.mark.optimized

X = jnp.asarray(2.0**-12 * (1 + np.arange(8) % 3), jnp.float16)
W = jnp.ones(2, jnp.float16)


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def loss(w, x, scale):
    """Mean of (x² w)₁ + (x² w)₂, in float16 but for its sum: its gradient of about 2⁻²³ is next to
    nothing there."""
    each = jnp.sum((x * x)[:, None] * w[None], axis=1)
    return scale * ja.Mean(jnp.sum(each.astype(jnp.float32)), len(x))


grad = ja.grad(loss, microbatch_size=2, in_axes=(None, 0, None))
TRUTH = np.full(2, np.mean(np.asarray(X, np.float64) ** 2))


def test_float16_gradients_survive_by_the_scale():
    """2⁻²⁴ · k in float16 is exact for few bits; scaled by 2¹⁵ the product keeps all eleven."""
    x = X * jnp.float16(2.0**-10)
    each = lambda w, x, s: s * ja.Mean(jnp.sum((x[:, None] * w[None]).astype(jnp.float32)), len(x))
    tiny = lambda w, x, s: each(w * jnp.float16(2.0**-6), x * jnp.float16(1.0), s)
    wide = ja.accumulators.in_place(
        jnp.float32
    )  # for master weights: float16 could not hold what is unscaled
    gradient = ja.grad(tiny, microbatch_size=2, in_axes=(None, 0, None), accumulator=wide)
    truth = np.full(2, np.mean(np.asarray(x, np.float64)) * 2.0**-6)
    opt = ja.dynamic_loss_scale(optax.sgd(1.0))
    state = opt.init(W.astype(jnp.float32))
    updates, state = opt.update(gradient(W, x, state.scale), state, W.astype(jnp.float32))
    assert normwise(-updates, truth) < float(jnp.finfo(jnp.float16).eps)
    assert normwise(gradient(W, x, 1.0), truth) > 0.1


def test_one_overflow_skips_the_batch_and_halves_the_scale():
    opt, x = ja.dynamic_loss_scale(optax.adam(0.1), growth_interval=2), X.at[5].set(200.0)
    state = start = opt.init(W)
    update = jax.jit(opt.update)
    updates, state = update(grad(W, x, state.scale), state, W)
    assert same(updates, jnp.zeros_like(updates))
    assert same(state.inner_opt_state, start.inner_opt_state)
    assert (float(state.scale), int(state.num_skipped), int(state.good_steps)) == (2.0**14, 1, 0)
    for scale in (2.0**14, 2.0**15, 2.0**15, 2.0**16):  # two good steps, and it grows
        updates, state = update(grad(W, X, state.scale), state, W)
        assert float(state.scale) == scale
        assert (updates != 0).all()
    assert int(state.num_skipped) == 1


def test_the_scale_is_checked_once_a_window():
    """Inside MultiSteps: an overflow in the second microbatch of four leaves the window out at its
    end, not before."""
    multi = ja.MultiSteps(ja.dynamic_loss_scale(optax.sgd(1.0)), 4)
    state, params, scales = multi.init(W), W, []
    update = jax.jit(multi.update)
    for window in range(2):
        for i in range(4):
            x = jnp.full(2, 200.0 if (window, i) == (0, 1) else 2.0**-4, jnp.float16)
            scale = state.inner_opt_state.scale
            updates, state = update(
                ja.grad(loss, num_microbatches=1, in_axes=(None, 0, None))(params, x, scale),
                state,
                params,
            )
            scales.append(float(scale))
            assert np.isfinite(updates).all()
            assert (np.any(updates)) == ((window, i) == (1, 3))
    assert scales == [2.0**15] * 4 + [2.0**14] * 4
    assert int(state.inner_opt_state.num_skipped) == 1
    assert normwise(-updates, np.full(2, 2.0**-8)) < float(jnp.finfo(jnp.float16).eps)


@pytest.mark.parametrize(
    "options", [{"initial": 0.5}, {"growth_interval": 0}, {"factor": 1.0}], ids=str
)
def test_bad_scales_are_refused(options):
    refused(lambda: ja.dynamic_loss_scale(optax.sgd(1.0), **options), next(iter(options)))


@pytest.mark.parametrize("way", ["in_place", "tree", "compensated", "MultiSteps"])
def test_bfloat16_parameters_do_not_drift_over_4096_microbatches(way):
    """Each microbatch's gradient is its own bfloat16 number; their sum is within a few roundings of
    float32."""
    n, w = 4096, jnp.zeros(4, jnp.bfloat16)
    x = jnp.asarray(1 + 0.5 * np.random.default_rng(1).normal(size=(n, 4)), jnp.bfloat16)
    truth, fun = (
        np.asarray(x, np.float64).mean(0),
        lambda w, x: ja.Mean(jnp.sum(w * x[0]).astype(jnp.float32), 1.0),
    )
    if way == "MultiSteps":
        multi = ja.MultiSteps(optax.identity(), n)

        def step(state, g):
            return multi.update(g, state, w)[1], ()

        last = n - 1
        state, _ = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(multi.init(w), x[:last])
        got = state.acc_grads + (x[last].astype(jnp.float32) - state.acc_grads) / n
        assert state.acc_grads.dtype == jnp.float32
    else:
        record, wide = getattr(ja.accumulators, way), jnp.float32
        made = record()._replace(dtype=wide) if way == "compensated" else record(wide)
        got = jax.jit(ja.grad(fun, microbatch_size=1, accumulator=made))(w, x)
        assert got.dtype == jnp.float32
    # Rounding errors of 4096 additions of float32 behave like a random walk; the certain bound is
    # 4096 of them.
    assert normwise(got, truth) < (2.0**-12 if way == "compensated" else 64 * 2.0**-24)
    stalled = jax.jit(
        ja.grad(fun, microbatch_size=1, accumulator=ja.accumulators.in_place(jnp.bfloat16))
    )(w, x)
    assert normwise(stalled, truth) > 0.5
