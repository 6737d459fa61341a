"""The plan: what fits, found by few compilations, equal to what the compiler says of the program
that the user runs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum._jaxpr import compat
from jaxaccum._jaxpr.flops import flops
from jaxaccum._tools.plan import Plan, Row, candidates
from tests.support.helpers import refused

pytestmark = pytest.mark.optimized

FLOAT, LAYERS, WIDTH, BATCH = jnp.float32, 8, 64, 4096
MESH = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
LIMIT = 3_500_000


def loss(params, x):
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, params)
    return jnp.mean(h**2)


def shapes(batch_size=BATCH, spec=None):
    rest, rows = (
        (None, None) if spec is None else (NamedSharding(MESH, P()), NamedSharding(MESH, spec))
    )
    params = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), FLOAT, sharding=rest)
    return params, jax.ShapeDtypeStruct((batch_size, WIDTH), FLOAT, sharding=rows)


@pytest.fixture(scope="module", autouse=True)
def _single_precision():
    with jax.enable_x64(False):
        yield


def analysis(microbatch_size, args):
    step = jax.jit(ja.value_and_grad(loss, microbatch_size=microbatch_size))
    return step.lower(*args).compile().memory_analysis()


@pytest.fixture(scope="module")
def planned(_single_precision):
    return ja.plan(loss, *shapes(), memory_bytes=LIMIT)


def test_the_best_is_the_largest_that_fits(planned):
    """The oracle compiles the program that the user will run, at the best size and at the next
    one."""
    sizes = [row.microbatch_size for row in planned.rows]
    assert sizes == [2**i for i in range(13)]
    place = sizes.index(planned.best.microbatch_size)
    assert 0 < place < len(sizes) - 1
    for row, within in ((planned.best, True), (planned.rows[place + 1], False)):
        real = analysis(row.microbatch_size, shapes())
        total = real.temp_size_in_bytes + real.argument_size_in_bytes + real.output_size_in_bytes
        assert (total <= LIMIT) is within is row.fits
    assert (
        planned.best.temp_bytes
        == analysis(planned.best.microbatch_size, shapes()).temp_size_in_bytes
    )


def test_the_prediction_is_within_a_tenth_of_the_compiled_figure(planned):
    assert planned.best.predicted_temp_bytes == pytest.approx(planned.best.temp_bytes, rel=0.1)
    for row in planned.rows[7], planned.rows[10]:
        assert not row.compiled
        assert row.temp_bytes == pytest.approx(
            analysis(row.microbatch_size, shapes()).temp_size_in_bytes, rel=0.1
        )


def test_few_programs_are_compiled_and_none_is_run(planned):
    assert planned.best.compiled
    assert sum(row.compiled for row in planned.rows) <= 4
    ran = []
    counted = lambda w, x: (
        loss(w, x) + jax.pure_callback(lambda: ran.append(1) or jnp.float32(0), jnp.float32(0))
    )
    ja.plan(counted, *shapes(64), memory_bytes=LIMIT, microbatch_size=16)
    assert not ran


def test_every_iteration_of_every_loop_counts(planned):
    """Three products of matrices a layer; XLA's own count sees one iteration of each loop."""
    products = 6 * LAYERS * WIDTH**2 * BATCH
    for row in planned.rows[5:]:  # below, adding the gradients up shows
        assert row.flops == pytest.approx(products, rel=0.1)
        assert row.num_microbatches * row.microbatch_size == BATCH


def test_flops_of_one_device():
    a, b = jnp.ones((6, 4), FLOAT), jnp.ones((4, 5), FLOAT)
    count = lambda fun, *args: flops(jax.make_jaxpr(fun)(*args).jaxpr)
    assert count(jnp.dot, a, b) == 2 * 6 * 4 * 5
    assert count(lambda a: lax.fori_loop(0, 7, lambda _, x: x + a, a), a) == 7 * (
        a.size + 1
    )  # and the counter
    assert count(lambda a: lax.cond(True, lambda: jnp.tanh(a), lambda: a), a) == a.size
    assert count(jax.checkpoint(jnp.tanh), a) == a.size
    image, kernel = jnp.ones((1, 9, 2), FLOAT), jnp.ones((3, 2, 5), FLOAT)
    conv = lambda x, k: lax.conv_general_dilated(
        x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    assert count(conv, image, kernel) == 2 * 9 * 5 * 3 * 2
    over = jax.shard_map(jnp.tanh, mesh=MESH, in_specs=P("data"), out_specs=P("data"))
    assert count(over, jnp.ones((8, 2))) == 8 * 2 / 4


@pytest.mark.parametrize(
    "options", [{"split": "strided"}, {"mesh_axes": "data"}], ids=["automatic", "manual"]
)
def test_the_bytes_are_those_of_one_device_of_the_mesh(options):
    args = shapes(1024, P("data"))
    plan = ja.plan(loss, *args, argnums=(0, 1), memory_bytes=2_500_000, **options)
    size, manual = plan.best.microbatch_size, "mesh_axes" in options
    assert all(row.microbatch_size % (1 if manual else 4) == 0 for row in plan.rows)
    assert plan.rows[-1].microbatch_size == (256 if manual else 1024)
    step = ja.value_and_grad(loss, argnums=(0, 1), microbatch_size=size, **options)
    if manual:
        out = (P(), (P(), P("data")))
        step = jax.shard_map(step, mesh=MESH, in_specs=(P(), P("data")), out_specs=out)
    real = jax.jit(step).lower(*args).compile().memory_analysis()
    assert plan.best.temp_bytes == pytest.approx(real.temp_size_in_bytes, rel=0.02)
    assert plan.best.flops == pytest.approx(6 * LAYERS * WIDTH**2 * 1024 / 4, rel=0.2)


def test_everything_that_value_and_grad_takes():
    """Aux, carried state, keys, padding, and a Python number in the place of a parameter."""

    def full(w, batch, key, state, count, flag):
        assert flag == "train"
        x, mask = batch["x"], (jnp.arange(batch["x"].shape[0]) < count).astype(FLOAT)
        noise = jax.random.normal(key, x.shape, FLOAT)
        return ja.Mean(jnp.sum(mask * w * jnp.sum(x * noise, axis=1)), jnp.sum(mask)), ja.Carry(
            state + 1
        )

    batch = {"x": jax.ShapeDtypeStruct((12, 3), FLOAT)}
    axes = (None, 0, ja.KEY, ja.CARRY, None, None)
    plan = ja.plan(
        full, 1.0, batch, jax.random.key(0), 0, 7, "train",
        in_axes=axes, has_aux=True, num_examples_argnum=4, memory_bytes=10**6,
    )  # fmt: skip
    assert plan.best.microbatch_size == 12
    assert [row.microbatch_size for row in plan.rows] == [1, 2, 3, 4, 6, 8, 12]


def test_it_prints_as_a_table(planned):
    lines = str(planned).splitlines()
    assert len(lines) == len(planned.rows) + 2
    (best,) = [line for line in lines if line.startswith("best")]
    assert best.split()[1:3] == [
        str(planned.best.microbatch_size),
        str(planned.best.num_microbatches),
    ]
    assert all(
        word in lines[0]
        for word in ("microbatch_size", "num_microbatches", "temporary", "total", "flops")
    )


def normalized(params, x):
    """Statistics of the whole batch, at two cuts."""
    h = jnp.tanh(x @ params[0])
    mean = lax.pmean(jnp.mean(h, axis=0, keepdims=True), "microbatch")
    variance = lax.pmean(jnp.mean((h - mean) ** 2, axis=0, keepdims=True), "microbatch")
    return jnp.mean(
        (h - mean) ** 2 * lax.rsqrt(variance + 1) * jnp.arange(WIDTH, dtype=FLOAT)[None]
    )


@pytest.fixture(scope="module")
def planned_coupled(_single_precision):
    return ja.plan(normalized, *shapes(1536), memory_bytes=2_000_000)


def test_a_coupled_loss_is_planned_under_every_schedule(planned_coupled):
    plan, best = planned_coupled, planned_coupled.best
    assert {row.memory for row in plan.rows} == {"min", None, "store"}
    assert {row.microbatch_size for row in plan.rows} == set(
        candidates(1536, equal=True)
    )  # powers of two among them
    step = jax.jit(
        ja.value_and_grad(normalized, microbatch_size=best.microbatch_size, memory=best.memory)
    )
    real = step.lower(*shapes(1536)).compile().memory_analysis()
    assert best.temp_bytes == real.temp_size_in_bytes
    assert best.total_bytes <= 2_000_000
    largest = {row.memory: row for row in plan.rows if row.fits and row.compiled}
    assert len({row.flops for row in largest.values()}) > 1
    assert best.flops == min(row.flops for row in largest.values())
    assert "memory" in str(plan).splitlines()[0]


def test_the_schedule_of_a_coupled_loss_can_be_asked_for(planned_coupled):
    plan = ja.plan(normalized, *shapes(1536), memory_bytes=2_000_000, memory="store")
    stored = [row for row in planned_coupled.rows if row.memory == "store"]
    assert plan.rows == tuple(stored)
    refused(
        lambda: ja.plan(normalized, *shapes(1536), memory_bytes=10_000),
        "memory_bytes=10000",
        "raise the limit",
    )


def test_nothing_of_a_coupled_loss_is_extrapolated(planned_coupled):
    """The schedule for None changes with the size: a line from the middle sizes would end below
    zero."""
    for schedule in ("min", None, "store"):
        rows = [row for row in planned_coupled.rows if row.memory == schedule]
        assert rows[0].compiled
        assert rows[-1].compiled
        assert min(row.temp_bytes for row in rows) > 0
        assert min(row.flops for row in rows) > 6 * WIDTH**2 * 1536 * 0.5


def test_a_coupled_batch_is_never_divided_into_unequal_microbatches():
    """12 examples and a limit for 8 of them, which leave a remainder of 4."""
    plan = ja.plan(normalized, *shapes(12), memory_bytes=10**7, memory="min")
    assert [row.microbatch_size for row in plan.rows] == [1, 2, 3, 4, 6, 12]
    refused(
        lambda: ja.plan(normalized, *shapes(12), memory_bytes=10**7, microbatch_size=8),
        "must be equal",
    )


def row_sums(params, x):
    """A loss over all devices and microbatches, or of this device's rows, and a sharding named in
    it."""
    h = jnp.einsum("bw,wv->bv", x, params[0], out_sharding=P("data"))
    return jnp.mean(jnp.tanh(h) ** 2)


def over_all(params, x):
    h = jnp.tanh(x @ params[0])
    centre = lax.pmean(jnp.mean(h, axis=0, keepdims=True), ("data", "microbatch"))
    return lax.pmean(jnp.mean((h - centre) ** 2), ("data", "microbatch"))


@pytest.mark.parametrize(("fun", "coupled"), [(row_sums, False), (over_all, True), (loss, False)])
def test_an_explicit_mesh_is_planned_as_it_runs(fun, coupled):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    at = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    w, x = shapes(256)
    args = at(w, P()), at(x, P("data"))
    plan = ja.plan(fun, *args, memory_bytes=10**7, microbatch_size=64)
    assert plan.coupled is coupled
    step = jax.jit(ja.value_and_grad(fun, microbatch_size=64, memory=plan.best.memory))
    real = step.lower(*args).compile().memory_analysis()
    assert plan.best.temp_bytes == pytest.approx(real.temp_size_in_bytes, rel=0.02)


def test_a_function_of_one_size_is_planned_at_it():
    def fixed(params, x):
        assert x.shape[0] == 16
        return loss(params, x)

    plan = ja.plan(fixed, *shapes(64), memory_bytes=10**7, microbatch_size=16, memory="min")
    assert [(row.microbatch_size, row.memory) for row in plan.rows] == [
        (16, None)
    ]  # "min" says nothing of this loss
    wrong = lambda: ja.plan(
        fixed, *shapes(64), memory_bytes=10**7, microbatch_size=16, memory="most"
    )
    refused(wrong, "memory", "most")


def test_of_equally_many_operations_the_larger_microbatch_is_best():
    def row(size, memory):
        return Row(
            size,
            64 // size,
            memory,
            1,
            1,
            100.0,
            compiled=True,
            predicted_temp_bytes=None,
            fits=True,
        )

    rows = row(8, "min"), row(16, "store")
    assert Plan(rows, 10, coupled=True).best is rows[1]
    assert Plan(rows[::-1], 10, coupled=True).best is rows[1]


def heavy(params, x):
    """Two large matrices and few examples: the sums of a loop are larger than anything else."""
    return jnp.mean(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) ** 2)


def test_what_a_device_cannot_hold_is_told_by_the_code_of_the_error():
    """Not by its text: an error of another kind may quote the words."""
    with pytest.raises(jax.errors.JaxRuntimeError) as info:
        jnp.zeros(2**45, FLOAT)  # 128 TiB
    assert compat.bytes_needed(info.value) > 2**47
    quoting = jax.errors.JaxRuntimeError(f"INTERNAL: after {info.value}, used 1.5G of 1.0G")
    assert compat.bytes_needed(quoting) is None


def test_the_whole_batch_may_fit_where_no_loop_does():
    params = {name: jax.ShapeDtypeStruct((256, 256), FLOAT) for name in "ab"}
    args = params, jax.ShapeDtypeStruct((16, 256), FLOAT)

    def total(size):
        step = jax.jit(ja.value_and_grad(heavy, microbatch_size=size))
        real = step.lower(*args).compile().memory_analysis()
        return real.temp_size_in_bytes + real.argument_size_in_bytes + real.output_size_in_bytes

    limit = total(16)
    assert all(total(size) > limit for size in (2, 4, 8))
    plan = ja.plan(heavy, *args, memory_bytes=limit)
    assert plan.best.microbatch_size == 16
    assert plan.best.compiled
    assert plan.best.total_bytes == limit
    assert not any(row.fits for row in plan.rows if row.microbatch_size in (2, 4, 8))


def test_a_function_of_few_examples_is_planned_at_sizes_that_it_accepts():
    def few(params, x):
        if len(x) > 2:
            raise ValueError("at most 2")
        return loss(params, x)

    plan = ja.plan(few, *shapes(8), memory_bytes=10**7)
    assert [row.microbatch_size for row in plan.rows] == [1, 2]
    assert plan.refused == (4, 8)


def centred(params, x):
    """The rewards of four adjacent examples, centred."""
    groups = (x @ params[0, :, :1]).reshape(-1, 4)
    return jnp.mean((groups - jnp.mean(groups, axis=1, keepdims=True)) ** 2)


def test_a_function_of_groups_is_planned_at_sizes_that_it_accepts():
    plan = ja.plan(centred, *shapes(24), memory_bytes=10**7)
    assert [row.microbatch_size for row in plan.rows] == [4, 8, 12, 16, 24]
    assert plan.refused == (1, 2, 3, 6)
    assert str(plan).splitlines()[-1] == "not accepted by fun: microbatches of 1, 2, 3, 6"
    for row in plan.rows:  # the oracle runs them
        step = ja.value_and_grad(centred, microbatch_size=row.microbatch_size)
        assert jax.eval_shape(step, *shapes(24))[0].shape == ()
    asked = lambda **size: lambda: ja.plan(centred, *shapes(24), memory_bytes=10**7, **size)
    refused(asked(microbatch_size=6), "microbatches of 6", "cannot reshape", "4, 8, 12, 16, 24")
    refused(asked(num_microbatches=4), "microbatches of 6", "4, 8, 12, 16, 24")
    refused(asked(num_microbatches=5), "microbatches of 5 and 4", "4, 8, 12, 16, 24")


def test_a_function_that_refuses_a_size_in_the_middle_is_planned_at_the_others():
    def ghost(params, x):
        groups = jnp.tanh(x @ params[0]).reshape(-1, min(len(x), 4), x.shape[1])
        return jnp.mean((groups - jnp.mean(groups, axis=1, keepdims=True)) ** 2)

    plan = ja.plan(ghost, *shapes(12), memory_bytes=10**7)
    assert [row.microbatch_size for row in plan.rows] == [1, 2, 3, 4, 8, 12]
    assert plan.refused == (6,)


def test_an_error_of_the_function_itself_is_its_own():
    def broken(params, x):
        raise RuntimeError("theirs")

    for size in ({}, {"microbatch_size": 4}):
        call = lambda size=size: ja.plan(broken, *shapes(24), memory_bytes=10**7, **size)
        refused(call, "theirs", error=RuntimeError)


def test_candidates():
    assert candidates(12) == [1, 2, 3, 4, 6, 8, 12]
    assert candidates(13) == [1, 2, 4, 8, 13]
    assert candidates(12, equal=True) == [1, 2, 3, 4, 6, 12]
    assert candidates(24, shards=4, equal=True) == [4, 8, 12, 24]


def test_one_size_can_be_asked_for():
    plan = ja.plan(loss, *shapes(96), memory_bytes=LIMIT, num_microbatches=5)
    assert [(row.microbatch_size, row.num_microbatches) for row in plan.rows] == [(20, 5)]
    assert dataclasses.astuple(plan.best)[0] == 20


def test_a_number_of_microbatches_is_planned_as_it_runs():
    """12 = 3 + 3 + 2 + 2 + 2, and not the four microbatches of 3."""
    (row,) = ja.plan(loss, *shapes(12), memory_bytes=LIMIT, num_microbatches=5).rows
    assert (row.microbatch_size, row.num_microbatches) == (3, 5)
    step = lambda **size: jax.jit(ja.value_and_grad(loss, **size)).lower(*shapes(12)).compile()
    asked, other = step(num_microbatches=5), step(microbatch_size=3)
    assert row.temp_bytes == asked.memory_analysis().temp_size_in_bytes
    assert row.temp_bytes != other.memory_analysis().temp_size_in_bytes


def test_two_examples_and_the_limit_of_the_device(monkeypatch):
    """One program is compiled, the other takes its bytes until it is compiled too."""
    monkeypatch.setattr("jaxaccum._tools.lowering.AbstractCall.device_limit", lambda call: LIMIT)
    plan = ja.plan(loss, *shapes(2))
    assert (plan.memory_bytes, plan.best.microbatch_size) == (LIMIT, 2)
    assert [row.compiled for row in plan.rows] == [True, True]


def test_what_cannot_be_planned_is_refused():
    refused(lambda: ja.plan(loss, *shapes()), "memory_bytes", "cpu", "no limit")
    mean = lambda w, x: jnp.mean(x @ w[0])
    refused(
        lambda: ja.plan(mean, *shapes(64), memory_bytes=100),
        "memory_bytes=100",
        "1 examples",
        "raise the limit",
    )
    refused(lambda: ja.plan(loss, *shapes(64), memory_bytes="1G"), "memory_bytes", "'1G'")
    refused(lambda: ja.plan(loss, *shapes(0), memory_bytes=LIMIT), "the batch is empty")
    refused(
        lambda: ja.plan(loss, *shapes(64), memory_bytes=LIMIT, mesh_axes="data"),
        "mesh_axes",
        "'data'",
        "sharding",
    )
    inside = lambda w, x: ja.plan(loss, w, x, memory_bytes=LIMIT).best.flops
    refused(lambda: jax.eval_shape(inside, *shapes(64)), "argument 0", "traced", "outside of jit")
    refused(lambda: ja.plan(lambda w, x: x @ w[0], *shapes(64), memory_bytes=LIMIT), "scalar")
