"""Derivative rules that close over the batch, or over what the loss computes: JAX runs them where
it derives the loss itself, and so does jaxaccum.

The oracle is plain JAX on the whole batch. Such a rule that is run with another microbatch's values
has a gradient of the right shape, so the negative control is the loop that always reads the first.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum import accumulators
from jaxaccum._jaxpr import compat
from tests.support import jitted
from tests.support.helpers import EXACT, UNDECIDED, data, normwise

W, BATCH = data(3), {"x": data(6, 3, seed=1), "y": data(6, seed=2)}


def by_vjp(weights):
    sine = jax.custom_vjp(jnp.sin)
    sine.defvjp(lambda z: (jnp.sin(z), jnp.cos(z)), lambda cos, g: (g * cos * weights,))
    return sine


def by_jvp(weights):
    sine = jax.custom_jvp(jnp.sin)
    sine.defjvp(lambda p, t: (jnp.sin(*p), jnp.cos(*p) * t[0] * weights))
    return sine


def by_jvps(weights):
    sine = jax.custom_jvp(jnp.sin)
    sine.defjvps(lambda t, _, z: jnp.cos(z) * t * weights)
    return sine


def by_gradient(weights):
    return jax.custom_gradient(lambda z: (jnp.sin(z), lambda g: g * jnp.cos(z) * weights))


def in_function(weights):
    """The function closes over the weights, too."""
    scaled = jax.custom_vjp(lambda z: z * weights)
    scaled.defvjp(lambda z: (z * weights, None), lambda _, g: (g * weights,))
    return scaled


def in_loop(weights):
    """Both steps of a loop have the rule."""
    sine = by_jvp(weights)
    return lambda z: lax.fori_loop(0, 2, lambda _, z: sine(z), z)


def in_checkpoint(weights):
    return jax.checkpoint(by_vjp(weights))


RULES = [by_vjp, by_jvp, by_jvps, by_gradient, in_function, in_loop, in_checkpoint]


def loss_of(rule, weights=lambda b: b["y"]):
    """A loss whose backward pass is multiplied by weights of the batch."""
    return lambda w, b: jnp.mean((rule(weights(b))(b["x"] @ w) - b["y"]) ** 2)


def computed(b):
    return jnp.tanh(b["x"][:, 0]) + b["y"]


def on_devices(loss):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = ja.grad(loss, microbatch_size=1, mesh_axes="data")
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))


GRADIENTS = {
    "eager": lambda loss: ja.grad(loss, num_microbatches=3),
    "jit": lambda loss: jax.jit(ja.grad(loss, num_microbatches=3)),
    "two sizes": lambda loss: jax.jit(ja.grad(loss, microbatch_size=4)),
    "one microbatch": lambda loss: jax.jit(ja.grad(loss, num_microbatches=1)),
    "microbatch": lambda loss: jax.grad(jax.jit(ja.microbatch(loss, num_microbatches=3))),
    "compensated": lambda loss: jax.jit(
        ja.grad(loss, num_microbatches=3, accumulator=accumulators.compensated())
    ),
    "devices": on_devices,
}


EVERY_RULE = [("jit", rule) for rule in RULES]
EVERY_GRADIENT = [(name, rule) for name in GRADIENTS for rule in (by_vjp, by_jvps)]


@pytest.mark.parametrize(("name", "rule"), dict.fromkeys(EVERY_RULE + EVERY_GRADIENT))
def test_a_rule_reads_its_own_microbatch(name, rule):
    loss = loss_of(rule, computed)
    step = GRADIENTS[name](loss)
    for batch in (BATCH, BATCH | {"y": BATCH["y"] + 1}):
        assert normwise(step(W, batch), jitted.grad(loss)(W, batch)) < EXACT


@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_of_a_rule_that_reads_the_first_microbatch_differs(rule):
    first = jnp.tile(computed(BATCH)[:2], 3)
    stale = jitted.grad(loss_of(rule, lambda _: first))(W, BATCH)
    assert normwise(stale, jitted.grad(loss_of(rule, computed))(W, BATCH)) > 1e6 * EXACT


def of_each_example(w, b):
    """The rule closes over what ``jax.vmap`` maps."""
    return jnp.mean(jax.vmap(lambda x, y: by_jvp(y)(x @ w))(b["x"], b["y"]))


@UNDECIDED
@pytest.mark.parametrize("name", ["jit", "microbatch"])
def test_a_rule_reads_what_an_inner_vmap_maps(name):
    expected = jitted.grad(of_each_example)(W, BATCH)
    assert normwise(GRADIENTS[name](of_each_example)(W, BATCH), expected) < EXACT


def test_the_loss_is_called_again_under_its_axis():
    """Its size is a number of Python, and no equation."""
    sizes = []

    def loss(w, b):
        sizes.append(lax.psum(1, "microbatch"))
        return loss_of(by_vjp)(w, b)

    ja.grad(loss, num_microbatches=3, audit=None)(W, BATCH)
    assert set(sizes) == {3}
    assert len(sizes) > 1


@pytest.mark.parametrize("derivative", [jax.jacfwd, jax.jacrev])
def test_a_gradient_with_such_a_rule_is_derived_again(derivative):
    loss = loss_of(by_jvp)
    actual = derivative(ja.grad(loss, num_microbatches=3))(W, BATCH)
    assert normwise(actual, jax.jit(derivative(jax.grad(loss)))(W, BATCH)) < EXACT


def test_what_is_returned_with_the_loss_stays():
    """With a key for each example, a mean of its own denominator, rows, and a skipped microbatch of
    padding."""

    def loss(w, b, key, n):
        keep = jax.vmap(jax.random.bernoulli)(key).astype(b["y"].dtype)
        errors = (by_vjp(b["y"] * keep)(b["x"] @ w) - b["y"]) ** 2
        terms = ja.Mean(jnp.sum(errors * b["mask"]), jnp.sum(b["mask"]))
        return terms, {"errors": ja.Concat(errors), "n": n}

    mask = jnp.asarray([1.0, 1, 0, 1, 0, 0, 0, 0])
    b = {"x": data(8, 3, seed=1), "y": data(8, seed=2), "mask": mask}
    key, axes = jax.random.key(0), (None, 0, ja.EXAMPLE_KEY, None)
    options = {"has_aux": True, "in_axes": axes, "num_examples_argnum": 3}
    step = jax.jit(ja.value_and_grad(loss, num_microbatches=4, **options))
    whole = jitted.value_and_grad(ja.full_batch(loss, in_axes=axes), has_aux=True)
    (value, aux), grads = step(W, b, key, jnp.int32(4))
    (expected, expected_aux), expected_grads = whole(W, b, key, jnp.int32(4))
    assert normwise((value, grads), (expected, expected_grads)) < EXACT
    assert normwise(aux["errors"][:4], expected_aux["errors"][:4]) < EXACT
    assert aux["n"] == 4
    _, unmasked = whole(W, b | {"mask": jnp.ones(8)}, key, jnp.int32(4))
    assert normwise(grads, unmasked) > 1e6 * EXACT


@pytest.mark.parametrize("rule", [by_vjp, by_jvp])
def test_the_audit_knows_what_a_rule_closes_over(rule):
    mean = lambda b: jnp.mean(b["y"])
    exact = loss_of(rule, computed)
    assert ja.audit(exact, W, BATCH, num_microbatches=3).exact
    for wrong in (mean, lambda b: b["y"] - mean(b)):
        loss = loss_of(rule, wrong)
        report = ja.audit(loss, W, BATCH, num_microbatches=3)
        assert not report.exact
        assert "coupling" in {finding.kind for finding in report.findings}
        got = ja.grad(loss, num_microbatches=3, audit=None)(W, BATCH)
        assert normwise(got, jitted.grad(loss)(W, BATCH)) > 1e6 * EXACT


class FakeQuant:
    """A layer that keeps its scale for the backward pass, which may find that of another trace."""

    def __call__(self, z):
        self.scale = 0.9 * lax.stop_gradient(jnp.max(jnp.abs(z)))
        rounded = jax.custom_vjp(lambda z: jnp.round(z))
        clip = lambda z, g: (jnp.where(jnp.abs(z) < self.scale, g, 0.0),)
        rounded.defvjp(lambda z: (jnp.round(z), z), clip)
        return rounded(z)


def test_what_a_rule_reads_of_another_trace_is_no_constant():
    layer = FakeQuant()
    loss = lambda w, b: jnp.mean((layer(3 * b["x"] @ w) - b["y"]) ** 2)
    assert not ja.audit(loss, W, BATCH, num_microbatches=3).exact
    got = jax.jit(ja.grad(loss, num_microbatches=3, audit=None))(W, BATCH)
    assert normwise(got, jitted.grad(loss)(W, BATCH)) > 1e6 * EXACT


def by_zeros(z, u):
    """A rule that is another one where JAX derives with respect to `u`."""
    product = jax.custom_vjp(lambda z, u: jnp.sin(z) * u)

    def forward(z, u):
        kept = (jnp.cos(z.value), jnp.sin(z.value), u.value)
        return jnp.sin(z.value) * u.value, (kept, Moves(u.perturbed))

    def backward(kept, g):
        (cos, sin, u), moves = kept
        return (g * cos * u, g * sin) if moves.both else (g * cos * jnp.mean(u), None)

    product.defvjp(forward, backward, symbolic_zeros=True)
    return product(z, u)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Moves:
    both: bool


def test_the_audit_walks_the_rule_for_the_operands_that_move():
    of_rows = lambda w, b: jnp.mean(by_zeros(b["x"] @ w, b["y"]) ** 2)
    assert not ja.audit(of_rows, W, BATCH, num_microbatches=3).exact
    got = jax.jit(ja.grad(of_rows, num_microbatches=3, audit=None))(W, BATCH)
    assert normwise(got, jitted.grad(of_rows)(W, BATCH)) > 1e6 * EXACT
    of_both = lambda w, b: jnp.mean(by_zeros(b["x"] @ w, b["y"] * w[0]) ** 2)
    assert ja.audit(of_both, W, BATCH, num_microbatches=3).exact
    got = jax.jit(ja.grad(of_both, num_microbatches=3))(W, BATCH)
    assert normwise(got, jitted.grad(of_both)(W, BATCH)) < EXACT


def refusing(w, b):
    """The rule has no derivative with respect to rows, and closes over rows."""
    product = jax.custom_vjp(lambda z, u: jnp.sin(z) * u)

    def forward(z, u):
        if u.perturbed:
            raise ValueError("no gradient with respect to u")
        return jnp.sin(z.value) * u.value, jnp.cos(z.value) * u.value

    product.defvjp(forward, lambda cos, g: (g * cos * b["y"], None), symbolic_zeros=True)
    return jnp.mean(product(b["x"] @ w, b["y"]) ** 2)


def test_a_rule_that_refuses_a_derivative_may_close_over_the_batch():
    got = jax.jit(ja.grad(refusing, num_microbatches=3))(W, BATCH)
    assert normwise(got, jitted.grad(refusing)(W, BATCH)) < EXACT


def with_mean(rule):
    def loss(w, b):
        z = rule(b["x"] @ w, b["y"])
        return jnp.mean((z - lax.pmean(jnp.mean(z), "microbatch")) ** 2)

    return loss


def with_index(rule):
    def loss(w, b):
        return jnp.mean(rule(b["x"] @ w, b["y"])) + lax.axis_index("microbatch").astype(float)

    return loss


def with_index_in_a_loop(rule):
    def loss(w, b):
        place = lax.map(lambda _: lax.axis_index("microbatch"), jnp.arange(1))
        return jnp.mean(rule(b["x"] @ w, b["y"])) + place[0].astype(float)

    return loss


@jax.custom_vjp
def weighed(z, weights):
    return jnp.sin(z)


weighed.defvjp(
    lambda z, weights: (jnp.sin(z), (z, weights)),
    lambda kept, g: (g * jnp.cos(kept[0]) * kept[1], jnp.zeros_like(kept[1])),
)


REFUSED = {
    with_mean: NotImplementedError,
    with_index: NotImplementedError,
    with_index_in_a_loop: jax.errors.UnexpectedTracerError,
}


@pytest.mark.parametrize("make", REFUSED)
@pytest.mark.parametrize("rule", [by_vjp, by_jvp])
def test_where_the_loop_is_named_the_rule_is_told_to_take_an_argument(rule, make):
    with pytest.raises(REFUSED[make]) as raised:
        ja.grad(make(lambda z, y: rule(y)(z)), num_microbatches=2, audit=None)(W, BATCH)
    told = "".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    assert re.search("(?i)pass (these values|what the rule reads)", told)
    told = make(weighed)
    expected = jitted.grad(ja.full_batch(told))(W, BATCH)
    assert normwise(ja.grad(told, num_microbatches=2, audit=None)(W, BATCH), expected) < EXACT


@pytest.mark.parametrize("rule", [by_vjp, by_jvp])
def test_a_closed_over_parameter_is_told_to_be_an_argument(rule):
    loss = loss_of(rule)

    def around(w, b):
        return ja.microbatch(lambda b: loss(w, b), in_axes=(0,), num_microbatches=3)(b)

    with pytest.raises(NotImplementedError, match="closes over what is differentiated"):
        jax.grad(around)(W, BATCH)


def test_a_closed_over_parameter_of_integers_is_told_so():
    """No row has a derivative that could tell the rule of the trace from that of the loss."""

    def around(w, rows):
        loss = lambda rows: jnp.mean(by_vjp(rows.astype(w.dtype))(w[rows]))
        return ja.microbatch(loss, in_axes=(0,), num_microbatches=3)(rows)

    with pytest.raises(jax.errors.UnexpectedTracerError) as raised:
        jax.grad(around)(W, jnp.asarray([0, 1, 2, 2, 1, 0]))
    assert "closes over what is differentiated" in "".join(raised.value.__notes__)


def test_the_variable_of_a_tracer_is_known():
    seen = []
    jaxpr = jax.make_jaxpr(lambda x: seen.append(x) or x + 1)(W).jaxpr
    assert compat.variable_of(seen[0]) is jaxpr.invars[0]
    assert compat.variable_of(W) is None
