"""Coupled programs under and over every transformation of JAX, against the same around the full
batch."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support import jitted
from tests.support.covering import covering
from tests.support.helpers import EXACT, INEXACT, data, normwise

AXIS = "microbatch"
W, X = {"w": data(2, 4, 4)}, data(6, 4, seed=1) * jnp.arange(1.0, 7.0)[:, None]


def normalize(h, axes=AXIS):
    mean = lax.pmean(jnp.mean(h, axis=0), axes)
    var = lax.pmean(jnp.mean(h**2, axis=0), axes) - mean**2
    return (h - mean[None]) * lax.rsqrt(var + 1e-2)[None]


def layer(h, w, axes=AXIS):
    return h + jnp.tanh(normalize(h @ w, axes)), None


def loss(w, x):
    """Two normalized layers; a term of its own denominator beside the mean."""
    h = layer(layer(x, w["w"][0])[0], w["w"][1])[0]
    return {
        "cube": ja.Mean(jnp.sum(h**3), h.size),
        "up": ja.Mean(jnp.sum(jnp.where(h > 0, h, 0.0)), jnp.sum(h > 0)),
    }


def total(terms):
    return terms["cube"] + terms["up"]


def scalar(w, x):
    return jnp.mean(layer(layer(x, w["w"][0])[0], w["w"][1])[0] ** 3)


def square(tree):
    return sum(jnp.sum(x**3) for x in jax.tree.leaves(tree))


def of(tagged):
    """Value and gradient by JAX of a function that returns finalized terms."""
    return jitted.value_and_grad(lambda w, x: total(tagged(w, x)))


OURS = {
    "value_and_grad, min": ja.value_and_grad(loss, num_microbatches=3, memory="min"),
    "value_and_grad, store": ja.value_and_grad(loss, num_microbatches=3, memory="store"),
    "grad of microbatch": of(ja.microbatch(loss, num_microbatches=3)),
}
pytestmark = pytest.mark.filterwarnings("ignore:memory=")


def three_steps(vg, outer=lambda f: f):
    def train(w):
        def step(w, _):
            value, grads = vg(w, X)
            return jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), value

        w, values = lax.scan(outer(step), w, None, length=3)
        return jnp.sum(values) + square(w)

    return jax.jit(jax.value_and_grad(train))(W)


TWO_W, TWO_X = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), W), jnp.stack([X, X[::-1] ** 2])
AROUND = {
    "jit": lambda f: jax.jit(f)(W, X),
    "vmap over parameters": lambda f: jax.jit(jax.vmap(f, (0, None)))(TWO_W, X),
    "vmap over batches": lambda f: jax.vmap(jax.jit(f), (None, 0))(W, TWO_X),
    "reverse over reverse": lambda f: jax.jit(jax.grad(lambda w: square(f(w, X)[1])))(W),
    "forward over reverse": lambda f: jax.jit(lambda w: jax.jvp(lambda w: f(w, X)[1], (w,), (w,)))(
        W
    ),
    "checkpoint outside": lambda f: jax.jit(jax.grad(jax.checkpoint(lambda w: square(f(w, X)[1]))))(
        W
    ),
    "three scanned steps": three_steps,
    "three checkpointed steps": lambda f: three_steps(f, jax.checkpoint),
    "gradient of the batch": lambda f: jax.jit(jax.grad(lambda x: f(W, x)[0]))(X),
}


@functools.cache
def around_the_full_batch(name):
    return AROUND[name](of(ja.full_batch(loss)))


@pytest.mark.parametrize(("ours", "name"), covering(list(OURS), list(AROUND)))
def test_around(ours, name):
    assert normwise(AROUND[name](OURS[ours]), around_the_full_batch(name)) < EXACT


def test_forward_mode_of_one_scalar():
    moved = lambda f: jax.jvp(lambda w, x: f(w, x), (W, X), (jax.tree.map(jnp.sin, W), jnp.cos(X)))
    assert (
        normwise(moved(ja.microbatch(scalar, num_microbatches=3)), moved(ja.full_batch(scalar)))
        < EXACT
    )


INSIDE = {
    "jit": lambda w, x: jax.jit(scalar)(w, x),
    "checkpoint": lambda w, x: jax.checkpoint(scalar)(w, x),
    "scan over layers": lambda w, x: jnp.mean(lax.scan(layer, x, w["w"])[0] ** 3),
    "reversed scan of checkpoints": lambda w, x: jnp.mean(
        lax.scan(jax.checkpoint(layer), x, w["w"], reverse=True)[0] ** 3
    ),
    "fori_loop": lambda w, x: jnp.mean(
        lax.fori_loop(0, 2, lambda i, h: layer(h, w["w"][i])[0], x) ** 3
    ),
    "inner vmap and its axis": lambda w, x: jnp.mean(
        jax.vmap(
            lambda row: jnp.tanh(row @ w["w"][0]) - lax.pmean(row, ("row", AXIS)), axis_name="row"
        )(x)
        ** 3
    ),
    "cond without a collective": lambda w, x: jnp.mean(
        lax.cond(jnp.sum(w["w"]) > 0, jnp.sin, jnp.cos, normalize(x @ w["w"][0])) ** 2
    ),
    "custom rules without a collective": lambda w, x: jnp.mean(
        jax.nn.relu(normalize(x @ w["w"][0])) + jax.nn.softmax(x @ w["w"][1])
    ),
}


@INEXACT
@pytest.mark.parametrize("name", INSIDE)
def test_inside(name):
    actual = jax.jit(ja.value_and_grad(INSIDE[name], num_microbatches=3))(W, X)
    assert normwise(actual, jax.jit(jax.value_and_grad(ja.full_batch(INSIDE[name])))(W, X)) < EXACT


# -- a second axis ---------------------------------------------------------------------------------

BOTH = ("data", AXIS)
SHARDED = data(8, 4, seed=3) * jnp.arange(1.0, 9.0)[:, None]


def over_both(w, x):
    """Normalized over devices and time."""
    return ja.Mean(jnp.sum(layer(layer(x, w["w"][0], BOTH)[0], w["w"][1], BOTH)[0] ** 3), x.size)


def whole(w, x):
    """The same over all examples, without the library."""
    for kernel in w["w"]:
        h = x @ kernel
        h = (h - jnp.mean(h, axis=0)[None]) * lax.rsqrt(jnp.var(h, axis=0) + 1e-2)[None]
        x = x + jnp.tanh(h)
    return jnp.mean(x**3)


@pytest.mark.parametrize("memory", ["min", "store"])
@pytest.mark.parametrize("check_vma", [False, True], ids=["unchecked", "checked"])
def test_devices_and_time(check_vma, memory):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = ja.value_and_grad(over_both, num_microbatches=2, mesh_axes="data", memory=memory)
    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P()), "check_vma": check_vma}
    assert (
        normwise(
            jax.jit(jax.shard_map(step, mesh=mesh, **specs))(W, SHARDED),
            jitted.value_and_grad(whole)(W, SHARDED),
        )
        < EXACT
    )


@pytest.mark.parametrize("check_vma", [False, True], ids=["unchecked", "checked"])
def test_evaluation_on_devices(check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    evaluate = ja.microbatch(over_both, num_microbatches=2, mesh_axes="data")
    over = jax.shard_map(
        evaluate, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
    )
    assert normwise(jax.jit(over)(W, SHARDED), whole(W, SHARDED)) < EXACT


@pytest.mark.parametrize("rows", [False, True], ids=["scalar", "rows"])
def test_gradient_under_an_outer_mapped_axis(rows):
    """The backward pass of an outer `vmap` runs when its axis is bound no more."""

    def fun(w, x):
        h = layer(layer(x, w["w"][0], BOTH)[0], w["w"][1], BOTH)[0]
        return ja.Concat(jnp.mean(h**3, axis=1)) if rows else ja.Mean(jnp.sum(h**3), h.size)

    mapped = jax.vmap(ja.microbatch(fun, num_microbatches=2), (None, 0), axis_name="data")
    actual = jitted.value_and_grad(lambda w: jnp.mean(mapped(w, SHARDED.reshape(2, 4, 4))))(W)
    assert normwise(actual, jitted.value_and_grad(whole)(W, SHARDED)) < EXACT


@pytest.mark.parametrize("check_vma", [False, True], ids=["unchecked", "checked"])
def test_jax_differentiates_on_devices_with_keys(check_vma):
    """`microbatch` inside `shard_map`, keys of examples global over devices."""
    axes = (None, 0, ja.EXAMPLE_KEY)

    def fun(w, x, keys):
        h = jnp.where(
            jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(keys), x @ w["w"][0], 0.0
        )
        mean = lax.pmean(jnp.mean(h, axis=0), BOTH)
        return jnp.mean((h - mean[None]) ** 3)

    def truth(w, x, key):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(8))
        h = jnp.where(
            jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(keys), x @ w["w"][0], 0.0
        )
        return jnp.mean((h - jnp.mean(h, axis=0)[None]) ** 3)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jitted.value_and_grad(
        ja.microbatch(fun, in_axes=axes, num_microbatches=2, mesh_axes="data")
    )
    specs = {"in_specs": (P(), P("data"), P()), "out_specs": (P(), P()), "check_vma": check_vma}
    actual = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(W, SHARDED, jax.random.key(5))
    assert normwise(actual, jitted.value_and_grad(truth)(W, SHARDED, jax.random.key(5))) < EXACT


@pytest.mark.optimized
@pytest.mark.parametrize("check_vma", [False, True], ids=["unchecked", "checked"])
def test_one_all_reduce_a_cut_each_way(check_vma):
    """Two cuts, forward and back, and the one sum of the gradients: five, however many
    microbatches."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = ja.value_and_grad(over_both, num_microbatches=4, mesh_axes="data", memory="store")
    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P()), "check_vma": check_vma}
    text = jax.jit(jax.shard_map(step, mesh=mesh, **specs)).lower(W, SHARDED).compile().as_text()
    everywhere = len(re.findall(r" all-reduce(?:-start)?\(", text))
    entry = text[text.index("ENTRY") :]
    assert everywhere == len(re.findall(r" all-reduce(?:-start)?\(", entry)) == 5
