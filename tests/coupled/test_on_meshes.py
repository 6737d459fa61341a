"""Coupled losses over devices and microbatches: one device's whole batch, and derivatives taken
from outside."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding, reshard
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
import jaxaccum.nnx
from tests.support import jitted
from tests.support.covering import covering
from tests.support.helpers import EXACT, INEXACT, UNDECIDED, normwise, refused
from tests.support.meshes import EXPLICIT, W, X, laid_out, mesh_of, on_mesh


def normalized(axes):
    """A batch normalization whose statistics are those of all microbatches, and of all devices that
    `axes` names."""

    def fun(w, x):
        h = x @ w["a"]
        mean = lax.pmean(jnp.mean(h, axis=0), axes)
        variance = lax.pmean(jnp.mean((h - mean[None]) ** 2, axis=0), axes)
        return jnp.mean(
            jnp.tanh((h - mean[None]) * lax.rsqrt(variance + 1e-3)[None] * w["b"][None]) ** 4
        )

    return fun


def whole_norm(w, x):
    h = x @ w["a"]
    h = (h - jnp.mean(h, axis=0)[None]) * lax.rsqrt(jnp.var(h, axis=0) + 1e-3)[None]
    return jnp.mean(jnp.tanh(h * w["b"][None]) ** 4)


@UNDECIDED
def test_batch_normalization_over_devices_and_microbatches():
    mesh = mesh_of((4, 2), "manual")
    step = ja.value_and_grad(
        normalized(("data", "microbatch")), num_microbatches=2, mesh_axes="data"
    )
    over = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P())))
    right = jitted.value_and_grad(whole_norm)(W, X)
    assert normwise(over(W, X), right) < EXACT
    own = ja.value_and_grad(normalized("microbatch"), num_microbatches=2, mesh_axes="data")
    alone = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P())))
    assert normwise(alone(W, X), right) > 1e-3  # each device's own statistics


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_values_and_gradients_of_a_coupled_loss_are_differentiated_from_outside(check_vma):
    """Reverse mode over the `shard_map`: no cotangent is counted once per device."""
    mesh = mesh_of((4, 2), "manual")
    step = ja.value_and_grad(
        normalized(("data", "microbatch")), num_microbatches=2, mesh_axes="data"
    )
    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P()), "check_vma": check_vma}
    over = jax.shard_map(step, mesh=mesh, **specs)
    norm = lambda grads: sum(jnp.sum(g**3) for g in jax.tree.leaves(grads))
    right = jitted.grad(whole_norm)(W, X)
    assert normwise(jax.jit(jax.grad(lambda w: over(w, X)[0]))(W), right) < EXACT
    second = jitted.grad(lambda w: norm(jitted.grad(whole_norm)(w, X)))(W)
    assert normwise(jax.jit(jax.grad(lambda w: norm(over(w, X)[1])))(W), second) < EXACT


def test_a_coupled_loss_on_an_explicit_mesh_spans_all_devices():
    right = jitted.value_and_grad(whole_norm)(W, X)
    assert (
        normwise(on_mesh(ja.value_and_grad(normalized("microbatch"), num_microbatches=2)), right)
        < EXACT
    )


def among(gathered):
    """A contrastive loss without labels, among the rows that `gathered` gives."""

    def loss(w, x):
        z = jnp.tanh(x @ w["a"])
        return jnp.mean(jax.nn.logsumexp(z @ gathered(z).T, axis=1) - jnp.sum(z * z, axis=1))

    return loss


@pytest.mark.parametrize("dimension", [0, 1])
def test_rows_gathered_over_microbatches_alone_keep_the_sharding_of_one_microbatchs(dimension):
    """They may then be resharded as the whole batch's."""
    whole = lambda z: lax.all_gather(z, "microbatch", tiled=True)
    if dimension == 1:
        whole = lambda z: lax.all_gather(z.T, "microbatch", axis=1, tiled=True).T
    everywhere = lambda z: reshard(whole(z), P(None, None))
    right = jitted.value_and_grad(among(lambda z: z))(W, X)
    with jax.set_mesh(EXPLICIT):
        ours = on_mesh(ja.value_and_grad(among(everywhere), num_microbatches=2))
        alone = on_mesh(
            ja.value_and_grad(
                among(lambda z: reshard(z, P(None, None))), num_microbatches=2, audit=None
            )
        )
    assert normwise(ours, right) < EXACT
    assert normwise(alone, right) > 1e-3  # each microbatch among its own


@pytest.mark.parametrize("everywhere", [True, False], ids=["on the mesh", "on no mesh"])
def test_a_masked_normalization_on_an_explicit_mesh(everywhere):
    mask = jnp.arange(len(X)) % 3 > 0
    masked = lambda model, batch: model(batch[0], mask=batch[1][:, None]) ** 3

    def loss(model, batch):
        return ja.Mean(
            jnp.sum(jnp.where(batch[1][:, None], masked(model, batch), 0)), jnp.sum(batch[1])
        )

    model = lambda name: jaxaccum.nnx.BatchNorm(
        3, axis_name=name, rngs=nnx.Rngs(0), param_dtype=jnp.float64
    )
    ours, whole, batch = model("microbatch"), model(None), (X, mask)
    if everywhere:
        lay = lambda x: jax.device_put(x, NamedSharding(EXPLICIT, P()))
        nnx.update(ours, jax.tree.map(lay, nnx.state(ours)))
    step = jaxaccum.nnx.value_and_grad(loss, num_microbatches=4)
    value, grads = step(ours, jax.device_put(batch, NamedSharding(EXPLICIT, P("data"))))
    ratio = lambda mean: mean.total / mean.weight.astype(jnp.float64)
    truth, wanted = nnx.value_and_grad(lambda model: ratio(loss(model, batch)))(whole)
    assert normwise((value, nnx.to_pure_dict(grads)), (truth, nnx.to_pure_dict(wanted))) < EXACT
    assert normwise(ours.mean[...], whole.mean[...]) < EXACT
    own = loss(
        model(None), (X[::4], mask[::4])
    )  # the classic wrong answer: a microbatch's own statistics
    assert normwise(ratio(own), truth) > 1e-3


LAYOUTS = {
    "whole": {"a": P(), "b": P()},
    "columns": {"a": P(None, "other"), "b": P("other")},
    "one of two": {"a": P(None, "other"), "b": P()},
}


def tensor_parallel(layout, step):
    """A call on an explicit mesh of which one axis divides the rows and the other the
    parameters."""
    put = lambda x, spec: jax.device_put(x, NamedSharding(EXPLICIT, spec))
    w = {name: put(W[name], spec) for name, spec in LAYOUTS[layout].items()}
    return w, jax.jit(step)(w, put(X, P("data")))


AXES = {"global": "microbatch", "by device": ("data", "microbatch")}
DIVIDED = covering(2 * list(LAYOUTS), list(AXES), ["min", "store"])


@pytest.mark.parametrize(("layout", "axes", "memory"), DIVIDED)
def test_a_coupled_loss_of_divided_parameters(layout, axes, memory):
    """Statistics, their cotangents and stored boundaries are laid out as what they are of."""
    step = ja.value_and_grad(normalized(AXES[axes]), num_microbatches=2, memory=memory)
    w, (value, grads) = tensor_parallel(layout, step)
    right = jitted.value_and_grad(whole_norm)({"a": W["a"], "b": W["b"]}, X)
    assert normwise((value, grads), right) < EXACT
    assert all(grads[name].sharding.is_equivalent_to(w[name].sharding, w[name].ndim) for name in w)
    own = jitted.value_and_grad(whole_norm)
    each = [own({"a": W["a"], "b": W["b"]}, X[i::2]) for i in range(2)]
    # each microbatch by itself
    assert normwise(jax.tree.map(lambda x, y: (x + y) / 2, *each), right) > 1e-3


def test_derivatives_of_a_coupled_loss_of_divided_parameters():
    step = ja.value_and_grad(normalized(("data", "microbatch")), num_microbatches=2)
    norm = lambda grads: sum(jnp.sum(g**3) for g in jax.tree.leaves(grads))
    second = lambda f: jitted.grad(lambda w, x: norm(f(w, x)[1]))
    right = second(jitted.value_and_grad(whole_norm))({"a": W["a"], "b": W["b"]}, X)
    with jax.set_mesh(EXPLICIT):
        assert normwise(tensor_parallel("columns", second(step))[1], right) < EXACT
        tangent = lambda f: lambda w, x: jax.jvp(lambda w: f(w, x), (w,), (w,))
        right = tangent(jitted.value_and_grad(whole_norm))({"a": W["a"], "b": W["b"]}, X)
        assert normwise(tensor_parallel("columns", tangent(step))[1], right) < EXACT


def whole_contrastive(w, x):
    """CLIP's loss: every example of the batch against all others."""
    a, b = jnp.tanh(x @ w["a"]), jnp.sin(x @ w["a"] * w["b"][None])
    return jnp.mean(jax.nn.logsumexp(a @ b.T, axis=1) - jnp.sum(a * b, axis=1))


def contrastive(axes, *, global_labels=True):
    """The same as data parallelism writes it: own rows against all features, gathered over
    `axes`."""

    def fun(w, x):
        a, b = jnp.tanh(x @ w["a"]), jnp.sin(x @ w["a"] * w["b"][None])
        scores = a @ lax.all_gather(b, axes, tiled=True).T
        first = lax.axis_index(axes) * len(x) if global_labels else 0
        own = (jnp.arange(len(x), dtype=jnp.int32) + first)[:, None]
        picked = jnp.take_along_axis(scores, own, axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - picked)

    return fun


@INEXACT
@pytest.mark.parametrize("memory", ["min", None, "store"])
def test_a_contrastive_loss_gathers_from_devices_and_microbatches(memory):
    right, mesh, both = (
        jitted.value_and_grad(whole_contrastive)(W, X),
        mesh_of((4, 2), "manual"),
        ("data", "microbatch"),
    )

    def over(fun):
        step = ja.value_and_grad(fun, num_microbatches=4, mesh_axes="data", memory=memory)
        return jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
        )(W, X)

    assert normwise(over(contrastive(both)), right) < EXACT
    assert normwise(over(contrastive("microbatch")), right) > 1e-3  # each device among its own
    assert (
        normwise(over(contrastive(both, global_labels=False)), right) > 1e-3
    )  # the first rows' partners for all
    explicit = jax.jit(ja.value_and_grad(contrastive(both), num_microbatches=2, memory=memory))
    w, (x, _) = laid_out(mesh_of((8,), "explicit"), ("data",))
    assert normwise(explicit(w, x), right) < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_features_are_gathered_beside_a_second_explicit_axis(layout):
    """The loss says how its scores are laid out, as it must in JAX where both features are divided
    alike."""

    def fun(w, x):
        a, b = jnp.tanh(x @ w["a"]), jnp.sin(x @ w["a"] * w["b"][None])
        scores = jnp.matmul(
            a, lax.all_gather(b, ("data", "microbatch"), tiled=True).T, out_sharding=P()
        )
        own = jnp.arange(len(x), dtype=jnp.int32) + lax.axis_index(("data", "microbatch")) * len(x)
        picked = jnp.take_along_axis(scores, own[:, None], axis=1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(scores, axis=1) - picked)

    right = jitted.value_and_grad(whole_contrastive)({"a": W["a"], "b": W["b"]}, X)
    _, got = tensor_parallel(layout, ja.value_and_grad(fun, num_microbatches=2))
    assert normwise(got, right) < EXACT


PLACES = jnp.cos(jnp.arange(16.0))[:, None]
EXCHANGES = {
    "all_gather, tiled": lambda z, axes: (
        jnp.sin(lax.all_gather(z, axes, axis=1, tiled=True)).mean(axis=1) * z[:, 0]
    ),
    "all_gather, stacked": lambda z, axes: jnp.sin(lax.all_gather(z, axes, axis=1))[:, 3] * z,
    "psum_scatter, tiled": lambda z, axes: (
        lax.psum_scatter(jnp.tile(z, (8, 1)) * PLACES, axes, tiled=True) ** 2
    ),
    "psum_scatter, stacked": lambda z, axes: lax.psum_scatter(z[:1] * PLACES, axes) ** 3,
    "psum, pmax": lambda z, axes: (
        z / lax.psum(jnp.sum(z**2), axes) + lax.pmax(lax.stop_gradient(jnp.max(z)), axes)
    ),
}  # fmt: skip


@INEXACT
@pytest.mark.parametrize("name", EXCHANGES)
def test_collectives_over_devices_and_microbatches(name):
    """The oracle is one axis of 16 that `jax.vmap` maps over."""
    mesh = mesh_of((4, 2), "manual")
    fun = lambda axes: lambda w, x: jnp.mean(jnp.tanh(EXCHANGES[name](x @ w["a"], axes)))
    right = jitted.value_and_grad(
        lambda w: jnp.mean(
            jax.vmap(functools.partial(fun("all"), w), axis_name="all")(X.reshape(16, 2, 3))
        )
    )(W)
    step = ja.value_and_grad(fun(("data", "microbatch")), num_microbatches=4, mesh_axes="data")
    over = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P())))
    assert normwise(over(W, X), right) < EXACT


def gathered_twice(w, x):
    """The contrastive loss with one gather an axis, the one inside a checkpoint, the other under
    jit."""
    a, b = jnp.tanh(x @ w["a"]), jnp.sin(x @ w["a"] * w["b"][None])
    own = jax.checkpoint(lambda b: lax.all_gather(b, "microbatch", tiled=True))
    scores = a @ jax.jit(lambda b: lax.all_gather(own(b), "data", tiled=True))(b).T
    place = jnp.arange(len(x), dtype=jnp.int32) + lax.axis_index(("data", "microbatch")) * len(x)
    return jnp.mean(
        jax.nn.logsumexp(scores, axis=1) - jnp.take_along_axis(scores, place[:, None], axis=1)[:, 0]
    )


GATHERED = {"at once": contrastive(("data", "microbatch")), "axis by axis": gathered_twice}


@INEXACT
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", GATHERED)
def test_gathered_losses_are_transformed_from_outside(name, check_vma):
    """Gradients of values and of gradients, tangents and a mapped axis, taken over the
    `shard_map`."""
    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P()), "check_vma": check_vma}
    step = ja.value_and_grad(GATHERED[name], num_microbatches=4, mesh_axes="data")
    ours = jax.shard_map(step, mesh=mesh_of((4, 2), "manual"), **specs)
    full = jitted.value_and_grad(whole_contrastive)
    scaled, tangents = lambda c: jax.tree.map(lambda x: c * x, W), jax.tree.map(jnp.cos, W)
    transformed = {
        "grad": lambda f: jitted.grad(lambda w: f(w, X)[0])(W),
        "grad of grad": lambda f: jitted.grad(
            lambda w: sum(jnp.sum(g**3) for g in f(w, X)[1].values())
        )(W),
        "jvp": lambda f: jax.jvp(lambda w: f(w, X), (W,), (tangents,)),
        "vmap": lambda f: jax.vmap(lambda c: f(scaled(c), X))(jnp.arange(1.0, 4.0)),
    }
    for name, how in transformed.items():
        assert normwise(jax.jit(lambda how=how: how(ours))(), how(full)) < EXACT, name
    each = jitted.grad(lambda w: sum(f(w, X)[0] for f in [full] * 4))(W)
    assert normwise(each, transformed["grad"](full)) > 1  # counted once per device


EXTREMA = {"pmax": (lax.pmax, jnp.max), "pmin": (lax.pmin, jnp.min)}
IN_EACH_WAY = covering(2 * list(EXTREMA), ["manual", "explicit"], ["min", "store"])


@pytest.mark.parametrize(("extremum", "kind", "memory"), IN_EACH_WAY)
def test_extrema_over_devices_and_microbatches_are_differentiated(extremum, kind, memory):
    """By `reduce_max`'s rule on the whole batch; the extremum's own example carries its gradient,
    on one device."""
    collective, whole = EXTREMA[extremum]
    mesh, both = mesh_of((8,), kind), ("data", "microbatch")
    h = lambda w, x: jnp.tanh(x @ w["a"]) * w["b"][None]
    fun = lambda w, x: jnp.mean((h(w, x) - collective(whole(h(w, x), axis=0), both)[None]) ** 3)
    right = jitted.value_and_grad(
        lambda w, x: jnp.mean((h(w, x) - whole(h(w, x), axis=0)[None]) ** 3)
    )(W, X)
    step = ja.value_and_grad(
        fun, num_microbatches=2, mesh_axes="data" if kind == "manual" else None, memory=memory
    )
    if kind == "manual":
        over = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
        actual = jax.jit(over)(W, X)
    else:
        w, (x, _) = laid_out(mesh, ("data",))
        actual = jax.jit(step)(w, x)
    assert normwise(actual, right) < EXACT
    constant = lambda w, x: jnp.mean(
        (h(w, x) - lax.stop_gradient(whole(h(w, x), axis=0))[None]) ** 3
    )
    assert (
        normwise(jitted.value_and_grad(constant)(W, X), right) > 1e-3
    )  # an extremum without a gradient


def test_other_collectives_over_several_axes_are_refused():
    def fun(w, x):
        return jnp.mean(
            lax.all_to_all(jnp.tile(x @ w["a"], (8, 1)), ("data", "microbatch"), 0, 0, tiled=True)
        )

    step = ja.value_and_grad(fun, num_microbatches=4, mesh_axes="data")
    over = jax.jit(
        jax.shard_map(
            step, mesh=mesh_of((4, 2), "manual"), in_specs=(P(), P("data")), out_specs=(P(), P())
        )
    )
    says = ["all_to_all", "psum_scatter", "one axis per call", __file__]
    refused(lambda: over(W, X), *says, error=NotImplementedError)


class Dropped(nnx.Module):
    """Statistics over devices and microbatches, and a mask of dropout from a stream of the model's
    own."""

    def __init__(self):
        rngs, wide = nnx.Rngs(0), {"param_dtype": jnp.float64}
        self.norm = ja.nnx.BatchNorm(3, axis_name=("data", "microbatch"), rngs=rngs, **wide)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.norm(x)))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
def test_streams_of_a_coupled_model_differ_between_devices_and_microbatches(check_vma, n):
    graph, params, rest = nnx.split(Dropped(), nnx.Param, ...)
    fun = lambda model, x: jnp.mean((model(x) - 1) ** 2)

    def step(params, rest, x):
        model = nnx.merge(graph, params, rest)
        options = {"num_microbatches": n, "mesh_axes": "data", "example_streams": False}
        return ja.nnx.value_and_grad(fun, **options)(model, x)

    def expected(params, place):
        is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        own = lambda i: jax.tree.map(lambda x: jax.random.fold_in(x, i) if is_key(x) else x, rest)
        one = lambda d, m, x: fun(nnx.merge(graph, params, own(place(d, m)), copy=True), x)
        over = jax.vmap(
            jax.vmap(one, (None, 0, 0), axis_name="microbatch"), (0, None, 0), axis_name="data"
        )
        return jnp.mean(over(jnp.arange(4), jnp.arange(n), X.reshape(4, n, -1, 3)))

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P()), "check_vma": check_vma}
    actual = jax.jit(jax.shard_map(step, mesh=mesh_of((4, 2), "manual"), **specs))(params, rest, X)
    whole = lambda place: jitted.value_and_grad(lambda params: expected(params, place))(params)
    assert normwise(actual, whole(lambda d, m: n * d + m)) < EXACT
    assert normwise(actual, whole(lambda d, m: m)) > 1e-2  # the same on every device
