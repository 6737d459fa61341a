"""An output that follows from collectives over all microbatches needs no tag: it is the whole
batch's in every one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.helpers import EXACT, INEXACT, UNDECIDED, bits, data, normwise, refused, same

W, X = {"k": data(3), "t": data(2, seed=1)}, data(8, 3, seed=2)
AXIS = "microbatch"


def over(axes=AXIS):
    """The mean over microbatches, or, of None, that of a whole batch."""
    return lambda x: x if axes is None else lax.pmean(x, axes)


def summed(axes, x):
    return x if axes is None else lax.psum(x, axes)


def loss(w, x, axes=AXIS):
    h = jnp.sin(x @ w["k"])
    return jnp.mean((h - over(axes)(jnp.mean(h))) ** 2)


def mean(w, x, axes):
    return over(axes)(jnp.mean(jnp.tanh(x * w["k"][None]), axis=0))


def gathered(w, x, axes):
    del w
    rows = x if axes is None else lax.all_gather(x, axes, tiled=True)
    return jnp.max(rows**2, axis=0)


def steps(w, x, axes):
    """A scan that carries a statistic."""

    def step(old, _):
        return 0.9 * old + 0.1 * mean(w, x, axes), jnp.max(old)

    return lax.scan(step, w["k"], None, length=3)


SHARED = {
    "a mean": mean,
    "a running mean": lambda w, x, axes: 0.9 * w["k"] + 0.1 * mean(w, x, axes),
    "a count": lambda w, x, axes: summed(axes, jnp.sum(x > 0)),
    "a flag": lambda w, x, axes: mean(w, x, axes)[0] > 0,
    "a key": lambda w, x, axes: jax.random.fold_in(jax.random.key(0), summed(axes, jnp.sum(x > 0))),
    "a maximum": lambda w, x, axes: jnp.max(x) if axes is None else lax.pmax(jnp.max(x), axes),
    "of all rows": gathered,
    "of whole arguments too": lambda w, x, axes: {"t": w["t"] * mean(w, x, axes)[0], "own": w["t"]},
    "in jit": lambda w, x, axes: jax.jit(lambda w, x: mean(w, x, axes))(w, x),
    "in a checkpoint": lambda w, x, axes: jax.checkpoint(lambda w, x: mean(w, x, axes))(w, x),
    "in a scan": steps,
    "through a branch": lambda w, x, axes: lax.cond(
        mean(w, x, axes)[0] > 0, jnp.sin, jnp.cos, mean(w, x, axes)
    ),
    "through a loop": lambda w, x, axes: lax.while_loop(
        lambda m: jnp.sum(m) < 3, lambda m: m + 1, lax.stop_gradient(mean(w, x, axes))
    ),
    "through a rule": lambda w, x, axes: jax.nn.relu(mean(w, x, axes)),
    "constants beside it": lambda w, x, axes: {
        "mean": mean(w, x, axes),
        "flag": jnp.array(False),
        "rate": np.array([0.5, 0.25]),
        "step": 3,
        "key": jax.random.key(1),
    },
    "of bfloat16": lambda w, x, axes: jnp.bfloat16(gathered(w, x, axes)),
}
"""Outputs, by what makes them; `axes` is None on the whole batch."""
OPTIONS = [{"num_microbatches": 4}, {"microbatch_size": 4, "split": "strided"}]


def pair(name, axes=AXIS):
    return lambda w, x: (loss(w, x, axes), SHARED[name](w, x, axes))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_it_is_the_whole_batchs(name, options):
    """As aux of both forms, and as the tag `Last` has it, bit by bit."""
    expected = jax.value_and_grad(pair(name, None), has_aux=True)(W, X)
    options = {**options, "audit": "raise"}
    for step in (
        ja.value_and_grad(pair(name), has_aux=True, **options),
        jax.value_and_grad(ja.microbatch(pair(name), **options), has_aux=True),
    ):
        actual = step(W, X)
        assert jax.tree.map(lambda x: x.dtype, bits(actual)) == jax.tree.map(
            lambda x: x.dtype, bits(expected)
        )
        assert normwise(jax.tree.map(jnp.float64, bits(actual)), bits(expected)) < EXACT
    tagged = lambda w, x: (loss(w, x), ja.Last(SHARED[name](w, x, AXIS)))
    last = ja.value_and_grad(tagged, has_aux=True, **options)(W, X)
    assert same(bits(last), bits(ja.value_and_grad(pair(name), has_aux=True, **options)(W, X)))
    whole = ja.full_batch(pair(name))(W, X)
    assert normwise(jax.tree.map(jnp.float64, bits(whole)), bits(pair(name, None)(W, X))) < EXACT


OWN = {
    "rows": lambda w, x: x - mean(w, x, AXIS)[None],
    "its own mean": lambda w, x: jnp.mean(x, axis=0) + mean(w, x, AXIS),
    "the index": lambda w, x: mean(w, x, AXIS) * jnp.float64(lax.axis_index(AXIS)),
    "the index in a branch": lambda w, x: lax.cond(
        lax.axis_index(AXIS) == 0, jnp.sin, jnp.cos, mean(w, x, AXIS)
    ),
    "what another has": lambda w, x: lax.ppermute(
        mean(w, x, AXIS), AXIS, [(i, (i + 1) % 4) for i in range(4)]
    ),
    "the outside": lambda w, x: io_callback(lambda m: m, jnp.zeros(3), mean(w, x, AXIS)),
    "a share of the sum": lambda w, x: lax.psum_scatter(jnp.tile(mean(w, x, AXIS), (4, 1)), AXIS),
    "carried by a scan": lambda w, x: lax.scan(
        lambda old, row: (row, mean(w, x, AXIS)), jnp.zeros(3), x
    )[0],
    "carried from the second step on": lambda w, x: lax.scan(
        lambda old, _: ((old[1], jnp.mean(x, axis=0)), None),
        (jnp.zeros(3), mean(w, x, AXIS)),
        None,
        length=2,
    )[0][0],
    "the number of microbatches": lambda w, x: lax.psum(w["t"], AXIS),
    "the number of rows": lambda w, x: x.shape[0],
    "the index alone": lambda w, x: lax.axis_index(AXIS),
    "a one, added up": lambda w, x: lax.psum(1, AXIS),
}
"""Outputs that differ between microbatches, or depend on their number alone."""


@pytest.mark.parametrize("name", OWN)
def test_what_differs_is_refused(name):
    fun = lambda w, x: (loss(w, x), {"beside": OWN[name](w, x), "mean": mean(w, x, AXIS)})
    says = "aux['beside']", "without a tag", "follows from collectives", "jaxaccum.Sum(x)"
    step = ja.value_and_grad(fun, has_aux=True, num_microbatches=4)
    refused(lambda: step(W, X), *says)


def test_what_is_drawn_for_each_microbatch_is_refused():
    fun = lambda w, x, key: (loss(w, x), mean(w, x, AXIS) + jax.random.normal(key, (3,)))
    for role in (ja.KEY, ja.EXAMPLE_KEY):
        own = (lambda w, x, keys: fun(w, x, keys[0])) if role is ja.EXAMPLE_KEY else fun
        step = ja.value_and_grad(
            own, has_aux=True, num_microbatches=4, in_axes=(None, 0, role), audit=None
        )
        refused(lambda step=step: step(W, X, jax.random.key(0)), "aux", "without a tag")


def test_a_state_is_updated_once_beside_it():
    def fun(w, x, state):
        return loss(w, x), (mean(w, x, AXIS) + state, 2 * state[None], ja.Carry(state + 1))

    step = ja.value_and_grad(
        fun, has_aux=True, num_microbatches=4, in_axes=(None, 0, ja.CARRY), audit="raise"
    )
    (_, (shifted, twice, state)), _ = step(W, X, jnp.float64(3.0))
    assert normwise((shifted, twice, state), (mean(W, X, None) + 3, jnp.array([6.0]), 4.0)) < EXACT
    whole = ja.full_batch(fun, in_axes=(None, 0, ja.CARRY))(W, X, jnp.float64(3.0))
    assert normwise(whole[1], (shifted, twice, state)) < EXACT


def test_a_loss_of_one_size_alone_has_no_constants():
    """Nothing tells that they do not depend on the size, and the error is ours."""

    def of_size(size):
        def fun(w, x):
            assert len(x) == size
            return loss(w, x), jnp.arange(3)

        return fun

    step = ja.value_and_grad(of_size(2), has_aux=True, num_microbatches=4, audit=None)
    refused(lambda: step(W, X), "aux", "without a tag")
    refused(lambda: ja.full_batch(of_size(8))(W, X), "output[1]", "without a tag")


@INEXACT
def test_padding_is_masked_in_the_collectives():
    def fun(w, x, mask, n):
        del n
        count = lax.psum(jnp.sum(mask), AXIS)
        shift = lax.psum(mask @ x, AXIS) / count
        nll = jnp.sin(x @ w["k"] - shift[0])
        return ja.Mean(jnp.sum(nll * mask), jnp.sum(mask)), (shift, jnp.int32(count))

    padded, mask = ja.pad_batch(X, to=12)
    options = {"in_axes": (None, 0, 0, None), "num_examples_argnum": 3, "num_microbatches": 3}
    step = ja.value_and_grad(fun, has_aux=True, **options)
    (value, (shift, count)), _ = step(W, padded, jnp.float64(mask), 8)
    whole = jnp.mean(X, axis=0)
    assert normwise((value, shift), (jnp.mean(jnp.sin(X @ W["k"] - whole[0])), whole)) < EXACT
    assert int(count) == 8


# -- derivatives -------------------------------------------------------------------------------


def test_its_derivative_is_an_error():
    """And NaN in forward mode, which cannot tell whether anybody reads it."""
    f = ja.microbatch(pair("a mean"), num_microbatches=4)
    says = "a derivative of output[1]", "without a tag", "Mean(x, 1)"
    refused(lambda: jax.grad(lambda w: jnp.sum(f(w, X)[1]))(W), *says)
    tangent = jax.jvp(lambda w: f(w, X), (W,), (W,))[1]
    expected = jax.jvp(lambda w: loss(w, X, None), (W,), (W,))[1]
    assert normwise(tangent[0], expected) < EXACT
    assert np.isnan(tangent[1]).all()
    tagged = lambda w, x: (loss(w, x), ja.Mean(mean(w, x, AXIS), 1))
    ours = ja.microbatch(tagged, num_microbatches=4, audit=None)
    actual = jax.grad(lambda w: jnp.sum(ours(w, X)[1]))(W)
    assert normwise(actual, jax.grad(lambda w: jnp.sum(mean(w, X, None)))(W)) < EXACT


def test_a_gradient_beside_it_takes_no_further_pass():
    """The loops of the program are those that it has with the tag."""

    def loops(fun):
        step = jax.value_and_grad(ja.microbatch(fun, num_microbatches=4), has_aux=True)
        return str(jax.make_jaxpr(step)(W, X)).count("scan[")

    tagged = lambda w, x: (loss(w, x), ja.Last(mean(w, x, AXIS)))
    assert loops(pair("a mean")) == loops(tagged)


# -- devices -----------------------------------------------------------------------------------


def mesh_of(kind):
    return jax.make_mesh((2,), ("data",), axis_types=(kind,))


def on_mesh(axes, check_vma):
    fun = lambda w, x: (loss(w, x, (AXIS, "data")), {"mean": mean(w, x, axes)})
    step = ja.value_and_grad(fun, has_aux=True, num_microbatches=2, mesh_axes="data")
    specs = {"mesh": mesh_of(AxisType.Auto), "in_specs": (P(), P("data")), "out_specs": P()}
    return jax.jit(jax.shard_map(step, check_vma=check_vma, **specs))(W, X)


@pytest.mark.parametrize("check_vma", [True, False])
def test_over_devices_the_collective_spans_them_too(check_vma):
    expected = jax.value_and_grad(pair("a mean", None), has_aux=True)(W, X)
    (value, aux), grads = on_mesh((AXIS, "data"), check_vma)
    assert normwise(((value, aux["mean"]), grads), expected) < EXACT
    refused(lambda: on_mesh(AXIS, check_vma), "aux['mean']", "without a tag")


@UNDECIDED
@pytest.mark.parametrize("order", [(AXIS, "data"), ("data", AXIS)])
def test_the_collectives_may_come_one_after_the_other(order):
    first, second = order
    average = lambda x: lax.pmean(lax.pmean(jnp.mean(x, axis=0), first), second)
    fun = lambda w, x: (loss(w, x, (AXIS, "data")), average(x))
    step = ja.value_and_grad(fun, has_aux=True, num_microbatches=2, mesh_axes="data")
    specs = {"mesh": mesh_of(AxisType.Auto), "in_specs": (P(), P("data")), "out_specs": P()}
    (_, aux), _ = jax.jit(jax.shard_map(step, **specs))(W, X)
    assert normwise(aux, jnp.mean(X, axis=0)) < EXACT


def test_an_explicit_mesh():
    mesh = mesh_of(AxisType.Explicit)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    step = ja.value_and_grad(pair("a mean"), has_aux=True, num_microbatches=2)
    actual = jax.jit(step)(jax.tree.map(lambda x: put(x, P()), W), put(X, P("data")))
    expected = jax.value_and_grad(pair("a mean", None), has_aux=True)(W, X)
    assert normwise(jax.device_get(actual), expected) < EXACT
