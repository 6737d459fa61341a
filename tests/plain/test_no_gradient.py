"""A derivative of an output that passes none is refused, where somebody asks for it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum.linen import BatchNorm
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, normwise, refused

W, X = {"k": data(3), "t": data(1, seed=1)}, data(5, 3, seed=2)
TAGS = {"Last": ja.Last, "Max": ja.Max, "Min": ja.Min}


def temperature(w, x):
    """Of the parameters alone."""
    return jnp.exp(w["t"])


def largest(w, x):
    """Of the microbatch too."""
    return jnp.max(x @ w["k"])


def smallest(w, x):
    return jnp.min(x @ w["k"])


VALUES = {"temperature": temperature, "extreme": largest}


def outputs(w, x, *, tag=lambda x: x, value=temperature, stop=lambda x: x):
    """A loss, and beside it a value under the tag."""
    return {"loss": ja.Mean(jnp.sum((x @ w["k"]) ** 2), len(x)), "beside": tag(stop(value(w, x)))}


def valued(name, value):
    """The value that the tag is true of."""
    return smallest if (name, value) == ("Min", "extreme") else VALUES[value]


def transformed(name, value, **options):
    own = functools.partial(outputs, tag=TAGS[name], value=valued(name, value), **options)
    return {"microbatch": ja.microbatch(own, num_microbatches=2), "full_batch": ja.full_batch(own)}


def product(f):
    """A loss that reads the value."""
    return lambda w: f(w, X)["loss"] * jnp.sum(f(w, X)["beside"])


def loss(w):
    """The oracle of the loss alone."""
    return jnp.mean((X @ w["k"]) ** 2)


@functools.cache
def of_the_loss():
    return jax.value_and_grad(loss)(W)


WAYS = ["microbatch", "full_batch"]
EVERY = pytest.mark.parametrize("name", TAGS)
BOTH = pytest.mark.parametrize("value", VALUES)
KINDS = pytest.mark.parametrize("kind", WAYS)
REVERSE = {
    "grad": jax.grad,
    "compiled": lambda f: jax.jit(jax.grad(jax.jit(f))),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "mapped": lambda f: lambda w: jax.vmap(jax.grad(f))(jax.tree.map(lambda x: x[None], w)),
    "of a map": lambda f: (
        lambda w: jax.grad(lambda w: jnp.sum(jax.vmap(f)(w)))(jax.tree.map(lambda x: x[None], w))
    ),
    "twice": lambda f: jax.grad(lambda w: jnp.sum(jax.grad(f)(w)["k"])),
    "scanned": lambda f: jax.grad(lambda w: jnp.sum(lax.map(lambda s: s * f(w), jnp.ones(2)))),
}


@KINDS
@BOTH
@EVERY
def test_a_derivative_that_would_be_lost_is_refused(name, value, kind):
    f = product(transformed(name, value)[kind])
    says = ["output['beside']", name, "stop_gradient"]
    if kind == "microbatch":
        says += ["without a tag"] if value == "temperature" else ["Stack(x)", "Mean(x, 1)"]
    refused(lambda: jax.grad(f)(W), *says)


@pytest.mark.parametrize("reverse", REVERSE)
def test_it_is_refused_under_every_transformation(reverse):
    f = product(transformed("Last", "temperature")["microbatch"])
    refused(lambda: REVERSE[reverse](f)(W), "output['beside'].Last")


def test_it_is_refused_of_an_auxiliary_output_that_is_differentiated_from_outside():
    own = transformed("Last", "temperature")["microbatch"]
    with_aux = jax.grad(lambda w: (own(w, X)["loss"], own(w, X)["beside"]), has_aux=True)
    refused(lambda: jax.grad(lambda w: jnp.sum(with_aux(w)[1]))(W), "output['beside'].Last")
    second = jax.grad(lambda w: jnp.sum(with_aux(w)[0]["k"]))(W)
    assert normwise(second, {"k": jnp.sum(2 * X.T @ X / 5, axis=0), "t": jnp.zeros(1)}) < EXACT


@pytest.mark.parametrize("check_vma", [True, False])
@EVERY
def test_devices(name, check_vma):
    own = functools.partial(outputs, tag=TAGS[name], value=valued(name, "extreme"))
    f = ja.microbatch(own, num_microbatches=2, mesh_axes="data")
    both = lambda w, x: (f(w, x)["loss"], f(w, x)["beside"])
    options = {
        "mesh": jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
        "out_specs": P(),
    }
    options |= {"in_specs": (P(), P("data")), "check_vma": check_vma}
    step = jax.shard_map(jax.grad(both, has_aux=True), **options)
    x = data(16, 3, seed=3)
    grad, _ = jax.jit(step)(W, x)
    assert normwise(grad, jax.grad(lambda w: jnp.mean((x @ w["k"]) ** 2))(W)) < EXACT
    asked = jax.shard_map(jax.grad(lambda w, x: both(w, x)[1]), **options)
    refused(lambda: jax.jit(asked)(W, x), f"output['beside'].{name}", "Stack(x)")


def test_the_classic_wrong_answer_is_a_gradient_of_zero():
    """What the refusal stands for: the gradient through the value is not 0."""
    truth = jax.grad(lambda w: loss(w) * jnp.sum(temperature(w, X)))(W)
    assert float(jnp.abs(truth["t"][0])) > 0.1


READS = {
    "auxiliary output": lambda f: jax.value_and_grad(
        lambda w: (f(w, X)["loss"], f(w, X)["beside"]), has_aux=True
    ),
    "compiled auxiliary output": lambda f: jax.jit(
        jax.value_and_grad(jax.jit(lambda w: (f(w, X)["loss"], f(w, X)["beside"])), has_aux=True)
    ),
    "under stop_gradient": lambda f: jax.value_and_grad(
        lambda w: f(w, X)["loss"] + 0 * jnp.sum(lax.stop_gradient(f(w, X)["beside"]))
    ),
    "compared": lambda f: jax.value_and_grad(
        lambda w: jnp.where(jnp.all(f(w, X)["beside"] < jnp.inf), f(w, X)["loss"], 0.0)
    ),
    "written by a scan": lambda f: jax.value_and_grad(
        lambda w: jnp.sum(
            lax.map(lambda s: [s * f(w, X)["loss"], f(w, X)["beside"]], jnp.ones(1))[0]
        )
    ),
    "carried by a scan": lambda f: jax.value_and_grad(
        lambda w: lax.scan(
            lambda carry, _: ((f(w, X)["loss"], f(w, X)["beside"]), None),
            (jnp.zeros(()), jnp.zeros_like(f(w, X)["beside"])),
            length=2,
        )[0][0]
    ),
    "of a branch": lambda f: jax.value_and_grad(
        lambda w: lax.cond(
            w["k"][0] < 9, lambda w: list(f(w, X).values()), lambda w: list(f(w, X).values()), w
        )[list(f(w, X)).index("loss")]
    ),
    "of a checkpoint": lambda f: jax.value_and_grad(
        lambda w: jax.checkpoint(lambda w: f(w, X))(w)["loss"]
    ),
}


@pytest.mark.parametrize(
    ("way", "name", "value"),
    covering(list(itertools.product(READS, WAYS)), list(TAGS), list(VALUES)),
)
def test_what_nobody_differentiates_is_not_refused(way, name, value):
    read, kind = way
    first, grad = READS[read](transformed(name, value)[kind])(W)
    total = first[0] if isinstance(first, tuple) else first
    assert normwise((total, grad), of_the_loss()) < EXACT


@KINDS
@BOTH
@pytest.mark.parametrize(
    "stop", [lax.stop_gradient, jax.jit(lax.stop_gradient)], ids=["plain", "compiled"]
)
def test_a_value_that_the_loss_itself_stops_is_a_constant(stop, value, kind):
    """The gradient through it is 0, and that is right."""
    f = product(transformed("Last", value, stop=stop)[kind])
    rows = X if kind == "full_batch" else X[3:]  # the last microbatch's
    held = jnp.sum(VALUES[value](W, rows))
    assert normwise(jax.grad(f)(W), jax.grad(lambda w: loss(w) * held)(W)) < EXACT


@BOTH
@EVERY
def test_forward_mode_goes_on(name, value):
    """Its tangents of such outputs are 0; that of the loss is right."""
    f = transformed(name, value)["microbatch"]
    _, tangents = jax.jit(lambda w: jax.jvp(lambda w: f(w, X), (w,), (w,)))(W)
    assert normwise(tangents["loss"], jax.jvp(loss, (W,), (W,))[1]) < EXACT
    assert not jnp.any(tangents["beside"])
    hessian = jax.hessian(lambda k: f(W | {"k": k}, X)["loss"])(W["k"])
    assert normwise(hessian, 2 * X.T @ X / 5) < EXACT


def test_auxiliary_outputs_of_value_and_grad():
    """Their derivative is asked for from outside; an untagged one has it."""
    fun = lambda w, x: (jnp.mean(x @ w["k"]), {"last": ja.Last(w["t"]), "own": w["t"] ** 2})
    step = ja.value_and_grad(fun, has_aux=True, num_microbatches=2)
    aux = lambda name: lambda w: jnp.sum(step(w, X)[0][1][name])
    refused(lambda: jax.grad(aux("last"))(W), "aux['last'].Last", "without a tag")
    assert normwise(jax.grad(aux("own"))(W), {"k": jnp.zeros(3), "t": 2 * W["t"]}) < EXACT


# -- carried state -----------------------------------------------------------------------------


def counted(w, x, state):
    """A state that moves with the parameters, and that the loss does not read."""
    new = 0.9 * state + 0.1 * jnp.mean(x @ w["k"])
    return {"loss": ja.Mean(jnp.sum((x @ w["k"]) ** 2), len(x)), "state": ja.Carry(new)}


def test_a_derivative_of_a_carried_state_is_refused():
    f = ja.microbatch(counted, num_microbatches=2, in_axes=(None, 0, ja.CARRY))
    refused(
        lambda: jax.grad(lambda w: f(w, X, jnp.zeros(()))["state"])(W),
        "output['state'].Carry",
        "Stack(x)",
    )


def normalized(w, batch, state):
    """A coupled loss: BatchNorm, whose statistics are updated once."""
    layer = BatchNorm(use_running_average=False, param_dtype=jnp.float64, axis_name="microbatch")
    variables = {"params": {"scale": w["k"], "bias": jnp.zeros(3)}, "batch_stats": state}
    y, new = layer.apply(variables, batch * w["k"][None], mutable="batch_stats")
    return {
        "loss": ja.Mean(jnp.sum(jnp.sin(y) ** 2), len(batch)),
        "state": ja.Carry(new["batch_stats"]),
    }


@pytest.mark.parametrize("coupled", [False, True])
def test_training_steps_that_carry_a_state_are_differentiated(coupled):
    """Three steps under scan: the state moves with parameters of earlier steps; no loss reads
    it."""
    state = {"mean": jnp.zeros(3), "var": jnp.ones(3)} if coupled else jnp.zeros(())
    x = jnp.concatenate([X, X[:1]])

    def trained(f):
        def step(carried, _):
            w, state = carried
            own = lambda w: (lambda out: (out["loss"], out["state"]))(f(w, x, state))
            (value, state), grads = jax.value_and_grad(own, has_aux=True)(w)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, w, grads), state), value

        def final(w):
            (w, _), values = lax.scan(step, (w, state), None, length=3)
            return jnp.sum(values) + jnp.sum(w["k"] ** 3)

        return jax.jit(jax.value_and_grad(final))(W)

    fun, axes = (normalized if coupled else counted), (None, 0, ja.CARRY)
    ours = ja.microbatch(fun, num_microbatches=3, in_axes=axes)
    assert normwise(trained(ours), trained(ja.full_batch(fun, in_axes=axes))) < EXACT
