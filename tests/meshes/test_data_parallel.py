"""A batch divided over devices: on automatic, explicit and manual meshes of any shape, the whole
batch's numbers.

Eight simulated devices.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum.testing import collectives
from tests.support.covering import covering
from tests.support.helpers import EXACT, INEXACT, normwise, refused, same
from tests.support.meshes import EXPLICIT, KINDS, MASK, ROWS, W, X, laid_out, mesh_of, on_mesh

KEY = jax.random.key(7)
BYTES = sum(x.nbytes for x in jax.tree.leaves(W))
SPECS = {"rows": P("data"), "max": P(), "min": P(), "sum": P(), "mean": P()}


def hidden(w, x):
    return jnp.tanh(x @ w["a"] + w["b"][None]) @ w["c"]


def loss(w, batch, keys):
    """Two denominators, a mask that is zero for whole examples, dropout, and one output of each
    kind."""
    x, mask = batch
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (3,)))(keys)
    e = jnp.sum(hidden(w, jnp.where(keep, x, 0.0)) ** 2, axis=-1)
    terms = {"token": ja.Mean(jnp.sum(e * mask), jnp.sum(mask)), "mean": jnp.mean(e)}
    aux = {
        "rows": ja.Concat(e),
        "max": ja.Max(jnp.max(e)),
        "min": ja.Min(jnp.min(e)),
        "sum": ja.Sum(jnp.sum(e)),
    }
    return terms, aux | {"mean": ja.Mean(jnp.sum(mask), mask.size)}


IN_AXES = (None, 0, ja.EXAMPLE_KEY)


@functools.cache
def expected():
    """One device, one pass, float64."""

    def summed(w):
        terms, aux = ja.full_batch(loss, in_axes=IN_AXES)(w, (X, MASK), KEY)
        return sum(terms.values()), aux

    return jax.jit(jax.value_and_grad(summed, has_aux=True))(W)


def step_for(mesh, axes, kind, **options):
    """The call that a user writes for the kind of mesh."""
    if kind == "automatic":
        return ja.value_and_grad(loss, has_aux=True, in_axes=IN_AXES, split="strided", **options)
    if kind == "explicit":
        return ja.value_and_grad(loss, has_aux=True, in_axes=IN_AXES, **options)
    own = ja.value_and_grad(loss, has_aux=True, in_axes=IN_AXES, mesh_axes=axes, **options)
    outs = ((P(), SPECS | {"rows": P(axes)}), P())
    return jax.shard_map(own, mesh=mesh, in_specs=(P(), P(axes), P()), out_specs=outs)


@functools.cache
def compiled(shape, axes, kind, n):
    mesh = mesh_of(shape, kind)
    step = step_for(mesh, axes, kind, num_microbatches=n)
    return jax.jit(step).lower(*laid_out(mesh, axes), KEY).compile()


LAYOUTS = [
    ((8,), ("data",)),
    ((4, 2), ("data",)),
    ((2, 4), ("data", "other")),
    ((2, 2), ("other",)),
]
MESHES = list(itertools.product(LAYOUTS, sorted(KINDS)))


@pytest.mark.parametrize(("mesh", "n"), covering(MESHES, [2, 4]), ids=str)
def test_any_mesh_gives_the_whole_batchs_numbers(mesh, n):
    (shape, axes), kind = mesh
    actual = compiled(shape, axes, kind, n)(*laid_out(mesh_of(shape, kind), axes), KEY)
    assert normwise(actual, expected()) < EXACT


@pytest.mark.parametrize("kind", ["explicit", "manual"])
@pytest.mark.parametrize("n", [1, 4])
def test_gradients_are_reduced_once_a_step(kind, n):
    """Promised for explicit meshes and for shard_map: whatever the number of microbatches."""
    found = collectives(compiled((4, 2), ("data",), kind, n))
    large = [c for c in found if c.bytes >= BYTES]
    assert [(c.kind, c.times, c.loops) for c in large] == [("all-reduce", 1, 0)]
    assert all(c.loops == 0 and c.kind == "all-reduce" for c in found)


def test_on_an_automatic_mesh_the_compiler_reduces_at_every_microbatch():
    """What is reported and not promised: the compiler's choice on CPU. The batch stays where it
    is."""
    for n in (2, 4):
        found = collectives(compiled((4, 2), ("data",), "automatic", n))
        assert sum(c.times for c in found if c.bytes >= min(x.nbytes for x in W.values())) >= n
        assert all(c.kind == "all-reduce" for c in found)


def test_a_contiguous_split_of_an_automatic_mesh_moves_the_batch():
    """The negative control: why the split is strided."""
    mesh = mesh_of((4, 2), "automatic")
    step = ja.value_and_grad(loss, has_aux=True, in_axes=IN_AXES, num_microbatches=4)
    found = collectives(jax.jit(step).lower(*laid_out(mesh, ("data",)), KEY).compile())
    assert {c.kind for c in found} - {"all-reduce"}


def test_a_loop_by_hand_reduces_at_every_microbatch():
    """The negative control of the one all-reduce, and the classic wrong answer beside the right
    one."""
    mesh = mesh_of((4, 2), "manual")
    mean = lambda w, x: jnp.mean(jnp.sum(hidden(w, x) ** 2, axis=-1))

    def by_hand(w, x):
        add = lambda g, rows: (jax.tree.map(jnp.add, g, jax.grad(mean)(w, rows)), None)
        return lax.scan(add, jax.tree.map(jnp.zeros_like, w), x.reshape(2, -1, 3))[0]

    over = jax.shard_map(by_hand, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    program = jax.jit(over).lower(W, X).compile()
    found = collectives(program)
    assert max(c.loops for c in found) == 1
    assert sum(c.bytes * c.times for c in found) >= 2 * BYTES
    assert normwise(program(W, X), jax.grad(mean)(W, X)) > 0.1  # eight means, added


def mean_of_weighted_means(w, batch):
    """The classic wrong answer on a mesh: every device divides by its own weight."""
    e = jnp.sum(hidden(w, batch[0]) ** 2, axis=-1)
    return lax.pmean(jnp.sum(e * batch[1]) / jnp.sum(batch[1]), "data")


def test_every_device_dividing_by_its_own_weight_is_wrong():
    mesh = mesh_of((8,), "manual")
    over = jax.shard_map(
        mean_of_weighted_means, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    e = jnp.sum(hidden(W, X) ** 2, axis=-1)
    right = jnp.sum(e * MASK) / jnp.sum(MASK)
    ours = lambda w, b: ja.Mean(
        jnp.sum(jnp.sum(hidden(w, b[0]) ** 2, axis=-1) * b[1]), jnp.sum(b[1])
    )
    laid = laid_out(mesh_of((8,), "explicit"), ("data",))
    assert normwise(ja.microbatch(ours, num_microbatches=2)(*laid), right) < EXACT
    assert normwise(jax.jit(over)(W, (X, MASK)), right) > 1e-3


# -- explicit meshes: what they choose by themselves -----------------------------------------------


def mean(w, x):
    return jnp.mean(jnp.sum(hidden(w, x) ** 2, axis=-1))


@pytest.mark.parametrize(("context", "compile_"), covering([True, False], [True, False]))
def test_with_and_without_a_context_compiled_and_not(context, compile_):
    step = ja.value_and_grad(mean, num_microbatches=4)
    step = jax.jit(step) if compile_ else step
    w, x = laid_out(EXPLICIT, "data")
    with jax.set_mesh(EXPLICIT) if context else jax.enable_x64(True):
        value, grads = step(w, x[0])
    assert normwise((value, grads), jax.value_and_grad(mean)(W, X)) < EXACT
    assert all(
        jax.typeof(grads[name]).sharding.spec == jax.typeof(w[name]).sharding.spec for name in W
    )


def test_rows_and_their_gradients_stay_on_their_device_in_the_batchs_order():
    both = lambda w, x: (mean(w, x), ja.Concat(x[:, :2]))
    (_, rows), (_, grad) = on_mesh(
        ja.value_and_grad(both, argnums=(0, 1), has_aux=True, num_microbatches=2)
    )
    assert same(rows, X[:, :2])
    assert normwise(grad, jax.grad(mean, argnums=1)(W, X)) < EXACT
    assert jax.typeof(grad).sharding.spec[0] == jax.typeof(rows).sharding.spec[0] == "data"


@pytest.mark.parametrize(
    "options", [{"num_microbatches": 2}, {"microbatch_size": 16}, {"microbatch_size": 99}], ids=str
)
def test_sizes_are_those_of_the_whole_batch(options):
    seen = []
    noted = lambda w, x: seen.append(len(x)) or mean(w, x)
    assert normwise(on_mesh(ja.grad(noted, audit=None, **options)), jax.grad(mean)(W, X)) < EXACT
    assert seen == [
        8 if options == {"microbatch_size": 99} else 4
    ]  # one device's rows of one microbatch, traced once


def test_a_microbatch_takes_the_rows_of_every_shard_that_the_split_says():
    """Of 16 rows on 4 devices, 2 microbatches: consecutive rows of each, or every other row."""
    x = jax.device_put(jnp.arange(16.0), ROWS)
    seen = lambda x, s: (ja.Concat(x), ja.Stack(x), ja.Carry(s))  # a state sees whole microbatches
    rows = {"contiguous": [0, 1, 4, 5, 8, 9, 12, 13], "strided": [0, 2, 4, 6, 8, 10, 12, 14]}
    for split, first in rows.items():
        loop = ja.microbatch(seen, num_microbatches=2, in_axes=(0, ja.CARRY), split=split)
        whole, each, _ = loop(x, jnp.zeros(()))
        assert each[0].tolist() == first
        assert sorted(each[0].tolist() + each[1].tolist()) == whole.tolist() == x.tolist()


def pairs(w, x):
    """DPO: a chosen and a rejected answer in adjacent rows."""
    scores = jnp.sum(hidden(w, x), axis=-1).reshape(-1, 2)
    return -jnp.mean(jax.nn.log_sigmoid(scores[:, 0] - scores[:, 1]))


def groups(w, x):
    """GRPO: the rewards of four adjacent answers, centred."""
    scores = jnp.sum(hidden(w, x), axis=-1).reshape(-1, 4)
    apart = scores - jnp.mean(scores, axis=1, keepdims=True)
    return jnp.mean(jnp.tanh(scores) * apart)


def with_a_state(loss):
    fun = lambda w, x, s: (
        loss(w, x),
        {"state": ja.Carry(s + jnp.sum(x)), "rows": ja.Concat(x[:, 0])},
    )
    return fun, {"has_aux": True, "in_axes": (None, 0, ja.CARRY)}, (jnp.zeros(()),)


def with_rows(loss):
    return lambda w, x: (loss(w, x), {"rows": ja.Concat(x[:, 0])}), {"has_aux": True}, ()


@INEXACT
@pytest.mark.parametrize(
    ("loss", "n", "around"),
    [
        (pairs, 2, with_a_state),
        (pairs, 4, with_rows),
        (groups, 2, with_rows),
        (groups, 2, with_a_state),
    ],
)
def test_groups_of_adjacent_rows_stay_together(loss, n, around):
    fun, options, state = around(loss)
    for split in ("contiguous", "strided"):
        step = ja.value_and_grad(fun, num_microbatches=n, split=split, **options)
        (value, aux), grads = on_mesh(step, *state)
        apart = normwise((value, grads), jax.value_and_grad(loss)(W, X))
        assert (
            apart < EXACT if split == "contiguous" else apart > 1e-3
        )  # strided groups hold other rows
        assert same(aux["rows"], X[:, 0])


def test_global_arrays_are_cut_in_place():
    fun, options, state = with_a_state(pairs)
    step = ja.value_and_grad(fun, num_microbatches=4, **options)
    put = lambda x, spec: jax.device_put(x, NamedSharding(EXPLICIT, spec))
    args = {name: put(x, P()) for name, x in W.items()}, put(X, P("data")), *state
    found = collectives(jax.jit(step).lower(*args).compile())
    assert {c.kind for c in found} == {"all-reduce"}


@pytest.mark.parametrize("split", ["contiguous", "strided"])
def test_example_keys_are_those_of_the_whole_batch_under_either_split(split):
    draws = lambda x, keys: ja.Concat(jax.vmap(jax.random.uniform)(keys))
    draws_of = lambda loop, *state: loop(jax.device_put(X, ROWS), KEY, *state)
    expected = [float(jax.random.uniform(jax.random.fold_in(KEY, i))) for i in range(len(X))]
    axes = (0, ja.EXAMPLE_KEY)
    by_device = ja.microbatch(draws, num_microbatches=4, in_axes=axes, split=split)
    assert draws_of(by_device).tolist() == expected
    carried = lambda x, keys, s: (draws(x, keys), ja.Carry(s + 1))
    globally = ja.microbatch(carried, num_microbatches=4, in_axes=(*axes, ja.CARRY), split=split)
    assert draws_of(globally, jnp.zeros(()))[0].tolist() == expected


def test_jax_differentiates_microbatch_on_a_mesh():
    """A regularizer counts once; the second derivative too is that of the whole batch."""
    ours = lambda w, x: ja.microbatch(mean, num_microbatches=2)(w, x) + jnp.sum(w["c"] ** 2)
    full = lambda w, x: mean(w, x) + jnp.sum(w["c"] ** 2)
    norm = lambda f: lambda w, x: sum(jnp.sum(g**2) for g in jax.grad(f)(w, x).values())
    assert normwise(on_mesh(jax.value_and_grad(ours)), jax.value_and_grad(full)(W, X)) < EXACT
    assert normwise(on_mesh(jax.grad(norm(ours))), jax.grad(norm(full))(W, X)) < EXACT


def test_tensor_parallel_parameters_stay_divided():
    """A second explicit axis divides the model; the loop is manual over the batch's axis alone."""
    wide = lambda w, x: jnp.mean(jnp.tanh(x @ w["a"] + w["b"][None]) ** 2)
    spec = {"a": P(None, "other"), "b": P("other"), "c": P()}
    w = {name: jax.device_put(x, NamedSharding(EXPLICIT, spec[name])) for name, x in W.items()}
    value, grads = jax.jit(ja.value_and_grad(wide, num_microbatches=2))(w, jax.device_put(X, ROWS))
    assert normwise((value, grads), jax.value_and_grad(wide)(W, X)) < EXACT
    assert all(jax.typeof(grads[name]).sharding.spec == spec[name] for name in ("a", "b"))


def test_keys_differ_between_devices_and_microbatches():
    draw = ja.microbatch(
        lambda x, key: ja.Stack(jax.random.uniform(key)), num_microbatches=2, in_axes=(0, ja.KEY)
    )
    drawn = draw(jax.device_put(X, ROWS), KEY)
    assert sorted(set(drawn.tolist())) == sorted(
        float(jax.random.uniform(jax.random.fold_in(KEY, i))) for i in range(8)
    )


def test_outputs_are_laid_out_as_the_parameters_that_they_come_from():
    """Tensor parallelism beside data parallelism: sums, extrema and rows whose last axis is
    divided."""

    def outputs(w, x):
        h = jnp.tanh(x @ w)
        reduced = {
            "sum": ja.Sum(jnp.sum(h, 0)),
            "max": ja.Max(jnp.max(h, 0)),
            "min": ja.Min(jnp.min(h, 0)),
        }
        return jnp.mean(h**2), reduced | {"rows": ja.Concat(h), "last": ja.Last(h[-1])}

    h = jnp.tanh(X @ W["a"])
    aux = {"sum": h.sum(0), "max": h.max(0), "min": h.min(0), "rows": h, "last": h[-1]}
    right = (jnp.mean(h**2), aux), jax.grad(lambda w: jnp.mean(jnp.tanh(X @ w) ** 2))(W["a"])
    step = jax.jit(ja.value_and_grad(outputs, has_aux=True, num_microbatches=4))
    (value, found), grad = step(
        jax.device_put(W["a"], NamedSharding(EXPLICIT, P(None, "other"))), jax.device_put(X, ROWS)
    )
    assert normwise(((value, found), grad), right) < EXACT
    assert grad.sharding.spec == P(None, "other")
    assert {name: x.sharding.spec for name, x in found.items()} == dict.fromkeys(
        aux, P("other")
    ) | {"rows": P("data", "other")}
    first = jnp.sum(jnp.tanh(X[:8] @ W["a"]), 0)
    assert normwise(first, aux["sum"]) > 1e-3  # one microbatch's


def one_product(w, x):
    """JAX adds no reduced parameter to rows."""
    return jnp.mean(jnp.tanh(x @ w["a"]) ** 2) + jnp.mean(jnp.sin(x) @ w["a"] @ w["c"])


SUMS = {
    # the type of the parameters: a loss of them
    "reduced": one_product,
    "unreduced": lambda w, x: one_product(
        jax.tree.map(lambda a: jax.sharding.reshard(a, P()), w), x
    ),
}


@pytest.mark.parametrize(("kind", "n"), [*((kind, 2) for kind in SUMS), ("reduced", 1)])
def test_parameters_that_are_reduced_or_not_yet_have_gradients_of_jaxs_types(kind, n):
    """The gradient of a reduced parameter is a sum over devices that JAX has still to take, and the
    other way round."""

    def gradient(step):
        types = []

        def of(w, x):
            w = jax.tree.map(lambda a: jax.sharding.reshard(a, P(**{kind: {"data"}})), w)
            grads = step(w, x)
            types.append(jax.tree.map(lambda g: jax.typeof(g).sharding.spec, grads))
            return jax.tree.map(lambda g: jax.sharding.reshard(g, P()), grads)

        with jax.set_mesh(EXPLICIT):
            return on_mesh(of), types[0]

    loss = SUMS[kind]
    expected, types = gradient(jax.grad(loss))
    for step in (
        ja.grad(loss, num_microbatches=n),
        jax.grad(ja.microbatch(loss, num_microbatches=n)),
    ):
        actual, own = gradient(step)
        assert own == types
        assert normwise(actual, expected) < EXACT
    assert normwise(expected, jax.grad(one_product)(W, X)) < EXACT


# -- bad meshes ------------------------------------------------------------------------------------


def test_bad_layouts_are_refused():
    w, x = W, jax.device_put(X, ROWS)
    other = jax.device_put(X, NamedSharding(EXPLICIT, P("other")))
    call = lambda **options: lambda: ja.grad(mean, **options)(w, x)
    refused(call(num_microbatches=3), "num_microbatches=3", "32 examples", "4 shards", "'data'")
    refused(
        call(num_microbatches=16), "num_microbatches=16", "microbatches of 2", "divides the 8 rows"
    )
    refused(call(microbatch_size=6), "microbatch_size=6", "6 and 2", "4 times")
    refused(call(num_microbatches=2, gather="twice"), "gather", "'twice'")
    two = lambda w, b: mean(w, b[0]) + mean(w, b[1])
    refused(
        lambda: ja.grad(two, num_microbatches=2)(w, (x, other)),
        "argument 1[0]",
        "'data'",
        "'other'",
    )
    refused(lambda: ja.grad(two, num_microbatches=2)(w, (x, X)), "argument 1[1]", "no axis")


def test_a_mesh_axis_with_the_name_of_the_loop_is_refused():
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("microbatch",), axis_types=(kind,))
        x = jax.device_put(X, NamedSharding(mesh, P("microbatch")))
        refused(lambda x=x: ja.grad(mean, num_microbatches=2)(W, x), "'microbatch'", "axis_name")
        renamed = ja.grad(mean, num_microbatches=2, axis_name="loop", split="strided")(W, x)
        assert normwise(renamed, jax.grad(mean)(W, X)) < EXACT


def test_a_batch_that_mesh_axes_do_not_divide_is_refused():
    mesh = mesh_of((4, 2), "manual")
    step = ja.grad(mean, num_microbatches=2, mesh_axes=("data", "other"))
    over = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    refused(lambda: over(W, X), "'other'", "['data']", "in_specs")


def test_last_is_the_last_shards():
    mesh = mesh_of((4, 2), "manual")
    last = ja.microbatch(
        lambda x: ja.Last((x[-1], x[-1] > 0)), in_axes=(0,), num_microbatches=2, mesh_axes="data"
    )
    for check_vma in (True, False):
        over = jax.shard_map(
            last, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma
        )
        assert same(jax.jit(over)(X[:, 0]), (X[-1, 0], X[-1, 0] > 0))
    constant = ja.microbatch(
        lambda x: ja.Last(jnp.float64(3)), in_axes=(0,), num_microbatches=2, mesh_axes="data"
    )
    over = jax.shard_map(constant, mesh=mesh, in_specs=P("data"), out_specs=P())
    assert float(jax.jit(over)(X[:, 0])) == 3
