"""Inside `shard_map`, over further axes than the batch's: the loss is counted once, not per device.

Texts whose tokens are divided over "seq", features over "model", a key or a state of each device:
some arguments vary over an axis, and the loss, which sums over it, does not. Its gradient was
multiplied by the length of the axis, in silence.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum.testing.bounds import normwise
from tests.support.helpers import EXACT, data, refused

TEXTS, LABELS = data(8, 4, 3, seed=1), data(8, seed=2)
W = data(3, seed=3)
RUNS = [{"num_microbatches": 1}, {"num_microbatches": 2}, {"microbatch_size": 3}]


def mesh_of(**lengths):
    kinds = (AxisType.Auto,) * len(lengths)
    return jax.make_mesh(tuple(lengths.values()), tuple(lengths), axis_types=kinds)


def on(mesh, fun, in_specs, out_specs, *args):
    mapped = jax.shard_map(fun, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return jax.jit(mapped)(*args)


def pooled(w, batch, *, total):
    """The loss of texts, of which a device sees some tokens; `total` sums over devices."""
    tokens, labels = batch
    mean = total(jnp.sum(jnp.tanh(tokens @ w), axis=1)) / 4
    return jnp.mean((mean - labels) ** 2)


OF_TOKENS = functools.partial(pooled, total=lambda x: lax.psum(x, "seq"))
WHOLE = functools.partial(pooled, total=lambda x: x)


@pytest.mark.parametrize("options", RUNS)
def test_tokens_divided_over_devices(options):
    value, grads = jax.value_and_grad(WHOLE)(W, (TEXTS, LABELS))
    specs = (P(), (P(None, "seq"), P()))
    own = jaxaccum.value_and_grad(OF_TOKENS, audit="raise", **options)
    found, ours = on(mesh_of(seq=2), own, specs, (P(), P()), W, (TEXTS, LABELS))
    spread = jax.grad(jaxaccum.microbatch(OF_TOKENS, **options))
    through = on(mesh_of(seq=2), spread, specs, P(), W, (TEXTS, LABELS))
    assert abs(found - value) <= EXACT * abs(value)
    assert normwise(ours, grads) <= EXACT
    assert normwise(through, grads) <= EXACT
    assert normwise(2 * grads, grads) > EXACT  # what was given


@pytest.mark.parametrize("options", RUNS[:2])
def test_a_shared_loss_beside_an_output_of_each_device(options):
    def both(w, batch):
        return OF_TOKENS(w, batch), jnp.mean(batch[0] @ w)

    spread = jaxaccum.microbatch(both, **options)
    own = jax.grad(lambda w, batch: spread(w, batch)[0])
    ours = on(mesh_of(seq=2), own, (P(), (P(None, "seq"), P())), P(), W, (TEXTS, LABELS))
    assert normwise(ours, jax.grad(WHOLE)(W, (TEXTS, LABELS))) <= EXACT


def test_a_leaf_that_nothing_reads_changes_nothing():
    loss = lambda w, b: jnp.mean((b["x"] @ w) ** 2)
    batch = {"x": data(8, 3, seed=4), "unread": jnp.ones((8, 4))}
    specs = (P(), {"x": P(), "unread": P(None, "model")})
    own = jaxaccum.grad(loss, num_microbatches=2)
    ours = on(mesh_of(model=2), own, specs, P(), W, batch)
    assert normwise(ours, jax.grad(loss)(W, batch)) <= EXACT


def divided(params, batch, *, total):
    """A dense layer whose features are divided, and a factor that all devices share."""
    x, y = batch
    return jnp.mean((params["c"] * total(x @ params["w"]) - y) ** 2)


@pytest.mark.parametrize("options", RUNS[:2])
def test_features_divided_beside_a_batch_that_is_divided_too(options):
    """The batch over "data", summed by `mesh_axes`; features and their weights over "model"."""
    params = {"w": data(4, seed=5), "c": jnp.asarray(0.5)}
    batch = (data(16, 4, seed=6), data(16, seed=7))
    own = {"w": P("model"), "c": P()}
    specs = (own, (P("data", "model"), P("data")))
    loss = functools.partial(divided, total=lambda x: lax.psum(x, "model"))
    grad = jaxaccum.value_and_grad(loss, mesh_axes="data", **options)
    value, grads = on(mesh_of(data=4, model=2), grad, specs, (P(), own), params, batch)
    expected, exact = jax.value_and_grad(functools.partial(divided, total=lambda x: x))(
        params, batch
    )
    assert abs(value - expected) <= EXACT * abs(expected)
    for name in params:
        assert normwise(grads[name], exact[name]) <= EXACT


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_key_of_each_device(num_microbatches):
    """Dropout of the features that a device holds: what JAX alone gives for the whole batch."""
    params = {"w": data(4, seed=5), "c": jnp.asarray(0.5)}
    batch, key = (data(8, 4, seed=6), data(8, seed=7)), jax.random.key(0)
    own = {"w": P("model"), "c": P()}

    def loss(params, batch, key):
        x, y = batch
        mine = lax.dynamic_slice_in_dim(x, lax.axis_index("model") * 2, 2, 1)
        kept = jnp.where(jax.random.bernoulli(key, 0.5, mine.shape), mine, 0.0)
        return jnp.mean((params["c"] * lax.psum(kept @ params["w"], "model") - y) ** 2)

    def with_keys(grad):
        return lambda params, batch, key: grad(
            params, batch, jax.random.fold_in(key, lax.axis_index("model"))
        )

    options = {"num_microbatches": num_microbatches, "in_axes": (None, 0, jaxaccum.BATCH_KEY)}
    run = lambda grad: on(
        mesh_of(model=2), with_keys(grad), (own, (P(), P()), P()), own, params, batch, key
    )
    ours, exact = run(jaxaccum.grad(loss, **options)), run(jax.grad(loss))
    for name in params:
        assert normwise(ours[name], exact[name]) <= EXACT


def test_a_loss_that_differs_between_devices_is_one_for_each():
    """As in JAX, the gradient of a shared parameter is then that of their sum: nothing changed."""
    loss = lambda w, batch: jnp.mean((batch @ w) ** 2)
    batch = data(8, 3, seed=8)
    halves = [jax.grad(loss)(W, half) for half in (batch[:4], batch[4:])]
    for n in (1, 2):
        own = jaxaccum.grad(loss, num_microbatches=n)
        ours = on(mesh_of(seq=2), own, (P(), P("seq")), P(), W, batch)
        assert normwise(ours, halves[0] + halves[1]) <= EXACT


@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("mapped", ["shard_map", "pmap", "typed"])
def test_a_gathered_parameter_of_no_type_is_told(mapped, num_microbatches):
    """Where JAX tracks no types, parts of a parameter look like a whole one."""
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ lax.all_gather(w, "data", tiled=True)) ** 2)
    step = jaxaccum.grad(loss, num_microbatches=num_microbatches, mesh_axes="data")
    w, x = data(4, 3, seed=4), data(8, 4, seed=5)
    expected = jax.grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(w)

    def run():
        if mapped == "pmap":
            parts = w.reshape(2, 2, 3), x.reshape(2, 4, 4)
            return jax.pmap(step, axis_name="data")(*parts).reshape(4, 3)
        spread = jax.shard_map(
            step, mesh=mesh_of(data=2), in_specs=P("data"), out_specs=P("data"),
            check_vma=mapped == "typed",
        )  # fmt: skip
        return jax.jit(spread)(w, x)

    if mapped == "typed":
        assert normwise(run(), expected) <= EXACT
        return
    said = "(?s)may not be exact.*a parameter is gathered where JAX.*fix: pass check_vma=True"
    with pytest.warns(jaxaccum.InexactWarning, match=said):
        found = run()
    assert normwise(found, expected) > EXACT


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_what_devices_gather_of_their_rows_is_not_told(num_microbatches):
    axes = ("data", "microbatch") if num_microbatches > 1 else "data"

    def loss(w, x):
        z = jnp.tanh(x @ w)
        others = lax.all_gather(z, axes, tiled=True)
        return jnp.mean(jnp.sum(z @ others.T, axis=1) ** 2)

    w, x = data(4, 3, seed=4), data(8, 4, seed=5)
    options = {"num_microbatches": num_microbatches, "mesh_axes": "data", "audit": "raise"}
    step = jaxaccum.grad(loss, **options)
    spread = jax.shard_map(
        step, mesh=mesh_of(data=2), in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    whole = lambda w: jnp.mean(jnp.sum(jnp.tanh(x @ w) @ jnp.tanh(x @ w).T, axis=1) ** 2)
    assert normwise(jax.jit(spread)(w, x), jax.grad(whole)(w)) <= EXACT


def test_a_place_in_the_loop_is_refused_where_types_are_tracked():
    """JAX's own error has no words."""
    loss = lambda w, x: jaxaccum.Sum(
        jnp.sum((x @ w) ** 2) * (1.0 + lax.axis_index("microbatch").astype(x.dtype))
    )
    step = jaxaccum.grad(loss, num_microbatches=2, mesh_axes="data", audit=None)
    spread = lambda **options: jax.shard_map(
        step, mesh=mesh_of(data=2), in_specs=(P(), P("data")), out_specs=P(), **options
    )
    x = data(8, 3, seed=4)
    refused(
        lambda: spread()(W, x), "lax.axis_index('microbatch')", "jaxaccum.KEY", "check_vma=False",
        error=NotImplementedError,
    )  # fmt: skip
    weights = jnp.asarray([1.0, 1, 2, 2, 1, 1, 2, 2])
    expected = jax.grad(lambda w: jnp.sum((x @ w) ** 2 * weights))(W)
    assert normwise(spread(check_vma=False)(W, x), expected) <= EXACT
