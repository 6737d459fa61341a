"""Devices and microbatches together: inside shard_map, every device gets the whole batch's value
and gradient."""

import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum._devices import varying
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, normwise, refused, same
from tests.support.meshes import mesh_of

W = {"a": data(3, 5), "b": data(5, seed=1), "c": data(5, 2, seed=2)}
BATCH = (data(16, 3, seed=3), jnp.abs(data(16, seed=4)) * jnp.float64(jnp.arange(16) % 3 > 0))
MESH = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
CHECKED = pytest.mark.parametrize("check_vma", [True, False])


def rows(w, x):
    return jnp.sum((jnp.tanh(x @ w["a"] + w["b"][None]) @ w["c"]) ** 2, axis=-1)


def loss(w, batch):
    e = rows(w, batch[0])
    return {"token": ja.Mean(jnp.sum(e * batch[1]), jnp.sum(batch[1])), "mean": jnp.mean(e)}


def expected(w, batch):
    e = rows(w, batch[0])
    return jnp.sum(e * batch[1]) / jnp.sum(batch[1]) + jnp.mean(e)


def sharded(fun, out_specs, check_vma):
    return jax.jit(
        jax.shard_map(
            fun, mesh=MESH, in_specs=(P(), P("data")), out_specs=out_specs, check_vma=check_vma
        )
    )


@pytest.mark.parametrize(("n", "check_vma"), covering([2, 3], [False, True]))
def test_value_and_gradient_of_the_whole_batch(n, check_vma):
    fun = ja.value_and_grad(loss, argnums=(0, 1), num_microbatches=n, mesh_axes="data")
    actual = sharded(fun, (P(), (P(), P("data"))), check_vma)(W, BATCH)
    assert normwise(actual, jax.value_and_grad(expected, argnums=(0, 1))(W, BATCH)) < EXACT


@pytest.mark.parametrize("kind", ["manual, checked", "manual, unchecked", "explicit"])
def test_parameters_that_the_compiler_divides_over_another_axis(kind):
    """Data parallel by hand or by type, tensor parallel by the compiler: one axis of the mesh stays
    automatic."""
    types = (AxisType.Explicit if kind == "explicit" else AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    lay = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    w = {
        "a": lay(data(3, 6), None, "model"),
        "b": lay(data(6, seed=1)),
        "c": lay(data(6, 2, seed=2)),
    }
    batch = tuple(lay(x, "data") for x in BATCH)
    step = ja.value_and_grad(
        loss, num_microbatches=2, mesh_axes=None if kind == "explicit" else "data"
    )
    if kind != "explicit":
        specs = {"in_specs": (P(), P("data")), "out_specs": P(), "axis_names": {"data"}}
        step = jax.shard_map(step, mesh=mesh, check_vma=kind == "manual, checked", **specs)
    actual = jax.jit(step)(w, batch)
    assert (
        normwise(jax.device_get(actual), jax.value_and_grad(expected)(*jax.device_get((w, BATCH))))
        < EXACT
    )


@pytest.mark.parametrize(("name", "check_vma"), covering(["token", None], [False, True]))
def test_microbatch_is_differentiated_by_jax(name, check_vma):
    """One scalar and several: the two derivatives of the loop, with a regularizer that counts
    once."""
    square = lambda w: sum(jnp.sum(x**2) for x in jax.tree.leaves(w))
    one = lambda w, b: loss(w, b) if name is None else {name: loss(w, b)[name]}
    ours = lambda w, b: (
        sum(ja.microbatch(one, num_microbatches=2, mesh_axes="data")(w, b).values()) + square(w)
    )
    full = lambda w, b: sum(ja.full_batch(one)(w, b).values()) + square(w)
    actual = sharded(jax.value_and_grad(ours), (P(), P()), check_vma)(W, BATCH)
    assert normwise(actual, jax.value_and_grad(full)(W, BATCH)) < EXACT


@CHECKED
def test_without_mesh_axes_it_is_jax_grad_there(check_vma):
    first = lambda tree: jax.tree.map(lambda x: x[None], tree)
    ours = sharded(
        lambda w, b: first(ja.grad(loss, num_microbatches=3)(w, b)), P("data"), check_vma
    )
    full = sharded(lambda w, b: first(jax.grad(expected)(w, b)), P("data"), check_vma)
    assert normwise(ours(W, BATCH), full(W, BATCH)) < EXACT


@pytest.mark.optimized
@pytest.mark.parametrize(("n", "check_vma"), covering([1, 2, 4], [False, True]))
def test_one_all_reduce_a_step(n, check_vma):
    mean = lambda w, batch: jnp.mean(rows(w, batch[0]))
    fun = sharded(
        ja.value_and_grad(mean, num_microbatches=n, mesh_axes="data"), (P(), P()), check_vma
    )
    hlo = fun.lower(W, BATCH).compile().as_text()
    assert len(re.findall(r" all-reduce\(", hlo)) == 1
    assert not re.search(r"all-gather|all-to-all|collective-permute", hlo)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("entry", ["value_and_grad", "microbatch"])
def test_an_ensemble_over_a_second_axis_of_the_mesh(entry, n):
    """``jax.vmap(…, spmd_axis_name=…)`` around `shard_map`, where JAX's own scan needs
    check_vma=False too."""
    mesh = jax.make_mesh((2, 4), ("model", "data"), axis_types=(AxisType.Auto,) * 2)
    members, (x, _) = data(4, 3, 5), BATCH
    mean = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)

    def gradients(check_vma):
        options = {"num_microbatches": n, "mesh_axes": "data"}
        one = (
            ja.grad(mean, **options)
            if entry == "value_and_grad"
            else jax.grad(ja.microbatch(mean, **options))
        )
        over = jax.shard_map(
            one, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma
        )
        return jax.jit(jax.vmap(over, in_axes=(0, None), spmd_axis_name="model"))(members, x)

    expected = jax.vmap(jax.grad(mean), in_axes=(0, None))(members, x)
    assert normwise(gradients(False), expected) < EXACT
    refused(
        lambda: gradients(True), "spmd_axis_name='model'", "pass check_vma=False to jax.shard_map"
    )


@pytest.mark.optimized
def test_a_loop_by_hand_reduces_once_a_microbatch():
    """The negative control of the law above: parameters that are not cast to varying."""

    def by_hand(w, batch):
        add = lambda g, x: (
            jax.tree.map(jnp.add, g, jax.grad(lambda w: jnp.mean(rows(w, x)))(w)),
            None,
        )
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, w), batch[0].reshape(2, 2, 3))[0]

    hlo = sharded(by_hand, P(), True).lower(W, BATCH).compile().as_text()
    body = hlo[: hlo.index("ENTRY")]
    assert re.search(r" all-reduce\(", body)


@CHECKED
def test_keys_rows_and_extrema_over_shards(check_vma):
    def fun(x, key, own):
        draws = jax.vmap(jax.random.uniform)(own)
        return {
            "rows": ja.Concat(draws), "stack": ja.Stack(jax.random.uniform(key)),
            "max": ja.Max(jnp.max(x)),
            "min": ja.Min(jnp.min(x)), "sum": ja.Sum(jnp.sum(x)), "count": ja.Sum(x.size),
        }  # fmt: skip

    x, key = data(16), jax.random.key(5)
    specs = {
        "rows": P("data"),
        "stack": P("data"),
        "max": P(),
        "min": P(),
        "sum": P(),
        "count": P(),
    }
    loop = ja.microbatch(
        fun, in_axes=(0, ja.KEY, ja.EXAMPLE_KEY), num_microbatches=2, mesh_axes="data"
    )
    over = jax.shard_map(
        lambda k, x: loop(x, k, k),
        mesh=MESH,
        in_specs=(P(), P("data")),
        out_specs=specs,
        check_vma=check_vma,
    )
    actual = jax.jit(over)(key, x)
    draw = lambda i: float(jax.random.uniform(jax.random.fold_in(key, i)))
    assert actual["rows"].tolist() == [draw(i) for i in range(16)]
    assert actual["stack"].tolist() == [draw(i) for i in range(8)]
    assert (float(actual["max"]), float(actual["min"]), int(actual["count"])) == (
        float(x.max()),
        float(x.min()),
        16,
    )
    assert normwise(actual["sum"], jnp.sum(x)) < EXACT


KEYS = itertools.product(["threefry2x32", "rbg", "unsafe_rbg"], [True, False])
LOOPS = itertools.product([True, False], ["contiguous", "strided"])


@pytest.mark.parametrize(("keys", "loops"), covering(list(KEYS), list(LOOPS)), ids=str)
def test_example_keys_on_a_mesh_are_those_of_split_over_all_shards(keys, loops):
    (impl, partitionable), (check_vma, split) = keys, loops
    options = {"num_microbatches": 2, "mesh_axes": "data", "split": split}
    with jax.threefry_partitionable(partitionable):
        key, x = jax.random.key(5, impl=impl), data(16)
        loop = ja.microbatch(
            lambda x, keys: ja.Concat(keys), in_axes=(0, ja.EXAMPLE_KEY), **options
        )
        whole = lambda x: jax.random.key_data(loop(x, key))
        found = sharded(lambda _, x: whole(x), P("data"), check_vma)(W, x)
        assert same(found, jax.random.key_data(jax.random.split(key, 16)))
        own = jax.random.key_data(jax.random.split(key, 4))
        assert not same(found, jnp.tile(own, (4, 1)))  # as if each shard split the key anew


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "legacy"])
@pytest.mark.parametrize("role", [ja.KEY, ja.EXAMPLE_KEY], ids=str)
def test_keys_are_traced_with_the_types_with_which_they_run(role, key):
    """Each shard has keys of its own, so that JAX casts nothing that meets them."""
    seen = []
    fun = lambda x, own: seen.append(varying.varying_axes(own)) or ja.Sum(jnp.sum(x))
    loop = ja.microbatch(fun, in_axes=(0, role), num_microbatches=2, mesh_axes="data")
    over = jax.shard_map(loop, mesh=MESH, in_specs=(P("data"), P()), out_specs=P())
    jax.eval_shape(over, data(16), key)
    assert set(seen) == {frozenset({"data"})}


def test_what_jax_refuses_of_fun_comes_through():
    """A loss without a collective over the loop is never run where JAX does not check it."""
    again = lambda w, batch: jnp.mean(rows(w, jax.lax.pcast(batch[0], "data", to="varying")))
    over = sharded(ja.grad(again, num_microbatches=2, mesh_axes="data"), P(), True)
    refused(lambda: jax.eval_shape(over, W, BATCH), "pcast", "varying")


def test_bad_meshes_are_refused():
    carried = lambda w, x, s: (jnp.mean(x @ w["a"]), ja.Carry(s))
    fun = lambda w, x: ja.value_and_grad(
        carried, has_aux=True, in_axes=(None, 0, ja.CARRY), num_microbatches=2, mesh_axes="data"
    )(w, x, 0.0)
    refused(lambda: jax.eval_shape(sharded(fun, P(), True), W, BATCH[0]), "CARRY", "mesh_axes")
    refused(
        lambda: jax.eval_shape(
            sharded(ja.grad(loss, num_microbatches=2, mesh_axes="model"), P(), True), W, BATCH
        ),
        "'model'",
        "shard_map",
    )
    clash = ja.grad(loss, num_microbatches=2, axis_name="data")
    refused(lambda: jax.eval_shape(sharded(clash, P(), True), W, BATCH), "'data'", "axis_name")


TENSOR = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
DIVIDED = {"a": P(None, "model"), "b": P("model"), "c": P("model", None)}


def divided(w, batch):
    """A network whose hidden units are divided over devices, as Megatron's: one sum over `model` at
    the end."""
    hidden = jnp.tanh(batch[0] @ w["a"] + w["b"][None])
    e = jnp.sum(jax.lax.psum(hidden @ w["c"], "model") ** 2, axis=-1)
    return ja.Mean(jnp.sum(e * batch[1]), jnp.sum(batch[1]))


def undivided(w, batch):
    return jnp.sum(rows(w, batch[0]) * batch[1]) / jnp.sum(batch[1])


def in_two_ways(fun, **options):
    """Value and gradient by us, and by JAX through `microbatch`."""
    through = ja.microbatch(fun, num_microbatches=2, mesh_axes="data", **options)
    return {
        "value_and_grad": ja.value_and_grad(fun, num_microbatches=2, mesh_axes="data", **options),
        "microbatch": lambda w, b: jax.value_and_grad(lambda w: through(w, b))(w),
    }


@pytest.mark.parametrize("way", ["value_and_grad", "microbatch"])
@pytest.mark.parametrize("scaled", [False, True], ids=["divided", "beside a shared one"])
def test_parameters_divided_over_another_axis(scaled, way):
    """A shared parameter's gradient is summed over the devices that hold parts of what it meets,
    and counted once."""
    w = {"a": data(3, 6), "b": data(6, seed=1), "c": data(6, 2, seed=2)} | (
        {"s": data(3, seed=5)} if scaled else {}
    )
    own = lambda fun: lambda w, b: fun(w, (b[0] * w["s"][None], b[1]) if scaled else b)
    specs = DIVIDED | ({"s": P()} if scaled else {})
    step = in_two_ways(own(divided))[way]
    actual = jax.jit(
        jax.shard_map(step, mesh=TENSOR, in_specs=(specs, P("data")), out_specs=(P(), specs))
    )(w, BATCH)
    assert normwise(actual, jax.value_and_grad(own(undivided))(w, BATCH)) < EXACT


def test_divided_parameters_where_they_are_not_supported():
    def over_microbatches(w, batch):
        return divided(
            w, (batch[0] - jax.lax.pmean(jnp.mean(batch[0], axis=0), "microbatch")[None], batch[1])
        )

    skip = ja.accumulators.skip_nonfinite()
    for fun in (
        ja.grad(over_microbatches, num_microbatches=2, mesh_axes="data"),
        lambda w, b: ja.grad(divided, num_microbatches=2, mesh_axes="data", accumulator=skip)(w, b),
    ):
        w = {"a": data(3, 6), "b": data(6, seed=1), "c": data(6, 2, seed=2)}
        over = jax.shard_map(fun, mesh=TENSOR, in_specs=(DIVIDED, P("data")), out_specs=DIVIDED)
        refused(
            lambda over=over, w=w: jax.eval_shape(over, w, BATCH),
            "'model'",
            error=(ValueError, NotImplementedError),
        )


def test_a_lookup_that_says_where_its_rows_are():
    """JAX computes it under a mesh of its own, whose axes are automatic."""

    def loss(table, ids):
        rows = table.at[ids].get(out_sharding=P("data"))
        others = table.at[ids // 2].get(out_sharding=P("data"))
        return ja.Mean(jnp.sum(jnp.tanh(rows * others) ** 2), len(ids))

    table, ids = data(8, 3), jnp.arange(16) % 7
    mesh = mesh_of((4, 2), "explicit")
    whole = lambda table: jnp.sum(jnp.tanh(table[ids] * table[ids // 2]) ** 2) / 16
    expected = jax.grad(whole)(table)
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, P()), jax.device_put(ids, P("data"))
        actual = jax.jit(ja.grad(loss, num_microbatches=2))(*placed)
    assert normwise(actual, expected) < EXACT
