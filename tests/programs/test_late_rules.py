"""Derivative rules that read what the loss changes afterwards: a variable of Python, an attribute,
a setting. JAX runs a rule where it derives, which is after the loss where that is traced first.

The oracle is plain JAX on the whole batch. The negative control is ``jax.grad(jax.jit(loss))``,
which traces first and is silently another gradient.
"""

import contextlib
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum import accumulators
from jaxaccum._jaxpr.traces import trace
from tests.programs.nested_programs import define
from tests.programs.test_derivative_rules import GRADIENTS
from tests.programs.test_nested_programs import BATCH as NESTED_BATCH
from tests.programs.test_nested_programs import DRAWN, PARAMS, TAGS
from tests.support import jitted
from tests.support.helpers import EXACT, INEXACT, UNDECIDED, data, normwise

W, BATCH = data(3, 3), {"x": data(6, 3, seed=1), "y": data(6, seed=2)}


def leaky_by_jvp(slope):
    leaky = jax.custom_jvp(lambda z: jnp.where(z > 0, z, slope() * z))
    leaky.defjvps(lambda t, _, z: jnp.where(z > 0, t, slope() * t))
    return leaky


def leaky_by_vjp(slope):
    leaky = jax.custom_vjp(lambda z: jnp.where(z > 0, z, slope() * z))
    forward = lambda z: (leaky(z), jnp.where(z > 0, 1, jnp.asarray(slope(), z.dtype)))
    leaky.defvjp(forward, lambda slopes, g: (g * slopes,))
    return leaky


def leaky_by_gradient(slope):
    def leaky(z):
        slopes = jnp.where(z > 0, 1, jnp.asarray(slope(), z.dtype))
        return z * slopes, lambda g: g * slopes

    return jax.custom_gradient(leaky)


def of_a_variable(make):
    """Every layer's rule reads the loop's own variable."""

    def loss(w, b):
        leaky, h = make(lambda: slope), b["x"]
        for slope in (0.5, 0.1, 2.0):  # noqa: B007
            h = leaky(h @ w)
        return jnp.mean((h[:, 0] - b["y"]) ** 2)

    return loss


def of_an_attribute(make):
    """One layer, used twice."""

    def loss(w, b):
        layer = types.SimpleNamespace(slope=0.1)
        leaky = make(lambda: layer.slope)
        h = leaky(b["x"] @ w)
        layer.slope = 2.0
        return jnp.mean((leaky(h @ w)[:, 0] - b["y"]) ** 2)

    return loss


def of_a_setting(make):
    """The setting holds while the layer is called."""
    current = [1.0]

    @contextlib.contextmanager
    def slope(value):
        current.append(value)
        yield
        current.pop()

    def loss(w, b):
        with slope(0.1):
            h = make(lambda: current[-1])(b["x"] @ w)
        return jnp.mean((h[:, 0] - b["y"]) ** 2)

    return loss


def of_a_rebound_name(make):
    def loss(w, b):
        slope = lambda: 0.1
        leaky = make(lambda: slope())
        h = leaky(b["x"] @ w)
        slope = lambda: 2.0
        return jnp.mean((leaky(h @ w)[:, 0] - b["y"]) ** 2)

    return loss


def of_a_stream(make):
    """The slopes are drawn one after the other. The function and the rule draw for themselves."""

    def loss(w, b):
        slopes = itertools.count(1)
        h = make(lambda: float(next(slopes)))(b["x"] @ w)
        h = make(lambda: float(next(slopes)))(h @ w)
        return jnp.mean((h[:, 0] - b["y"]) ** 2)

    return loss


READERS = [of_a_variable, of_an_attribute, of_a_setting, of_a_rebound_name]
RULES = [leaky_by_jvp, leaky_by_vjp, leaky_by_gradient]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reader", READERS)
def test_a_rule_reads_what_it_would_under_jax_grad(reader, rule):
    loss = reader(rule)
    expected = jitted.grad(loss)(W, BATCH)
    for name in ("jit", "microbatch"):
        assert normwise(GRADIENTS[name](loss)(W, BATCH), expected) < EXACT
    assert normwise(jax.grad(jax.jit(loss))(W, BATCH), expected) > 1e6 * EXACT


@pytest.mark.parametrize("name", GRADIENTS)
def test_it_does_in_every_kind_of_gradient(name):
    loss = of_a_variable(leaky_by_vjp)
    assert normwise(GRADIENTS[name](loss)(W, BATCH), jitted.grad(loss)(W, BATCH)) < EXACT


def test_a_rule_that_draws_reads_what_it_would_under_jax_grad():
    loss = of_a_stream(leaky_by_gradient)
    expected = jitted.grad(loss)(W, BATCH)
    assert normwise(GRADIENTS["jit"](loss)(W, BATCH), expected) < EXACT
    assert normwise(jax.grad(jax.jit(loss))(W, BATCH), expected) > 1e6 * EXACT


def test_a_rule_has_the_matmul_precision_of_its_call():
    product = jax.custom_vjp(lambda x, w: x @ w)
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

    def loss(w, b):
        with jax.default_matmul_precision("highest"):
            h = product(b["x"], w)
        return jnp.mean(h**2)

    program = lambda gradient: str(jax.make_jaxpr(gradient)(W, BATCH))
    assert "HIGHEST" in program(jax.grad(loss))
    assert "HIGHEST" in program(ja.grad(loss, num_microbatches=3))
    assert "HIGHEST" not in program(jax.grad(jax.jit(loss)))


def once_per_call(state, draw):
    """The backward pass takes what it multiplies by from a state of this call of the loss."""

    def layers(w, x):
        held, scaled = state(), jax.custom_vjp(lambda z: 1 * z)
        scaled.defvjp(lambda z: (1 * z, None), lambda _, g: (g * draw(held),))
        for _ in range(3):
            x = scaled(x @ w)
        return x

    return layers


def first_time(held):
    return 2.0 if held.pop("first", False) else 1.0


STATES = {
    "a counter": once_per_call(lambda: itertools.count(1), lambda held: float(next(held))),
    "an iterator": once_per_call(lambda: iter([0.1, 0.5, 2.0]), next),
    "a stack": once_per_call(lambda: [0.1, 0.5, 2.0], list.pop),
    "a flag": once_per_call(lambda: {"first": True}, first_time),
    "a generator": once_per_call(lambda: np.random.default_rng(0), lambda held: held.random()),
}


@INEXACT  # the audit, which runs the rule more often, finds other numbers
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("gradient", ["jit", "two sizes", "microbatch"])
def test_a_rule_finds_its_state_as_the_loss_left_it(gradient, name):
    """The comparison runs the rule, too."""
    loss = lambda w, b: jnp.mean((STATES[name](w, b["x"])[:, 0] - b["y"]) ** 2)
    expected = jitted.grad(loss)(W, BATCH)
    assert normwise(GRADIENTS[gradient](loss)(W, BATCH), expected) < EXACT
    scaled = jitted.grad(lambda w, b: jnp.mean(((b["x"] @ w @ w @ w)[:, 0] - b["y"]) ** 2))
    assert normwise(scaled(W, BATCH), expected) > 1e6 * EXACT


SECOND = {
    "hessian": lambda loss: jax.hessian(ja.microbatch(loss, num_microbatches=3)),
    "jacfwd": lambda loss: jax.jacfwd(ja.grad(loss, num_microbatches=3)),
    "jacrev": lambda loss: jax.jacrev(ja.grad(loss, num_microbatches=3)),
    "compensated": lambda loss: jax.jacrev(
        ja.grad(loss, num_microbatches=3, accumulator=accumulators.compensated())
    ),
    "of the value": lambda loss: jax.grad(
        lambda w, b: ja.value_and_grad(loss, num_microbatches=3)(w, b)[0]
    ),
}


BOTH = [(name, rule) for name in SECOND for rule in (leaky_by_jvp, leaky_by_vjp)]
BOTH.remove(("hessian", leaky_by_vjp))  # JAX alone has no Hessian of a custom_vjp


@pytest.mark.parametrize(("name", "rule"), BOTH)
def test_a_rule_that_would_run_late_in_a_second_derivative_is_refused(name, rule):
    with pytest.raises(NotImplementedError, match="pass what the rule reads as an argument"):
        SECOND[name](of_a_variable(rule))(W, BATCH)


@pytest.mark.parametrize("name", ["hessian", "jacfwd", "jacrev"])
def test_a_rule_of_which_nothing_is_left_has_a_second_derivative(name):
    loss = of_a_variable(leaky_by_gradient)
    expected = jax.jit(jax.hessian(loss))(W, BATCH)
    assert normwise(SECOND[name](loss)(W, BATCH), expected) < EXACT
    assert normwise(jax.hessian(jax.jit(loss))(W, BATCH), expected) > 1e6 * EXACT


# -- losses that cannot be called again ------------------------------------------------------------


def centered(h):
    return jnp.mean((h - lax.pmean(jnp.mean(h), "microbatch")) ** 2)


def coupled(make):
    def loss(w, b):
        leaky, h = make(lambda: slope), b["x"]
        for slope in (0.5, 0.1, 2.0):  # noqa: B007
            h = leaky(h @ w)
        return centered(h)

    return loss


def by_place(make):
    """Each microbatch's loss is multiplied by its place."""
    loss = of_a_variable(make)
    return lambda w, b: loss(w, b) * (1.0 + lax.axis_index("microbatch").astype(float))


REFUSED = {
    **{make.__name__: coupled(make) for make in RULES},
    "axis_index": by_place(leaky_by_vjp),
    "state": lambda w, b: centered(jnp.sin(STATES["a flag"](w, b["x"]))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_coupled_loss_with_such_a_rule_is_refused(name):
    with pytest.raises(NotImplementedError, match="Pass what the rule reads as an argument"):
        ja.grad(REFUSED[name], num_microbatches=3, audit=None)(W, BATCH)


@pytest.mark.parametrize("rule", RULES)
def test_a_loss_that_closes_over_its_parameters_is_refused(rule):
    loss = of_a_variable(rule)
    around = lambda w: ja.microbatch(lambda b: loss(w, b), in_axes=(0,), num_microbatches=3)(BATCH)
    with pytest.raises(NotImplementedError, match="closes over what is differentiated"):
        jax.grad(around)(W)


def test_it_is_not_where_its_rules_read_constants():
    loss = of_a_variable(lambda _: leaky_by_vjp(lambda: 0.1))
    around = lambda w: ja.microbatch(lambda b: loss(w, b), in_axes=(0,), num_microbatches=3)(BATCH)
    assert normwise(jax.grad(around)(W), jitted.grad(loss)(W, BATCH)) < EXACT


def test_a_loss_that_reads_its_place_is_not_where_its_rules_read_constants():
    """The oracle is a Python loop."""
    rule = lambda _: leaky_by_vjp(lambda: 0.1)
    loss, actual = of_a_variable(rule), ja.grad(by_place(rule), num_microbatches=3, audit=None)
    parts = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], BATCH) for i in range(3)]
    grads = [(1.0 + i) * jitted.grad(loss)(W, part) for i, part in enumerate(parts)]
    assert normwise(actual(W, BATCH), sum(grads) / 3) < EXACT


@pytest.mark.parametrize("check_vma", [True, False])
def test_it_is_on_a_mesh(check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = ja.grad(coupled(leaky_by_vjp), num_microbatches=3, mesh_axes="data")
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    with pytest.raises(NotImplementedError, match="Pass what the rule reads as an argument"):
        jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs)(W, BATCH)


def with_callback(h):
    jax.debug.callback(lambda x: None, h[0, 0])
    return jnp.sin(h)


def with_policy(make):
    def layer(h):
        inner = lambda h: checkpoint_name(jnp.sin(h), "sine")
        return jax.checkpoint(inner, policy=make())(h)

    return layer


POLICIES = jax.checkpoint_policies
ANEW = {
    "a rule": jnp.sin,
    "a callback": with_callback,
    "a callback with arguments": lambda h: (
        jax.pure_callback(functools.partial(np.add, 1.0), jax.typeof(h), lax.stop_gradient(h)) + h
    ),
    "a policy of one's own": with_policy(lambda: lambda p, *_, **__: p.name == "sin"),
    "a policy with names": with_policy(lambda: POLICIES.save_only_these_names("sine")),
    "a policy that offloads": with_policy(
        lambda: POLICIES.offload_dot_with_no_batch_dims("device", "pinned_host")
    ),
    "a root": lambda h: lax.custom_root(
        lambda y: y**3 + y - h,
        jnp.zeros_like(h),
        lambda f, y: lax.fori_loop(0, 60, lambda _, y: y - f(y) / (3 * y**2 + 1), y),
        lambda g, y: y / g(jnp.ones_like(y)),
    ),
    "JAX's pmax": lambda h: jnp.exp(h - lax.pmax(jnp.max(h), "microbatch")),
}


@UNDECIDED
@pytest.mark.parametrize("name", ANEW)
@pytest.mark.parametrize("gradient", ["jit", "microbatch"])
def test_a_coupled_loss_that_makes_its_parts_anew_is_not(gradient, name):
    """Its rule reads a constant. Of ``pmax`` JAX has no derivative to compare."""
    loss = lambda w, b: centered(ANEW[name](leaky_by_vjp(lambda: 0.1)(b["x"] @ w)))
    expected = jitted.grad(ja.full_batch(loss))(W, BATCH)
    assert normwise(GRADIENTS[gradient](loss)(W, BATCH), expected) < EXACT


def test_the_error_of_a_rule_comes_from_jax():
    wrong = jax.custom_vjp(lambda z: z * z)
    wrong.defvjp(lambda z: (z * z, z), lambda z, g: (z[0],))
    with pytest.raises(ValueError, match="same type"):
        ja.grad(lambda w, b: centered(wrong(b["x"] @ w)), num_microbatches=3)(W, BATCH)


# -- rules that are derived from the trace ---------------------------------------------------------

square = jax.custom_vjp(lambda z: z * z)
square.defvjp(lambda z: (z * z, z), lambda z, g: (2 * z * g,))

sine = jax.custom_jvp(jnp.sin)
sine.defjvp(lambda p, t: (jnp.sin(*p), jnp.cos(*p) * t[0]))

bent = jax.custom_jvp(lambda z, slope: jnp.where(z > 0, z, slope * z))
bent.defjvp(lambda p, t: (bent(*p), jnp.where(p[0] > 0, t[0], p[1] * t[0])))

power = jax.custom_vjp(lambda z, n: z**n, nondiff_argnums=(1,))
power.defvjp(lambda z, n: (z**n, z), lambda n, z, g: (n * z ** (n - 1) * g,))


def kernel(block, doubled):
    doubled[...] = block[...] + block[...]


def by_kernel(z):
    row = pl.BlockSpec((1, 3), lambda i: (i, np.int32(0)))
    options = {"grid": z.shape[:1], "in_specs": [row], "out_specs": row, "interpret": True}
    return pl.pallas_call(kernel, jax.ShapeDtypeStruct(z.shape, z.dtype), **options)(z)


twice = jax.custom_vjp(by_kernel)
twice.defvjp(lambda z: (by_kernel(z), None), lambda _, g: (by_kernel(g),))

TABLE = data(1, 3, seed=4)
LAYER = {
    "custom_vjp": square,
    "custom_jvp": sine,
    "custom_gradient": jax.custom_gradient(lambda z: (jnp.sin(z), lambda g: g * jnp.cos(z))),
    "an operand in Python": lambda z: bent(z, 0.1),
    "an argument that is no operand": lambda z: power(z, 3),
    "a kernel": twice,
    "an array": lambda z: square(z) * TABLE,
    "a list": lambda z: square(z) * jnp.array([[1.0, 2.0, 3.0]]),
    "an array of numpy": lambda z: square(z) * np.arange(3.0)[None],
    "functions of JAX's": lambda z: jax.nn.relu(jax.nn.softmax(square(z))),
    "jit": jax.jit(square),
    "checkpoint": jax.checkpoint(square),
    "vmap": jax.vmap(square),
    "map": lambda z: lax.map(square, z),
    "cond": lambda z: lax.cond(z.sum() > 0, square, jnp.sin, z),
    "labels": lambda z: optax.losses.softmax_cross_entropy_with_integer_labels(
        square(z), jnp.arange(len(z)) % 3
    )[:, None],
}


def loss_of(layer):
    return lambda w, b: [jnp.mean(jnp.tanh(layer(b["x"] @ w)))]


def scanned(layer):
    def loss(w, b):
        step = lambda h, w: (jnp.tanh(layer(h @ w)), None)
        return [jnp.mean(lax.scan(step, b["x"], jnp.stack([w, w]))[0] ** 2)]

    return loss


def traced(loss):
    flat = lambda w, x, y: loss(w, {"x": x, "y": y})
    return trace(flat, [W, BATCH["x"], BATCH["y"]], ("microbatch", 2))[0]


def is_derived_from_its_trace(loss):
    one = traced(loss)
    return not one.has_other_derivative([one.num_consts])


@pytest.mark.parametrize("name", LAYER)
def test_other_rules_are_derived_from_the_trace(name):
    """Gradients are then added in place, which a function that is called again has no program
    for."""
    assert is_derived_from_its_trace(loss_of(LAYER[name]))
    if name != "labels":
        assert is_derived_from_its_trace(scanned(LAYER[name]))


def test_a_late_rule_is_not():
    late = of_a_variable(leaky_by_jvp)
    assert not is_derived_from_its_trace(lambda w, b: [late(w, b)])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_constants_are_compared_by_what_they_hold(kind):
    """A rule that reads another array of the same shape is another rule."""

    def loss(w, b, tables):
        product = jax.custom_jvp(lambda z: z * kind(table)[None])
        product.defjvps(lambda t, _, z: t * kind(table)[None])
        h = b["x"] @ w
        for table in tables:  # noqa: B007
            h = product(h)
        return [jnp.mean(h)]

    same, other = [np.arange(3.0)] * 2, [np.arange(3.0), np.ones(3)]
    assert is_derived_from_its_trace(functools.partial(loss, tables=same))
    assert not is_derived_from_its_trace(functools.partial(loss, tables=other))


def test_outputs_that_were_left_out_are_not_returned():
    """The function is called with all of them."""
    late = of_a_variable(leaky_by_jvp)
    one = traced(lambda w, b: [late(w, b), jnp.mean(b["x"] @ w)])
    for part in (one.split(1)[0], one.first(1)):
        assert part.has_other_derivative([0])
        (value,) = part.called_again([W, BATCH["x"], BATCH["y"]])
        assert normwise(value, late(W, BATCH)) < EXACT


def test_programs_of_the_generator_are_derived_from_their_traces():
    """Their rules read nothing but their operands."""
    names, with_rules = [*PARAMS, *NESTED_BATCH], 0
    for program in DRAWN[:100]:
        loss = define(repr(program), **TAGS)

        def flat(*leaves, loss=loss):
            given = dict(zip(names, leaves, strict=True))
            return jax.tree.leaves(loss(given, given))

        one, consts = trace(flat, [*PARAMS.values(), *NESTED_BATCH.values()], ("microbatch", 2))
        with_rules += one.original is not None
        moved = range(len(consts), len(consts) + len(PARAMS))
        assert not one.has_other_derivative(moved), program
    assert with_rules > 10
