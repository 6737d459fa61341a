"""An output that depends on whole arguments alone needs no tag: it passes as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from tests.support.helpers import EXACT, bits, data, normwise, refused, same

pytestmark = pytest.mark.optimized

W = {"k": data(3), "t": data(2, seed=1)}
X = data(8, 3, seed=2)
OPTIONS = [
    {"num_microbatches": 3},
    {"microbatch_size": 2},
    {"num_microbatches": 4, "split": "strided"},
]
EVERY = pytest.mark.parametrize("options", OPTIONS, ids=str)


def encode(w, x):
    """Rows, and a temperature that all of them share."""
    return {"z": ja.Concat(jnp.tanh(x * w["k"][None])), "t": jnp.exp(w["t"])}


def plain(w, x):
    """The oracle: the same on the whole batch, without tags."""
    return {"z": jnp.tanh(x * w["k"][None]), "t": jnp.exp(w["t"])}


def contrast(f):
    """A loss of all pairs, at a temperature."""

    def total(w, x):
        out = f(w, x)
        scores = out["t"][0] * (out["z"] @ out["z"].T) + out["t"][1]
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores))

    return total


@EVERY
def test_its_gradient_counts_once(options):
    ours = contrast(ja.microbatch(encode, **options))
    assert (
        normwise(jax.value_and_grad(ours)(W, X), jax.value_and_grad(contrast(plain))(W, X)) < EXACT
    )
    tagged = lambda w, x: {"z": encode(w, x)["z"], "t": ja.Sum(jnp.exp(w["t"]) / 3)}
    wrong = jax.grad(contrast(ja.microbatch(tagged, num_microbatches=4, audit=None)))(W, X)
    assert normwise(wrong, jax.grad(contrast(plain))(W, X)) > 0.01


AROUND = {
    "compiled": lambda f: jax.jit(jax.value_and_grad(f))(W, X),
    "of the batch too": lambda f: jax.grad(f, argnums=(0, 1))(W, X),
    "mapped": lambda f: jax.vmap(jax.grad(f), (None, 0))(W, jnp.stack([X, 2 * X])),
    "twice": lambda f: jax.grad(lambda w: jnp.sum(jax.grad(f)(w, X)["k"] ** 3))(W),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f))(W, X),
    "scanned": lambda f: jax.grad(
        lambda w: jnp.sum(lax.map(lambda s: f(w, s * X), jnp.arange(2.0)))
    )(W),
}


@pytest.mark.parametrize("around", AROUND)
def test_jax_differentiates_it_as_it_stands(around):
    ours = contrast(ja.microbatch(encode, num_microbatches=3))
    assert normwise(AROUND[around](ours), AROUND[around](contrast(plain))) < EXACT


def test_forward_mode():
    fun = lambda w, x: {"loss": jnp.mean(x @ w["k"]), "t": jnp.exp(w["t"])}
    ours = jax.jvp(lambda w: ja.microbatch(fun, num_microbatches=3)(w, X), (W,), (W,))
    assert normwise(ours, jax.jvp(lambda w: fun(w, X), (W,), (W,))) < EXACT


HELD = {
    "matrix": jnp.arange(6.0).reshape(2, 3),
    "low": jnp.ones(2, jnp.bfloat16),
    "complex": jnp.ones((), jnp.complex64),
    "count": jnp.int32(7),
    "byte": jnp.uint8(200),
    "flags": jnp.array([True, False]),
    "key": jax.random.key(3),
    "keys": jax.random.split(jax.random.key(4), 2),
    "legacy": jax.random.PRNGKey(5),
    "numpy": np.arange(4),
}


@EVERY
def test_every_shape_and_dtype_passes_bit_by_bit(options):
    fun = lambda held, x: {"held": held, "half": held["matrix"] / 2}
    expected = bits(fun(jax.tree.map(jnp.asarray, HELD), X))
    step = ja.value_and_grad(
        lambda w, x, held: (jnp.mean(x @ w), fun(held, x)),
        has_aux=True,
        in_axes=(None, 0, None),
        **options,
    )
    for actual in (
        ja.microbatch(fun, **options)(HELD, X),
        ja.full_batch(fun)(HELD, X),
        jax.jit(step)(W["k"], X, HELD)[0][1],
    ):
        assert jax.tree.map(lambda x: x.dtype, bits(actual)) == jax.tree.map(
            lambda x: x.dtype, expected
        )
        assert same(bits(actual), expected)


def test_a_value_that_fun_closes_over_is_whole():
    def total(w, microbatch):
        own = lambda x: {"z": ja.Concat(jnp.tanh(x * w["k"][None])), "t": jnp.exp(w["t"])}
        f = (
            ja.microbatch(own, in_axes=(0,), num_microbatches=3)
            if microbatch
            else lambda x: plain(w, x)
        )
        return contrast(lambda w, x: f(x))(w, X)

    assert normwise(jax.grad(total)(W, True), jax.grad(total)(W, False)) < EXACT


def inside_loops(jaxpr, name, looped=False):
    """How many equations of a name stand inside loops."""
    count = 0
    for eqn in jaxpr.eqns:
        count += looped and eqn.primitive.name == name
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            count += inside_loops(inner, name, looped or eqn.primitive.name == "scan")
    return count


def test_no_loop_computes_it():
    fun = lambda tag: lambda w, x: (jnp.mean(jnp.tanh(x @ w["k"])), {"t": tag(jnp.sinh(w["t"]))})
    count = {}
    for name, tag in {"untagged": lambda x: x, "Last": ja.Last}.items():
        step = ja.value_and_grad(fun(tag), has_aux=True, num_microbatches=4)
        count[name] = inside_loops(jax.make_jaxpr(step)(W, X).jaxpr, "sinh")
    assert count["untagged"] == 0 < count["Last"]


def test_prints_stay_in_the_loop(capfd):
    def fun(w, x):
        jax.debug.print("seen {}", x[0, 0])
        return {"z": ja.Concat(x), "t": w["t"]}

    jax.block_until_ready(jax.jit(ja.microbatch(fun, num_microbatches=4))(W, X))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("seen") == 4


def test_padding_does_not_count_in_it():
    def loss(w, x, mask, n):
        return ja.Mean(jnp.sum((x @ w["k"]) ** 2 * mask), jnp.sum(mask)), {
            "scale": w["t"][0],
            "t": w["t"],
        }

    padded, mask = ja.pad_batch(X, to=12)
    mask = jnp.float64(mask)
    options = {"in_axes": (None, 0, 0, None), "num_examples_argnum": 3, "num_microbatches": 6}
    (value, aux), grad = ja.value_and_grad(loss, has_aux=True, **options)(W, padded, mask, 8)
    assert (
        normwise((value, grad["k"]), jax.value_and_grad(lambda k: jnp.mean((X @ k) ** 2))(W["k"]))
        < EXACT
    )
    assert same((aux["scale"], aux["t"]), (W["t"][0], W["t"]))
    untagged = lambda w, x, mask, n: w["t"][0]
    refused(lambda: ja.grad(untagged, **options)(W, padded, mask, 8), "tag", "Mean(total, weight)")


def test_a_coupled_loss_beside_it():
    def fun(w, x):
        h = jnp.sin(x @ w["k"])
        center = lax.pmean(jnp.mean(h), "microbatch")
        return {"loss": jnp.mean((h - center) ** 2), "t": jnp.exp(w["t"])}

    def oracle(w):
        return jnp.var(jnp.sin(X @ w["k"])) * jnp.sum(jnp.exp(w["t"]))

    f = ja.microbatch(fun, num_microbatches=4)
    ours = lambda w: f(w, X)["loss"] * jnp.sum(f(w, X)["t"])
    assert normwise(jax.value_and_grad(ours)(W), jax.value_and_grad(oracle)(W)) < EXACT


# -- devices -----------------------------------------------------------------------------------


def mesh_of(kind):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,))


def scaled(f):
    """A loss that multiplies the batch's mean by what is whole."""
    return lambda w, x: f(w, x)["loss"] * jnp.sum(f(w, x)["t"])


def mean_and_temperature(w, x):
    return {"loss": ja.Mean(jnp.sum((x @ w["k"]) ** 2), len(x)), "t": jnp.exp(w["t"])}


def coupled_and_temperature(w, x):
    h = jnp.sin(x @ w["k"])
    center = lax.pmean(jnp.mean(h), ("data", "microbatch"))
    return {"loss": jnp.mean((h - center) ** 2), "t": jnp.exp(w["t"])}


TRUTHS = {
    mean_and_temperature: lambda w: jnp.mean((X @ w["k"]) ** 2) * jnp.sum(jnp.exp(w["t"])),
    coupled_and_temperature: lambda w: jnp.var(jnp.sin(X @ w["k"])) * jnp.sum(jnp.exp(w["t"])),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("fun", TRUTHS, ids=lambda f: f.__name__)
def test_devices_count_it_once(fun, check_vma):
    ours = scaled(ja.microbatch(fun, num_microbatches=2, mesh_axes="data"))
    step = jax.shard_map(
        jax.value_and_grad(ours),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert normwise(jax.jit(step)(W, X), jax.value_and_grad(TRUTHS[fun])(W)) < EXACT


def test_without_mesh_axes_it_is_jax_grad_there():
    """Each device has the loss of its own rows; JAX sums the gradients of what they share."""
    own = lambda w, x: jnp.mean((x @ w["k"]) ** 2) * jnp.sum(jnp.exp(w["t"]))
    ours = scaled(ja.microbatch(mean_and_temperature, num_microbatches=2))
    options = {"mesh": mesh_of(AxisType.Auto), "in_specs": (P(), P("data")), "out_specs": P()}
    call = lambda f: jax.jit(jax.shard_map(jax.grad(f), **options))(W, X)
    assert normwise(call(ours), call(own)) < EXACT


def test_a_share_of_a_parameter_stays_the_devices_own():
    """In shard_map, a parameter that is divided differs between devices; so does what is made of
    it."""
    fun = lambda w, x: (jnp.mean(jnp.sum(x, axis=1) * jnp.sum(w)), {"own": 2 * w})
    step = ja.value_and_grad(fun, has_aux=True, num_microbatches=2, mesh_axes="data")
    call = lambda w, x: step(w, x)[0][1]["own"]
    shares = jax.shard_map(
        call, mesh=mesh_of(AxisType.Auto), in_specs=(P("data"), P("data")), out_specs=P("data")
    )
    assert same(jax.jit(shares)(jnp.arange(4.0), X), 2 * jnp.arange(4.0))


@pytest.mark.parametrize("gather", ["each", "once"])
@pytest.mark.parametrize("spec", [P(), P("data")], ids=["shared", "divided"])
def test_explicit_meshes(spec, gather):
    """Also of a parameter that is divided as the batch is, of which one device sees a share."""
    w = {"k": data(3), "t": data(4, seed=1)}
    loss = lambda w, x: (
        jnp.mean((x @ w["k"]) ** 2) + jnp.sum(w["t"]),
        {"t": jnp.exp(w["t"]), "sum": jnp.sum(w["t"])[None]},
    )
    mesh = mesh_of(AxisType.Explicit)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    laid = {"k": put(w["k"], P()), "t": put(w["t"], spec)}
    step = ja.value_and_grad(loss, has_aux=True, num_microbatches=2, gather=gather)
    actual = jax.device_get(jax.jit(step)(laid, put(X, P("data"))))
    assert normwise(actual, jax.value_and_grad(loss, has_aux=True)(w, X)) < EXACT


# -- what is not whole -------------------------------------------------------------------------

KEY = jax.random.key(0)
OF_MORE = {
    "rows": (lambda w, x: w["t"] + x[0, 0], {}),
    "the size of rows": (lambda w, x: x.shape[0], {}),
    "no argument": (lambda w, x: jnp.arange(3), {}),
    "a key": (
        lambda w, x, key: w["t"] + jax.random.normal(key, (2,)),
        {"in_axes": (None, 0, ja.KEY)},
    ),
    "keys of examples": (
        lambda w, x, keys: w["t"] + jax.random.normal(keys[0], (2,)),
        {"in_axes": (None, 0, ja.EXAMPLE_KEY)},
    ),
    "the index": (lambda w, x: w["t"] * jnp.float64(lax.axis_index("microbatch")), {}),
    "the number": (lambda w, x: lax.psum(w["t"], "microbatch"), {}),
    "the outside": (lambda w, x: io_callback(lambda t: t, w["t"], w["t"]), {}),
}


@pytest.mark.parametrize("name", OF_MORE)
def test_what_depends_on_more_is_refused(name):
    value, options = OF_MORE[name]
    args = (W, X, KEY)[: 3 if options else 2]
    fun = lambda *args: {"beside": value(*args)}
    says = (
        "output['beside']",
        "without a tag",
        "from arguments that are not cut",
        "Mean(total, weight)",
    )
    refused(lambda: ja.microbatch(fun, num_microbatches=4, **options)(*args), *says)
    step = ja.value_and_grad(
        lambda *args: (jnp.mean(args[1] @ args[0]["k"]), fun(*args)),
        has_aux=True,
        num_microbatches=4,
        **options,
    )
    refused(lambda: step(*args), "aux['beside']", *says[1:])
    if name not in ("the index", "the number", "the outside"):
        refused(lambda: ja.full_batch(fun, **options)(*args), *says)


def test_a_carried_state_is_not_whole():
    fun = lambda w, x, state: {"beside": w["t"] * state, "state": ja.Carry(state + 1)}
    options = {"in_axes": (None, 0, ja.CARRY), "num_microbatches": 2}
    refused(lambda: ja.microbatch(fun, **options)(W, X, 0.0), "output['beside']", "without a tag")


def test_the_audit_agrees():
    fun = lambda w, x: (jnp.mean((x @ w["k"]) ** 2), {"t": jnp.exp(w["t"])})
    assert ja.audit(fun, W, X, has_aux=True).exact
    wrong = lambda w, x: (jnp.mean((x @ w["k"]) ** 2), {"t": w["t"] * len(x)})
    assert not ja.audit(wrong, W, X, has_aux=True).exact
