"""Memory, read from the compiled program: one tree of gradients, and one microbatch's
activations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import lax

import jaxaccum as ja

pytestmark = pytest.mark.optimized

WIDTH, LAYERS, BATCH, N = 1024, 12, 16, 8
FLOAT = jnp.float32
PARAMS = {
    "w": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), FLOAT),
    "b": jax.ShapeDtypeStruct((LAYERS, WIDTH), FLOAT),
}
ROWS = jax.ShapeDtypeStruct((BATCH, WIDTH), FLOAT)


def loss(params, x):
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"][None]), None), x, params)
    return jnp.mean(h**2)


def weighted(params, x):
    mask = (x[:, 0] > 0).astype(FLOAT)
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"][None]), None), x, params)
    return {
        "token": ja.Mean(jnp.sum(jnp.mean(h**2, axis=-1) * mask), jnp.sum(mask)),
        "mean": jnp.mean(h),
    }


def usual(params, x):
    """The scan that everybody writes: a gradient tree is added to another."""

    def add(total, rows):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, rows)), None

    zeros = (jnp.zeros((), FLOAT), jax.tree.map(jnp.zeros_like, params))
    return jax.tree.map(lambda g: g / N, lax.scan(add, zeros, x.reshape(N, BATCH // N, WIDTH))[0])


def step_memory(value_and_grad, like=PARAMS):
    """Temporary bytes of an AdamW step over the bytes of the parameters; compiled, not run."""
    optimizer = optax.adamw(1e-3)

    def step(params, state, x):
        value, grads = value_and_grad(params, x)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

    with jax.enable_x64(False):
        state = jax.eval_shape(optimizer.init, like)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(like, state, ROWS).compile()
    bytes_of_parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
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


def scanned(wrap_layer=lambda f: f, wrap_model=lambda f: f):
    """The same model, with its layer or all of it inside a transformation."""

    def layer(h, own):
        return jnp.tanh(h @ own["w"] + own["b"][None]), None

    def model(params, x):
        return lax.scan(wrap_layer(layer), x, params)[0]

    return lambda params, x: jnp.mean(wrap_model(model)(params, x) ** 2)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        return jnp.tanh(nn.Dense(WIDTH)(h)), None


def flax_scan(wrap=lambda layer: layer):
    scan = nn.scan(
        wrap(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
    )
    return lambda params, x: jnp.mean(scan().apply(params, x, None)[0] ** 2)


FLAX_PARAMS = {"params": {"Dense_0": {"kernel": PARAMS["w"], "bias": PARAMS["b"]}}}


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, h):
        return jnp.tanh(self.inner(h))


def nnx_scan():
    """A scanned nnx model by its state; the graph is made without allocating parameters."""

    def create():
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs):
            return Linear(rngs)

        return nnx.split(stack(nnx.Rngs(0)))

    graph, state = jax.eval_shape(create)

    def loss(state, x):
        forward = nnx.scan(lambda h, layer: layer(h), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return jnp.mean(forward(x, nnx.merge(graph, state)) ** 2)

    return loss, state


FORMS = {
    "layer under checkpoint": lambda: (scanned(jax.checkpoint), PARAMS),
    "layer under jit": lambda: (scanned(jax.jit), PARAMS),
    "model under jit": lambda: (scanned(wrap_model=jax.jit), PARAMS),
    "flax scan": lambda: (flax_scan(), FLAX_PARAMS),
    "flax scan of remat": lambda: (flax_scan(nn.remat), FLAX_PARAMS),
    "nnx scan": nnx_scan,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_common_forms_of_scanned_layers_hold_one_tree_too(form):
    with jax.enable_x64(False):
        loss, params = FORMS[form]()
        assert step_memory(ja.value_and_grad(loss, num_microbatches=N), params) <= 1.2


def test_a_narrow_table_of_embeddings_is_added_to_row_by_row():
    """XLA finds this by itself for float32 tables; not where the gradient is cast before it is
    added."""
    table, ids = (
        jax.ShapeDtypeStruct((65536, 64), jnp.bfloat16),
        jax.ShapeDtypeStruct((BATCH, 8), jnp.int32),
    )
    loss = lambda table, ids: jnp.mean(table[ids].astype(FLOAT) ** 2)
    memory = lambda f: jax.jit(f).lower(table, ids).compile().memory_analysis().temp_size_in_bytes
    sums = {"in place": ja.accumulators.in_place(FLOAT), "tree": ja.accumulators.tree(FLOAT)}
    used = {
        name: memory(ja.grad(loss, num_microbatches=N, accumulator=one))
        for name, one in sums.items()
    }
    assert used["tree"] - used["in place"] > 0.95 * 65536 * 64 * 2


@pytest.mark.parametrize(
    "value_and_grad",
    [usual, ja.value_and_grad(loss, num_microbatches=N, accumulator=ja.accumulators.tree())],
    ids=["usual", "tree"],
)
def test_a_sum_of_trees_holds_two(value_and_grad):
    assert step_memory(value_and_grad) > 2


def test_activations_are_those_of_one_microbatch():
    """A deep, narrow model on a large batch: activations are everything, and fall with the number
    of microbatches."""
    params, x = jax.ShapeDtypeStruct((64, 32, 32), FLOAT), jax.ShapeDtypeStruct((4096, 32), FLOAT)
    deep = lambda w, x: jnp.mean(
        lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0] ** 2
    )
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
    """There JAX derives both passes from the forward one, and would keep what every microbatch
    computed."""
    params, x = jax.ShapeDtypeStruct((16, 32, 32), FLOAT), jax.ShapeDtypeStruct((4096, 32), FLOAT)
    deep = lambda w, h: lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), h, w)[0]
    encode = lambda w, x: ja.Concat(deep(w, mix(deep(w, x))))
    halves = jax.vmap(ja.microbatch(encode, num_microbatches=16), (None, 0))
    memory = lambda f: (
        jax.jit(jax.grad(f)).lower(params, x).compile().memory_analysis().temp_size_in_bytes
    )
    ours = memory(lambda w, x: jnp.mean(halves(w, x.reshape(2, -1, 32)) ** 2))
    assert ours < memory(lambda w, x: jnp.mean(ja.full_batch(encode)(w, x) ** 2)) / 8
