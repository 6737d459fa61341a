"""Composition: every transformation of JAX around and inside the loop, against the same around the
full batch."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxaccum as ja
from jaxaccum._jaxpr.equations import equations_inside
from tests.support import jitted
from tests.support.covering import covering
from tests.support.helpers import EXACT, INEXACT, data, normwise

W, X, M = {"w": data(3, 3, 3)}, data(6, 3, seed=1), jnp.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
AXES = (None, 0, 0)


def loss(w, x, m, inner=lambda f: f):
    """A scan over layers and a masked mean; `inner` wraps a layer."""
    h, _ = lax.scan(inner(lambda h, layer: (jnp.tanh(h @ layer), None)), x, w["w"])
    return ja.Mean(jnp.sum(jnp.sum(h**2, axis=-1) * m), jnp.sum(m))


def expected(w, x, m):
    """The full batch, without the library."""
    h = x
    for i in range(3):
        h = jnp.tanh(h @ w["w"][i])
    return jnp.sum(jnp.sum(h**2, axis=-1) * m) / jnp.sum(m)


remat = functools.partial(loss, inner=jax.checkpoint)
OURS = {
    "value_and_grad": ja.value_and_grad(loss, in_axes=AXES, num_microbatches=4),
    "value_and_grad of checkpoint": ja.value_and_grad(remat, in_axes=AXES, num_microbatches=4),
    "grad of microbatch": jax.value_and_grad(ja.microbatch(loss, in_axes=AXES, num_microbatches=4)),
}


def square(tree):
    return sum(jnp.sum(x**3) for x in jax.tree.leaves(tree))


def three_steps(vg, outer=lambda f: f):
    """Value and gradient through three training steps under scan: references went wrong silently
    here."""

    def train(w):
        def step(w, _):
            value, grads = vg(w, X, M)
            return jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), value

        w, values = lax.scan(outer(step), w, None, length=3)
        return jnp.sum(values) + square(w)

    return jax.jit(jax.value_and_grad(train))(W)


TWO_W, TWO_X, TWO_M = (
    jax.tree.map(lambda x: jnp.stack([x, 2 * x]), W),
    jnp.stack([X, -2 * X]),
    jnp.stack([M, 1 - M]),
)
AROUND = {
    "eager": lambda f: f(W, X, M),
    "jit with donation": lambda f: jax.jit(f, donate_argnums=0)(jax.tree.map(jnp.copy, W), X, M),
    "vmap over parameters": lambda f: jax.jit(jax.vmap(f, (0, None, None)))(TWO_W, X, M),
    "vmap over batches": lambda f: jax.vmap(jax.jit(f), (None, 0, 0))(W, TWO_X, TWO_M),
    "reverse over reverse": lambda f: jax.jit(jax.grad(lambda w: square(f(w, X, M)[1])))(W),
    "forward over reverse": lambda f: jax.jit(
        lambda w: jax.jvp(lambda w: f(w, X, M)[1], (w,), (w,))
    )(W),
    "checkpoint outside": lambda f: jax.jit(
        jax.grad(jax.checkpoint(lambda w: square(f(w, X, M)[1])))
    )(W),
    "three scanned steps": three_steps,
    "three checkpointed steps": lambda f: three_steps(f, jax.checkpoint),
    "vmap of three scanned steps": lambda f: jax.vmap(
        lambda s: three_steps(lambda w, x, m: f(w, s * x, m))[0]
    )(jnp.arange(2.0)),
    "gradient of the batch": lambda f: jax.jit(
        jax.grad(lambda x, m: f(W, x, m)[0], argnums=(0, 1))
    )(X, M + 0.5),
    "cond": lambda f: jax.jit(
        lambda c: lax.cond(c, lambda w: f(w, X, M), lambda w: f(w, 2 * X, M), W)
    )(True),
}


@functools.cache
def around_the_full_batch(name):
    return AROUND[name](jax.value_and_grad(expected))


@pytest.mark.parametrize(("name", "ours"), covering(list(AROUND), list(OURS)))
def test_around(name, ours):
    assert normwise(AROUND[name](OURS[ours]), around_the_full_batch(name)) < EXACT


@pytest.mark.parametrize("sums", [ja.accumulators.in_place, ja.accumulators.tree])
def test_hessian(sums):
    f = ja.grad(loss, in_axes=AXES, num_microbatches=4, accumulator=sums())
    assert (
        normwise(jax.jit(jax.jacfwd(f))(W, X, M), jax.jit(jax.hessian(expected))(W, X, M)) < EXACT
    )


def test_forward_mode_of_one_scalar():
    f = ja.microbatch(loss, in_axes=AXES, num_microbatches=4)
    moved = lambda f: jax.jvp(lambda w: f(w, X, M), (W,), (jax.tree.map(jnp.sin, W),))
    assert normwise(moved(f), moved(expected)) < EXACT


def test_terms_outside_count_once():
    f = ja.microbatch(loss, in_axes=AXES, num_microbatches=4)
    outside = lambda f: jitted.grad(lambda w: f(w, X, M) + square(w))(W)
    assert normwise(outside(f), outside(expected)) < EXACT


@pytest.mark.parametrize(
    "options", [{"num_microbatches": 4}, {"num_microbatches": 3, "split": "strided"}], ids=str
)
def test_embeddings_of_the_whole_batch(options):
    """A contrastive loss over Concat rows: every pair of the batch, the encoder at one microbatch's
    memory."""
    encode = lambda w, x: jnp.tanh(x @ w["w"][0])
    contrast = lambda z: jnp.mean(jax.nn.logsumexp(z @ z.T, axis=1) - jnp.sum(z * z, axis=1))
    rows = ja.microbatch(
        lambda w, x: {"z": ja.Concat(encode(w, x)), "norm": ja.Stack(jnp.sum(x))}, **options
    )
    actual = jax.jit(jax.value_and_grad(lambda w, x: contrast(rows(w, x)["z"]), argnums=(0, 1)))(
        W, X
    )
    truth = jitted.value_and_grad(lambda w, x: contrast(encode(w, x)), argnums=(0, 1))(W, X)
    assert normwise(actual, truth) < EXACT
    apart = lambda w: sum(contrast(encode(w, part)) for part in (X[:3], X[3:])) / 2
    assert normwise(jitted.grad(apart)(W), truth[1][0]) > 0.01


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_mapped_embeddings_are_differentiable(axes):
    """``grad(vmap(f))`` of rows: an ensemble of encoders, or several batches."""
    encode = lambda w, x: jnp.tanh(x @ w["w"][0])
    rows = ja.microbatch(lambda w, x: ja.Concat(encode(w, x)), num_microbatches=4)
    args = TWO_W if axes[0] == 0 else W, TWO_X if axes[1] == 0 else X
    for argnums in (0, 1):
        total = lambda f, i=argnums: jax.jit(
            jax.grad(lambda w, x: jnp.sum(jax.vmap(f, axes)(w, x) ** 3), i)
        )(*args)
        assert normwise(total(rows), total(encode)) < EXACT


def test_stacked_outputs_are_differentiable():
    f = ja.microbatch(lambda w, x: ja.Stack(jnp.sum(jnp.tanh(x @ w["w"][0]))), num_microbatches=3)
    truth = jitted.grad(
        lambda w: sum(
            (i + 1) * jnp.sum(jnp.tanh(X[2 * i : 2 * i + 2] @ w["w"][0])) for i in range(3)
        )
    )(W)
    assert normwise(jitted.grad(lambda w: jnp.dot(f(w, X), jnp.arange(1.0, 4.0)))(W), truth) < EXACT


def test_a_custom_vjp_inside_keeps_its_rule():
    @jax.custom_vjp
    def straight(x):
        return jnp.round(x)

    straight.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (3 * ct,))
    fun = lambda w, x: jnp.mean(straight(x @ w["w"][0]) ** 2)
    assert (
        normwise(ja.value_and_grad(fun, num_microbatches=4)(W, X), jitted.value_and_grad(fun)(W, X))
        < EXACT
    )


@pytest.mark.parametrize(
    "inner", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"]
)
def test_slices_of_parameters_add_in_place(inner):
    """jax 0.10 adds the transpose of a slice into a reference only where the slice has strides."""
    halves = inner(lambda w, x: jnp.tanh(x @ lax.slice(w, (0, 0), (3, 2))) * jnp.sum(w[1:, 2]))
    fun = lambda w, x: jnp.mean(halves(w["w"][0], x) ** 2)
    assert (
        normwise(ja.value_and_grad(fun, num_microbatches=4)(W, X), jitted.value_and_grad(fun)(W, X))
        < EXACT
    )


def test_closures_are_differentiated_in_every_microbatch():
    def through(f):
        return jax.jit(jax.grad(lambda w: f(w)(jnp.float64(2.0), X)))(W)

    fun = lambda w: lambda scale, x: jnp.mean(jnp.tanh(scale * x @ w["w"][1]))
    assert (
        normwise(through(lambda w: ja.microbatch(fun(w), num_microbatches=4)), through(fun)) < EXACT
    )
    second = lambda grad: through(lambda w: lambda s, x: grad(fun(w))(s, x))
    assert normwise(second(lambda f: ja.grad(f, num_microbatches=4)), second(jax.grad)) < EXACT


@INEXACT
def test_nested_loops_shadow_the_axis():
    inner = lambda w, x: ja.Mean(
        jnp.sum(jnp.tanh(x @ w)) + lax.axis_index("microbatch").astype(w.dtype), len(x)
    )
    nested = ja.microbatch(inner, num_microbatches=2)
    outer = lambda w, x: ja.Mean(
        nested(w, x) * len(x) + lax.axis_index("microbatch").astype(w.dtype) * w[0, 0], len(x)
    )

    def host(w):
        parts = [
            (jnp.sum(jnp.tanh(X[2 * i : 2 * i + 2] @ w)) + 1) / 2 * 2 + i * w[0, 0]
            for i in range(3)
        ]
        return sum(parts) / 6

    w = W["w"][0]
    assert (
        normwise(
            jax.jit(ja.value_and_grad(outer, num_microbatches=3))(w, X), jax.value_and_grad(host)(w)
        )
        < EXACT
    )


@INEXACT
def test_the_index_of_the_microbatch_at_any_depth():
    def fun(w, x):
        i = lambda: lax.axis_index("microbatch").astype(w.dtype)
        jitted = jnp.sum(jax.jit(lambda w: w * i())(w))
        scanned = lax.scan(lambda c, _: (c + i(), None), w[0, 0], None, length=2)[0]
        branch = jnp.sum(lax.cond(w[0, 0] > 0, lambda w: w * i(), lambda w: -w * i(), w))
        counted = lax.fori_loop(0, 3, lambda _, c: c + i(), w[0, 0])
        looped = lax.while_loop(
            lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * i()), (0, lax.stop_gradient(w[0, 0]))
        )[1]
        kept = jnp.sum(jax.checkpoint(lambda w: jnp.sin(w * i()))(w))
        return ja.Sum(jitted + scanned + branch + counted + looped + kept + 0 * jnp.sum(x))

    def host(w):
        total, sign = 0.0, jnp.where(w[0, 0] > 0, 1.0, -1.0)
        for i in map(float, range(3)):
            total += (
                jnp.sum(w * i) * (1 + sign)
                + 2 * w[0, 0]
                + 5 * i
                + lax.stop_gradient(w[0, 0]) * i * i
            )
            total += jnp.sum(jnp.sin(w * i))
        return total

    w = W["w"][0]
    assert (
        normwise(
            jax.jit(ja.value_and_grad(fun, num_microbatches=3))(w, X), jax.value_and_grad(host)(w)
        )
        < EXACT
    )


def test_the_gradient_of_microbatch_traces_its_loop_once():
    """Where JAX parts a loop into what moves and what does not, it takes out of it what depends on
    the parameters alone: a second copy of these. `value_and_grad` leaves it where it is."""
    of_parameters = lambda w, x: jnp.mean((x @ jnp.exp(w)) ** 2)
    program = jax.make_jaxpr(jax.grad(ja.microbatch(of_parameters, num_microbatches=2)))
    eqns = program(W["w"][0], X).jaxpr.eqns
    (loop,) = (eqn for eqn in eqns if eqn.primitive.name == "scan")
    inside = [eqn.primitive.name for eqn in equations_inside(loop.params["jaxpr"].jaxpr)]
    assert "exp" in inside
    assert "exp" not in [eqn.primitive.name for eqn in eqns]
