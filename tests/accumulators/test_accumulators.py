"""Accumulators: each equals the full batch, or the batch without what it leaves out, and reports
what it saw."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum import accumulators as acc
from tests.support.helpers import EXACT, INEXACT, data, normwise, same, sizes_of

W, X, M = (
    {"a": data(3), "b": data(3, 2, seed=1)},
    data(7, 3, seed=2),
    jnp.asarray([1.0, 0.0, 2.0, 0.5, 3.0, 0.0, 1.0]),
)
AXES = (None, 0, 0)


def per_example(w, x):
    return jnp.sum(jnp.tanh(x @ w["b"]), axis=1) ** 2 + jnp.sin(x @ w["a"])


def loss(w, x, m):
    return ja.Mean(jnp.sum(per_example(w, x) * m), jnp.sum(m))


def expected(w, x, m):
    return jnp.sum(per_example(w, x) * m) / jnp.sum(m)


def plain_mean():
    """A record of a user's own, any object with the three functions."""
    return types.SimpleNamespace(
        init=lambda params: (jax.tree.map(jnp.zeros_like, params), 0.0),
        update=lambda s, g, w, i: (jax.tree.map(lambda x, y: x + w * y, s[0], g), s[1] + w),
        finalize=lambda s: (jax.tree.map(lambda x: x / s[1], s[0]), None),
    )


MADE = {
    "in_place": acc.in_place,
    "tree": acc.tree,
    "compensated": acc.compensated,
    "skip_nonfinite": acc.skip_nonfinite,
    "noise_scale": acc.noise_scale,
    "skip of noise": lambda: acc.skip_nonfinite(acc.noise_scale(acc.compensated())),
    "noise of skip": lambda: acc.noise_scale(acc.skip_nonfinite(acc.tree())),
    "a record of one's own": plain_mean,
}
CUSTOM = [name for name in MADE if name not in ("in_place", "tree")]


def without_report(value_and_grads):
    value, grads = value_and_grads
    return (value[0] if isinstance(value, tuple) else value), grads


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(
    "options", [{"microbatch_size": 3}, {"num_microbatches": 7}, {"num_microbatches": 1}], ids=str
)
def test_every_accumulator_equals_the_full_batch(name, options):
    step = jax.jit(ja.value_and_grad(loss, in_axes=AXES, accumulator=MADE[name](), **options))
    assert normwise(without_report(step(W, X, M)), jax.value_and_grad(expected)(W, X, M)) < EXACT


def test_a_mean_that_ignores_weights_is_another_number():
    wrong = plain_mean()
    right, wrong.update = wrong.update, lambda s, g, w, i: right(s, g, jnp.ones_like(w), i)
    own = types.SimpleNamespace(**(vars(wrong) | {"update": wrong.update}))
    value, grads = ja.value_and_grad(loss, in_axes=AXES, microbatch_size=2, accumulator=own)(
        W, X, M
    )
    truth = jax.value_and_grad(expected)(W, X, M)
    assert normwise(value, truth[0]) < EXACT
    assert normwise(grads, truth[1]) > 0.01


@pytest.mark.parametrize("name", CUSTOM)
def test_a_record_driven_by_hand_equals_the_loop(name):
    made, microbatches = (
        MADE[name](),
        [(W, X[i : i + 2], M[i : i + 2]) for i in (0, 2, 4)] + [(W, X[6:], M[6:])],
    )
    state = made.init(W)
    for i, (w, x, m) in enumerate(microbatches):
        mean = (
            jax.tree.map(jnp.nan_to_num, jax.grad(expected)(w, x, m)) if float(jnp.sum(m)) else None
        )
        state = made.update(
            state, mean or jax.tree.map(jnp.zeros_like, w), jnp.sum(m), jnp.int32(i)
        )
    grads, _ = made.finalize(state)
    assert normwise(grads, jax.grad(expected)(W, X, M)) < EXACT


def test_argnums_aux_and_reports_keep_their_places():
    fun = lambda w, x, m, scale: (
        ja.Mean(jnp.sum(scale * per_example(w, x) * m), jnp.sum(m)),
        ja.Concat(m),
    )
    options = {
        "in_axes": (None, 0, 0, None),
        "argnums": (0, 3),
        "has_aux": True,
        "microbatch_size": 2,
    }
    for made, has_report in ((acc.noise_scale(), True), (acc.compensated(), False)):
        (value, aux, *report), grads = ja.value_and_grad(fun, accumulator=made, **options)(
            W, X, M, 2.0
        )
        assert len(report) == has_report
        assert same(aux, M)
        truth = jax.value_and_grad(lambda w, s: s * expected(w, X, M), argnums=(0, 1))(W, 2.0)
        assert normwise((value, grads), truth) < EXACT
        again = ja.grad(fun, accumulator=made, **options)(W, X, M, 2.0)
        assert same(again, (grads, aux, *report))
    grads, report = ja.grad(loss, in_axes=AXES, microbatch_size=2, accumulator=acc.noise_scale())(
        W, X, M
    )
    assert report.norms.shape == (4,)
    assert normwise(grads, jax.grad(expected)(W, X, M)) < EXACT


# -- around the loop -------------------------------------------------------------------------------

square = lambda tree: sum(jnp.sum(x**3) for x in jax.tree.leaves(tree))


def three_steps(f):
    def train(w):
        def step(w, _):
            value, grads = f(w, X, M)
            return jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), value

        w, values = lax.scan(step, w, None, length=3)
        return jnp.sum(values) + square(w)

    return jax.jit(jax.value_and_grad(train))(W)


AROUND = {
    "vmap": lambda f: jax.jit(jax.vmap(f, (0, None, 0)))(
        jax.tree.map(lambda x: jnp.stack([x, 2 * x]), W), X, jnp.stack([M, M[::-1]])
    ),
    "three scanned steps and their gradient": three_steps,
    "reverse over checkpointed reverse": lambda f: jax.grad(
        jax.checkpoint(lambda w: square(f(w, X, M)[1]))
    )(W),
    "hessian": lambda f: jax.jit(jax.jacfwd(lambda w: f(w, X, M)[1]))(W),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", ["skip of noise", "a record of one's own"])
def test_transformations_around(around, name):
    ours = ja.value_and_grad(loss, in_axes=AXES, microbatch_size=3, accumulator=MADE[name]())
    actual = AROUND[around](lambda *args: without_report(ours(*args)))
    assert normwise(actual, AROUND[around](jax.value_and_grad(expected))) < EXACT


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("compensated", False),
        ("skip_nonfinite", True),
        ("noise of skip", False),
        ("noise of skip", True),
    ],
)
def test_shards_of_one_batch(name, bad):
    """Over a mesh the result is the mean of the devices' own, by weight; a device whose rows are
    all bad counts not."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    ours = ja.value_and_grad(
        loss, in_axes=AXES, microbatch_size=2, mesh_axes="data", accumulator=MADE[name]()
    )
    step = lambda *args: without_report(ours(*args))
    x, m = jnp.concatenate([X, X[:1]]), jnp.concatenate([M, M[:1]])
    if bad:
        x = x.at[0, 0].set(jnp.nan).at[3, 0].set(jnp.inf)
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=(P(), P())
    )
    truth = jax.value_and_grad(expected)(W, *((x[4:], m[4:]) if bad else (x, m)))
    assert normwise(jax.jit(sharded)(W, x, m), truth) < EXACT


def test_padding_is_no_microbatch():
    fun = lambda w, x, m, count: loss(w, x, m)
    for made in (acc.noise_scale(), acc.skip_nonfinite(), acc.compensated()):
        step = ja.value_and_grad(
            fun, in_axes=(*AXES, None), microbatch_size=2, num_examples_argnum=3, accumulator=made
        )
        (x, m), mask = ja.pad_batch((X, M), to=12)
        got = jax.jit(step)(W, x, jnp.where(mask, m, 0.0), 7)
        assert normwise(without_report(got), jax.value_and_grad(expected)(W, X, M)) < EXACT
        if isinstance(got[0], tuple):
            report = got[0][1]
            entries = (
                getattr(report, "norms", None) if hasattr(report, "norms") else report.microbatches
            )
            assert entries.shape == (6,)
            assert not entries[4:].any()


# -- skip_nonfinite --------------------------------------------------------------------------------


def faulty(w, x, m, poison, bump):
    """The loss, whose gradient of leaf a or b, or whose value alone, is not finite where poison is
    not 0."""
    value = jnp.sum(per_example(w, x) * m)
    bad_a = jnp.sum(w["a"]) * jnp.sum(poison[:, 0]) + jnp.sum(w["b"]) * jnp.sum(poison[:, 1])
    return value + bad_a - lax.stop_gradient(bad_a) + jnp.sum(poison[:, 2]) + 0 * bump


@given(
    sizes=st.sampled_from([{"microbatch_size": 2}, {"microbatch_size": 3}]),
    row=st.integers(0, 6), where=st.integers(0, 2),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
)  # fmt: skip
def test_a_bad_microbatch_is_as_if_it_had_not_been_there(sizes, row, where, value):
    poison = jnp.zeros((7, 3)).at[row, where].set(value)

    def fun(w, x, m, poison, state):
        total = faulty(w, x, m, poison, 0.0)
        aux = {
            "mean": ja.Mean(jnp.sum(m), len(m)), "sum": ja.Sum(jnp.sum(x)),
            "max": ja.Max(jnp.max(x)),
            "rows": ja.Concat(x), "state": ja.Carry(0.5 * state + jnp.sum(x)),
            "last": ja.Last(jnp.sum(m)),
        }  # fmt: skip
        return ja.Mean(total, jnp.sum(m)), aux

    options = {"in_axes": (None, 0, 0, 0, ja.CARRY), "has_aux": True, **sizes}
    key = tuple(sizes.items())
    if key not in _skipping:
        _skipping[key] = [
            jax.jit(ja.value_and_grad(fun, accumulator=a, **options))
            for a in (acc.skip_nonfinite(), None)
        ]
    skipping, default = _skipping[key]
    (loss_value, aux, report), grads = skipping(W, X, M, poison, jnp.float64(0))
    bounds = np.cumsum([0, *sizes_of(7, **sizes)])
    index = int(np.searchsorted(bounds, row, side="right")) - 1
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    kept = np.concatenate([np.arange(7)[part] for i, part in enumerate(parts) if i != index])
    truth = jax.value_and_grad(expected)(W, X[kept], M[kept])
    assert normwise((loss_value, grads), truth) < EXACT
    state = 0.0
    for i, part in enumerate(parts):
        state = state if i == index else 0.5 * state + np.sum(X[part])
    last = parts[-1 if index != len(parts) - 1 else -2]
    sums = {
        "mean": np.mean(M[kept]),
        "sum": np.sum(X[kept]),
        "max": np.max(X[kept]),
        "state": state,
    }
    assert normwise({name: aux[name] for name in sums}, sums) < EXACT
    assert float(aux["last"]) == float(np.sum(M[last]))
    assert same(aux["rows"], X)
    assert int(report.num_skipped) == 1
    assert np.flatnonzero(report.microbatches).tolist() == [index]
    assert [bool(x[index]) for x in (report.leaves["a"], report.leaves["b"], report.loss)] == [
        where == 0, where == 1, where == 2 or (where < 2 and bool(report.loss[index]))
    ]  # fmt: skip
    assert report.describe()[0].startswith(f"microbatch {index}: ")
    (value, _), poisoned = default(W, X, M, poison, jnp.float64(0))
    assert not all(np.isfinite(x).all() for x in jax.tree.leaves((value, poisoned)))
    (value, _), clean = default(W, X, M, 0 * jnp.nan_to_num(poison), jnp.float64(0))
    assert normwise((value, clean), jax.value_and_grad(expected)(W, X, M)) < EXACT


_skipping = {}


def test_where_nothing_is_finite_value_and_gradient_are_zero():
    step = ja.value_and_grad(
        loss, in_axes=AXES, microbatch_size=2, accumulator=acc.skip_nonfinite()
    )
    (value, report), grads = step(W, X * jnp.nan, M)
    assert same((value, grads), (jnp.zeros(()), jax.tree.map(jnp.zeros_like, W)))
    assert report.microbatches.all()
    assert int(report.num_skipped) == 4


# -- noise_scale -----------------------------------------------------------------------------------


def test_the_noise_scale_is_unbiased():
    """Its mean over every division of 6 examples into pairs is the sample covariance's trace, a
    direct estimate."""
    x = X[:6]
    each = np.stack(
        [ravel_pytree(jax.grad(expected)(W, row, jnp.ones(1)))[0] for row in x[:, None]]
    )
    trace = np.trace(np.cov(each.T))
    step = jax.jit(ja.grad(loss, in_axes=AXES, microbatch_size=2, accumulator=acc.noise_scale()))
    orders = itertools.permutations(range(6))
    pairs = [p for p in orders if p[0] < p[1] and p[2] < p[3] and p[4] < p[5]]
    assert len(pairs) == 90
    reports = [step(W, x[np.asarray(p)], jnp.ones(6))[1] for p in pairs]
    assert normwise(np.mean([r.trace for r in reports]), trace) < EXACT
    square = np.sum(each.mean(0) ** 2) - trace / 6
    assert normwise(np.mean([r.squared_norm for r in reports]), square) < EXACT
    assert np.std([r.trace for r in reports]) > 0.1 * trace
    for report in reports[:3]:  # the paper's form, for equal microbatches
        small, big = np.mean(report.norms**2), np.sum(each.mean(0) ** 2)
        assert normwise(report.trace, (small - big) / (1 / 2 - 1 / 6)) < EXACT


def test_the_noise_scale_of_microbatches_of_many_weights():
    step = ja.grad(loss, in_axes=AXES, microbatch_size=3, accumulator=acc.noise_scale())
    grads, report = step(W, X, M)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    own = np.stack([flat(jax.grad(expected)(W, X[a : a + 3], M[a : a + 3])) for a in (0, 3, 6)])
    weights = np.asarray([float(jnp.sum(M[a : a + 3])) for a in (0, 3, 6)])
    trace = np.sum(weights * np.sum((own - flat(grads)) ** 2, axis=1)) / 2
    assert normwise(report.trace, trace) < EXACT
    assert normwise(report.squared_norm, np.sum(flat(grads) ** 2) - trace / weights.sum()) < EXACT
    assert normwise(report.norms, np.linalg.norm(own, axis=1)) < EXACT
    _, alone = ja.grad(loss, in_axes=AXES, num_microbatches=1, accumulator=acc.noise_scale())(
        W, X, M
    )
    assert np.isnan(alone.trace)


def test_a_skipped_microbatch_makes_no_noise():
    noise = acc.noise_scale(acc.skip_nonfinite())
    x = X.at[2, 0].set(jnp.nan)
    _, report = ja.grad(loss, in_axes=AXES, microbatch_size=2, accumulator=noise)(W, x, M)
    kept = np.asarray([0, 1, 4, 5, 6])
    _, truth = ja.grad(loss, in_axes=AXES, microbatch_size=2, accumulator=acc.noise_scale())(
        W, X[kept], M[kept]
    )
    assert normwise(report[:3], truth[:3]) < EXACT
    assert report.inner.microbatches.tolist() == [False, True, False, False]
    assert np.isnan(report.norms).tolist() == [False, True, False, False]


def test_a_microbatch_without_weight_makes_no_noise():
    """Masked, and so no sample; the paper's n counts the others."""
    mask = M.at[2:4].set(0.0)
    step = jax.jit(ja.grad(loss, in_axes=AXES, microbatch_size=2, accumulator=acc.noise_scale()))
    kept = np.asarray([0, 1, 4, 5, 6])
    (_, report), (_, truth) = step(W, X, mask), step(W, X[kept], mask[kept])
    assert normwise(report[:3], truth[:3]) < EXACT


# -- compensated -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("jitted", [True, False])
def test_the_error_of_a_compensated_sum_does_not_grow(dtype, jitted):
    """4096 microbatches: within two roundings of float64, where the plain sum of that dtype is
    lost."""
    fun, n = lambda w, x: ja.Mean(jnp.sum(w * x[0]), 1.0), 4096
    x = jnp.asarray(1 + 0.1 * np.random.default_rng(0).normal(size=(n, 8)), dtype)
    w, truth = jnp.zeros(8, dtype), np.asarray(x, np.float64).mean(0)
    error = lambda made: normwise(
        (jax.jit if jitted else lambda f: f)(ja.grad(fun, microbatch_size=1, accumulator=made))(
            w, x
        ),
        truth,
    )
    eps = float(jnp.finfo(jnp.float32).eps)
    wide = acc.compensated()._replace(
        dtype=jnp.float32
    )  # the sum itself, before it is cast to the parameter's dtype
    assert error(wide) < (n * 2.0**-16 * 2.0**-8 if dtype == jnp.bfloat16 else eps)
    assert error(acc.tree(dtype)) > (0.5 if dtype == jnp.bfloat16 else 4 * eps)


MAKERS = [acc.in_place, acc.tree, acc.compensated]
WRAPPERS = [lambda inner: inner, acc.skip_nonfinite, acc.noise_scale]


def dtype_of_gradients(accumulator, parameters):
    loss = lambda p, x: jnp.mean((x @ p.astype(x.dtype)) ** 2)
    step = ja.value_and_grad(loss, num_microbatches=2, accumulator=accumulator)
    return jax.eval_shape(step, parameters, data(4, 3))[1].dtype


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("wrap", WRAPPERS, ids=["bare", "skip_nonfinite", "noise_scale"])
@pytest.mark.parametrize("make", MAKERS)
def test_gradients_have_the_dtype_of_their_parameters(make, wrap, dtype):
    """So that the one line that is changed changes no type; an explicit dtype is what the caller
    asked for."""
    w = jnp.ones(3, dtype)
    assert dtype_of_gradients(wrap(make()), w) == dtype
    assert dtype_of_gradients(wrap(make(jnp.float32)), w) == jnp.float32


def test_a_scanned_donated_adamw_step_of_low_precision_runs_unchanged():
    optimizer, x = optax.adamw(1e-2), data(8, 4, dtype=jnp.bfloat16)
    loss = lambda w, x: jnp.mean((x @ w) ** 2)

    def trained(value_and_grad):
        def step(carried, _):
            w, state = carried
            value, grads = value_and_grad(w, x)
            updates, state = optimizer.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), value

        def run(w, state):
            return lax.scan(step, (w, state), None, length=2)

        w = jnp.ones((4, 6), jnp.bfloat16)
        with jax.numpy_dtype_promotion("standard"):
            return jax.jit(run, donate_argnums=(0, 1))(w, optimizer.init(w))

    ours, theirs = (
        trained(ja.value_and_grad(loss, num_microbatches=2)),
        trained(jax.value_and_grad(loss)),
    )
    dtypes = lambda result: [x.dtype for x in jax.tree.leaves(result)]
    assert dtypes(ours) == dtypes(theirs)
    assert normwise(ours[0][0], theirs[0][0]) < 2 * float(jnp.finfo(jnp.bfloat16).eps)


@INEXACT
def test_compensation_in_dtypes():
    fun = lambda w, x: ja.Mean(
        jnp.sum(jnp.sum(x) * sum(jnp.sum(p.astype(jnp.float32)) for p in w)), len(x)
    )
    w = [jnp.zeros(2, d) for d in (jnp.bfloat16, jnp.float16, jnp.float32)]
    x = data(4, 1, dtype=jnp.float32)
    state = acc.compensated().init(w)
    assert [pair.high.dtype.name for pair in state[0]] == ["bfloat16", "float32", "float32"]
    grads = ja.grad(fun, microbatch_size=1, accumulator=acc.compensated())(w, x)
    assert [g.dtype.name for g in grads] == ["bfloat16", "float16", "float32"]
    z = jnp.zeros(2, jnp.complex128)
    own = lambda z, x: ja.Mean(jnp.sum(jnp.real((1 + 2j) * z)) * jnp.sum(x), 1.0)
    actual = ja.grad(own, microbatch_size=1, accumulator=acc.compensated())(z, data(5, 1))
    assert normwise(actual, np.full(2, (1 + 2j) * float(jnp.mean(data(5, 1))))) < EXACT
