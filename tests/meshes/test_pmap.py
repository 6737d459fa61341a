"""Everything inside `jax.pmap`: with `mesh_axes`, a step over devices has the numbers of the whole
batch on one device.

The oracle is JAX on one device, in float64, without microbatches. The rows are divided over four
devices, so that each holds six of the 24, in microbatches of 4 and 2; masks leave some devices with
few rows and one of them with none.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import lax

import jaxaccum as ja
import jaxaccum.linen
import jaxaccum.nnx
from jaxaccum import accumulators
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, normwise, refused, same

DEVICES, ROWS, SIZE = 4, 24, 4
OPTIONS = {"microbatch_size": SIZE, "mesh_axes": "devices", "audit": "raise"}
W = {"a": data(3, 5), "b": data(5, seed=1)}
X = data(ROWS, 3, seed=2)
MASK = jnp.where(
    jnp.arange(ROWS) < 18, jnp.abs(data(ROWS, seed=3)), 0.0
)  # the last device has no row that counts
BATCH = {"x": X, "mask": MASK}


@pytest.fixture
def mixing_dtypes():
    """Flax and optax mix dtypes on their own."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def divided(tree):
    """The rows of each device along a new first axis, as `pmap` takes them."""
    return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), tree)


def wide(tree):
    """In float64; keys and counters as they are."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def joined(tree):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def on_devices(step, *whole, rows=(BATCH,)):
    """The step's outputs on every device; arguments `whole` are the same on each."""
    in_axes = (None,) * len(whole) + (0,) * len(rows)
    return jax.pmap(step, "devices", in_axes=in_axes)(*whole, *map(divided, rows))


def first(tree):
    """The outputs of one device, after every device gave the same."""
    for x in jax.tree.leaves(tree):
        assert all(same(x[0], other) for other in x)
    return jax.tree.map(lambda x: x[0], tree)


def errors(w, x):
    return jnp.tanh(x @ w["a"]) @ w["b"] - 1


def tokens(w, batch):
    return ja.Mean(jnp.sum(errors(w, batch["x"]) ** 2 * batch["mask"]), jnp.sum(batch["mask"]))


def terms(w, batch):
    e = errors(w, batch["x"])
    return {"token": tokens(w, batch), "mean": jnp.mean(e**2), "decay": 0.1 * jnp.sum(w["b"] ** 2)}


def total(w, batch):
    return ja.Sum(jnp.sum(errors(w, batch["x"]) ** 2 * batch["mask"]))


LOSSES = {
    "mean": lambda w, batch: jnp.mean(errors(w, batch["x"]) ** 2),
    "tokens": tokens,
    "terms": terms,
    "sum": total,
}


@functools.cache
def whole_batch(loss):
    """The oracle: the loss as one microbatch, differentiated by JAX."""
    summed = lambda w: sum(jax.tree.leaves(ja.full_batch(loss)(w, BATCH)))
    return jax.jit(jax.value_and_grad(summed))(W)


def by_microbatch(loss):
    spread = ja.microbatch(loss, **OPTIONS)
    return jax.value_and_grad(lambda w, batch: sum(jax.tree.leaves(spread(w, batch))))


ENGINES = {
    "value_and_grad": lambda loss: ja.value_and_grad(loss, **OPTIONS),
    "compiled": lambda loss: jax.jit(ja.value_and_grad(loss, **OPTIONS)),
    "grad": lambda loss: (
        lambda *args: (ja.microbatch(loss, **OPTIONS)(*args), ja.grad(loss, **OPTIONS)(*args))
    ),
}


@pytest.mark.parametrize(("name", "engine"), covering(list(LOSSES), list(ENGINES)))
def test_gradients_are_those_of_the_whole_batch(name, engine):
    value, grads = first(on_devices(ENGINES[engine](LOSSES[name]), W))
    expected = whole_batch(LOSSES[name])
    assert normwise((sum(jax.tree.leaves(value)), grads), expected) < EXACT


@pytest.mark.parametrize("name", LOSSES)
def test_jax_differentiates_microbatch(name):
    """Inside `pmap` JAX's gradient is that of one device, as for any function; the devices' are
    summed by the user."""
    step = lambda w, batch: lax.pmean(by_microbatch(LOSSES[name])(w, batch), "devices")
    assert normwise(first(on_devices(step, W)), whole_batch(LOSSES[name])) < EXACT


def test_the_mean_of_the_devices_means_is_wrong():
    """The classic step under `pmap`: exact on every device, and averaged."""
    options = OPTIONS | {"mesh_axes": ()}
    step = lambda w, batch: lax.pmean(ja.value_and_grad(tokens, **options)(w, batch), "devices")
    assert normwise(first(on_devices(step, W)), whole_batch(tokens)) > 0.1


def test_without_mesh_axes_each_device_has_the_gradient_of_its_rows():
    options = OPTIONS | {"mesh_axes": ()}
    actual = on_devices(ja.value_and_grad(LOSSES["mean"], **options), W)
    own = divided(BATCH)
    for i in range(DEVICES):
        expected = jax.value_and_grad(LOSSES["mean"])(W, jax.tree.map(lambda x, i=i: x[i], own))
        assert normwise(jax.tree.map(lambda x, i=i: x[i], actual), expected) < EXACT


@pytest.mark.optimized
def test_every_output_of_a_step():
    def loss(w, batch):
        e = errors(w, batch["x"])
        aux = {
            "sum": ja.Sum(jnp.sum(e)),
            "mean": ja.Mean({"e": jnp.sum(e), "m": jnp.sum(batch["mask"])}, len(e)),
            "max": ja.Max(jnp.max(e)),
            "min": ja.Min(jnp.min(e)),
            "rows": ja.Concat(e),
            "own": w["b"],
        }
        return tokens(w, batch), aux

    (value, aux), grads = on_devices(ja.value_and_grad(loss, has_aux=True, **OPTIONS), W)
    e = errors(W, X)
    assert normwise(first((value, grads)), whole_batch(tokens)) < EXACT
    assert same(first(aux["own"]), W["b"])
    assert same(first((aux["max"], aux["min"])), (jnp.max(e), jnp.min(e)))
    assert normwise(joined(aux["rows"]), e) < EXACT
    assert (
        normwise(
            first((aux["sum"], aux["mean"])), (jnp.sum(e), {"e": jnp.mean(e), "m": jnp.mean(MASK)})
        )
        < EXACT
    )


def test_a_state_is_that_of_one_device():
    """It runs through the microbatches of its device; with `mesh_axes` it would have to run through
    all of them."""
    loss = lambda w, x, count: (jnp.mean(errors(w, x) ** 2), ja.Carry(count + len(x)))
    options = OPTIONS | {"mesh_axes": (), "has_aux": True, "in_axes": (None, 0, ja.CARRY)}
    run = lambda **own: jax.pmap(
        ja.value_and_grad(loss, **options | own), "devices", in_axes=(None, 0, 0)
    )
    counts = jnp.arange(DEVICES)
    (_, after), _ = run()(W, divided(X), counts)
    assert same(after, counts + ROWS // DEVICES)
    refused(lambda: run(mesh_axes="devices")(W, divided(X), counts), "CARRY", "mesh_axes")


def test_examples_draw_the_whole_batchs_dropout():
    """One key per example: split for the whole batch, and divided as the rows are."""

    def loss(w, x, keys):
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (3,)))(keys)
        return jnp.mean(errors(w, jnp.where(keep, x, 0)) ** 2)

    keys = jax.random.split(jax.random.key(3), ROWS)
    step = ja.value_and_grad(loss, in_axes=(None, 0, 0), **OPTIONS)
    actual = first(on_devices(step, W, rows=(X, keys)))
    assert normwise(actual, jax.value_and_grad(loss)(W, X, keys)) < EXACT


def test_keys_of_the_call_are_folded_with_the_device():
    """The whole batch's key on every device: one key per example all the same, and no two alike."""
    one = ja.microbatch(lambda x, keys: ja.Concat(keys), in_axes=(0, ja.EXAMPLE_KEY), **OPTIONS)
    keys = jax.pmap(one, "devices", in_axes=(0, None))(divided(X), jax.random.key(3))
    assert (
        len({key.tobytes() for key in jax.random.key_data(keys).reshape(ROWS, -1).__array__()})
        == ROWS
    )


@pytest.mark.usefixtures("mixing_dtypes")
@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxaccum.linen.BatchNorm])
def test_batch_norm_spans_devices_and_microbatches(norm):
    """Value, gradient and running statistics are those of the whole batch."""
    model = nn.Sequential([nn.Dense(4), norm(False), jnp.tanh])
    spanning = norm(False, axis_name=("devices", "microbatch"))
    spread = nn.Sequential([*model.layers[:1], spanning, *model.layers[2:]])
    state = wide(jax.jit(model.init)(jax.random.key(0), X))
    params, stats = state["params"], {"batch_stats": state["batch_stats"]}
    weights = jnp.cos(jnp.arange(4.0))

    def loss(model, tag, params, x, stats):
        y, stats = model.apply({"params": params} | stats, x, mutable=["batch_stats"])
        return jnp.mean((y @ weights - x[:, 0]) ** 2), tag(stats)

    expected = jax.value_and_grad(functools.partial(loss, model, lambda s: s), has_aux=True)(
        params, X, stats
    )
    options = OPTIONS | {"microbatch_size": 2}
    step = ja.value_and_grad(
        functools.partial(loss, spread, ja.Carry),
        has_aux=True,
        in_axes=(None, 0, ja.CARRY),
        **options,
    )
    actual = first(jax.pmap(step, "devices", in_axes=(None, 0, None))(params, divided(X), stats))
    assert normwise(actual, expected) < EXACT
    alone = functools.partial(loss, model, ja.Carry)  # the statistics of a microbatch: wrong
    step = ja.value_and_grad(
        alone,
        has_aux=True,
        in_axes=(None, 0, ja.CARRY),
        **options | {"mesh_axes": (), "audit": None},
    )
    usual = jax.pmap(
        lambda *args: lax.pmean(step(*args), "devices"), "devices", in_axes=(None, 0, None)
    )
    assert normwise(first(usual(params, divided(X), stats))[1], expected[1]) > 0.1


def test_gathered_pairs_are_those_of_the_whole_batch():
    """A contrastive loss over the rows of all devices and microbatches."""

    def pairs(z, anchors):
        return jnp.mean(jax.nn.logsumexp(anchors @ z.T, axis=1) - jnp.sum(anchors**2, axis=1))

    def loss(w, x):
        z = jnp.tanh(x @ w["a"])
        return pairs(lax.all_gather(z, ("devices", "microbatch"), tiled=True), z)

    step = ja.value_and_grad(loss, **OPTIONS | {"microbatch_size": 2, "audit": None})
    expected = jax.value_and_grad(lambda w: pairs(jnp.tanh(X @ w["a"]), jnp.tanh(X @ w["a"])))(W)
    assert normwise(first(on_devices(step, W, rows=(X,))), expected) < EXACT


ACCUMULATORS = ["tree", "compensated", "skip_nonfinite", "noise_scale"]


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_every_accumulator(name):
    accumulator = getattr(accumulators, name)()
    step = ja.value_and_grad(LOSSES["mean"], accumulator=accumulator, **OPTIONS)
    _, grads = on_devices(step, W)
    assert normwise(first(grads), whole_batch(LOSSES["mean"])[1]) < EXACT


def test_padded_batches_count_the_examples_of_all_devices():
    """The number of examples on each device: 6, 6, 6 and 1 of 6."""

    def loss(w, x, real, n):
        return ja.Mean(jnp.sum(jnp.where(real, errors(w, x) ** 2, 0)), jnp.sum(real))

    options = OPTIONS | {"num_examples_argnum": 3, "microbatch_size": 1}
    step = ja.value_and_grad(loss, in_axes=(None, 0, 0, None), **options)
    counts = jnp.array([6, 6, 6, 1])  # int64, which is not the dtype of an index
    real = jnp.arange(ROWS) < 19
    actual = first(
        jax.pmap(step, "devices", in_axes=(None, 0, 0, 0))(W, divided(X), divided(real), counts)
    )
    assert normwise(actual, jax.value_and_grad(LOSSES["mean"])(W, {"x": X[:19]})) < EXACT


@pytest.mark.usefixtures("mixing_dtypes")
def test_three_steps_of_training_in_a_scan_with_donated_state():
    opt = optax.adamw(1e-2)
    step = ja.grad(tokens, **OPTIONS)

    def train(params, state, batch):
        def one(carry, _):
            params, state = carry
            updates, state = opt.update(step(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(one, (params, state), None, length=3)[0]

    copies = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), (W, opt.init(W)))
    params, state = jax.pmap(train, "devices", donate_argnums=(0, 1))(*copies, divided(BATCH))
    expected, expected_state = W, opt.init(W)
    for _ in range(3):
        grads = jax.grad(lambda w: ja.full_batch(tokens)(w, BATCH))(expected)
        updates, expected_state = opt.update(grads, expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    assert normwise(first(params), expected) < EXACT
    assert normwise(first(state[0].mu), expected_state[0].mu) < EXACT


def test_multi_steps():
    """A window of two calls; each brings the gradient over all devices, with its weight."""
    opt = ja.MultiSteps(optax.sgd(1.0), 2)
    grad = ja.grad(tokens, **OPTIONS | {"microbatch_size": 1})

    def call(params, state, batch):
        weight = lax.psum(jnp.sum(batch["mask"]), "devices")
        updates, state = opt.update(grad(params, batch), state, params, weight=weight)
        return optax.apply_updates(params, updates), state

    run = jax.pmap(call, "devices")
    params, state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), (W, opt.init(W)))
    for rows in (slice(0, 12), slice(12, 24)):
        params, state = run(
            params, state, divided(jax.tree.map(lambda x, rows=rows: x[rows], BATCH))
        )
    expected = jax.tree.map(jnp.subtract, W, whole_batch(tokens)[1])
    assert normwise(first(params), expected) < EXACT


@pytest.mark.usefixtures("mixing_dtypes")
def test_an_nnx_model():
    """A model with BatchNorm over devices and microbatches, as an argument of `pmap` by its
    state."""

    class Net(nnx.Module):
        def __init__(self, axis_name=None):
            rngs = nnx.Rngs(0)
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, axis_name=axis_name, rngs=rngs)
            self.last = nnx.Linear(4, 1, rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.norm(self.first(x))))[:, 0]

    loss = lambda model, x: jnp.mean((model(x) - x[:, 0]) ** 2)
    whole = Net()
    nnx.update(whole, wide(nnx.state(whole)))
    graphdef, state = nnx.split(Net(("devices", "microbatch")))
    state = jax.tree.map(jnp.copy, nnx.state(whole))
    expected = nnx.jit(nnx.value_and_grad(loss))(whole, X)

    def step(state, x):
        model = nnx.merge(graphdef, state)
        value, grads = jaxaccum.nnx.value_and_grad(loss, **OPTIONS | {"microbatch_size": 3})(
            model, x
        )
        return value, nnx.as_pure(grads), nnx.as_pure(nnx.state(model, nnx.BatchStat))

    actual = first(on_devices(step, state, rows=(X,)))
    value, grads = expected
    stats = nnx.as_pure(nnx.state(whole, nnx.BatchStat))
    assert normwise(actual, (value, nnx.as_pure(grads), stats)) < EXACT


def test_parameters_that_each_device_has_of_its_own():
    """Mapped over devices and over models at once: `vmap` inside."""
    models = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), W)
    step = jax.vmap(ja.value_and_grad(tokens, **OPTIONS), in_axes=(0, None))
    actual = first(on_devices(step, models))
    expected = jax.vmap(jax.value_and_grad(lambda w: ja.full_batch(tokens)(w, BATCH)))(models)
    assert normwise(actual, expected) < EXACT


def test_an_axis_that_is_not_there_is_named():
    refused(lambda: ja.value_and_grad(tokens, **OPTIONS)(W, BATCH), "devices")
    refused(lambda: on_devices(ja.grad(tokens, **OPTIONS | {"mesh_axes": "device"}), W), "'device'")
