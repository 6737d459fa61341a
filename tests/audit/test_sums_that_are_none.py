"""Sums that are none: those that wrap, solvers that are not linear, places that are moved, NaN that
the program computes, and rules that change between calls."""

import functools

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg as iterative
import numpy as np
import pytest
from jax import lax
from jax.experimental.ode import odeint

import jaxaccum
from jaxaccum import Mean, Sum
from tests.audit import partitions
from tests.audit.partitions import W, gathered, nll, own
from tests.support.helpers import EXACT, data

N = 24
Y = jnp.arange(N, dtype=jnp.int32) % 4
BATCH = {"x": data(N, 3, seed=1), "y": Y, "t": data(N, seed=7), "one": jnp.ones(N, jnp.uint8)}
BATCH |= {"few": (Y > 2).astype(jnp.uint8), "some": Y > 1, "many": jnp.ones((N, 20), jnp.uint8)}
off = functools.partial(partitions.off, b=BATCH)
is_called_exact = functools.partial(partitions.is_called_exact, b=BATCH)
WRONG = 1e-3
"""Every error of these losses is larger."""


# -- sums of integers ------------------------------------------------------------------------------

WIDE = {
    "a count": lambda b: jnp.sum(b["some"]).astype(float),
    "a sum that jnp widens": lambda b: jnp.sum(b["many"]).astype(float),
    "a signed difference": lambda b: (
        2 * jnp.sum(b["one"], dtype=jnp.int32) - jnp.sum(b["some"], dtype=jnp.int32)
    ).astype(float),
    "a product of counts": lambda b: jnp.dot(b["one"], b["one"], preferred_element_type=jnp.int32)
    .astype(float),
}  # fmt: skip
NARROW = {
    "an unsigned difference": lambda b: (
        jnp.sum(b["few"], dtype=jnp.uint32) - jnp.sum(b["one"], dtype=jnp.uint32)
    ).astype(float),
    "a product of booleans": lambda b: jnp.dot(b["some"], b["some"]).astype(float),
    "a sum of bytes": lambda b: jnp.sum(b["many"], dtype=jnp.uint8).astype(float),
    "a product of bytes": lambda b: jnp.vdot(b["many"], b["many"]).astype(float),
    "a histogram in bytes": lambda b: (
        jnp.zeros(3, jnp.uint8).at[0 * b["y"]].add(jnp.uint8(20))[0].astype(float)
    ),
    "a number of constants": lambda b: jnp.vdot(
        jnp.ones((len(b["y"]), 20), jnp.uint8), jnp.ones((len(b["y"]), 20), jnp.uint8)
    ).astype(float),
    "a step in bytes": lambda b: lax.scan(
        lambda c, m: ((c.astype(jnp.uint8) + m * jnp.uint8(20)).astype(jnp.int32), None),
        jnp.int32(0),
        b["one"],
    )[0].astype(float),
    "an unsigned loop": lambda b: lax.scan(
        lambda c, m: (c - m.astype(jnp.uint32), None), jnp.uint32(0), b["one"]
    )[0].astype(float),
    "a loop in bytes": lambda b: lax.scan(
        lambda c, m: (c + m * jnp.uint8(20), None), jnp.uint8(0), b["one"]
    )[0].astype(float),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_sum_that_its_dtype_holds_is_one(name):
    loss = lambda w, b: Mean(jnp.sum(nll(w, b)), WIDE[name](b))
    assert is_called_exact(loss)
    assert off(loss) < EXACT


@pytest.mark.parametrize("name", NARROW)
def test_a_sum_that_may_overflow_is_no_sum(name):
    loss = lambda w, b: Mean(jnp.sum(nll(w, b)), NARROW[name](b))
    assert not is_called_exact(loss)
    assert off(loss) > WRONG
    with pytest.raises(jaxaccum.InexactError, match="int32"):
        jaxaccum.grad(loss, num_microbatches=2, audit="raise")(W, BATCH)


def test_a_count_that_overflows_is_no_output():
    counted = lambda dtype: lambda w, b: (jnp.mean(nll(w, b)), Sum(jnp.sum(b["many"], dtype=dtype)))
    assert is_called_exact(counted(jnp.int32), has_aux=True)
    assert not is_called_exact(counted(jnp.uint8), has_aux=True)
    (_, wide), (_, narrow) = [
        jaxaccum.microbatch(counted(dtype), num_microbatches=2, audit=None)(W, BATCH)
        for dtype in (jnp.int32, jnp.uint8)
    ]
    ones = np.asarray(BATCH["many"])
    assert int(wide) == ones.sum()
    assert int(narrow) != ones.sum(dtype=np.uint8)


# -- NaN that the program computes -----------------------------------------------------------------


def nan_mean(w, b):
    return jnp.nanmean(nll(w, b) + jnp.log(b["t"]))


def counted_by_hand(w, b):
    e = nll(w, b) + jnp.log(b["t"])
    return jnp.sum(jnp.where(jnp.isnan(e), 0.0, e)) / jnp.sum(~jnp.isnan(e)).astype(float)


@pytest.mark.parametrize("loss", [nan_mean, counted_by_hand])
def test_a_mean_of_what_is_not_nan_has_a_weight(loss):
    def mended(w, b):
        e = nll(w, b) + jnp.log(b["t"])
        return Mean(jnp.nansum(e), jnp.sum(~jnp.isnan(e)))

    assert not is_called_exact(loss)
    assert off(loss) > WRONG
    assert is_called_exact(mended)
    assert off(mended, loss) < EXACT


def regression(w, b):
    return jnp.sum((b["x"] @ w - 1.0) ** 2, axis=1) / 4.0


def few(b):
    return b["few"].astype(jnp.float64)


MADE_NAN = {
    "a logarithm": lambda e, b: e + jnp.log(b["x"][:, 0]),
    "a division": lambda e, b: e * few(b) / few(b),
    "a root": lambda e, b: jnp.sqrt(e * b["x"][:, 0]),
    "a gather": lambda e, b: jnp.take(jnp.ones(2), b["y"]) * e,
    "a loop": lambda e, b: lax.fori_loop(0, 1, lambda _, c: c + jnp.log(b["x"][:, 0]), e),
    "a branch": lambda e, b: lax.cond(W[0, 0] > 99, lambda: e, lambda: e + jnp.log(b["x"][:, 0])),
}


@pytest.mark.parametrize("name", MADE_NAN)
def test_a_mean_of_known_numbers_that_may_become_nan_has_a_weight(name):
    loss = lambda w, b: jnp.nanmean(MADE_NAN[name](regression(w, b), b))
    assert not jaxaccum.audit(loss, W, BATCH).exact
    assert off(loss) > WRONG


def test_a_mean_of_known_numbers_that_are_not_nan_is_exact():
    """It rests on them, so that nothing is known of what ``jax.jit`` traces."""
    loss = lambda w, b: jnp.nanmean(regression(w, b))
    step = jaxaccum.grad(loss, num_microbatches=2, audit="raise")
    report = jaxaccum.audit(loss, W, BATCH)
    assert report.exact
    assert "assumption" in [finding.kind for finding in report.findings]
    assert off(loss) < EXACT
    missing = BATCH | {"x": BATCH["x"].at[:7, 0].set(jnp.nan)}
    assert off(loss, b=missing) > WRONG
    for call in (step, jax.jit(step)):
        with pytest.raises(jaxaccum.InexactError, match="divides by its own denominator"):
            call(W, missing)
    infinite = BATCH | {"x": BATCH["x"].at[:7, 0].set(jnp.inf)}
    assert not jaxaccum.audit(lambda w, b: loss(0 * w, b), W, infinite).exact


GUARDS = {
    "of rows": lambda v, e: jnp.mean(jnp.where(jnp.isnan(v), 0.0, e)),
    "and a condition": lambda v, e: jnp.where(jnp.isnan(v) & (jnp.sum(W) < 99), 0.0, v),
}


@pytest.mark.parametrize("name", GUARDS)
def test_a_choice_by_the_nan_of_a_total_is_an_assumption(name):
    loss = lambda w, b: (lambda e: GUARDS[name](jnp.mean(e), e))(nll(w, b))
    report = jaxaccum.audit(loss, W, BATCH)
    assert report.exact
    assert off(loss) < EXACT
    assert "assumption" in [finding.kind for finding in report.findings]
    missing = BATCH | {"x": BATCH["x"].at[0, 0].set(jnp.nan)}
    assert not jaxaccum.audit(loss, W, missing).exact


# -- derivatives that are not linear ---------------------------------------------------------------

POSITIVE = jnp.diag(jnp.asarray([1.0, 3.0, 10.0, 30.0])) + 0.5
"""A symmetric positive definite matrix."""


def solved(solve):
    return lambda w, b: jnp.mean(jnp.tanh(b["x"] @ w @ solve(w[0]) - b["t"]) ** 2)


def clipped(b):
    solve = lambda _, b: jnp.linalg.solve(POSITIVE, b)
    transposed = lambda _, b: jnp.clip(jnp.linalg.solve(POSITIVE, b), -0.01, 0.01)
    return lax.custom_linear_solve(lambda x: POSITIVE @ x, b, solve, transposed)


SOLVERS = {
    "cg that stops early": lambda b: iterative.cg(POSITIVE, b, maxiter=1)[0],
    "bicgstab that stops early": lambda b: iterative.bicgstab(POSITIVE, b, maxiter=1)[0],
    "clipped": clipped,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_that_is_not_linear_in_the_cotangent(name):
    loss = solved(SOLVERS[name])
    assert not is_called_exact(loss)
    assert off(loss) > WRONG


@pytest.mark.parametrize(
    "solve",
    [
        lambda b: jnp.linalg.solve(POSITIVE, b),
        lambda b: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(POSITIVE), b),
        lambda b: jnp.linalg.inv(POSITIVE) @ b,
    ],
    ids=["solve", "cho_solve", "inv"],
)
def test_a_direct_solver_is_linear(solve):
    loss = solved(solve)
    assert is_called_exact(loss)
    assert off(loss) < EXACT


def test_a_solver_for_each_example_need_not_be_linear():
    each = jax.vmap(lambda h: iterative.cg(POSITIVE, h, maxiter=2)[0])
    loss = lambda w, b: jnp.mean(jnp.sum(jnp.tanh(each(b["x"] @ w)), axis=1))
    assert is_called_exact(loss)
    assert off(loss) < EXACT


def flow(w, y):
    field = lambda y, t, w: jnp.tanh(w[:, :3] @ y) - y
    return odeint(field, y, jnp.asarray([0.0, 2.0]), w, rtol=1e-3, atol=1e-3)[-1]


def test_the_steps_of_an_adjoint_depend_on_the_cotangent():
    each = jax.vmap(lambda y, w: flow(w, y), (0, None))
    alone = lambda w, b: jnp.mean(jnp.sum(each(b["x"], w), axis=1))
    assert off(alone) < EXACT
    shared = lambda w, b: jnp.mean((b["x"] @ flow(w, w[:, 3]) - b["t"]) ** 2)
    assert not is_called_exact(shared)
    assert off(shared) > WRONG


# -- places in another order -----------------------------------------------------------------------


def by_partner(place):
    """The product of each example's row and another's, of microbatches and of the whole batch."""
    product = lambda x, w, rows: jnp.mean(jnp.sum(jnp.tanh(x @ w) * rows, axis=1))
    whole = lambda w, b: product(b["x"], w, (b["x"] @ w)[place(jnp.arange(N, dtype=jnp.int32))])
    return lambda w, b: product(b["x"], w, gathered(w, b)[place(own(b))]), whole


MOVED = {
    "half a batch further": lambda i: (i + N // 2) % N,
    "the next": lambda i: (i + 1) % N,
    "the other of a pair": lambda i: i ^ 1,
    "one for two": lambda i: i // 2,
    "the one before": lambda i: jnp.where(i > 0, i - 1, i),
    "one of few": lambda i: i.astype(bool).astype(jnp.int32),
    "one of the first": lambda i: jnp.minimum(i, 3),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_place_that_is_moved_is_another_in_another_order(name):
    loss, whole = by_partner(MOVED[name])
    assert is_called_exact(loss)
    assert off(loss, whole) < EXACT
    assert not is_called_exact(loss, split="strided")
    assert off(loss, whole, split="strided") > WRONG


TABLE = data(N, seed=11)


PICKED = {
    "a feature": lambda w, own, rows, i: own[:, 0] * jnp.sum(rows[:, i], axis=0),
    "a row and a column": lambda w, own, rows, i: own[:, 0] * rows[3, i],
    "as many columns": lambda w, own, rows, i: (
        own * (lambda r: jnp.sum(r * r.T))(rows[:, jnp.arange(N) % 4])
    ),
    "an entry of a square": lambda w, own, rows, i: own[:, 0] * (rows @ rows.T)[i, 3],
}


@pytest.mark.parametrize("name", PICKED)
def test_rows_are_picked_by_places_and_nothing_else_is(name):
    w = data(3, 30, seed=3)
    of = lambda w, b, rows, i: jnp.mean(PICKED[name](w, jnp.tanh(b["x"] @ w), rows, i))
    loss = lambda w, b: of(w, b, gathered(w, b), own(b))
    whole = lambda w, b: of(w, b, b["x"] @ w, jnp.arange(N, dtype=jnp.int32))
    assert off(loss, whole, w) < EXACT
    assert not is_called_exact(loss, w, split="strided")
    assert off(loss, whole, w, split="strided") > WRONG


def test_a_place_that_a_branch_makes_is_in_the_order_of_the_microbatches():
    def loss(w, b):
        n = len(b["y"])
        start, within = lax.axis_index("microbatch") * n, jnp.arange(n, dtype=jnp.int32)
        branches = lambda i: (start + i) + 0, lambda i: (start + i) + 1
        place = lax.cond(jnp.sum(w) > 0, *branches, within)
        return jnp.mean((b["x"] @ w)[:, 0] * jnp.cos(place.astype(float)))

    first = jnp.where(jnp.sum(W) > 0, 0.0, 1.0)
    whole = lambda w, b: jnp.mean((b["x"] @ w)[:, 0] * jnp.cos(first + jnp.arange(float(N))))
    assert is_called_exact(loss)
    assert off(loss, whole) < EXACT
    assert not is_called_exact(loss, split="strided")
    assert off(loss, whole, split="strided") > WRONG


def test_a_loop_that_gathers_sums_in_the_order_of_the_microbatches():
    def loss(w, b):
        step = lambda c, t: (c + t * gathered(w, b), None)
        total, _ = lax.scan(step, jnp.zeros((N, 4)), jnp.arange(3.0))
        return jnp.mean(b["x"] @ w * jnp.sum(total * TABLE[:, None], axis=0)[None])

    def whole(w, b):
        h = b["x"] @ w
        return jnp.mean(h * jnp.sum(3 * h * TABLE[:, None], axis=0)[None])

    assert is_called_exact(loss)
    assert off(loss, whole) < EXACT
    assert not is_called_exact(loss, split="strided")
    assert off(loss, whole, split="strided") > WRONG


def test_a_place_that_its_dtype_does_not_hold_is_another():
    many = {"x": data(200, 3, seed=1), "y": jnp.arange(200, dtype=jnp.int32)}
    of = lambda own, rows, i: jnp.mean(jnp.sum(jnp.tanh(own) * rows[i], axis=1))
    cut = lambda i: i.astype(jnp.int8).astype(jnp.int32)
    loss = lambda w, b: of(b["x"] @ w, gathered(w, b), cut(own(b)))
    whole = lambda w, b: of(b["x"] @ w, b["x"] @ w, cut(b["y"]))
    assert off(loss, whole, b=many) < EXACT
    assert not is_called_exact(loss, b=many, split="strided")
    assert off(loss, whole, b=many, split="strided") > WRONG


def test_the_own_place_is_the_same_in_any_order():
    loss, whole = by_partner(lambda i: i[:, None].reshape(-1))
    assert is_called_exact(loss, split="strided")
    assert off(loss, whole, split="strided") < EXACT


def whole_of(function):
    """A loss of the own rows and all rows, of microbatches and of the whole batch."""
    loss = lambda w, b: jnp.mean(function(jnp.tanh(b["x"] @ w), gathered(w, b)))
    return loss, lambda w, b: jnp.mean(function(jnp.tanh(b["x"] @ w), b["x"] @ w))


SCRAMBLED = {
    "a reshape across the rows": (4, lambda own, rows: own * jnp.sum(rows.reshape(4, N), 1)[None]),
    "a reshape after a transpose": (
        4,
        lambda own, rows: own * jnp.max(rows.T.reshape(N, 4), 0)[None],
    ),
    "features as many as rows": (N, lambda own, rows: own * jnp.sum(rows * rows.T)),
    "a product of rows with rows": (N, lambda own, rows: own * jnp.sum(rows @ rows)),
}


@pytest.mark.parametrize("name", SCRAMBLED)
def test_rows_and_features_are_told_apart(name):
    width, function = SCRAMBLED[name]
    w = data(3, width, seed=3)
    loss, whole = whole_of(function)
    assert off(loss, whole, w) < EXACT
    assert not is_called_exact(loss, w, split="strided")
    assert off(loss, whole, w, split="strided") > WRONG


# -- what is known of another call -----------------------------------------------------------------


def test_a_derivative_rule_that_changes_is_audited_anew():
    limit = [np.inf]

    @jax.custom_vjp
    def identity(x):
        return x

    def backward(_, g):
        return (g if np.isinf(limit[0]) else jnp.clip(g, -limit[0], limit[0]),)

    identity.defvjp(lambda x: (x, None), backward)
    loss = lambda w, b: jnp.mean(nll(identity(w), b))
    step = jaxaccum.grad(loss, num_microbatches=2, audit="raise")
    step(W, BATCH)
    limit[0] = 0.01
    with pytest.raises(jaxaccum.InexactError):
        step(W, BATCH)
    assert off(loss) > WRONG


def test_the_report_of_jaxs_own_functions_is_kept():
    traces = []

    def loss(w, b):
        traces.append(len(b["y"]))
        return jnp.mean(jax.nn.relu(nll(w, b)))

    step = jaxaccum.grad(loss, num_microbatches=2, audit="raise")
    step(W, BATCH)
    once = len(traces)
    step(W, BATCH)
    assert len(traces) < 2 * once
