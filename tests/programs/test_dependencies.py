"""Which arguments a result depends on, in one pass: what JAX says of each result by itself."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.experimental import io_callback
from jax.interpreters import partial_eval

import jaxaccum as ja
from jaxaccum._jaxpr.dependencies import Dependencies
from jaxaccum._jaxpr.traces import Trace

A, B, C = jnp.float64(1.0), jnp.float64(2.0), jnp.arange(3.0)
AXIS = ("i", 2)


@jax.custom_vjp
def ruled(a, b):
    return a, b + 1


ruled.defvjp(lambda a, b: (ruled(a, b), ()), lambda _, cotangents: cotangents)

PROGRAMS = {
    "apart": lambda a, b, c: (a + 1, b * 2, c[0], a * b),
    "a literal": lambda a, b, c: (3.0, a),
    "a call": lambda a, b, c: jax.jit(lambda a, b: (b, a))(a, b),
    "a checkpoint": lambda a, b, c: jax.checkpoint(lambda a, b: (jnp.sin(a), jnp.cos(b)))(a, b),
    "a rule": lambda a, b, c: (jax.nn.relu(a), *ruled(a, b)),
    "a scan": lambda a, b, c: lax.scan(lambda s, x: (s * 2, x + 1), a, c),
    "a scan that passes on": lambda a, b, c: lax.scan(
        lambda s, x: ((s[1], s[2], s[2]), s[0]), (a, a, b), c
    ),
    "a scan of its constant": lambda a, b, c: lax.scan(lambda s, x: (s, x * b), a, c),
}
"""Of these the marks are what JAX says."""
VAGUE = {
    "a loop": lambda a, b, c: lax.while_loop(
        lambda s: s[0] < 9, lambda s: (s[0] + 1, s[1]), (a, b)
    ),
    "a branch": lambda a, b, c: lax.cond(c[0] > 0, lambda: (a, b), lambda: (a + 1, b)),
}
"""Of these they may be more."""


def traced(fun, *args):
    return jax.make_jaxpr(fun, axis_env=[AXIS])(*args).jaxpr


def needed(jaxpr, result):
    """The oracle: JAX leaves out what the result does not need."""
    wanted = [i == result for i in range(len(jaxpr.outvars))]
    return partial_eval.dce_jaxpr(jaxpr, wanted)[1]


@pytest.mark.parametrize("name", [*PROGRAMS, *VAGUE])
def test_it_is_what_jax_says_of_each_result(name):
    jaxpr = traced((PROGRAMS | VAGUE)[name], A, B, C)
    found = Dependencies.of(jaxpr, "i")
    for i in range(len(jaxpr.outvars)):
        used = needed(jaxpr, i)
        assert found.among(i, used) or found.is_vague(i)
        for place, one in enumerate(used):
            alone = [k == place for k in range(len(used))]
            assert found.any(i, alone) or not one
            assert found.any(i, alone) == one or found.is_vague(i)
        assert not found.is_vague(i) or name in VAGUE


OUTSIDE = {
    "a collective": lambda a, b: (lax.psum(a, "i"), b),
    "in a scan": lambda a, b: (lax.scan(lambda s, _: (lax.psum(s, "i"), None), a, None, 2)[0], b),
    "in a branch": lambda a, b: (lax.cond(b > 0, lambda: lax.psum(a, "i"), lambda: a), b),
    "the host": lambda a, b: (io_callback(lambda a: a, a, a), b),
    "a reference": lambda a, b: (jax.jit(lambda a: jax.new_ref(a)[...])(a), b),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_coupled_or_depends_on_the_outside_has_a_mark(name):
    found = Dependencies.of(traced(OUTSIDE[name], A, B), "i")
    assert not found.among(0, [True, True])
    assert found.among(1, [True, True])


def test_a_program_is_not_gone_through_for_each_state(monkeypatch):
    """JAX is asked as often for a model of 12 frozen layers as for one of 3."""
    asked, restrict = [], Trace._restrict
    monkeypatch.setattr(Trace, "_restrict", lambda *args: asked.append(1) or restrict(*args))

    def count(num_layers):
        asked.clear()
        layers = [nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(num_layers)]
        model = nnx.Sequential(*layers, nnx.LoRA(3, 2, 3, rngs=nnx.Rngs(0)))
        step = ja.nnx.grad(
            lambda model, x: jnp.mean(model(x)),
            argnums=nnx.DiffState(0, nnx.LoRAParam),
            num_microbatches=2,
            audit=None,
        )
        step(model, jnp.ones((4, 3), jnp.float32))
        return len(asked)

    assert count(12) == count(3)
