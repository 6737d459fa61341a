"""`experiments bench` at a small size: a wrong gradient is seen, memory and who wins are read off
right.

No time is asserted. The oracle of every gradient is JAX's own of the full batch in float64.
"""

import jax
import numpy as np
import pytest

from experiments import _bench_rivals, _bench_timing, _bench_torch, bench
from experiments._bench_cases import CASES
from jaxaccum._loop.derivative import Derivative
from tests.support.helpers import INEXACT, normwise

SMALL = {
    "transformer": {"layers": 1, "width": 32, "length": 8, "batch_size": 8},
    "BERT": {"layers": 1, "width": 16, "length": 16, "vocabulary": 200, "batch_size": 8},
    "scanned MLP": {"layers": 12, "width": 32, "batch_size": 8},
    "untied layers": {"layers": 2, "width": 32, "batch_size": 8},
    "CNN": {"channels": (4, 8), "batch_size": 8, "size": 16},
    "embedding": {"rows": 500, "width": 8, "batch_size": 8},
    "tied LM": {"layers": 1, "width": 16, "length": 8, "tokens": 64, "batch_size": 8},
    "contrastive": {"width": 16, "layers": 1, "batch_size": 32},
    "tiny": {"batch_size": 8},
}
OPTIONS = {"sizes": SMALL, "numbers": (8,), "rounds": 3, "seconds": 0.0, "torch": False}
WAYS = {
    "BERT": ["jaxaccum", "full batch", "lax.scan", "usual scan", "optax.MultiSteps"],
    "contrastive": ["jaxaccum", "full batch", "GradCache", "usual scan"],
}


def small(name):
    return CASES[name](**SMALL[name])


@pytest.fixture
def _as_in_a_script():
    """The experiments run under JAX's own defaults."""
    with jax.enable_x64(False):
        yield


@pytest.fixture
def _few_ways(monkeypatch):
    monkeypatch.setattr(_bench_rivals, "names", lambda case: WAYS[case.name])
    monkeypatch.setattr(_bench_timing, "peak", lambda: _bench_timing.Peak(1e9, 1e9))


@pytest.mark.usefixtures("_as_in_a_script", "_few_ways")
def test_a_wrong_gradient_is_flagged_and_competes_with_nobody():
    """Averages of means, where microbatches weigh unequally; and any loop, where examples
    interact."""
    record = bench.run(cases=tuple(WAYS), **OPTIONS)
    wrong = {
        (row["case"], row["way"]) for row in record.data["rows"] if row["verdict"] == bench.WRONG
    }
    assert wrong == {
        ("BERT", "usual scan"),
        ("BERT", "optax.MultiSteps"),
        ("contrastive", "usual scan"),
    }
    error, _, _, control = record.checks
    assert error.passed
    assert control.passed
    assert {row["pairs"] for row in record.data["rows"]} == {3}
    assert record.settings["cores"] >= 1


@INEXACT
@pytest.mark.usefixtures("_as_in_a_script", "_few_ways")
def test_the_check_fails_where_ours_is_the_wrong_one(monkeypatch):
    monkeypatch.setitem(_bench_rivals.GRADIENTS, "jaxaccum", _bench_rivals.with_usual_scan)
    monkeypatch.setitem(WAYS, "contrastive", ["jaxaccum", "full batch"])
    assert not bench.run(cases=("contrastive",), **OPTIONS).checks[0].passed


@pytest.mark.usefixtures("_as_in_a_script")
@pytest.mark.parametrize("way", sorted(set(_bench_rivals.GRADIENTS) - {"GradCache"}))
def test_every_way_computes_the_gradient_where_all_examples_weigh_the_same(way):
    case = small("tiny")
    wanted = bench.oracle(case)
    _, grads = jax.jit(_bench_rivals.GRADIENTS[way](case, 4))(case.params, case.batch)
    assert normwise(grads, wanted) < bench.ROUNDING
    half = jax.tree.map(lambda leaf: leaf[:4], case.batch)
    assert (
        normwise(jax.grad(case.mean)(case.params, half), wanted) > 10 * bench.ROUNDING
    )  # some rows are forgotten


@pytest.mark.usefixtures("_as_in_a_script")
def test_memory_is_that_of_the_whole_step():
    """A scan over layers, where ours adds in place and the usual way makes a second tree of
    gradients."""
    case = small("scanned MLP")
    size = lambda name: _bench_rivals.made(name, case, 8).memory / case.parameter_bytes
    assert size("jaxaccum") < size("lax.scan") - 0.5
    assert size("optax.MultiSteps") > 2  # its sums live in the optimizer's state, between the calls


@pytest.mark.usefixtures("_as_in_a_script")
@pytest.mark.parametrize(
    "name", ["scanned MLP", "untied layers", "CNN", "embedding", "tied LM"]
)  # every layer, once
def test_torch_computes_the_same_gradient(name):
    case = small(name)
    run, gradient = _bench_torch.loop("torch eager", case, 4)
    run()
    wanted = bench.oracle(case)
    assert normwise(gradient(), wanted) < bench.ROUNDING
    undivided = jax.tree.map(lambda leaf: 4 * leaf, gradient())
    assert normwise(undivided, wanted) > 1  # the usual mistake


@pytest.mark.usefixtures("_as_in_a_script")
def test_accelerate_accumulates_over_all_microbatches():
    case = small("tiny")
    run, gradient = _bench_torch.loop("Accelerate", case, 4)
    run()
    assert normwise(gradient(), bench.oracle(case)) < bench.ROUNDING


def test_ours_runs_beside_each_rival_and_the_order_alternates(monkeypatch):
    monkeypatch.setattr(_bench_timing, "SHORTEST", 0.0)
    seen = []
    note = lambda name: lambda: seen.append(name)
    pairs = _bench_timing.in_pairs(
        note("ours"), {"a": note("a"), "b": note("b")}, rounds=3, seconds=0.0
    )
    assert {name: len(pair.ours) for name, pair in pairs.items()} == {"a": 3, "b": 3}
    assert (
        " ".join(seen[3:]) == "ours a ours b b ours a ours ours a ours b"
    )  # the first three tell how long a run is


def test_a_ratio_below_one_is_ours_being_faster():
    seconds = lambda *walls: [_bench_timing.Seconds(wall, wall) for wall in walls]
    pairs = _bench_timing.Pairs(seconds(1.0, 2.0, 3.0), seconds(2.0, 4.0, 1.0))
    assert np.allclose(pairs.ratios, [0.5, 0.5, 3.0])
    assert pairs.quartiles[1] == 0.5 == pairs.cpu_ratio


@pytest.mark.usefixtures("_as_in_a_script")
def test_one_microbatch_is_the_full_batch(monkeypatch):
    """Nothing is added to zeros: a scan over layers writes its gradients, and does not read
    sums."""
    case = small("scanned MLP")
    size = lambda name: _bench_rivals.made(name, case, 1).memory
    assert size("jaxaccum") == size("full batch")
    monkeypatch.setattr(Derivative, "is_in_place", True)
    assert size("jaxaccum") > size("full batch")


OURS = {
    "way": "jaxaccum",
    "ours / its, processor": 1.0,
    "bytes": 100 * bench.MIB,
    "error": 0.0,
    "quartiles": [1.0, 1.0],
}


@pytest.mark.parametrize(
    ("low", "size", "error", "says"),
    [
        (1.2, 100, 0.0, bench.BOTH),
        (1.2, 150, 0.0, bench.FASTER),
        (1.0, 90, 0.0, bench.SMALLER),
        (1.02, 100, 0.0, bench.EVEN),
        (9.0, 10, 1e-2, bench.WRONG),
    ],
)
def test_who_wins(low, size, error, says):
    row = {"way": "lax.scan", "bytes": size * bench.MIB, "error": error, "quartiles": [low, 2.0]}
    row |= {"ours / its": low}
    assert bench.verdict(row | {"ours / its, processor": 1.5}, [OURS]) == says
    unsure = bench.verdict(row | {"ours / its, processor": 1.0}, [OURS])
    assert unsure not in (
        bench.BOTH,
        bench.FASTER,
    )  # the clock alone tells of the machine's other programs


@pytest.mark.parametrize(
    ("unrolled", "rival", "says"),
    [
        ((70, 1.4), (70, 1.4), bench.EVEN),  # our loop written out is as fast, and no larger
        ((100, 1.4), (70, 1.4), bench.BOTH),  # it is larger, and does not count
        ((70, 1.4), (100, 1.7), bench.BOTH),  # it is smaller, and slower
        ((70, 0.5), (70, 1.0), bench.BOTH),  # it is as small, and slower
        ((300, 1.4), (150, 1.4), bench.SMALLER),  # it is as fast, and larger
    ],
)
def test_a_rival_is_also_compared_with_our_loop_written_out(unrolled, rival, says):
    """MiB, and how many times as fast as our loop, which needs 100."""
    timed = lambda size, speed: {
        "bytes": size * bench.MIB,
        "ours / its": speed,
        "ours / its, processor": speed,
    }
    low = rival[1] - 0.05
    row = timed(*rival) | {"way": "unrolled", "error": 0.0, "quartiles": [low, rival[1] + 0.05]}
    assert bench.verdict(row, [OURS, OURS | timed(*unrolled)]) == says


def test_a_win_fails_the_check():
    row = {**OURS, "verdict": bench.REFERENCE, "allowed bytes": 100 * bench.MIB}
    rival = {**row, "way": "lax.scan", "quartiles": [1.2, 1.3], "verdict": bench.BOTH}
    assert [check.passed for check in bench.checks([row])] == [True, True, True]
    assert [check.passed for check in bench.checks([row, rival])] == [True, False, True]
    assert not bench.checks([{**row, "bytes": 120 * bench.MIB}])[2].passed
