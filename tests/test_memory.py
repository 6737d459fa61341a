"""Memory, read from the compiled program: one tree of gradients, and one microbatch's activations."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import jaxaccum as ja
from jaxaccum._trace import trace

WIDTH, LAYERS, BATCH, N = 1024, 12, 16, 8
FLOAT = jnp.float32
PARAMS = {"w": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), FLOAT), "b": jax.ShapeDtypeStruct((LAYERS, WIDTH), FLOAT)}
ROWS = jax.ShapeDtypeStruct((BATCH, WIDTH), FLOAT)


def loss(params, x):
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"][None]), None), x, params)
    return jnp.mean(h**2)


def weighted(params, x):
    mask = (x[:, 0] > 0).astype(FLOAT)
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"][None]), None), x, params)
    return {"token": ja.Mean(jnp.sum(jnp.mean(h**2, axis=-1) * mask), jnp.sum(mask)), "mean": jnp.mean(h)}


def usual(params, x):
    """The scan that everybody writes: a gradient tree is added to another."""

    def add(total, rows):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, rows)), None

    zeros = (jnp.zeros((), FLOAT), jax.tree.map(jnp.zeros_like, params))
    return jax.tree.map(lambda g: g / N, lax.scan(add, zeros, x.reshape(N, BATCH // N, WIDTH))[0])


def step_memory(value_and_grad):
    """Temporary bytes of an AdamW step over the bytes of the parameters; compiled, not run."""
    optimizer = optax.adamw(1e-3)

    def step(params, state, x):
        value, grads = value_and_grad(params, x)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

    with jax.enable_x64(False):
        state = jax.eval_shape(optimizer.init, PARAMS)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, state, ROWS).compile()
    bytes_of_parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(PARAMS))
    return compiled.memory_analysis().temp_size_in_bytes / bytes_of_parameters


@pytest.mark.parametrize(
    "value_and_grad",
    [
        ja.value_and_grad(loss, num_microbatches=N),
        ja.value_and_grad(loss, microbatch_size=3),
        ja.value_and_grad(weighted, num_microbatches=N),
        jax.value_and_grad(ja.microbatch(loss, num_microbatches=N)),
    ],
    ids=["equal", "ragged", "two terms", "microbatch"],
)
def test_a_step_holds_one_tree_of_gradients(value_and_grad):
    assert step_memory(value_and_grad) <= 1.2


@pytest.mark.parametrize(
    "value_and_grad",
    [usual, ja.value_and_grad(loss, num_microbatches=N, accumulator=ja.accumulators.tree())],
    ids=["usual", "tree"],
)
def test_a_sum_of_trees_holds_two(value_and_grad):
    assert step_memory(value_and_grad) > 2


def test_activations_are_those_of_one_microbatch():
    """A deep, narrow model on a large batch: activations are everything, and fall with the number of microbatches."""
    params, x = jax.ShapeDtypeStruct((64, 32, 32), FLOAT), jax.ShapeDtypeStruct((4096, 32), FLOAT)
    deep = lambda w, x: jnp.mean(lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0] ** 2)
    encode = lambda w, x: ja.Concat(lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0])
    memory = lambda f: jax.jit(f).lower(params, x).compile().memory_analysis().temp_size_in_bytes
    full = memory(jax.value_and_grad(deep))
    assert memory(ja.value_and_grad(deep, num_microbatches=16)) < full / 12
    embedded = lambda w, x: jnp.mean(ja.microbatch(encode, num_microbatches=16)(w, x) ** 2)
    assert memory(jax.value_and_grad(embedded)) < full / 8


def centered(h):
    return h - lax.pmean(jnp.mean(h, axis=0), "microbatch")[None]


@pytest.mark.parametrize("mix", [lambda h: h, centered], ids=["plain", "coupled"])
def test_rows_under_an_outer_vmap_keep_one_microbatchs_activations(mix):
    """There JAX derives both passes from the forward one, and would keep what every microbatch computed."""
    params, x = jax.ShapeDtypeStruct((16, 32, 32), FLOAT), jax.ShapeDtypeStruct((4096, 32), FLOAT)
    deep = lambda w, h: lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), h, w)[0]
    encode = lambda w, x: ja.Concat(deep(w, mix(deep(w, x))))
    halves = jax.vmap(ja.microbatch(encode, num_microbatches=16), (None, 0))
    memory = lambda f: jax.jit(jax.grad(f)).lower(params, x).compile().memory_analysis().temp_size_in_bytes
    ours = memory(lambda w, x: jnp.mean(halves(w, x.reshape(2, -1, 32)) ** 2))
    assert ours < memory(lambda w, x: jnp.mean(ja.full_batch(encode)(w, x) ** 2)) / 8


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (lambda w, x: jnp.mean(x @ w[0]), False),
        (lambda w, x: jnp.mean(jax.jit(lambda w, x: jnp.einsum("bi,lij->bj", x, w))(w, x)), True),
        (lambda w, x: jnp.mean(jax.jit(lambda w, x: x @ w[1])(w, x)), False),
        (lambda w, x: jnp.mean(lax.scan(lambda h, w: (h @ w, None), x, w)[0]), False),
        (lambda w, x: jnp.mean(x @ jnp.sum(w, axis=0) + jnp.sum(w)), False),
    ],
    ids=["a slice", "once", "a slice in jit", "scanned", "twice"],
)
def test_references_are_for_gradients_that_arrive_in_pieces(fun, expected):
    """One that arrives whole is added after the backward pass, in the order of the scan that everybody writes."""
    args = jax.ShapeDtypeStruct((2, 3, 3), FLOAT), jax.ShapeDtypeStruct((4, 3), FLOAT)
    traced, _ = trace(lambda w, x: [fun(w, x)], args, ("microbatch", 1))
    assert traced.read_at_once()[0] is expected
