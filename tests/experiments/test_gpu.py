"""Compiled for H100s by XLA's CUDA plug-in, no GPU present: one accumulator in place, sent once per
step.

Programs are compiled and never run. XLA combines all-reduces only in part: what is counted are
bytes.
"""

import jax
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from experiments import _compiled_models as models
from experiments import _compiled_steps as steps
from experiments import _compiled_ways as ways
from experiments import gpu
from experiments._compiled_devices import described
from experiments._compiled_hlo import whole_results
from jaxaccum.testing import collectives

pytestmark = [pytest.mark.gpu, pytest.mark.optimized]

N, EXAMPLES = 8, 16
ONE, HOST = "h100:1x1x1", "h100:1x1x8"


@pytest.fixture(scope="module", autouse=True)
def _as_in_a_script():
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def compiled(way, place=ONE, name="scanned", n=N, examples=EXAMPLES):
    """An AdamW step of a model on the described GPUs."""
    one, devices = models.model(name), described(place, "gpu")
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    params = steps.laid(one.params, mesh, P())
    state = steps.laid(jax.eval_shape(steps.OPTIMIZER.init, one.params), mesh, P())
    batch = steps.laid(one.batch(examples * len(devices)), mesh, P("data"))
    step = jax.jit(steps.step(ways.ways(name)[way](one.loss, n, mesh)), donate_argnums=(0, 1))
    return step.lower(params, state, batch).compile()


def over_parameters(program, name="scanned"):
    """Temporary memory over the bytes of the parameters."""
    return program.memory_analysis().temp_size_in_bytes / models.model(name).bytes


def whole(program, name="scanned"):
    """Whole gradients of the layers that its loops make."""
    return whole_results(program.as_text(), models.model(name).largest)


def sent(program, name="scanned"):
    """How often one step sends the gradients, to a thousandth, and whether a loop does so. The loss
    takes four bytes."""
    large = [c for c in collectives(program) if c.bytes > 1024]
    assert {c.kind for c in large} == {"all-reduce"}
    times = sum(c.times * c.bytes for c in large) / models.model(name).bytes
    return round(times, 3), any(c.loops for c in large)


@pytest.mark.parametrize("place", [ONE, HOST])
def test_one_accumulator_in_place(place):
    """Less than twice the parameters: there is no room for a second. No loop makes a whole
    gradient, or copies one."""
    program = compiled(ways.OURS, place)
    assert over_parameters(program) <= 1.2
    assert whole(program) == {}


@pytest.mark.parametrize("way", [ways.SCAN, ways.OPTAX])
def test_the_others_make_a_second(way):
    program = compiled(way)
    assert over_parameters(program) >= 2.1
    assert whole(program) == {
        "broadcast": N,
        "add": N,
    }  # zeros for every microbatch's gradient, and the sum


@pytest.mark.parametrize("n", [1, 2, 16])
def test_gradients_are_sent_once_whatever_the_number_of_microbatches(n):
    assert sent(compiled(ways.OURS, HOST, n=n)) == (1.0, False)


@pytest.mark.parametrize("way", [ways.SCAN, ways.OPTAX])
def test_the_others_send_them_for_every_microbatch(way):
    assert sent(compiled(way, HOST)) == (N, True)


@pytest.mark.parametrize(
    ("place", "count"), [("h100:1x1x2", 2), ("h100:1x4x8", 32), ("h100:1x32x8", 256)]
)
def test_gradients_are_sent_once_whatever_the_number_of_gpus(place, count):
    assert described(place, "gpu").size == count
    program = compiled(ways.OURS, place)
    assert sent(program) == (1.0, False)
    assert over_parameters(program) <= 1.2


def test_bfloat16_parameters_are_summed_in_float32_in_place():
    """A billion parameters: the float32 sum is 2.0 times their bytes, and no second one of any
    dtype is made."""
    needed = {}
    for way in (ways.OURS, ways.WIDE):
        program = compiled(way, name="decoder", examples=64)
        analysis = program.memory_analysis()
        beyond = analysis.peak_memory_in_bytes - analysis.argument_size_in_bytes
        needed[way] = beyond / models.model("decoder").bytes
        assert (whole(program, "decoder") == {}) is (way == ways.OURS)
    assert needed[ways.OURS] <= 2.4
    assert needed[ways.WIDE] >= 3.2


def test_the_experiment_compiles_every_way_and_checks_it(monkeypatch):
    options = {
        "models": ("scanned",),
        "topologies": (HOST,),
        "num_microbatches": (2,),
        "examples": 4,
    }
    record = gpu.run(**options)
    assert record.passed
    assert [row["way"] for row in record.rows] == list(ways.WAYS)
    assert all(row["seconds"] > 0 and row["note"] == "estimated" for row in record.rows)
    monkeypatch.setitem(ways.WAYS, "jaxaccum", ways.with_scan)
    assert [check.passed for check in gpu.run(**options).checks] == [False] * 4
