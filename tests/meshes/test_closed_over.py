"""Inside of `shard_map`, a loss of parameters that the jitted function around it holds.

Their types speak of the mesh outside, where its axes are automatic. `jnp.zeros_like` does not take
such an array, and `jax.value_and_grad` does.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.helpers import EXACT, data, normwise

MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
ON_MESH = lambda x, *spec: jax.device_put(x, NamedSharding(MESH, P(*spec)))
W, X = ON_MESH(data(3, 3)), ON_MESH(data(8, 3, seed=1), "data")


def loss(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def coupled(w, x, mean=lambda x: lax.pmean(x, ("microbatch", "data"))):
    h = x @ w
    return jnp.mean(jnp.tanh(h - mean(jnp.mean(h, 0, keepdims=True))) ** 2)


def at_each_device(step, *, check_vma):
    """The value and gradient of the devices' shards, of parameters that are closed over."""

    def update(w, x):
        own = lambda x: jax.tree.map(lambda leaf: lax.pmean(leaf, "data"), step(w, x))
        specs = {"in_specs": P("data"), "out_specs": P()}
        return jax.shard_map(own, mesh=MESH, **specs, check_vma=check_vma)(x)

    return jax.jit(update)(W, X)


def accumulated(accumulator=None, count=2):
    return ja.value_and_grad(loss, num_microbatches=count, accumulator=accumulator)


STEPS = {
    "one microbatch": accumulated(count=1),
    "in place": accumulated(),
    "tree": accumulated(ja.accumulators.tree()),
    "compensated": accumulated(ja.accumulators.compensated()),
    "microbatch": jax.value_and_grad(ja.microbatch(loss, num_microbatches=2)),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_the_gradient_is_jaxs_in_the_same_place(name, check_vma):
    ours = at_each_device(STEPS[name], check_vma=check_vma)
    assert normwise(ours, at_each_device(jax.value_and_grad(loss), check_vma=check_vma)) < EXACT
    if not check_vma:  # with it, JAX has summed the gradient over devices, and the mean is the sum
        assert normwise(ours, jax.jit(jax.value_and_grad(loss))(W, X)) < EXACT
    first = at_each_device(lambda w, x: jax.value_and_grad(loss)(w, x[:2]), check_vma=check_vma)
    assert normwise(ours, first) > 0.01


@pytest.mark.parametrize("memory", [None, "store"])
def test_a_coupled_loss(memory):
    step = ja.value_and_grad(coupled, num_microbatches=2, mesh_axes="data", memory=memory)
    whole = jax.jit(jax.value_and_grad(lambda w, x: coupled(w, x, mean=lambda x: x)))(W, X)
    for check_vma in (True, False):
        assert normwise(at_each_device(step, check_vma=check_vma), whole) < EXACT
    apart = at_each_device(
        lambda w, x: jax.value_and_grad(coupled)(w, x, lambda x: x), check_vma=False
    )
    assert normwise(apart, whole) > 0.01
