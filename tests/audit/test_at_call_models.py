"""The audit at the call, of the models of training code."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxaccum
import jaxaccum.linen
import jaxaccum.nnx
from jaxaccum import CARRY, Carry, InexactWarning, Mean
from tests.audit.test_at_call import (
    BATCH,
    W,
    X,
    line,
    root_mean_square,
    token_mean,
    token_mean_mended,
)
from tests.support import jitted
from tests.support.helpers import EXACT, data, normwise

IMAGES = data(8, 4, seed=3, dtype=jnp.float32)


class Linen(nn.Module):
    """A network with a BatchNorm, of the microbatch's statistics or of all of them."""

    norm: type
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        x = self.norm(use_running_average=False, **dict(self.options))(x)  # linen's norm
        return nn.Dense(1)(x)


def linen_step(model):
    variables = model.init(jax.random.key(0), IMAGES)
    params, state = variables["params"], {"batch_stats": variables["batch_stats"]}

    def loss(params, state, x):
        y, state = model.apply({"params": params, **state}, x, mutable=["batch_stats"])
        return jnp.mean(y**2), Carry(state)

    options = {"has_aux": True, "num_microbatches": 4, "in_axes": (None, CARRY, 0)}
    return lambda audit: jaxaccum.grad(loss, audit=audit, **options)(params, state, IMAGES)


class Nnx(nnx.Module):
    """The same of nnx, with dropout."""

    def __init__(self, norm, **options):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.norm, self.dropout = norm(4, rngs=rngs, **options), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.first(x))  # nnx's norm
        return self.last(self.dropout(x))


def nnx_step(norm, **options):
    loss = lambda model, x: jnp.mean(model(x) ** 2)
    return lambda audit: jaxaccum.nnx.grad(loss, num_microbatches=4, audit=audit)(
        Nnx(norm, **options), IMAGES
    )


MODELS = {
    # the model: (as it is, mended, its line, what the warning says to write)
    "linen": (
        linen_step(Linen(nn.BatchNorm)),
        linen_step(Linen(jaxaccum.linen.BatchNorm)),
        "# linen's norm",
        'axis_name="microbatch"',
    ),
    "nnx": (
        nnx_step(nnx.BatchNorm),
        nnx_step(jaxaccum.nnx.BatchNorm),
        "# nnx's norm",
        'axis_name="microbatch"',
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_batch_norm_is_warned_of_until_it_spans_the_microbatches(name):
    step, mended, mark, write = MODELS[name]
    with pytest.warns(InexactWarning) as caught:
        step("warn")
    said = [str(one.message) for one in caught if issubclass(one.category, InexactWarning)]
    assert f":{line(mark, __file__)} in " in said[0]
    assert write in said[0]
    mended("raise")


def test_inside_pmap_and_shard_map():
    """The batch of one device is what the audit sees; what the devices are to sum is declared by
    `mesh_axes`."""
    mesh = jax.make_mesh(
        (2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    own = lambda f, **options: jaxaccum.grad(f, num_microbatches=2, mesh_axes="devices", **options)
    spec = {"mesh": mesh, "in_specs": (P(), P("devices")), "out_specs": P()}
    over = {
        "shard_map": lambda f, **options: jax.jit(jax.shard_map(own(f, **options), **spec)),
        "pmap": lambda f, **options: (
            lambda w, b: jax.pmap(own(f, **options), "devices", in_axes=(None, 0))(
                w, jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), b)
            )[0]
        ),
    }
    expected = jitted.grad(token_mean)(W, BATCH)
    for run in over.values():
        with pytest.warns(InexactWarning, match="token_mean is not exact"):
            run(token_mean)(W, BATCH)
        assert normwise(run(token_mean_mended, audit="raise")(W, BATCH), expected) <= EXACT


def test_a_statistic_of_one_device_is_warned_of_even_without_microbatches():
    """Two devices with one microbatch each are two parts of the batch."""
    mesh = jax.make_mesh(
        (2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    spec = {"mesh": mesh, "in_specs": (P(), P("devices")), "out_specs": P()}
    grad = jaxaccum.grad(root_mean_square, num_microbatches=1, mesh_axes="devices")
    with pytest.warns(InexactWarning, match="root_mean_square is not exact"):
        jax.jit(jax.shard_map(grad, **spec))(W, BATCH)


def test_one_microbatch_on_each_device_of_a_loss_that_spans_the_devices_is_the_whole_batch():
    mesh = jax.make_mesh(
        (2,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )

    def centred(w, x):
        y = x @ w
        return jnp.mean((y - jax.lax.pmean(jnp.mean(y), "devices")) ** 2)

    def grad(count, audit):
        own = jaxaccum.grad(centred, num_microbatches=count, mesh_axes="devices", audit=audit)
        spread = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P())
        return jax.jit(spread)

    expected = jitted.grad(lambda w: jnp.var(X @ w))(W)
    assert normwise(grad(1, "raise")(W, X), expected) <= EXACT
    with pytest.warns(InexactWarning, match="centred is not exact"):
        assert normwise(grad(2, "warn")(W, X), expected) > EXACT


def test_other_outputs_that_are_inexact_are_named():
    """One warning speaks of one cause; the others are not left to be found one by one."""
    aux = lambda x: {
        "largest": jnp.max(x),
        "count": Mean(jnp.sum(x), len(x)),
        "deviation": jnp.std(x),
    }
    loss = lambda w, x: (jnp.mean((x @ w) ** 2), aux(x))
    with pytest.warns(InexactWarning) as caught:
        jaxaccum.grad(loss, num_microbatches=2, has_aux=True)(W, X)
    first = str(caught[0].message).splitlines()[0]
    assert "aux['deviation']" in first
    assert "aux['largest']" in first
    assert "aux['count']" not in first


def test_what_key_draws_is_no_remedy_for_a_place():
    def loss(w, x, key):
        times = (jax.random.uniform(key, ()) + jnp.arange(float(len(x)))) / len(x)
        return jnp.mean((x @ w) * times)

    for role, said in ((jaxaccum.KEY, True), (None, False)):
        with pytest.warns(InexactWarning) as caught:
            jaxaccum.grad(loss, num_microbatches=2, in_axes=(None, 0, role))(
                W, X, jax.random.key(0)
            )
        assert ("BATCH_KEY" in str(caught[0].message)) is said
