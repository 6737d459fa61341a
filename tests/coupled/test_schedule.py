"""What a coupled loss costs: memory and operations of compiled programs, against the schedule's own
predictions."""

import dataclasses
import math
import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxaccum as ja
from jaxaccum import _coupled
from jaxaccum._program.call import Options, read
from jaxaccum._program.prepare import prepare
from tests.support import jitted
from tests.support.helpers import refused

pytestmark = pytest.mark.optimized

AXIS, FLOAT = "microbatch", jnp.float32
shape = lambda *dims: jax.ShapeDtypeStruct(dims, FLOAT)


def normalize(h):
    mean = lax.pmean(jnp.mean(h, axis=0), AXIS)
    var = lax.pmean(jnp.mean(h**2, axis=0), AXIS) - mean**2
    return (h - mean[None]) * lax.rsqrt(var + FLOAT(1e-3))[None]


def perceptron(w, x):
    for kernel in w:
        x = jax.nn.relu(normalize(x @ kernel))
    return jnp.mean(x**2)


def towers(w, pairs):
    """Embeddings of both sides: six blocks that widen by four and narrow again."""
    embedded = []
    for kernels, h in zip(w, pairs, strict=True):
        for wide, narrow in kernels:
            h = h + jax.nn.gelu(h @ wide) @ narrow
        embedded.append(h / jnp.linalg.norm(h, axis=-1, keepdims=True))
    return embedded


def gathered(w, pairs):
    """The whole table of similarities, once."""
    z, v = (lax.all_gather(h, AXIS, tiled=True) for h in towers(w, pairs))
    table = 14.0 * z @ v.T
    match = jnp.diagonal(jax.nn.log_softmax(table)) + jnp.diagonal(jax.nn.log_softmax(table.T))
    return -jnp.mean(match) / 2


def local(w, pairs):
    """Own rows of the table alone."""
    own = towers(w, pairs)
    z, v = (lax.all_gather(h, AXIS, tiled=True) for h in own)
    rows = jnp.arange(len(own[0]))
    match = lambda a, b: jax.nn.log_softmax(14.0 * a @ b.T)[
        rows, lax.axis_index(AXIS) * len(rows) + rows
    ]
    return -jnp.mean(match(own[0], v) + match(own[1], z)) / 2


WIDTH, DIM = 512, 256
LOSSES = {
    "perceptron": (perceptron, [shape(WIDTH, WIDTH)] * 6, shape(2048, WIDTH), 8),
    "gathered": (
        gathered,
        [[(shape(DIM, 4 * DIM), shape(4 * DIM, DIM))] * 6] * 2,
        [shape(512, DIM)] * 2,
        32,
    ),
    "local": (
        local,
        [[(shape(DIM, 4 * DIM), shape(4 * DIM, DIM))] * 6] * 2,
        [shape(512, DIM)] * 2,
        32,
    ),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Temporary bytes, and operations of matrix products with the trip counts of loops."""

    memory: int
    flops: int
    size: int


def compiled(fun, *args):
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = jax.jit(fun).lower(*args).compile()
    text = program.as_text()
    return Compiled(program.memory_analysis().temp_size_in_bytes, matrix_flops(text), len(text))


def matrix_flops(text):
    """Two operations a multiply-add of every dot, times the known trip counts around it."""
    bodies, name = {}, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def cost(name):
        total, shapes = 0, {}
        for line in bodies[name]:
            if made := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]", line):
                shapes[made[1]] = [int(size) for size in made[2].split(",") if size]
            if " dot(" in line:
                operand = re.search(r" dot\(.*?%([\w.\-]+)", line)[1]
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1].split(",")
                total += (
                    2
                    * math.prod(shapes[made[1]])
                    * math.prod(shapes[operand][int(i)] for i in contracted)
                )
            trips = int((re.search(r'known_trip_count.*?"n":"(\d+)"', line) or [0, "1"])[1])
            for inner in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                total += (trips if "body=" in line else 1) * cost(inner)
        return total

    return cost(re.search(r"ENTRY %?([\w.\-]+)", text)[1])


@pytest.fixture(scope="module")
def full():
    found = {}
    for name, (loss, params, batch, _) in LOSSES.items():
        found[name] = compiled(jitted.value_and_grad(ja.full_batch(loss)), params, batch)
    return found


def ours(name, memory):
    loss, params, batch, n = LOSSES[name]
    return compiled(ja.value_and_grad(loss, num_microbatches=n, memory=memory), params, batch)


def predicted(name, memory):
    loss, params, batch, n = LOSSES[name]
    found = []

    def record(params, batch):
        options = Options(num_microbatches=n, memory=memory)
        call = read(loss, options, (params, batch), {}, argnums=0)
        program, _ = prepare(call, loss=True)
        found.append(_coupled.schedule(program, call.differentiated))
        return 0

    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.eval_shape(record, params, batch)
    return found[0]


@pytest.mark.parametrize(
    ("name", "memory", "most"),
    [("perceptron", "min", 0.10), ("gathered", None, 0.10), ("local", None, 0.10)],
)
def test_temporary_memory(full, name, memory, most):
    assert ours(name, memory).memory <= most * full[name].memory


@pytest.mark.parametrize(
    ("name", "memory"),
    [("perceptron", "store"), ("gathered", None), ("local", None), ("local", "store")],
)
def test_operations(full, name, memory):
    assert full[name].flops < ours(name, memory).flops <= 1.40 * full[name].flops


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("perceptron", "min"),
        ("perceptron", "store"),
        ("perceptron", 10_000_000),
        ("gathered", None),
        ("local", "min"),
    ],
)
def test_the_prediction_is_that_of_the_compiled_program(full, name, memory):
    schedule = predicted(name, memory)
    assert abs(schedule.flops / ours(name, memory).flops - 1) < 0.2
    assert abs(schedule.full_batch_flops / full[name].flops - 1) < 0.2


def test_stored_bytes_are_those_of_the_boundaries():
    """Each normalization stores its input, of the full batch's size."""
    boundary = 2048 * WIDTH * 4
    least = predicted("perceptron", "min")
    assert least.stored_bytes == 0
    assert (
        least.statistics_bytes == (6 + 8) * 2 * WIDTH * 4
    )  # two a cut, and what 8 microbatches give to one of them
    assert predicted("perceptron", "store").stored_bytes == 6 * boundary
    two = predicted("perceptron", 2 * boundary + least.statistics_bytes)
    assert two.stored_bytes == 2 * boundary
    assert len(two.stored) == 2
    assert [cut.bytes for cut in two.cuts] == [boundary] * 6
    assert two.cuts[0].frames[0].function == "normalize"


def test_what_crosses_two_boundaries_is_stored_once():
    """A skip connection over two normalizations."""

    def fun(w, x):
        h = jnp.tanh(x @ w)
        return jnp.mean((normalize(normalize(h @ w) @ w) + h) ** 2)

    LOSSES["skip"] = fun, shape(8, 8), shape(16, 8), 4
    boundary = 16 * 8 * 4
    schedule = predicted("skip", "store")
    assert [cut.bytes for cut in schedule.cuts] == [2 * boundary, 2 * boundary]
    assert schedule.stored_bytes == 3 * boundary


def test_more_memory_is_never_slower():
    least = predicted("perceptron", "min")
    flops = [
        predicted("perceptron", least.statistics_bytes + i * 4_194_304).flops for i in range(7)
    ]
    assert flops == sorted(flops, reverse=True)
    assert flops[0] == least.flops
    assert flops[-1] == predicted("perceptron", "store").flops
    assert len(set(flops)) == 7


@pytest.mark.parametrize("memory", [None, "store"])
def test_compiled_size_grows_linearly_with_the_cuts(memory):
    def size(depth):
        args = [shape(32, 32)] * depth, shape(64, 32)
        return compiled(
            ja.value_and_grad(perceptron, num_microbatches=8, memory=memory), *args
        ).size

    small, medium, large = size(2), size(4), size(8)
    assert large - medium < 2.5 * (medium - small)


def test_the_default_stores_more_than_it_holds_anyway_where_else_it_would_be_slow():
    """Of 64 microbatches one holds less than any boundary."""
    loss, params, batch, _ = LOSSES["perceptron"]
    LOSSES["many"] = loss, params, batch, 64
    default = predicted("many", None)
    assert 0 < len(default.stored) < 6
    assert default.relative_flops <= 3 < predicted("many", "min").relative_flops


def test_a_slow_schedule_warns_of_its_cost():
    loss, params, batch, n = LOSSES["perceptron"]
    with pytest.warns(
        UserWarning, match=r"memory='min' takes 5\.\d times the operations of the full batch"
    ):
        jax.eval_shape(ja.value_and_grad(loss, num_microbatches=n, memory="min"), params, batch)
    jax.eval_shape(
        ja.value_and_grad(loss, num_microbatches=n), params, batch
    )  # the default does not


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        (10, ["memory=10", "no schedule", "6 cuts", "at least"]),
        (-1, ["memory", "-1"]),
        ("max", ["memory", "'max'", "store"]),
        (2.5, ["memory", "2.5"]),
        (True, ["memory", "True"]),
    ],
    ids=str,
)
def test_a_budget_that_no_schedule_meets(memory, says):
    loss, params, batch, n = LOSSES["perceptron"]
    refused(
        lambda: jax.eval_shape(
            ja.value_and_grad(loss, num_microbatches=n, memory=memory), params, batch
        ),
        *says,
    )
