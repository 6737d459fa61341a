"""`experiments overlap`: what travels while a program computes is read off its schedule, and
`unroll="last"` hides it."""

import pytest

from experiments import overlap
from experiments._schedule import Sent, sums_sent

MIB = 2**20
HEAD = (
    "HloModule jit_run, is_scheduled=true\n\n%add.1 (a: f32[]) -> f32[] {\n}\n\nENTRY %main.9 "
    "(p.1: f32[]) -> f32[] {\n"
)
LAYER = "f32[512,512]{1,0:T(8,128)S(1)}"
GPU = {
    "start": f"  %all-reduce-start.2 = {LAYER} all-reduce-start(%add.7), channel_id=1",
    "end": f"  %all-reduce-done.2 = {LAYER} all-reduce-done(%all-reduce-start.2)",
}
TPU = {
    "start": f"  %async-collective-start.2 = ({LAYER}, u32[]) fusion(%add.7), kind=kCustom",
    "end": (
        f"  %async-collective-done.2 = {LAYER} fusion(%gte.5), kind=kCustom, "
        "calls=%async_collective_fusion.2"
    ),
}
COMPUTES = f"  %fusion.3 = {LAYER} fusion(%all-reduce-done.1, %dot.2), kind=kLoop, calls=%fused.3"
MOVES = f"  %gte.5 = {LAYER} get-tuple-element(%async-collective-start.2), index=0"


def schedule(*lines):
    return HEAD + "\n".join(lines) + "\n}\n"


@pytest.mark.parametrize("names", [GPU, TPU], ids=["gpu", "tpu"])
def test_a_sum_is_hidden_if_something_is_computed_between_its_start_and_its_end(names):
    assert sums_sent(schedule(names["start"], COMPUTES, names["end"])) == [Sent(MIB, hidden=True)]
    assert sums_sent(schedule(names["start"], MOVES, names["end"])) == [Sent(MIB, hidden=False)]
    assert sums_sent(schedule(COMPUTES, names["start"], names["end"], COMPUTES)) == [
        Sent(MIB, hidden=False)
    ]


def test_a_plain_all_reduce_waits():
    both = f"  %all-reduce.4 = ({LAYER}, {LAYER}) all-reduce(%a, %b), channel_id=1"
    assert sums_sent(schedule(COMPUTES, both, COMPUTES)) == [Sent(2 * MIB, hidden=False)]


def test_losses_and_weights_are_left_out():
    assert sums_sent(schedule("  %all-reduce.4 = f32[] all-reduce(%a), channel_id=1")) == []


def test_an_end_without_its_start_is_an_error():
    with pytest.raises(ValueError, match=r"no start of all-reduce-done\.2"):
        sums_sent(schedule(GPU["end"]))


def test_on_a_described_tpu_the_last_microbatch_hides_sums_and_a_loop_hides_none():
    looped, peeled = (overlap.measured("v5e:2x4", 2, form, layers=4) for form in overlap.FORMS)
    assert looped["gradients sent"] == peeled["gradients sent"] == 1.0
    assert looped["share sent while computing"] == 0.0
    assert peeled["share sent while computing"] >= 0.5


def test_a_loop_in_the_place_of_the_last_microbatch_fails_the_checks():
    row = {"gradients sent": 1.0, "share sent while computing": 0.0, "N": 2, "place": "v5e:2x4"}
    peeled = row | {"unroll": "last", "share sent while computing": 0.75}
    passed = lambda *rows: [check.passed for check in overlap.checks(rows)]
    assert passed(row | {"unroll": 1}, peeled) == [True, True, True]
    assert passed(row | {"unroll": 1}, row | {"unroll": "last"}) == [True, False, True]
    assert passed(row | {"unroll": 1, "gradients sent": 8.0}, peeled) == [False, True, True]
