"""Gradients that go into a running sum: every reader adds its share once, whatever reads the
parameter and how often.

The oracle is plain ``jax.vjp`` of the same program. The negative control is an evaluation in which
one reader forgets the sum of the readers after it, as a reference that is overwritten would.
"""

import itertools

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import pytest
from jax import lax

from jaxaccum._jaxpr import running_sums
from jaxaccum._jaxpr.equations import with_invars
from tests.support.helpers import EXACT, data, normwise

X, A, B, STACK = (
    data(4, 3),
    data(3, 3, seed=1) / 2,
    data(3, 3, seed=2) / 2,
    data(2, 3, 3, seed=3) / 2,
)
IDS = jnp.array([2, 0, 2, 1])


def layer(h, a, b):
    return jnp.tanh(h @ a) @ b


def steps(a, b, h, length=2):
    return lax.scan(lambda h, _: (layer(h, a, b), None), h, None, length=length)[0]


def layers(w, h, wrap=lambda f: f, **options):
    return lax.scan(lambda h, w: (wrap(lambda h, w: jnp.tanh(h @ w))(h, w), None), h, w, **options)[
        0
    ]


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

PROGRAMS = {
    "whole": lambda p, x: layer(x, p["a"], p["b"]),
    "unused": lambda p, x: x @ p["b"],
    "an output itself": lambda p, x: p["a"],
    "one jit, twice": lambda p, x: jax.jit(layer)(x, p["a"], p["a"]),
    "jit around a scan": lambda p, x: jax.jit(steps)(p["a"], 2 * p["b"], x),
    "jit, raw and scanned": lambda p, x: (
        jax.jit(lambda w, h: layers(w, h) + h @ w[0])(p["stack"], x)
    ),
    "scan over, closed over": lambda p, x: (
        lax.scan(lambda h, r: (jnp.tanh(h @ p["a"]) + r[None], None), x, p["a"])[0]
    ),
    "twice in xs": lambda p, x: (
        lax.scan(lambda h, s: (h * s[0][None] + s[1][None], None), x, (p["a"], p["a"]))[0]
    ),
    "in the carry": lambda p, x: (
        lax.scan(lambda c, _: (jnp.tanh(c @ p["a"]), None), p["a"], None, length=2)[0]
    ),
    "carry and xs": lambda p, x: (
        lax.scan(lambda c, r: (jnp.tanh(c) + r[None], None), p["a"], p["a"])[0]
    ),
    "computed beside raw": lambda p, x: steps(2 * p["a"], p["b"], x),
    "raw beside computed": lambda p, x: steps(p["a"], 2 * p["b"], x),
    "low rank": lambda p, x: steps(p["a"] + p["b"][:, :1] @ p["b"][:1], p["b"], x),
    "layers": lambda p, x: layers(p["stack"], x),
    "layers in reverse": lambda p, x: layers(p["stack"], x, reverse=True),
    "layers unrolled": lambda p, x: layers(p["stack"], x, unroll=2),
    "layers under checkpoint": lambda p, x: layers(p["stack"], x, jax.checkpoint),
    "layers under jit": lambda p, x: layers(p["stack"], x, jax.jit),
    "checkpointed layers": lambda p, x: jax.checkpoint(layers)(p["stack"], x),
    "checkpoint of a shared matrix": lambda p, x: (
        jax.checkpoint(lambda a, h: steps(a, a, h))(p["a"], x)
    ),
    "layers twice": lambda p, x: layers(p["stack"], layers(p["stack"], x)),
    "layers and a slice": lambda p, x: layers(p["stack"], x) @ p["stack"][1],
    "layers of layers": lambda p, x: (
        lax.scan(lambda h, _: (layers(p["stack"], h), None), x, None, length=2)[0]
    ),
    "scan, jit, scan": lambda p, x: (
        layers(p["stack"], x, lambda f: jax.jit(lambda h, w: steps(w, p["a"], f(h, w))))
    ),
    "a slice, an index": lambda p, x: (
        x @ p["stack"][0] @ lax.dynamic_index_in_dim(p["stack"], IDS[3], keepdims=False)
    ),
    "a strided slice": lambda p, x: x[:, :2] @ p["a"][::2],
    "rows of a table": lambda p, x: x + p["a"][IDS],
    "a table and its transpose": lambda p, x: jnp.tanh(x + p["a"][IDS]) @ p["a"].T,
    "rows that may lie outside": lambda p, x: (
        x + p["a"].at[IDS * 2].get(mode="fill", fill_value=1.0)
    ),
    "single numbers of a table": lambda p, x: x * p["a"][IDS, IDS][:, None],
    "columns of a table": lambda p, x: x @ p["a"][:, IDS],
    "cond of one twice": lambda p, x: (
        lax.cond(x[0, 0] > -9, layer, lambda h, a, b: h @ b, x, p["a"], p["a"])
    ),
    "switch": lambda p, x: (
        lax.switch(IDS[0], [layer, layer, lambda h, a, b: h @ a @ a], x, p["a"], p["a"])
    ),
    "custom rule": lambda p, x: clipped(x @ p["a"]) @ p["a"],
    "map": lambda p, x: lax.map(lambda r: jnp.tanh(r @ p["a"]) @ p["a"], x),
    "fori": lambda p, x: lax.fori_loop(0, 2, lambda i, h: h @ p["stack"][i], x),
    "hypot": lambda p, x: x @ jnp.hypot(p["a"], p["a"]),
    "solve": lambda p, x: jnp.linalg.solve(p["a"] + 3 * jnp.eye(3), p["a"]) + 0 * x[:3],
}  # fmt: skip
PARAMS = {"a": A, "b": B, "stack": STACK}


def with_sums(program, params, sums, x):
    """The program's output, evaluated with one running sum for each parameter, and these sums."""
    flat, treedef = jax.tree.flatten(params)
    flat_program = lambda *args: program(treedef.unflatten(args[:-1]), args[-1])
    closed = jax.make_jaxpr(flat_program)(*flat, x)
    jaxpr, consts = (
        with_invars(closed.jaxpr, [*closed.jaxpr.constvars, *closed.jaxpr.invars]),
        closed.consts,
    )
    places = {len(consts) + i: i for i in range(len(flat))}
    (out,), sums = running_sums.evaluate(jaxpr, [*consts, *flat, x], jax.tree.leaves(sums), places)
    return out, treedef.unflatten(sums)


def added(program, before, seed=None):
    """What the running sums hold after one backward pass that starts from `before`."""
    unread = jax.tree.map(jnp.zeros_like, PARAMS)
    (out, _), pull = jax.vjp(lambda sums: with_sums(program, PARAMS, sums, X), unread)
    return pull((jnp.ones_like(out) if seed is None else seed, before))[0]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_sum_grows_by_the_gradient(name):
    program, before = PROGRAMS[name], jax.tree.map(lambda x: data(*x.shape, seed=9), PARAMS)
    out, pull = jax.vjp(lambda p: program(p, X), PARAMS)
    expected = jax.tree.map(jnp.add, before, pull(jnp.ones_like(out))[0])
    assert normwise(added(program, before), expected) < EXACT


@pytest.mark.parametrize(
    "name", ["layers twice", "twice in xs", "scan over, closed over", "low rank"]
)
def test_a_reader_that_forgets_the_others_is_seen(name, monkeypatch):
    entry = lambda total, gradient, i: lax.dynamic_update_index_in_dim(
        jnp.zeros_like(total), gradient, i, 0
    )
    monkeypatch.setattr(running_sums, "_add_whole", lambda total, gradient, where: gradient)
    monkeypatch.setattr(running_sums, "_add_at_index", entry)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    out, pull = jax.vjp(lambda p: PROGRAMS[name](p, X), PARAMS)
    assert normwise(added(PROGRAMS[name], zeros), pull(jnp.ones_like(out))[0]) > 0.01


def additions(jaxpr, shape):
    """How many equations, at any depth, add two arrays of the given shape."""
    names = ("add", "add_any")
    here = [
        eqn
        for eqn in jaxpr.eqns
        if eqn.primitive.name in names and eqn.outvars[0].aval.shape == shape
    ]
    inner = itertools.chain.from_iterable(jex.jaxprs_in_params(eqn.params) for eqn in jaxpr.eqns)
    return len(here) + sum(additions(sub, shape) for sub in inner)


IN_PIECES = [
    "layers", "layers in reverse", "layers under checkpoint", "layers under jit",
    "checkpointed layers", "layers twice",
    "layers and a slice", "layers of layers", "a slice, an index", "jit, raw and scanned",
]  # fmt: skip


@pytest.mark.parametrize("name", IN_PIECES)
def test_a_stack_of_layers_is_never_added_whole(name):
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    assert (
        additions(jax.make_jaxpr(lambda s: added(PROGRAMS[name], s))(zeros).jaxpr, STACK.shape) == 0
    )


def test_a_sum_may_be_wider_than_its_parameter():
    narrow = {name: x.astype(jnp.bfloat16) for name, x in PARAMS.items()}
    x = X.astype(jnp.bfloat16)
    wide = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), narrow)
    out = PROGRAMS["layers"](narrow, x)
    _, pull = jax.vjp(lambda sums: with_sums(PROGRAMS["layers"], narrow, sums, x), wide)
    after = pull((jnp.ones_like(out), wide))[0]
    plain = jax.grad(lambda p: jnp.sum(PROGRAMS["layers"](p, x)))(narrow)
    assert after["stack"].dtype == jnp.float32
    assert normwise(after["stack"], plain["stack"]) == 0
