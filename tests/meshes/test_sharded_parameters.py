"""Parameters divided over the batch's own axes: sums divided as they are, and the price of
gathering them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum.testing import collectives
from tests.support.helpers import EXACT, data, normwise, refused

pytestmark = pytest.mark.optimized

LAYERS, WIDTH, BATCH, N = 4, 64, 64, 4
W, X = data(LAYERS, WIDTH, WIDTH) / WIDTH**0.5, data(BATCH, WIDTH, seed=1)
EXPLICIT = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
AUTOMATIC = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
SPEC = P(None, "data", None)


def loss(w, x):
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)
    return ja.Mean(jnp.sum(h**2), h.size)


def gathering(w, x):
    """Manual: the parameters of one layer at a time, gathered where they are used."""
    whole = lambda layer: lax.all_gather(layer, "data", axis=0, tiled=True)
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ whole(layer)), None), x, w)
    return ja.Mean(jnp.sum(h**2), h.size)


@functools.cache
def expected():
    return jax.value_and_grad(lambda w: ja.full_batch(loss)(w, X))(W)


def manual(step):
    return jax.shard_map(step, mesh=AUTOMATIC, in_specs=(SPEC, P("data")), out_specs=(P(), SPEC))


def once_by_hand(w, x):
    """The gather outside of the loop: its transpose scatters the sum, once."""
    whole = lambda w: lax.all_gather(w, "data", axis=1, tiled=True)
    return jax.value_and_grad(
        lambda w: ja.microbatch(loss, num_microbatches=N, mesh_axes="data")(whole(w), x)
    )(w)


WAYS = {
    "explicit, each": (EXPLICIT, ja.value_and_grad(loss, num_microbatches=N)),
    "explicit, once": (EXPLICIT, ja.value_and_grad(loss, num_microbatches=N, gather="once")),
    "manual, each layer": (
        AUTOMATIC,
        manual(ja.value_and_grad(gathering, num_microbatches=N, mesh_axes="data")),
    ),
    "manual, once": (AUTOMATIC, manual(once_by_hand)),
    "automatic": (AUTOMATIC, ja.value_and_grad(loss, num_microbatches=N, split="strided")),
}


@functools.cache
def compiled(name):
    mesh, step = WAYS[name]
    laid = (
        jax.device_put(W, NamedSharding(mesh, SPEC)),
        jax.device_put(X, NamedSharding(mesh, P("data"))),
    )
    return jax.jit(step).lower(*laid).compile(), laid


@pytest.mark.parametrize("name", WAYS)
def test_value_and_gradient_are_the_whole_batchs(name):
    program, laid = compiled(name)
    value, grad = program(*laid)
    assert normwise((value, grad), expected()) < EXACT
    if name != "automatic":  # there the compiler chooses
        assert grad.sharding.is_equivalent_to(laid[0].sharding, 3)


def counted(name, kind):
    """How often the bytes of all parameters go through a kind of collective, in one step."""
    whole = {"all-gather": W.nbytes, "reduce-scatter": W.nbytes / 8}[kind]
    return sum(c.times * c.bytes for c in collectives(compiled(name)[0]) if c.kind == kind) / whole


@pytest.mark.parametrize(
    ("name", "gathers", "scatters"),
    [
        ("explicit, each", N, N),
        ("explicit, once", 1, 1),
        ("manual, each layer", 2 * N, N),
        ("manual, once", 1, 1),
    ],
)
def test_the_price_of_gathering(name, gathers, scatters):
    """At each microbatch, or once per window; a layer at a time it may be gathered for the way back
    too."""
    assert 1 <= counted(name, "all-gather") <= gathers
    assert counted(name, "reduce-scatter") == scatters
    if scatters == N:
        assert counted(name, "all-gather") >= N
    large = [c for c in collectives(compiled(name)[0]) if c.kind == "all-reduce" and c.bytes > 64]
    assert not large


def test_the_memory_that_it_buys():
    """One layer whole at a time, against all parameters and a whole gradient on every device."""
    temporary = {name: compiled(name)[0].memory_analysis().temp_size_in_bytes for name in WAYS}
    assert temporary["manual, each layer"] < temporary["explicit, once"] - W.nbytes


def test_two_axes_divide_the_batch_and_one_the_parameters():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    w = jax.device_put(W, NamedSharding(mesh, P(None, None, "fsdp")))
    x = jax.device_put(X, NamedSharding(mesh, P(("data", "fsdp"))))
    for gather in ("each", "once"):
        value, grad = jax.jit(ja.value_and_grad(loss, num_microbatches=N, gather=gather))(w, x)
        assert normwise((value, grad), expected()) < EXACT
        assert grad.sharding.is_equivalent_to(w.sharding, 3)


@pytest.mark.parametrize("context", [False, True])
def test_a_carried_state_runs_on_global_arrays_with_parameters_gathered_once(context):
    fun = lambda w, x, s: (loss(w, x), ja.Carry(s + jnp.sum(x)))
    step = ja.value_and_grad(
        fun, has_aux=True, in_axes=(None, 0, ja.CARRY), num_microbatches=N, gather="once"
    )
    w, x = (
        jax.device_put(a, NamedSharding(EXPLICIT, spec)) for a, spec in ((W, SPEC), (X, P("data")))
    )
    with jax.set_mesh(EXPLICIT) if context else contextlib.nullcontext():
        (value, state), grad = jax.jit(step)(w, x, 0.0)
    assert normwise((value, grad), expected()) < EXACT
    assert normwise(state, jnp.sum(X)) < EXACT
    assert grad.sharding.is_equivalent_to(w.sharding, 3)


def test_gather_is_checked():
    refused(
        lambda: ja.grad(loss, num_microbatches=N, gather="never")(W, X), "gather", "'never'", "once"
    )


@pytest.mark.parametrize("name", ["compensated", "skip_nonfinite", "noise_scale"])
def test_an_accumulator_of_its_own_needs_gradients_of_one_device(name):
    """Gathered at every microbatch they come of all devices, whose weights differ: refused; once,
    they are exact."""
    w, weights = data(16) / 4, jnp.arange(16.0) % 3
    x, y = data(16, 16, seed=1), data(16, seed=2)
    made = getattr(ja.accumulators, name)

    def loss(w, x, y, weights):
        return ja.Mean(jnp.sum((jnp.tanh(x @ w) - y) ** 2 * weights), jnp.sum(weights))

    lay = lambda array: jax.device_put(array, NamedSharding(EXPLICIT, P("data")))
    step = functools.partial(ja.value_and_grad, loss, in_axes=(None, 0, 0, 0), num_microbatches=2)
    arrays = [lay(array) for array in (w, x, y, weights)]
    truth = jax.grad(lambda w: ja.full_batch(loss, in_axes=(None, 0, 0, 0))(w, x, y, weights))(w)
    assert normwise(step(accumulator=made(), gather="once")(*arrays)[1], truth) < EXACT
    assert normwise(step()(*arrays)[1], truth) < EXACT
    refused(
        lambda: step(accumulator=made())(*arrays),
        "argument 0",
        "'data'",
        'gather="once"',
        "in_place()",
    )
