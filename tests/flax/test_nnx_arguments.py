"""What models may hold and go through: nnx's own transformations, variables of any kind, no lost
state."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.covering import covering
from tests.support.helpers import EXACT, INEXACT, data, normwise, refused

WIDE = {"param_dtype": jnp.float64}
X = data(8, 3)
OPTIONS = [{"num_microbatches": 1}, {"num_microbatches": 4}, {"microbatch_size": 3}]
MESH = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Auto,))


def linear(seed=0, out=3):
    return nnx.Linear(3, out, rngs=nnx.Rngs(seed), **WIDE)


def same_structure(actual, expected):
    return jax.tree.structure(actual) == jax.tree.structure(expected)


# -- models that go through transformations of nnx ----------


def through_scan(body):
    """Layers with a leading axis, one after the other."""

    def run(model, x):
        scanned = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return model.last(scanned(x, model.layers))

    return run


def through_cond(branch):
    def run(model, x):
        other = lambda first, x: jnp.sin(branch(first, x))
        return model.last(nnx.cond(jnp.sum(x) > 0, branch, other, model.first, x))

    return run


def through_loop(body, *, bounded=True):
    def run(model, x):
        if bounded:
            step = lambda _, carry: (carry[0], body(carry[0], carry[1]))
            return model.last(nnx.fori_loop(0, 2, step, (model.first, x))[1])
        # JAX has no gradient of a while loop: the model goes through it, and the result is a
        # constant.
        step = lambda carry: (carry[0], body(carry[0], carry[1]), carry[2] + 1)
        start = (model.first, jax.lax.stop_gradient(x), 0)
        _, y, _ = nnx.while_loop(lambda carry: carry[2] < 2, step, start)
        return model.last(jax.lax.stop_gradient(y))

    return run


def through_shard_map(model, x):
    specs = {"mesh": MESH, "in_specs": (nnx.StateSharding({...: P()}), P()), "out_specs": P()}
    return model.last(nnx.shard_map(lambda first, x: jnp.tanh(first(x)), **specs)(model.first, x))


THROUGH = {
    "remat": lambda model, x: model.last(
        nnx.remat(lambda first, x: jnp.tanh(first(x)))(model.first, x)
    ),
    "remat of all": nnx.remat(lambda model, x: model.last(jnp.tanh(model.first(x)))),
    "jit": nnx.jit(lambda model, x: model.last(jnp.tanh(model.first(x)))),
    "jit in remat": nnx.remat(nnx.jit(lambda model, x: model.last(jnp.tanh(model.first(x))))),
    "shard_map": through_shard_map,
    "scan": through_scan(lambda x, layer: jnp.tanh(layer(x))),
    "remat in scan": through_scan(nnx.remat(lambda x, layer: jnp.tanh(layer(x)))),
    "vmap": lambda model, x: model.last(
        nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(model.first, x)
    ),
    "cond": through_cond(lambda m, x: m(x)),
    "jit in cond": through_cond(nnx.jit(lambda m, x: m(x))),
    "fori_loop": through_loop(lambda m, x: jnp.tanh(m(x))),
    "jit in fori_loop": through_loop(nnx.jit(lambda m, x: jnp.tanh(m(x)))),
    "jit in while_loop": through_loop(nnx.jit(lambda m, x: jnp.tanh(m(x))), bounded=False),
}


class Model(nnx.Module):
    """Layers by name, layers with a leading axis, and a counter beside them."""

    def __init__(self):
        layer = nnx.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs, **WIDE), in_axes=0, out_axes=0)
        self.first, self.last = linear(), linear(1, out=2)
        self.layers = layer(nnx.Rngs(2).split(2))
        self.calls = nnx.BatchStat(jnp.int32(0))


def loss_through(name):
    def loss(model, x):
        model.calls[...] += 1
        return jnp.mean(THROUGH[name](model, x) ** 2)

    return loss


@INEXACT
@pytest.mark.parametrize(("name", "options"), covering(list(THROUGH), OPTIONS[1:]), ids=str)
def test_a_model_goes_through_transformations_of_nnx(name, options):
    loss, model, twin = loss_through(name), Model(), Model()
    actual = ja.nnx.value_and_grad(loss, **options)(model, X)
    expected = nnx.jit(nnx.value_and_grad(loss))(twin, X)
    assert same_structure(actual, expected)
    assert normwise(actual, expected) < EXACT
    assert int(model.calls.get_value()) == int(twin.calls.get_value()) == 1


@pytest.mark.parametrize(
    "transform", [lambda f: f, nnx.remat, nnx.jit, lambda f: nnx.remat(nnx.jit(f))]
)
def test_a_parameter_that_each_microbatch_assigns_to_is_refused(transform):
    def centered(model, x):
        model.first.bias[...] = jnp.mean(x) * model.first.bias[...]
        return model.last(jnp.tanh(model.first(x)))

    step = ja.nnx.grad(lambda m, x: jnp.mean(transform(centered)(m, x)), num_microbatches=2)
    refused(lambda: step(Model(), X), "assigns a value", "['first']['bias']", "nnx.Param")


# -- what is differentiated ----------


class Scale(nnx.Module):
    """A model without an nnx.Param."""

    def __init__(self):
        self.scale = nnx.Variable(data(3))

    def __call__(self, x):
        return x * self.scale[...][None]


GRAPHDEF, STATE = nnx.split(linear())
ARGUMENTS = {
    "a state": (lambda: STATE, lambda s, x: nnx.merge(GRAPHDEF, s)(x)),
    "a variable": (lambda: nnx.Variable(data(3, 2)), lambda v, x: x @ v[...]),
    "variables": (
        lambda: {"a": nnx.BatchStat(data(3)), "b": nnx.Param(data(3))},
        lambda d, x: x @ (d["a"] * d["b"]),
    ),
    "models": (lambda: [linear(0), linear(1)], lambda ms, x: ms[0](jnp.tanh(ms[1](x)))),
    "one model twice": (lambda: (m := linear(), m), lambda ms, x: ms[0](jnp.tanh(ms[1](x)))),
    "an array beside": (
        lambda: {"m": linear(), "s": data(3)},
        lambda d, x: d["m"](x) * d["s"][None],
    ),
    "a number beside": (lambda: (linear(), 0.5), lambda t, x: t[0](x) * t[1]),
    "a model of models": (lambda: nnx.List([linear(), Scale()]), lambda ms, x: ms[1](ms[0](x))),
    "arrays": (lambda: {"w": data(3, 2)}, lambda d, x: x @ d["w"]),
}


@pytest.mark.parametrize(("name", "options"), covering(list(ARGUMENTS), OPTIONS), ids=str)
def test_gradients_are_those_of_nnx_for_whatever_holds_variables(name, options):
    make, run = ARGUMENTS[name]
    loss = lambda arg, x: jnp.mean(jnp.sin(run(arg, x)))
    actual = ja.nnx.value_and_grad(loss, **options)(make(), X)
    expected = nnx.value_and_grad(loss)(make(), X)
    assert same_structure(actual, expected)
    assert normwise(actual, expected) < EXACT


def test_an_argument_without_anything_to_differentiate_is_refused():
    loss = lambda m, x: jnp.mean(m(x))
    step = lambda argnums=0: ja.nnx.grad(loss, argnums, num_microbatches=2)
    refused(lambda: step()(Scale(), X), "argument 0", "Param", "nnx.DiffState(0, nnx.Variable)")
    refused(lambda: step(nnx.DiffState(0, nnx.BatchStat))(linear(), X), "BatchStat")
    every = nnx.DiffState(0, nnx.Variable)
    assert normwise(step(every)(Scale(), X), nnx.grad(loss, argnums=every)(Scale(), X)) < EXACT


def test_integers_and_keys_have_no_gradient():
    state = nnx.State({"w": nnx.Param(data(3)), "n": nnx.Variable(jnp.int32(1))})
    step = ja.nnx.grad(lambda s, x: jnp.mean(x @ s["w"][...]), num_microbatches=2)
    refused(lambda: step(state, X), "['n']", "int32", error=TypeError)
    refused(lambda: step((linear(), 3), X), "argument 0[1]", "int", error=TypeError)


def test_a_report_comes_last():
    loss = lambda m, x: (jnp.mean(m(x) ** 2), ja.Concat(m(x)))
    options = {
        "num_microbatches": 4,
        "accumulator": ja.accumulators.noise_scale(ja.accumulators.in_place()),
    }
    (value, aux, report), grads = ja.nnx.value_and_grad(loss, has_aux=True, **options)(linear(), X)
    assert jax.tree.structure(report) == jax.tree.structure(
        ja.nnx.value_and_grad(lambda m, x: loss(m, x)[0], **options)(linear(), X)[0][1]
    )
    assert value.shape == ()
    both = ja.nnx.grad(loss, has_aux=True, **options)(linear(), X)
    assert normwise(both, (grads, aux, report)) == 0
    alone = ja.nnx.grad(lambda m, x: loss(m, x)[0], **options)(linear(), X)
    assert normwise(alone, (grads, report)) == 0


# -- models given to the functions of arrays ----------


class Counting(nnx.Module):
    def __init__(self, dtype):
        self.linear, self.count = linear(), nnx.BatchStat(jnp.zeros((), dtype))

    def __call__(self, x):
        self.count[...] += jnp.ones_like(self.count[...])
        return self.linear(x)


def loss_of(model, x):
    return jnp.mean(model(x) ** 2)


LOSING = {
    "value_and_grad": lambda loss: ja.value_and_grad(loss, num_microbatches=2),
    "grad": lambda loss: ja.grad(loss, num_microbatches=2),
    "microbatch": lambda loss: ja.microbatch(loss, num_microbatches=2),
    "full_batch": ja.full_batch,
    "nnx of microbatch": lambda loss: nnx.value_and_grad(ja.microbatch(loss, num_microbatches=2)),
    "jit": lambda loss: jax.jit(ja.value_and_grad(loss, num_microbatches=2)),
}


@pytest.mark.parametrize(("name", "dtype"), covering(list(LOSING), [jnp.float32, jnp.int32]))
def test_an_assignment_that_would_be_lost_is_refused(name, dtype):
    says = "argument 0.count", "jaxaccum.nnx.value_and_grad("
    refused(lambda: LOSING[name](loss_of)(Counting(dtype), X), *says)
    behind = lambda model, x: nnx.remat(loss_of)(model, x)
    refused(lambda: LOSING[name](behind)(Counting(dtype), X), *says)


def normalized(axis_name):
    """A model with a BatchNorm, and its loss."""
    layer = nnx.BatchNorm(3, axis_name=axis_name, **WIDE, rngs=nnx.Rngs(0))
    nnx.update(layer, jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), nnx.state(layer)))
    return nnx.Sequential(layer, linear())


@jax.numpy_dtype_promotion("standard")  # BatchNorm's momentum is a Python float
def test_a_batch_norm_is_told_both_lines_at_once():
    """And both of them are what is needed."""
    bent = lambda model, x: jnp.mean(jnp.tanh(model(x)) ** 2)
    step = ja.value_and_grad(bent, num_microbatches=2)
    both = "jaxaccum.nnx.value_and_grad(", 'BatchNorm axis_name="microbatch"'
    refused(lambda: step(normalized(None), X), *both)
    with pytest.raises(ValueError, match=r"nnx.value_and_grad") as told:
        step(normalized("microbatch"), X)
    assert "BatchNorm" not in str(told.value)
    mended = ja.nnx.value_and_grad(bent, num_microbatches=2)(normalized("microbatch"), X)
    full = nnx.jit(nnx.value_and_grad(bent))(normalized(None), X)
    assert normwise(mended, full) < EXACT
    half = ja.nnx.value_and_grad(bent, num_microbatches=2, audit=None)(normalized(None), X)
    assert normwise(half, full) > 1e3 * EXACT  # the first line alone is not enough


def test_a_variable_that_appears_would_be_lost_too():
    def loss(model, x):
        model.seen = nnx.Variable(x)
        return loss_of(model, x)

    refused(
        lambda: ja.value_and_grad(loss, num_microbatches=2)(linear(), X), "argument 0.seen", "lost"
    )


@pytest.mark.parametrize("behind", [lambda f: f, nnx.remat, nnx.jit])
def test_a_model_that_nothing_is_assigned_to_is_a_pytree_as_for_jax(behind):
    loss = lambda model, x: jnp.mean(behind(lambda m, x: m(x))(model, x) ** 2)
    expected = jax.value_and_grad(loss)(linear(), X)
    assert normwise(ja.value_and_grad(loss, num_microbatches=2)(linear(), X), expected) < EXACT
    rows = ja.microbatch(lambda m, x: ja.Concat(m(x)), num_microbatches=2)(linear(), X)
    assert normwise(rows, linear()(X)) < EXACT


@INEXACT  # what such a variable holds the audit does not know
def test_variables_of_flaxs_own_type_may_be_closed_over():
    """With ``hijax=True`` a variable is a value of JAX's, of a type that no array has."""
    batch = {"x": data(8, 3), "y": data(8, 3, seed=1)}
    with nnx.var_defaults(hijax=True):
        options = {"axis_name": None, "use_running_average": True}
        model = ja.nnx.BatchNorm(3, **options, **WIDE, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.with_vars(params, hijax=False)

    def loss(params, batch):
        own = nnx.merge(graphdef, params, rest)
        return jnp.mean((own(batch["x"]) - batch["y"]) ** 2)

    expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    for options, audit in covering([OPTIONS[0], OPTIONS[2]], [None, "warn"]):
        step = ja.value_and_grad(loss, audit=audit, **options)
        assert normwise(jax.jit(step)(params, batch), expected) < EXACT
