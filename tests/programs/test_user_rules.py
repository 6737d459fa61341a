"""Losses that bring rules of their own, checks, references, or no reverse derivative: what JAX
runs, jaxaccum runs.

The oracle is plain JAX on the whole batch. A backward rule that clips shows which cotangent it was
handed, so the negative control is the loop that hands every microbatch the cotangent 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify, io_callback

import jaxaccum as ja
from jaxaccum import accumulators
from tests.support import jitted
from tests.support.helpers import EXACT, INEXACT, UNDECIDED, data, normwise, refused

W, X = data(3), data(6, 3, seed=1)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


def clipping(w, x):
    return ja.Mean(jnp.sum(clipped((x @ w) ** 2)), len(x))


def of_pair(accumulator):
    """The gradient by an accumulator that also reports."""
    return lambda loss, n: (
        lambda w, x: ja.value_and_grad(loss, num_microbatches=n, accumulator=accumulator)(w, x)[1]
    )


GRADIENTS = {
    "grad": lambda loss, n: ja.grad(loss, num_microbatches=n),
    "microbatch": lambda loss, n: jax.grad(ja.microbatch(loss, num_microbatches=n)),
    "tree": lambda loss, n: ja.grad(loss, num_microbatches=n, accumulator=accumulators.tree()),
    "compensated": lambda loss, n: ja.grad(
        loss, num_microbatches=n, accumulator=accumulators.compensated()
    ),
    "skip_nonfinite": of_pair(accumulators.skip_nonfinite()),
    "noise_scale": of_pair(accumulators.noise_scale()),
}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", GRADIENTS)
def test_a_backward_rule_sees_the_cotangent_of_the_full_batch(name, n):
    expected = jitted.grad(ja.full_batch(clipping))(W, X)
    assert normwise(GRADIENTS[name](clipping, n)(W, X), expected) < EXACT


def test_a_scaled_loss_scales_what_the_rule_sees():
    scaled = lambda f: jax.grad(lambda w: 0.3 * f(w, X))(W)
    assert (
        normwise(
            scaled(ja.microbatch(clipping, num_microbatches=3)), scaled(ja.full_batch(clipping))
        )
        < EXACT
    )


def test_the_cotangent_one_is_the_classic_wrong_answer():
    by_ones = jitted.grad(lambda w: jnp.sum(clipped((X @ w) ** 2)))(W) / len(X)
    assert normwise(by_ones, jitted.grad(ja.full_batch(clipping))(W, X)) > 0.1


def scaled_by(t):
    """A custom rule that closes over a value of an outer transformation."""
    f = jax.custom_vjp(lambda x: x * t)
    f.defvjp(lambda x: (x * t, None), lambda _, g: (g * t,))
    return lambda w, x: jnp.mean(f(x @ w) ** 2)


ours = lambda t: ja.grad(scaled_by(t), num_microbatches=2)(W, X)
through_microbatch = lambda t: jitted.grad(ja.microbatch(scaled_by(t), num_microbatches=2))(W, X)
plain = lambda t: jitted.grad(scaled_by(t))(W, X)


@UNDECIDED
@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (lambda f: jax.vmap(f)(jnp.arange(1.0, 3.0)), ours),
        (lambda f: jax.jacobian(f)(2.0), ours),
        (lambda f: jax.jacobian(f)(2.0), through_microbatch),
    ],
    ids=["vmap", "jacobian", "jacobian of microbatch"],
)
def test_a_rule_may_close_over_an_outer_tracer(outer, inner):
    assert normwise(outer(inner), outer(plain)) < EXACT


def growing(w, x):
    """A loop whose length depends on the data: JAX has its forward derivative alone."""
    h, _ = lax.while_loop(
        lambda s: jnp.sum(s[0]) < 100.0, lambda s: (2 * s[0], s[1] + 1), (jnp.exp(x @ w), 0)
    )
    return jnp.mean(h)


def solved(w, x):
    """A linear solve that cannot be transposed."""
    matrix = lambda v: (3 + jnp.sum(w**2)) * v
    solve = lambda matvec, b: b / matvec(jnp.ones_like(b))
    return jnp.mean(lax.custom_linear_solve(matrix, jnp.tanh(x @ w), solve))


@UNDECIDED
@pytest.mark.parametrize("loss", [growing, solved])
def test_forward_mode_needs_no_reverse_rule(loss):
    by_rows = lambda w: jnp.mean(jnp.stack([loss(w, X[i : i + 2]) for i in (0, 2, 4)]))
    tangent = data(3, seed=5)
    actual = jax.jvp(lambda w: ja.microbatch(loss, num_microbatches=3)(w, X), (W,), (tangent,))
    assert normwise(actual, jax.jvp(by_rows, (W,), (tangent,))) < EXACT


def lookup(w, i):
    return jnp.mean(w[i] ** 2)


def looked_at(w, i):
    checkify.check(jnp.all(i < 3), "an id is too large")
    return lookup(w, i)


@pytest.mark.parametrize("name", ["grad", "microbatch", "tree"])
@pytest.mark.parametrize(
    ("loss", "errors"), [(lookup, checkify.index_checks), (looked_at, checkify.user_checks)]
)
def test_checks_inside_the_loss_are_reported(name, loss, errors):
    step = checkify.checkify(GRADIENTS[name](loss, 3), errors=errors)
    seen = [step(W, jnp.array(ids))[0].get() for ids in ([0, 1, 2, 2, 1, 0], [0, 1, 2, 2, 1, 9])]
    assert seen[0] is None
    assert seen[1] is not None


def test_checks_inside_a_mapped_loss_are_never_dropped():
    """Since jax 0.12 no ``custom_vjp`` may hold checks, and JAX says so."""
    loss = ja.microbatch(looked_at, num_microbatches=3)

    def checked(ids):
        total = lambda w: jnp.sum(jax.vmap(loss, (0, None))(w[None], jnp.array(ids)))
        return checkify.checkify(jax.grad(total), errors=checkify.user_checks)(W)[0].get()

    if jax.__version_info__ < (0, 12):
        assert checked([0, 1, 2, 2, 1, 0]) is None
        assert "an id is too large" in checked([0, 1, 2, 2, 1, 9])
    else:
        with pytest.raises(NotImplementedError, match="checkify effects"):
            checked([0, 1, 2, 2, 1, 9])


def test_a_loss_with_checks_has_a_forward_derivative():
    loss = ja.microbatch(looked_at, num_microbatches=3)
    ids = jnp.array([0, 1, 2, 2, 1, 0])
    both = lambda f: checkify.checkify(lambda w: jax.jvp(f, (w,), (w,)))(W)[1]
    assert normwise(both(lambda w: loss(w, ids)), both(lambda w: looked_at(w, ids))) < EXACT


def counting(count):
    def loss(w, x):
        count[...] += len(x)
        return jnp.mean((x @ w) ** 2)

    return loss


def remembering(w, x):
    ref = jax.new_ref(jnp.zeros(len(x)))
    ref[...] += x @ w
    return jnp.mean(ref[...] ** 2)


@UNDECIDED
def test_references_of_the_loss_do_what_they_do_in_jax():
    step = jax.jit(ja.value_and_grad(remembering, num_microbatches=3))
    assert normwise(step(W, X), jitted.value_and_grad(lambda w: jnp.mean((X @ w) ** 2))(W)) < EXACT
    count = jax.new_ref(jnp.int32(0))
    jax.jit(ja.value_and_grad(counting(count), num_microbatches=3))(W, X)
    assert count[...] == len(X)


def by_reference(count):
    def loss(w, x):
        count[...] += 1.0
        return ja.Mean(jnp.sum((x @ w) ** 2), count[...])

    return loss


def by_callback(w, x):
    scale = io_callback(lambda: np.float64(2), jax.ShapeDtypeStruct((), jnp.float64))
    return ja.Mean(jnp.sum((x @ w) ** 2), len(x) * scale)


def test_a_weight_must_not_depend_on_side_effects():
    """The weights of the batch are known before the loop, which computes them again."""
    says = "pass it as an argument"
    refused(
        lambda: ja.grad(by_reference(jax.new_ref(0.0)), num_microbatches=2)(W, X),
        "a reference",
        says,
    )
    refused(lambda: ja.grad(by_callback, num_microbatches=2)(W, X), "an io_callback", says)


FUNCTIONS_WITH_RULES = {
    "a rule that slices a tangent": lambda w: sliced(w),
    "a root": lambda w: lax.custom_root(
        lambda z: z**3 + z - w[0] ** 2, 1.0, newton, lambda g, y: y / g(1.0)
    ),
    "gmres": lambda w: jnp.sum(
        jax.scipy.sparse.linalg.gmres(lambda v: (jnp.outer(w, w) + 5 * jnp.eye(3)) @ v, w)[0]
    ),
    "a barrier": lambda w: jnp.sum(lax.optimization_barrier(w) ** 2),
}


@jax.custom_jvp
def sliced(w):
    return jnp.sum(w[1:] ** 2)


sliced.defjvp(lambda p, t: (sliced(p[0]), 2 * jnp.sum(p[0][1:] * t[0][1:])))


def newton(f, z):
    return lax.fori_loop(0, 30, lambda _, z: z - f(z) / jax.grad(f)(z), z)


@UNDECIDED  # gmres, which converges here
@pytest.mark.parametrize("rule", FUNCTIONS_WITH_RULES)
@pytest.mark.parametrize("name", ["grad", "microbatch"])
def test_functions_with_rules_of_their_own(name, rule):
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w)) * FUNCTIONS_WITH_RULES[rule](w)
    assert normwise(GRADIENTS[name](loss, 3)(W, X), jitted.grad(loss)(W, X)) < EXACT


@UNDECIDED
def test_a_check_and_a_solve():
    """Where only the weights are computed, the check is left out of the solve's programs and all
    else stays."""

    def loss(w, x):
        matrix = jnp.outer(w, w) + 5 * jnp.eye(3)
        solution = jax.scipy.sparse.linalg.gmres(lambda v: seen(matrix @ v), jnp.tanh(w))[0]
        return ja.Mean(jnp.sum(x @ solution), jnp.sum(x[:, 0] ** 2 * jnp.sum(solution)))

    def seen(v):
        jax.debug.callback(lambda: None)
        return v

    step = jax.jit(ja.value_and_grad(loss, num_microbatches=3))
    assert normwise(step(W, X), jitted.value_and_grad(ja.full_batch(loss))(W, X)) < EXACT


AROUND_A_MAP = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda f: lambda w: lax.scan(lambda c, _: (c, f(w)), 0, None, length=1)[1][0],
}


@pytest.mark.parametrize("around", AROUND_A_MAP)
def test_a_mapped_microbatch_is_differentiated(around):
    ws, loss = data(2, 3, seed=4), lambda w, x: ja.Mean(jnp.sum((x @ w) ** 2), len(x))
    mapped = lambda f: AROUND_A_MAP[around](lambda ws: jax.vmap(f, (0, None))(ws, X))
    actual, expected = mapped(ja.microbatch(loss, num_microbatches=3)), mapped(ja.full_batch(loss))
    assert (
        normwise(
            jax.grad(lambda ws: actual(ws).sum())(ws), jax.grad(lambda ws: expected(ws).sum())(ws)
        )
        < EXACT
    )
    assert normwise(jax.jvp(actual, (ws,), (ws,)), jax.jvp(expected, (ws,), (ws,))) < EXACT


def test_a_mapped_gradient_of_branches_is_differentiated():
    ws = data(2, 3, seed=4)
    loss = lambda w, x: lax.cond(
        w[0] > 0, lambda: jnp.mean((x @ w) ** 2), lambda: jnp.mean(jnp.tanh(x @ w))
    )
    twice = lambda grad: jitted.grad(lambda w: jnp.sum(jax.vmap(grad, (0, None))(w, X) ** 2))(ws)
    assert normwise(twice(ja.grad(loss, num_microbatches=3)), twice(jax.grad(loss))) < EXACT


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_coupled_state_may_become_a_constant(n):
    def loss(w, first, x):
        centered = x @ w - lax.pmean(jnp.mean(x @ w), "microbatch")
        return jnp.mean(centered**2), ja.Carry(jnp.zeros_like(first))

    axes = (None, ja.CARRY, 0)
    step = ja.value_and_grad(loss, has_aux=True, num_microbatches=n, in_axes=axes)
    (value, state), grad = step(W, jnp.array(True), X)
    expected = jitted.value_and_grad(lambda w: jnp.var(X @ w))(W)
    assert normwise((value, grad), expected) < EXACT
    assert not state


@INEXACT
def test_a_coupled_loop_of_no_steps():
    def loss(w, x):
        mean = lax.pmean(jnp.mean(x @ w), "microbatch")
        _, ys = lax.scan(lambda c, _: (c, lax.psum(c, "microbatch")), mean, None, length=0)
        return jnp.mean((x @ w - mean) ** 2) + jnp.sum(ys)

    expected = jitted.grad(lambda w: jnp.var(X @ w))(W)
    assert normwise(ja.grad(loss, num_microbatches=3)(W, X), expected) < EXACT


@pytest.mark.parametrize("jit", [False, True])
def test_a_mapped_microbatch_with_a_backward_rule_is_differentiated(jit):
    """``jax.grad`` of ``jax.vmap``, which maps a ``custom_vjp`` and no derivative of one."""
    whole = lambda w, x: jnp.mean(clipped((x @ w) ** 2))
    ws = data(2, 3, seed=4)

    def gradient(loss):
        mapped = jax.vmap(loss, (0, None))
        mapped = jax.jit(mapped) if jit else mapped
        return jax.grad(lambda ws: jnp.sum(mapped(ws, X)))(ws)

    total = lambda w, x: jnp.sum(clipped((x @ w) ** 2))  # each row is handed 1
    loss = ja.microbatch(clipping, num_microbatches=3)
    assert normwise(gradient(loss), gradient(whole)) < EXACT
    assert normwise(gradient(total) / len(X), gradient(whole)) > 1e6 * EXACT
