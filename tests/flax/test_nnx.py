"""`jaxaccum.nnx`: a model goes in, its gradients come out, and its state has run through all
microbatches."""

import copy
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxaccum as ja
from tests.support.helpers import EXACT, INEXACT, data, normwise, parts_of, refused, sizes_of

X, Y = data(7, 3), data(7, 2, seed=1)
BATCH = {"x": X, "y": Y}
OPTIONS = [
    {"num_microbatches": 1},
    {"num_microbatches": 3},
    {"microbatch_size": 1},
    {"microbatch_size": 3},
]


class Net(nnx.Module):
    """Parameters, statistics of each microbatch, random keys and a counter."""

    def __init__(self, seed=0):
        rngs, wide = nnx.Rngs(seed), {"param_dtype": jnp.float64}
        self.first = nnx.Linear(3, 4, rngs=rngs, **wide)
        self.norm = ja.nnx.BatchNorm(4, axis_name=None, momentum=0.9, rngs=rngs, **wide)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=seed + 1))
        self.last = nnx.Linear(4, 2, rngs=rngs, **wide)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))


def loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


@functools.cache
def of_nnx(fun):
    """One function for each `fun`, which is compiled once for each size."""
    return nnx.jit(nnx.value_and_grad(fun))


def host_loop(fun, model, batch, sizes):
    """Value and gradient of nnx itself, one microbatch after the other, each weighted by its
    examples."""
    total, sums = 0.0, None
    for rows, size in zip(parts_of(batch, sizes), sizes, strict=True):
        value, grads = of_nnx(fun)(model, rows)
        own = jax.tree.map(lambda g, size=size: g * size / sum(sizes), grads)
        total, sums = (
            total + value * size / sum(sizes),
            own if sums is None else jax.tree.map(jnp.add, sums, own),
        )
    return total, sums


def arrays(model):
    """All variables but the keys, as numbers."""
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey)))
    return jax.tree.map(lambda x: x.astype(jnp.float64), state)


@INEXACT
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("compiled", [True], ids=["jit"])
def test_it_is_the_host_loop_of_nnx_with_all_of_its_state(options, compiled):
    model, twin = Net(), Net()
    step = ja.nnx.value_and_grad(loss, **options, example_streams=False)
    value, grads = (nnx.jit(step) if compiled else step)(model, BATCH)
    expected = host_loop(loss, twin, BATCH, sizes_of(7, **options))
    assert normwise((value, grads), expected) < EXACT
    assert (
        jax.tree.structure(grads)
        == jax.tree.structure(expected[1])
        == jax.tree.structure(nnx.state(model, nnx.Param))
    )
    assert isinstance(grads, nnx.State)
    assert isinstance(grads["first"]["kernel"], nnx.Param)
    assert normwise(arrays(model), arrays(twin)) < EXACT
    assert model.calls.get_value() == len(sizes_of(7, **options))


@INEXACT
def test_state_that_is_dropped_would_show():
    """The host loop on copies, as a loop that forgets the state runs: other masks, other
    statistics."""
    model, twin = Net(), Net()
    step = ja.nnx.value_and_grad(loss, num_microbatches=3, example_streams=False)
    _, grads = step(model, BATCH)
    fresh = lambda model, batch: loss(copy.deepcopy(model), batch)
    _, forgotten = host_loop(fresh, twin, BATCH, [3, 2, 2])
    assert normwise(grads, forgotten) > 1e-2
    assert normwise(arrays(model), arrays(twin)) > 1e-2


def test_a_model_without_state_has_the_gradient_of_the_full_batch():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    expected = nnx.value_and_grad(loss)(model, BATCH)
    for options in OPTIONS:
        assert normwise(ja.nnx.value_and_grad(loss, **options)(model, BATCH), expected) < EXACT
    for options in OPTIONS[3:]:
        assert normwise(ja.nnx.grad(loss, **options)(model, BATCH), expected[1]) < EXACT


@INEXACT
def test_a_step_of_an_optimizer():
    model, twin = Net(), Net()
    optimizers = [
        nnx.Optimizer(m, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param) for m in (model, twin)
    ]
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        step = ja.nnx.grad(loss, num_microbatches=3, example_streams=False)
        update = nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))
        update(optimizers[0], model, step(model, BATCH))
        update(optimizers[1], twin, host_loop(loss, twin, BATCH, [3, 2, 2])[1])
    assert normwise(arrays(model), arrays(twin)) < EXACT
    assert normwise(arrays(model)["first"], arrays(Net())["first"]) > 1e-3


class Coupled(nnx.Module):
    """Statistics of the whole batch, and a mask of dropout from a stream of the model's own."""

    def __init__(self):
        rngs, wide = nnx.Rngs(0), {"param_dtype": jnp.float64}
        self.norm, self.last = (
            ja.nnx.BatchNorm(3, rngs=rngs, **wide),
            nnx.Linear(3, 2, rngs=rngs, **wide),
        )
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(x))))


def across_microbatches(model, batch, count, *, folded=True):
    """Value and gradient by `jax.vmap` over the microbatches, each with its own keys, or all with
    the same."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    own = lambda index: jax.tree.map(
        lambda x: jax.random.fold_in(x, index) if folded and is_key(x) else x, rest
    )
    rows = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

    def mean(params):
        one = lambda index, rows: loss(nnx.merge(graphdef, params, own(index), copy=True), rows)
        return jnp.mean(jax.vmap(one, axis_name="microbatch")(jnp.arange(count), rows))

    return jax.jit(jax.value_and_grad(mean))(params)


@pytest.mark.parametrize("memory", ["min", "store"])
def test_microbatches_of_a_coupled_model_draw_masks_of_their_own(memory):
    model, batch = Coupled(), {"x": data(8, 3), "y": data(8, 2, seed=1)}
    expected = across_microbatches(model, batch, 4)
    repeated = across_microbatches(model, batch, 4, folded=False)
    key = jax.random.key_data(model.dropout.rngs.key.get_value())
    options = {"num_microbatches": 4, "memory": memory, "example_streams": False}
    actual = ja.nnx.value_and_grad(loss, **options)(model, batch)
    assert normwise(actual, expected) < EXACT
    assert normwise(actual, repeated) > 1e-2
    assert model.dropout.rngs.count.get_value() == 1  # the state is updated once
    assert (jax.random.key_data(model.dropout.rngs.key.get_value()) == key).all()


class Drawing(nnx.Module):
    """A coupled model whose draws stand behind a transformation, or whose stream is one of
    several."""

    def __init__(self, how):
        self.norm, self.how = ja.nnx.BatchNorm(3, rngs=nnx.Rngs(0), param_dtype=jnp.float64), how
        self.rngs, self.key = nnx.Rngs(1), nnx.RngKey(jax.random.key(2), tag="own")
        self.several = nnx.RngKey(jax.random.split(jax.random.key(3), 2), tag="several")

    def drawn(self):
        draw = lambda key: jax.random.uniform(key, (), jnp.float64)
        match self.how:
            case "checkpoint":
                return nnx.remat(lambda rngs: draw(rngs()))(self.rngs)
            case "jit":
                return nnx.jit(lambda rngs: draw(rngs()))(self.rngs)
            case "split":
                key, own = jax.random.split(self.key.get_value())
                self.key.set_value(key)
                return draw(own)
            case _:
                return draw(self.several.get_value()[1])


@pytest.mark.parametrize("how", ["checkpoint", "jit", "split", "several"])
def test_wherever_a_coupled_model_draws_each_microbatch_draws_its_own(how):
    def fun(model, x):
        drawn = model.drawn()
        return jnp.mean(model.norm(x) * drawn), ja.Stack(drawn)

    model, options = Drawing(how), {"num_microbatches": 4, "example_streams": False}
    (_, drawn), _ = ja.nnx.value_and_grad(fun, has_aux=True, **options)(model, data(8, 3))
    assert len(set(drawn.tolist())) == 4
    following, _ = jax.random.split(jax.random.key(2))
    expected = following if how == "split" else jax.random.key(2)
    assert (jax.random.key_data(model.key.get_value()) == jax.random.key_data(expected)).all()


class Noisy(Coupled):
    """A coupled model that keeps how often it drew, and what."""

    def __init__(self, *, keeps):
        super().__init__()
        self.keeps, self.count, self.noise = (
            keeps,
            nnx.BatchStat(jnp.int32(0)),
            nnx.BatchStat(jnp.float64(0)),
        )

    def __call__(self, x):
        noise = jax.random.normal(self.dropout.rngs(), (), jnp.float64)
        self.count.set_value(self.count.get_value() + 1)
        if self.keeps:
            self.noise.set_value(noise)
        return self.last(self.norm(x)) + noise


def test_a_number_that_each_microbatch_drew_for_itself_is_no_state_of_the_whole_batch():
    """There is none that all of them drew; what counts the draws is the same for all, and kept."""
    batch = {"x": data(8, 3), "y": data(8, 2, seed=1)}
    step = ja.nnx.value_and_grad(loss, num_microbatches=4, example_streams=False)
    model = Noisy(keeps=False)
    assert normwise(step(model, batch), across_microbatches(Noisy(keeps=False), batch, 4)) < EXACT
    assert (model.count.get_value(), model.dropout.rngs.count.get_value()) == (1, 1)
    says = "differs between microbatches", "Stack, Mean or Last", "random stream"
    refused(lambda: step(Noisy(keeps=True), batch), *says)
    alone, twin = Noisy(keeps=True), Noisy(keeps=True)
    ja.nnx.value_and_grad(loss, num_microbatches=1)(
        alone, batch
    )  # one microbatch is the full batch, draws and all
    loss(twin, batch)
    assert normwise(alone.noise.get_value(), twin.noise.get_value()) < EXACT


def test_one_microbatch_of_a_coupled_model_is_the_full_batch_with_its_masks():
    model, twin, batch = Coupled(), Coupled(), {"x": data(8, 3), "y": data(8, 2, seed=1)}
    expected = of_nnx(loss)(twin, batch)
    assert normwise(ja.nnx.value_and_grad(loss, num_microbatches=1)(model, batch), expected) < EXACT
    assert normwise(arrays(model), arrays(twin)) < EXACT


def test_aux_and_terms_and_tags():
    def fun(model, batch, scale):
        error = (model.last(jnp.tanh(model.first(batch["x"]))) - batch["y"]) ** 2
        return {
            "a": ja.Mean(jnp.sum(error), error.size),
            "b": ja.Sum(scale * jnp.sum(error)),
        }, ja.Concat(error)

    axes, model = (None, 0, None), Net()
    step = ja.nnx.value_and_grad(fun, has_aux=True, in_axes=axes, microbatch_size=3)
    (value, rows), grads = step(model, BATCH, 0.5)
    error = lambda m: (m.last(jnp.tanh(m.first(X))) - Y) ** 2
    expected = nnx.value_and_grad(lambda m: jnp.mean(error(m)) + 0.5 * jnp.sum(error(m)))(model)
    assert normwise((value, grads), expected) < EXACT
    assert normwise(rows, error(model)) < EXACT
    grads, rows = ja.nnx.grad(fun, has_aux=True, in_axes=axes, microbatch_size=3)(model, BATCH, 0.5)
    assert normwise((grads, rows), (expected[1], error(model))) < EXACT


@INEXACT  # a counter of calls counts the microbatches
def test_argnums_and_filters_are_those_of_nnx():
    model = Net()
    model.eval()
    batch = lambda m, x, y: jnp.mean((m(x) - y) ** 2)
    only = nnx.DiffState(0, nnx.PathContains("last"))
    for argnums in (0, 1, (0,), (1, 0), only, (2, only)):
        expected = nnx.value_and_grad(batch, argnums=argnums)(model, X, Y)
        actual = ja.nnx.value_and_grad(batch, argnums, in_axes=(None, 0, 0), microbatch_size=1)(
            model, X, Y
        )
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        assert normwise(actual, expected) < EXACT


def test_two_models_and_one_that_they_share():
    shared = nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    towers = [
        nnx.List([shared, nnx.Linear(4, 2, rngs=nnx.Rngs(k), param_dtype=jnp.float64)])
        for k in (1, 2)
    ]
    run = lambda tower, x: tower[1](jnp.tanh(tower[0](x)))
    fun = lambda a, b, batch: jnp.mean((run(a, batch["x"]) * run(b, batch["x"]) - batch["y"]) ** 2)
    grads = ja.nnx.grad(fun, (0, 1), in_axes=(None, None, 0), microbatch_size=3)(*towers, BATCH)
    expected = nnx.grad(fun, argnums=(0, 1))(*towers, BATCH)
    assert normwise(jax.tree.leaves(grads), jax.tree.leaves(expected)) < EXACT


def test_gradients_have_the_parameters_dtype():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BATCH)
    grads = ja.nnx.grad(loss, microbatch_size=3)(model, batch)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


def test_fun_is_called_once_a_size():
    calls = []
    own = lambda m, b: calls.append(len(b["x"])) or loss(m, b)
    ja.nnx.grad(own, microbatch_size=3, audit=None, example_streams=False)(Net(), BATCH)
    assert calls == [3, 1]
    calls.clear()
    ja.nnx.grad(own, microbatch_size=3, audit=None)(Net(), BATCH)
    assert calls == [6, 3, 2, 1]  # twice the size tells which axis of a draw is the examples'


def test_the_model_is_untouched_where_the_call_is_refused():
    model = Net()
    refused(
        lambda: ja.nnx.grad(loss, num_microbatches=8)(model, BATCH),
        "num_microbatches=8",
        "7 examples",
    )
    assert normwise(arrays(model), arrays(Net())) == 0


class Growing(nnx.Module):
    def __init__(self, how):
        self.w, self.how = nnx.Param(jnp.ones(3)), how

    def __call__(self, x):
        if self.how == "adds":
            self.seen = nnx.Variable(x)
        elif self.how == "assigns":
            self.w[...] = jnp.mean(x, axis=0)
        elif self.how == "sets":
            self.how = "done"
        return x @ self.w[...]


def test_what_cannot_run_through_microbatches_is_refused():
    step = ja.nnx.grad(lambda m, x: jnp.mean(m(x)), num_microbatches=2)
    refused(lambda: step(Growing("adds"), X), "adds", "seen", "before the call")
    refused(lambda: step(Growing("assigns"), X), "assigns", "['w']", "nnx.Param")
    refused(lambda: step(Growing("sets"), X), "attribute", "nnx.Variable")
    model, call = (
        Net(),
        lambda **options: (
            lambda *args, **kw: ja.nnx.grad(loss, num_microbatches=2, **options)(*args, **kw)
        ),
    )
    refused(lambda: call(in_axes=(0, 0))(model, BATCH), "argument 0", "nnx model", "None")
    refused(
        lambda: call(in_axes=(None, ja.CARRY))(model, BATCH), "CARRY", "argument 1", "nnx.Variable"
    )
    refused(lambda: call()(model, BATCH, more=model), "more", "positional")
    refused(lambda: call(has_aux=True)(model, BATCH), "has_aux=True")
    refused(
        lambda: ja.nnx.grad(lambda m, b: (loss(m, b), 0), num_microbatches=2)(model, BATCH),
        "has_aux=True",
    )
    refused(lambda: call(argnums=2)(model, BATCH), "argnums")
    refused(lambda: ja.nnx.grad(loss)(model, BATCH), "num_microbatches")


def test_plain_arguments_may_be_differentiated_without_any_model():
    fun = lambda w, x: jnp.mean((x @ w) ** 2)
    w = data(3, seed=4)
    assert normwise(ja.nnx.grad(fun, num_microbatches=3)(w, X), jax.grad(fun)(w, X)) < EXACT


def test_a_print_does_not_change_how_streams_are_threaded():
    """It reads the batch, and the next keys do not; it prints once per microbatch, as without
    streams."""

    class Model(nnx.Module):
        def __init__(self, rate):
            wide = {"param_dtype": jnp.float64}
            self.norm = ja.nnx.BatchNorm(3, axis_name="microbatch", rngs=nnx.Rngs(0), **wide)
            self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(1)) if rate else (lambda x: x)

        def __call__(self, x):
            return self.dropout(self.norm(x))

    def counted(rate):
        seen = []

        def loss(model, x):
            jax.debug.callback(lambda mean: seen.append(float(mean)), jnp.mean(x))
            return jnp.mean(model(x) ** 2)

        value, _ = ja.nnx.value_and_grad(loss, num_microbatches=2)(
            Model(rate), jnp.ones((4, 3), jnp.float64)
        )
        jax.block_until_ready(value)
        jax.effects_barrier()
        return len(seen)

    assert counted(0.5) == counted(0.0) > 0
