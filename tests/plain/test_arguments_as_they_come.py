"""Arguments as users have them: classes that check their fields, strings beside arrays, padded
keys, complex values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxaccum as ja
import jaxaccum.linen
import jaxaccum.nnx
from jaxaccum.testing import assert_exact
from tests.support.helpers import EXACT, data, normwise, refused

W, X = data(3), data(6, 3, seed=1)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Vector:
    """A pytree that checks what it holds."""

    w: jax.Array

    def __post_init__(self):
        assert self.w.ndim == 1, "w must be a vector"

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_a_class_that_checks_its_fields_is_an_argument_and_an_output():
    loss = lambda p, x: (jnp.mean((x @ p.w) ** 2), ja.Sum(Vector(jnp.sum(x, axis=0))))
    step = ja.value_and_grad(loss, has_aux=True, num_microbatches=3)
    (value, aux), grads = step(Vector(W), X)
    expected = jax.value_and_grad(lambda w: jnp.mean((X @ w) ** 2))(W)
    assert normwise((value, grads.w), expected) < EXACT
    assert normwise(aux.w, X.sum(axis=0)) < EXACT


BATCH = {"x": np.ones((4, 3)), "id": np.array(["a", "b", "c", "d"])}


@pytest.mark.parametrize(
    "call",
    [
        lambda: ja.grad(lambda w, b: jnp.mean((b["x"] @ w) ** 2), num_microbatches=2)(W, BATCH),
        lambda: ja.partition(None, BATCH, num_microbatches=2),
        lambda: ja.pad_batch(BATCH, to=6),
    ],
    ids=["grad", "partition", "pad_batch"],
)
def test_strings_in_a_batch_are_named(call):
    refused(call, "['id']", "<U1", "leave it out of the batch")


def test_keys_are_padded():
    keys = jax.random.split(jax.random.key(0), 3)
    padded, mask = ja.pad_batch(keys, to=5)
    assert padded.shape == (5,)
    assert mask.tolist() == [True] * 3 + [False] * 2
    assert (jax.random.key_data(padded[:3]) == jax.random.key_data(keys)).all()


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "legacy"])
def test_a_wrong_loss_with_example_keys_is_found(key):
    def loss(w, batch, keys):
        x, mask = batch
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (3,)))(keys)
        return jnp.sum((jnp.where(keep, x, 0.0) @ w - 1) ** 2 * mask) / (jnp.sum(mask) + 1)

    batch, axes = (X, jnp.arange(6.0) % 3), (None, 0, ja.EXAMPLE_KEY)
    with pytest.raises(AssertionError, match="microbatch"):
        assert_exact(loss, W, batch, key, in_axes=axes, audit=False)


Z = jax.lax.complex(data(8, 3), data(8, 3, seed=2))


def test_a_complex_running_mean_keeps_its_imaginary_part():
    norm = jaxaccum.linen.BatchNorm(
        use_running_average=False, param_dtype=jnp.float64, axis_name=None
    )
    variables = norm.init(jax.random.key(0), Z)
    _, new = norm.apply(variables, Z, mutable=["batch_stats"])
    assert normwise(new["batch_stats"]["mean"], 0.01 * Z.mean(axis=0)) < EXACT
    real = norm.init(jax.random.key(0), Z.real)
    assert jnp.isrealobj(real["batch_stats"]["mean"])
    refused(
        lambda: norm.apply(real, Z, mutable=["batch_stats"]), "float64", "complex128", "Initialize"
    )


def test_an_nnx_running_mean_is_complex_or_says_so():
    norm = jaxaccum.nnx.BatchNorm(3, param_dtype=jnp.complex128, axis_name=None, rngs=nnx.Rngs(0))
    norm(Z, use_running_average=False)
    assert normwise(norm.mean[...], 0.01 * Z.mean(axis=0)) < EXACT
    real = jaxaccum.nnx.BatchNorm(3, axis_name=None, rngs=nnx.Rngs(0))
    refused(lambda: real(Z, use_running_average=False), "float32", "complex128", "param_dtype")


def test_a_state_without_leaves_is_carried():
    loss = lambda w, x, state: (jnp.mean((x @ w) ** 2), ja.Carry(state))
    step = ja.value_and_grad(loss, has_aux=True, num_microbatches=3, in_axes=(None, 0, ja.CARRY))
    (value, state), _ = step(W, X, {})
    assert state == {}
    assert normwise(value, jnp.mean((X @ W) ** 2)) < EXACT
