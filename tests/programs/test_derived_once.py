"""Equal equations become calls of one function: the same numbers, the same derivatives, and one
derivation per kind."""

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import PartitionSpec as P

from jaxaccum._jaxpr.derived_once import as_calls
from tests.support.helpers import data

X, W = data(4, 3), data(3, 3, seed=1)


def layers(w, x):
    for _ in range(12):
        x = jnp.tanh(x @ w) + 0.5 * lax.integer_pow(x, 2)
    return jnp.sum(x)


PROGRAMS = {
    "layers": layers,
    "a scan": lambda w, x: jnp.sum(
        lax.scan(lambda h, _: (jnp.sin(h @ w), None), x, None, length=3)[0]
    ),
    "a branch": lambda w, x: jnp.sum(
        lax.cond(x[0, 0] > 0, lambda h: h @ w, lambda h: jnp.cos(h), x)
    ),
    "a rule": lambda w, x: jnp.sum(jax.nn.relu(x @ w) + jax.nn.softplus(x)),
    "indices": lambda w, x: jnp.sum(w[jnp.array([0, 2, 2])] * x[jnp.array([1, 1, 3])]),
    "linear algebra": lambda w, x: jnp.sum(jnp.linalg.solve(w + 5 * jnp.eye(3), x.T)),
    "random numbers": lambda w, x: jnp.sum(
        x @ w * jax.random.normal(jax.random.key(0), (4, 3), x.dtype)
    ),
    "weak types": lambda w, x: jnp.sum(jnp.where(x > 0, 2.0, w[0, 0]) * 3),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_numbers_and_the_same_derivatives(name):
    loss = PROGRAMS[name]
    closed = jax.make_jaxpr(loss)(W, X)
    calls = as_calls(closed.jaxpr)
    ours = lambda w, x: jax.core.eval_jaxpr(calls, closed.consts, w, x)[0]
    for transform in (lambda f: f, jax.value_and_grad, jax.hessian):
        expected, actual = (jax.jit(transform(f))(W, X) for f in (loss, ours))
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def programs_called(fun):
    """What each call of a program holds, and how many equations there are without calls."""
    plain = jax.make_jaxpr(fun)(W, X).jaxpr
    called = [eqn.params["jaxpr"] for eqn in as_calls(plain).eqns if "jaxpr" in eqn.params]
    return list(map(id, called)), len(plain.eqns)


def test_one_function_for_all_equations_of_a_kind():
    def different_blocks(w, x):
        for power in range(2, 14):
            x = jnp.tanh(x @ w) + 0.5 * lax.integer_pow(x, power)
        return jnp.sum(x)

    held, count = programs_called(different_blocks)
    assert len(held) == count >= 5 * 12
    assert len(set(held)) == 5 + 12  # dot, tanh, half, sum of the two, the last sum; and 12 powers


def test_one_function_for_all_equal_blocks():
    """A block of twelve layers ends with its product: the first product and the end are alone."""
    held, count = programs_called(layers)
    assert count >= 5 * 12
    assert len(held) == 1 + 11 + 5
    assert len(set(held)) == 1 + 1 + 5


def test_a_block_that_gives_other_results_is_another_one():
    """Three blocks are a sine and a product, but the first sine is read again."""

    def fun(w, x):
        a = jnp.sin(x)
        b = jnp.sin(a @ w) @ w
        return jnp.sin(b) @ w.T + jnp.sin(jnp.sin(b) @ w) @ w + a

    jaxpr = jax.make_jaxpr(fun)(W, X).jaxpr
    np.testing.assert_array_equal(jax.core.eval_jaxpr(as_calls(jaxpr), [], W, X)[0], fun(W, X))


def test_a_block_of_other_operands_is_another_one():
    """Each block is a sine, a cosine and their product, the cosine first in the last two."""

    def fun(w):
        for turned in (False, False, True, True):
            pair = jnp.sin(w), jnp.cos(w)
            w = pair[turned] @ pair[not turned]
        return w

    jaxpr = jax.make_jaxpr(fun)(W).jaxpr
    np.testing.assert_array_equal(jax.core.eval_jaxpr(as_calls(jaxpr), [], W)[0], fun(W))


def scopes(jaxpr):
    return [(eqn.primitive.name, str(eqn.source_info.name_stack)) for eqn in jaxpr.eqns]


def test_names_and_marks_of_equations_stay():
    """A block has one name, and one set of marks: what comes out has those of each equation."""

    def fun(w, x):
        for i in range(4):
            with jax.named_scope(f"layer {i}"):
                x = jnp.tanh(x)
            with jax.named_scope("product"):
                x = jnp.tanh(jnp.sin(x) @ w)
            with set_xla_metadata(mark=str(i % 2)):
                x = jnp.cos(jnp.sin(x))
        return x

    plain = jax.make_jaxpr(fun)(W, X).jaxpr
    ours = lambda w, x: jax.core.eval_jaxpr(as_calls(plain), [], w, x)
    again = jax.make_jaxpr(ours)(W, X).jaxpr
    assert scopes(again) == scopes(plain)
    marks = [eqn.ctx.xla_metadata for eqn in plain.eqns]
    assert [eqn.ctx.xla_metadata for eqn in again.eqns] == marks
    assert [marks.count(mark) for mark in ({"mark": "0"}, {"mark": "1"})] == [4, 4]


def test_calls_vanish_from_what_comes_out():
    jaxpr = as_calls(jax.make_jaxpr(layers)(W, X).jaxpr)
    again = jax.make_jaxpr(lambda w, x: jax.core.eval_jaxpr(jaxpr, [], w, x))(W, X)
    plain = jax.make_jaxpr(layers)(W, X)
    assert [eqn.primitive for eqn in again.eqns] == [eqn.primitive for eqn in plain.eqns]


SIGNED = {
    # two programs that differ in one number alone
    "the sign of zero": [lambda x, z=z: jnp.arctan2(lax.full_like(x, z), x) for z in (0.0, -0.0)],
    "another literal": [lambda x, k=k: x * k for k in (2.0, 3.0)],
    "another power": [lambda x, k=k: lax.integer_pow(x, k) for k in (2, 3)],
    "another axis": [lambda x, k=k: jnp.cumsum(x, axis=k) for k in (0, 1)],
    "another length": [lambda x, k=k: x[:k] * 2.0 for k in (2, 3)],
    "another dtype": [lambda x, d=d: x.astype(d) * 2 for d in (jnp.float32, jnp.float64)],
}


@pytest.mark.parametrize("name", SIGNED)
def test_what_differs_in_a_number_is_another_kind(name):
    for fun in SIGNED[name]:
        jaxpr = jax.make_jaxpr(fun)(-X)
        (out,) = jax.core.eval_jaxpr(as_calls(jaxpr.jaxpr), jaxpr.consts, -X)
        expected = fun(-X)
        assert out.dtype == expected.dtype
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


def test_effects_and_programs_stay_as_they_are():
    def fun(x):
        jax.debug.print("{}", x[0, 0])
        return lax.fori_loop(0, 2, lambda _, h: jnp.sin(h), x)

    jaxpr = jax.make_jaxpr(fun)(X).jaxpr
    pairs = zip(jaxpr.eqns, as_calls(jaxpr).eqns, strict=True)
    kept = [eqn.primitive.name for eqn, new in pairs if eqn is new]
    assert {"debug_callback", "debug_print"} & set(kept)
    assert {"while", "scan"} & set(kept)


def test_on_each_mesh_its_own():
    """The types of values inside shard_map name its mesh."""
    fun = lambda x: jnp.sin(x) * 2.0
    for count in (2, 4):
        mesh = jax.make_mesh(
            (count,),
            ("d",),
            axis_types=(jax.sharding.AxisType.Auto,),
            devices=jax.devices()[:count],
        )

        def one(x):
            jaxpr = jax.make_jaxpr(fun)(x)
            assert isinstance(jaxpr.jaxpr, jex.Jaxpr)
            return jax.core.eval_jaxpr(as_calls(jaxpr.jaxpr), jaxpr.consts, x)[0]

        over = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=P("d"), out_specs=P("d")))
        np.testing.assert_allclose(over(X), fun(X), rtol=1e-15)
