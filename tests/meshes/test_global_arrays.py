"""What cannot run device by device on an explicit mesh runs on the global arrays, and is exact."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.helpers import EXACT, normwise, refused
from tests.support.meshes import EXPLICIT, ROWS, W, X, on_mesh


def hidden(w, x):
    return jnp.tanh(x @ w["a"] + w["b"][None]) @ w["c"]


def mean(w, x):
    return jnp.mean(jnp.sum(hidden(w, x) ** 2, axis=-1))


def test_a_carried_state_runs_on_global_arrays():
    fun = lambda w, x, s: (mean(w, x), ja.Carry(s + jnp.sum(x, axis=0)))
    step = ja.value_and_grad(fun, has_aux=True, num_microbatches=2, in_axes=(None, 0, ja.CARRY))
    reference = ((mean(W, X), jnp.sum(X, axis=0)), jax.grad(mean)(W, X))
    assert normwise(on_mesh(step, jnp.zeros(3)), reference) < EXACT


def scaled(scale):
    return lambda w, x: jnp.mean(hidden(w, x) ** 2 * scale[None])


def product(**sharding):
    return lambda w, x: jnp.mean(jnp.einsum("bi,ij->bj", x, w["a"], **sharding) ** 2)


def looped(w, x):
    return lax.scan(lambda total, _: (total + mean(w, x), None), 0.0, length=3)[0]


def beside(rows):
    return lambda w, x: mean(w, x) + jnp.mean(hidden(w, rows))


def mapped(w, x):
    over = jax.shard_map(hidden, in_specs=(P(), P("data")), out_specs=P("data"))
    return jnp.mean(over(w, x) ** 2)


SCALE = jnp.arange(2.0)
REFUSED = {
    "closing over arrays of the mesh": (
        scaled(jax.device_put(SCALE, NamedSharding(EXPLICIT, P()))),
        scaled(SCALE),
    ),
    "naming its axes": (product(out_sharding=P("data", None)), product()),
    "closing over rows": (beside(jax.device_put(X, ROWS)), beside(X)),
    "a loop from a constant": (looped, looped),
}


@pytest.mark.parametrize(("fun", "plain"), REFUSED.values(), ids=REFUSED)
def test_what_jax_refuses_device_by_device_runs_on_global_arrays(fun, plain):
    """Some of it JAX would refuse only when it compiles."""
    actual = on_mesh(ja.value_and_grad(fun, num_microbatches=2))
    assert normwise(actual, jax.value_and_grad(plain)(W, X)) < EXACT


def test_a_shard_map_over_the_axes_of_the_batch_runs_on_global_arrays():
    """In the context of a mesh that has further axes, JAX finds out when it compiles."""
    with jax.set_mesh(EXPLICIT):
        actual = on_mesh(ja.value_and_grad(mapped, num_microbatches=2))
    expected = jax.value_and_grad(lambda w, x: jnp.mean(hidden(w, x) ** 2))(W, X)
    assert normwise(actual, expected) < EXACT


@pytest.fixture(params=["off", "remove_frames"])
def frames(request):
    """Whether JAX removes its own frames from the tracebacks of its errors."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", request.param)
    yield
    jax.config.update("jax_traceback_filtering", before)


@pytest.mark.usefixtures("frames")
def test_whose_error_it_is_says_whether_the_global_arrays_are_tried():
    """JAX's own, which does not say why it refuses one device's rows; none that `fun` raises."""
    x, seen = jax.device_put(X, ROWS), []
    scale = jax.device_put(jnp.arange(6.0), NamedSharding(EXPLICIT, P()))
    plain = lambda w, x: jnp.mean(hidden(w, x) ** 2)
    closing = lambda w, x: plain(w | {"b": w["b"] * lax.sin(scale)}, x)
    actual = ja.grad(closing, num_microbatches=2)(W, x)
    expected = jax.grad(lambda w: plain(w | {"b": w["b"] * jnp.sin(jnp.arange(6.0))}, X))(W)
    assert normwise(actual, expected) < EXACT

    def wrong(w, x):
        seen.append(len(x))
        return jnp.mean(jnp.broadcast_to(x, (5, 7)))

    def choosy(w, x):
        seen.append(len(x))
        if len(x) < 16:
            raise ValueError("16 rows at least")
        return plain(w, x)

    with pytest.raises(ValueError, match="broadcast"):
        ja.grad(wrong, num_microbatches=2)(W, x)
    assert seen[-1] == 16
    seen.clear()
    refused(lambda: ja.grad(choosy, num_microbatches=2)(W, x), "16 rows at least")
    assert set(seen) == {4}
