"""MultiSteps: a window is one optimizer step on its weighted mean, under every transformation."""

import functools
import unittest

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.helpers import EXACT, data, normwise, same

OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "sgd without momentum": optax.sgd(1.0),
    "adamw": optax.adamw(optax.linear_schedule(0.1, 0.01, 5), weight_decay=0.1),
    "clip": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1)),
}
PARAMS = {"w": data(3, 2), "b": data(2, seed=1)}


@pytest.fixture(autouse=True)
def _optax_mixes_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def tree(seed, scale=1.0):
    return {"w": scale * data(3, 2, seed=seed + 10), "b": scale * data(2, seed=seed + 20)}


compiled = functools.cache(jax.jit)
"""A bound method is a new object at each access, and jit would compile it anew."""


def host_loop(multi, grads, weights=None, params=PARAMS, *, flush=False, wrap=compiled):
    """The parameters after each microbatch, and the state at the end."""
    state, seen, update = multi.init(params), [], wrap(multi.update)
    for i, grad in enumerate(grads):
        extra = {} if weights is None else {"weight": weights[i]}
        updates, state = update(grad, state, params, **extra)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    if flush:
        updates, state = wrap(multi.flush)(state, params)
        seen.append(optax.apply_updates(params, updates))
    return seen, state


@functools.cache
def multi_steps(name, k, skip=None):
    """One object, so that its jitted methods compile once."""
    return ja.MultiSteps(OPTIMIZERS[name], k, should_skip_update_fn=skip)


def bare_loop(opt, windows, params=PARAMS):
    """The oracle: the optimizer alone, on weighted means."""
    state, update = opt.init(params), compiled(opt.update)
    for grads, weights in windows:
        mean = jax.tree.map(
            lambda *g, w=weights: sum(a * b for a, b in zip(w, g, strict=True)) / sum(w), *grads
        )
        updates, state = update(mean, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# -- the window ------------------------------------------------------------------------------------


def test_the_tests_that_optax_ships_pass(monkeypatch):
    tests = pytest.importorskip("optax.transforms._accumulation_test")
    made = []

    class Counted(ja.MultiSteps):
        def __init__(self, *args, **kwargs):
            made.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr("optax.transforms._accumulation.MultiSteps", Counted)
    suite = unittest.defaultTestLoader.loadTestsFromModule(tests)
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        result = unittest.TextTestRunner(verbosity=0).run(suite)
    assert result.wasSuccessful(), [*result.failures, *result.errors]
    assert result.testsRun >= 12
    assert len(made) >= 8


@given(
    name=st.sampled_from(sorted(OPTIMIZERS)),
    k=st.sampled_from([1, 2, 3]),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, 512.0]), min_size=7, max_size=7),
)
def test_a_window_is_one_step_on_its_weighted_mean(name, k, weights):
    grads = [tree(i) for i in range(7)]
    seen, state = host_loop(multi_steps(name, k), grads, weights, flush=True)
    windows = [(grads[i : i + k], weights[i : i + k]) for i in range(0, 7, k)]
    nothing = [jax.tree.map(jnp.zeros_like, PARAMS)]
    windows = [
        (g, w) if sum(w) else (nothing, [1.0]) for g, w in windows
    ]  # a total weight of 0 gives 0
    truth, inner = bare_loop(OPTIMIZERS[name], windows)
    assert normwise(seen[-1], truth) < EXACT
    assert normwise(state.inner_opt_state, inner) < EXACT
    assert int(state.gradient_step) == len(windows)
    changed = [not same(a, b) for a, b in zip(seen[:7], [PARAMS, *seen[:6]], strict=True)]
    assert not any(c and (i + 1) % k for i, c in enumerate(changed))


def test_the_mean_of_means_is_another_number():
    grads, weights = [tree(i) for i in range(3)], [8.0, 1.0, 3.0]
    seen, _ = host_loop(ja.MultiSteps(optax.sgd(1.0), 3), grads, weights)
    unweighted, _ = host_loop(optax.MultiSteps(optax.sgd(1.0), 3), grads)
    truth, _ = bare_loop(optax.sgd(1.0), [(grads, weights)])
    assert normwise(seen[-1], truth) < EXACT
    assert normwise(unweighted[-1], truth) > 0.01


def test_a_host_loop_equals_value_and_grad_on_the_batch():
    """Token weights: the batch's loss, once by the scan and once by the host, through three steps
    of AdamW."""
    opt, x, mask = (
        OPTIMIZERS["adamw"],
        data(12, 3, seed=3),
        jnp.asarray(np.arange(12) % 4, jnp.float64),
    )

    def loss(params, x, mask):
        error = jnp.sum((jnp.tanh(x @ params["w"]) + params["b"][None]) ** 2, axis=1)
        return ja.Mean(jnp.sum(error * mask), jnp.sum(mask))

    multi = ja.MultiSteps(opt, 3)
    hosted, state, scanned, inner = PARAMS, multi.init(PARAMS), PARAMS, opt.init(PARAMS)
    own, step = (
        jax.jit(ja.grad(loss, num_microbatches=1, in_axes=(None, 0, 0))),
        jax.jit(multi.update),
    )
    whole = jax.jit(ja.grad(loss, microbatch_size=4, in_axes=(None, 0, 0)))
    for _ in range(3):
        for params, rows, weight in ja.partition(
            hosted, x, mask, microbatch_size=4, in_axes=(None, 0, 0)
        ):
            updates, state = step(own(params, rows, weight), state, params, weight=jnp.sum(weight))
            hosted = optax.apply_updates(hosted, updates)
        updates, inner = opt.update(whole(scanned, x, mask), inner, scanned)
        scanned = optax.apply_updates(scanned, updates)
    assert normwise(hosted, scanned) < EXACT
    assert normwise(hosted, PARAMS) > 0.01


def test_the_sum_of_a_window():
    grads, weights = [tree(i) for i in range(2)], [2.0, 5.0]
    for w in (None, weights):
        seen, _ = host_loop(ja.MultiSteps(optax.sgd(1.0), 2, use_grad_mean=False), grads, w)
        factors = w or [1.0, 1.0]
        truth = jax.tree.map(lambda p, a, b, w=factors: p - w[0] * a - w[1] * b, PARAMS, *grads)
        assert normwise(seen[-1], truth) < EXACT


def test_a_schedule_changes_the_window():
    multi = ja.MultiSteps(optax.sgd(1.0), lambda step: jnp.where(step < 2, 1, 3))
    ends, state = [], multi.init(PARAMS)
    for i in range(8):
        _, state = compiled(multi.update)(tree(i), state, PARAMS)
        ends.append(bool(multi.has_updated(state)))
    assert ends == [True, True, False, False, True, False, False, True]


@pytest.mark.optimized
def test_dyadic_windows_are_bitwise():
    grads = [jnp.float32(g) for g in (-16.0, -24.0)]
    for weights in (None, [3, 1]):
        seen, _ = host_loop(
            ja.MultiSteps(optax.sgd(1.0), 2), grads, weights, params=jnp.float32(1.0)
        )
        assert float(seen[-1]) == 1 + np.average([16, 24], weights=weights)


# -- flush -----------------------------------------------------------------------------------------


def test_flush_counts_three_of_four_as_three():
    grads = [tree(i) for i in range(3)]
    seen, state = host_loop(ja.MultiSteps(optax.sgd(1.0), 4), grads, flush=True)
    truth, _ = bare_loop(optax.sgd(1.0), [(grads, [1.0] * 3)])
    assert normwise(seen[-1], truth) < EXACT
    assert same(seen[2], PARAMS)
    assert (int(state.mini_step), int(state.gradient_step)) == (0, 1)
    over_k = jax.tree.map(lambda p, *g: p - sum(g) / 4, PARAMS, *grads)  # divided by k: 3/4 of it
    assert normwise(over_k, truth) > 0.01


def test_flush_of_an_empty_window_changes_nothing():
    multi = ja.MultiSteps(OPTIMIZERS["adamw"], 2)
    for grads in ([], [tree(0)] * 2):
        _, state = host_loop(multi, grads)
        for flush in (multi.flush, jax.jit(multi.flush)):
            assert bool(multi.has_updated(state)) == bool(grads)
            updates, after = flush(state, PARAMS)
            assert same(after._replace(updated=()), state._replace(updated=()))
            assert not multi.has_updated(after)
            assert all(not np.any(x) for x in jax.tree.leaves(updates))


def test_after_a_flush_the_next_window_is_clean():
    multi, grads = ja.MultiSteps(optax.sgd(1.0), 3), [tree(i) for i in range(4)]
    (*_, params), state = host_loop(multi, grads[:1], flush=True)
    assert bool(multi.has_updated(state))
    for grad in grads[1:]:
        updates, state = multi.update(grad, state, params)
    truth = jax.tree.map(lambda *g: -sum(g) / 3, *grads[1:])
    assert normwise(updates, truth) < EXACT


# -- transformations -------------------------------------------------------------------------------


def test_vmap_runs_windows_of_their_own():
    """Three lanes at different places of their windows, NaN in one of them."""
    multi, weights = (
        ja.MultiSteps(OPTIMIZERS["adamw"], 2),
        jnp.asarray([[1.0, 2.0], [0.0, 3.0], [4.0, 1.0]]),
    )
    states = [host_loop(multi, [tree(i)] * i)[1] for i in range(3)]
    state, lanes = jax.tree.map(lambda *x: jnp.stack(x), *states), [None] * 3
    stacked = jax.jit(jax.vmap(lambda g, s, w: multi.update(g, s, PARAMS, weight=w)))
    for t in range(2):
        grads = [tree(7 * t + i, scale=np.nan if i == 1 else 1.0) for i in range(3)]
        updates, state = stacked(
            jax.tree.map(lambda *x: jnp.stack(x), *grads), state, weights[:, t]
        )
        for i in range(3):
            lanes[i], states[i] = multi.update(grads[i], states[i], PARAMS, weight=weights[i, t])
        for i in range(3):
            lane = jax.tree.map(lambda x, i=i: x[i], (updates, state))
            assert np.array_equal(np.isnan(lane[0]["w"]), np.isnan(lanes[i]["w"]))
            finite = jax.tree.map(
                lambda x: np.nan_to_num(np.asarray(x, np.float64)), (lane, (lanes[i], states[i]))
            )
            assert normwise(finite[0], finite[1]) < EXACT
    assert not np.isnan(updates["w"][0]).any()


@pytest.mark.optimized
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_reduces_once_a_window(check_vma):
    """The optimizer averages over devices: the collective stands in the branch that runs at the end
    of a window."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    pmean = optax.GradientTransformation(
        lambda p: (), lambda g, s, p=None: (lax.pmean(g, "data"), s)
    )
    multi = ja.MultiSteps(optax.chain(pmean, OPTIMIZERS["adamw"]), 2)
    state = multi.init(PARAMS)
    whole = dict.fromkeys(["mini_step", "gradient_step", "updated", "inner_opt_state"], P())
    states = lambda spec: state._replace(**whole, acc_grads=spec, total_weight=spec)
    stack = lambda x: jnp.stack([x] * 4)

    def step(grads, state, weight):
        grads, acc = jax.tree.map(lambda x: x[0], (grads, state.acc_grads))
        own = state._replace(acc_grads=acc, total_weight=state.total_weight[0])
        updates, new = multi.update(grads, own, PARAMS, weight=weight[0])
        lead = jax.tree.map(lambda x: x[None], (new.acc_grads, new.total_weight))
        return updates, new._replace(acc_grads=lead[0], total_weight=lead[1])

    specs = (P("data"), states(P("data")), P("data"))
    sharded = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=specs, out_specs=(P(), specs[1]), check_vma=check_vma
        )
    )
    state = state._replace(
        acc_grads=jax.tree.map(stack, state.acc_grads), total_weight=stack(state.total_weight)
    )
    grads = [[tree(4 * t + d) for d in range(4)] for t in range(2)]
    weights = np.asarray([[1.0, 2.0, 3.0, 4.0], [4.0, 0.0, 1.0, 1.0]])
    for t in range(2):
        args = (jax.tree.map(lambda *x: jnp.stack(x), *grads[t]), state, jnp.asarray(weights[t]))
        text = sharded.lower(*args).compile().as_text()
        updates, state = sharded(*args)
    means = [
        jax.tree.map(
            lambda a, b, w=weights[:, d]: (w[0] * a + w[1] * b) / w.sum(), grads[0][d], grads[1][d]
        )
        for d in range(4)
    ]
    bare = OPTIMIZERS["adamw"]
    truth, _ = bare.update(jax.tree.map(lambda *g: sum(g) / 4, *means), bare.init(PARAMS), PARAMS)
    assert normwise(updates, truth) < EXACT
    entry = text[text.index("ENTRY") :]
    assert "conditional(" in entry
    assert "all-reduce" in text
    assert "all-reduce" not in entry


@pytest.mark.parametrize("grads", [jnp.bfloat16, jnp.float32])
def test_bfloat16_parameters_under_adamw_in_a_scan(grads):
    """The states keep their dtypes; the mean is summed in float32 and has the gradients' dtype."""
    opt, k, steps = optax.adamw(0.1), 4, 16
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    multi = ja.MultiSteps(opt, k)
    given_grads = [jax.tree.map(lambda g: g.astype(grads), tree(i)) for i in range(steps)]

    def step(carry, grad):
        params, state = carry
        updates, state = multi.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), updates

    xs = jax.tree.map(lambda *g: jnp.stack(g), *given_grads)
    (scanned, state), updates = jax.jit(lambda c, x: lax.scan(step, c, x))(
        (params, multi.init(params)), xs
    )
    bare, _ = opt.update(given_grads[0], opt.init(params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda u: u.dtype, bare)
    assert jax.tree.map(lambda s: s.dtype, state.inner_opt_state) == jax.tree.map(
        lambda s: s.dtype, opt.init(params)
    )
    assert {a.dtype for a in jax.tree.leaves(state.acc_grads)} == {jnp.dtype(jnp.float32)}
    inner, hosted = opt.init(params), params
    for i in range(0, steps, k):
        mean = jax.tree.map(
            lambda *g: sum(x.astype(jnp.float32) for x in g) / k, *given_grads[i : i + k]
        )
        mean = jax.tree.map(lambda g: g.astype(grads), mean)
        updates, inner = opt.update(mean, inner, hosted)
        inner = jax.tree.map(lambda s, old: s.astype(old.dtype), inner, opt.init(params))
        hosted = optax.apply_updates(
            hosted, jax.tree.map(lambda u, b: u.astype(b.dtype), updates, bare)
        )
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert normwise(scanned, hosted) < eps
    assert normwise(scanned, params) > 10 * eps


def test_the_optimizer_sees_the_dtype_that_came_in():
    """256 + 1 + 1 + 1 is 256 in bfloat16, and 260 when the sum in float32 is rounded to it."""
    seen = []

    def update(grads, state, params=None):
        jax.debug.callback(lambda g: seen.append((float(g), g.dtype)), grads)
        return grads, state

    opt = optax.GradientTransformation(lambda params: (), update)
    grads = [jnp.bfloat16(x) for x in (256, 1, 1, 1)]
    params = jnp.bfloat16(0.0)
    for dtype, total in ((jnp.float32, 260.0), (None, 256.0)):
        multi = ja.MultiSteps(opt, 4, use_grad_mean=False, accumulator_dtype=dtype)
        state = multi.init(params)
        for grad in grads:
            updates, state = jax.jit(multi.update)(grad, state, params)
        jax.effects_barrier()
        assert seen == [(total, jnp.bfloat16)]
        assert updates.dtype == jnp.bfloat16
        seen.clear()


def test_float64_and_complex_are_kept_and_a_wider_accumulator_is_wider():
    multi = lambda dtype=jnp.float32: ja.MultiSteps(optax.sgd(1.0), 2, accumulator_dtype=dtype)
    dtypes = {
        "f16": jnp.float16,
        "f32": jnp.float32,
        "f64": jnp.float64,
        "c64": jnp.complex64,
        "c128": jnp.complex128,
    }
    params = {name: jnp.zeros(2, dtype) for name, dtype in dtypes.items()}
    summed = lambda m: [m.init(params).acc_grads[name].dtype.name for name in dtypes]
    assert summed(multi()) == ["float32", "float32", "float64", "complex64", "complex128"]
    assert summed(multi(jnp.float64)) == ["float64"] * 3 + ["complex128"] * 2
    assert summed(multi(None)) == [jnp.dtype(d).name for d in dtypes.values()]
    seen, _ = host_loop(multi(), [jnp.full(2, 1 + 2.0**-30)] * 2, params=jnp.zeros(2))
    assert (-seen[-1] == 1 + 2.0**-30).all()
    seen, _ = host_loop(
        multi(), [jnp.full(2, 1 + 2j)] * 2, [1.0, 3.0], params=jnp.zeros(2, jnp.complex128)
    )
    assert (-seen[-1] == 1 + 2j).all()


# -- one state with optax --------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_state_of_optax_goes_on_here_and_back(done):
    opt, grads = OPTIMIZERS["adamw"], [tree(i) for i in range(6)]
    theirs, ours = optax.MultiSteps(opt, 3, accumulator_dtype=jnp.float64), ja.MultiSteps(opt, 3)
    expected, _ = host_loop(theirs, grads)
    for first, then in ((theirs, ours), (ours, theirs)):
        seen, state = host_loop(first, grads[:done])
        assert bool(then.has_updated(state)) == bool(first.has_updated(state))
        params = seen[-1] if seen else PARAMS
        for grad in grads[done:]:
            updates, state = then.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        assert normwise(params, expected[-1]) < EXACT


# -- skips and faults ------------------------------------------------------------------------------


@given(
    bad=st.integers(0, 5), leaf=st.sampled_from(["w", "b"]),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    k=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_a_bad_microbatch_is_left_out_or_spoils_its_own_window_alone(bad, leaf, value, k):
    grads, weights = [tree(i) for i in range(6)], [1.0, 2.0, 3.0, 1.0, 5.0, 2.0]
    faulty = list(grads)
    faulty[bad] = grads[bad] | {leaf: grads[bad][leaf].at[-1].set(value)}
    multi = multi_steps("adamw", k, optax.skip_not_finite)
    seen, state = host_loop(multi, faulty, weights)
    kept = [i for i in range(6) if i != bad]
    clean, expected = host_loop(multi, [grads[i] for i in kept], [weights[i] for i in kept])
    assert same(seen[-1], clean[-1])
    assert same(
        state._replace(skip_state=(), updated=()), expected._replace(skip_state=(), updated=())
    )
    multi, window = multi_steps("sgd without momentum", k), bad // k
    state = multi.init(PARAMS)
    for i, grad in enumerate(faulty):
        updates, state = compiled(multi.update)(grad, state, PARAMS, weight=weights[i])
        finite = all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
        assert finite == ((i + 1) % k != 0 or i // k != window)


def test_has_updated_is_false_after_a_skip():
    multi = ja.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=optax.skip_not_finite)
    state, seen = multi.init(PARAMS), []
    for scale in (1.0, 1.0, np.nan, 1.0, np.nan, 1.0):
        updates, state = compiled(multi.update)(tree(0, scale), state, PARAMS)
        seen.append(bool(multi.has_updated(state)))
        assert bool(state.skip_state["should_skip"]) == np.isnan(scale)
        assert any(np.any(x) for x in jax.tree.leaves(updates)) == seen[-1]
    assert seen == [False, True, False, False, False, True]


def test_a_weight_of_zero_hides_what_is_not_finite():
    """A microbatch without tokens: its mean gradient is 0 / 0."""
    grads = [tree(0), tree(1, np.nan), tree(2)]
    seen, _ = host_loop(ja.MultiSteps(optax.sgd(1.0), 3), grads, [2.0, 0.0, 1.0])
    truth, _ = bare_loop(optax.sgd(1.0), [([grads[0], grads[2]], [2.0, 1.0])])
    assert normwise(seen[-1], truth) < EXACT
    empty, _ = host_loop(ja.MultiSteps(optax.sgd(1.0), 1), [grads[1]], [0.0])
    assert same(empty[-1], PARAMS)


# -- the defects of optax, both run ----------------------------------------------------------------


def counted():
    """An optimizer that counts its runs."""
    runs = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: runs.append(1))
        return updates, state

    return optax.GradientTransformation(lambda params: (), update), runs


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_the_optimizer_runs_once_a_window(wrap):
    for multi, expected in ((optax.MultiSteps, 8), (ja.MultiSteps, 2)):
        opt, runs = counted()
        host_loop(multi(opt, 4), [tree(i) for i in range(8)], wrap=wrap)
        jax.effects_barrier()
        assert len(runs) == expected


def test_nan_ends_with_its_window_and_does_not_reach_the_parameters_before():
    grads = [tree(0, np.nan), *(tree(i) for i in range(1, 4))]
    theirs, _ = host_loop(optax.MultiSteps(optax.sgd(1.0), 2), grads)
    assert all(np.isnan(params["w"]).all() for params in theirs)
    multi, updates = ja.MultiSteps(optax.sgd(1.0), 2), []
    state = multi.init(PARAMS)
    for grad in grads:
        update, state = jax.jit(multi.update)(grad, state, PARAMS)
        updates.append(update["w"])
    assert not updates[0].any()
    assert np.isnan(updates[1]).all()
    assert normwise(updates[3], -(grads[2]["w"] + grads[3]["w"]) / 2) < EXACT


def test_extra_arguments_pass_through_a_chain():
    w, value = jnp.float64(1), jnp.float64(0.5)
    theirs = optax.chain(optax.MultiSteps(optax.polyak_sgd(), 2).gradient_transformation())
    with pytest.raises(TypeError, match="'value'"):
        theirs.update(w, theirs.init(w), w, value=value)
    polyak = ja.MultiSteps(optax.polyak_sgd(), 2).gradient_transformation()
    ours = optax.chain(optax.clip(10.0), polyak)
    state, update = ours.init(w), jax.jit(ours.update)
    for grad, weight in ((2.0, 1), (6.0, 3)):
        updates, state = update(jnp.float64(grad), state, w, value=value, weight=weight)
    assert float(updates) == pytest.approx(-0.5 / 5, rel=1e-12)  # value / mean² · mean
