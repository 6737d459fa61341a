"""`experiments overlap`: what travels while a program computes is read off its schedule, and
`unroll="last"` hides it."""

import pytest

from experiments import overlap
from experiments._schedule import Behind, Sent, sums_sent

pytestmark = pytest.mark.optimized

MIB = 2**20
HEAD = """HloModule jit_run, is_scheduled=true

%add.1 (a: f32[]) -> f32[] {
}

%fused.3 (p.1: f32[512,512]) -> f32[512,512] {
  ROOT %add.2 = f32[512,512] add(%p.1, %p.1)
}

%gemm.3 (p.1: f32[512,512]) -> f32[512,512] {
  ROOT %dot.2 = f32[512,512] dot(%p.1, %p.1), lhs_contracting_dims={1}
}

ENTRY %main.9 (p.1: f32[]) -> f32[] {
"""
LAYER = "f32[512,512]{1,0:T(8,128)S(1)}"
GPU = {
    "start": f"  %all-reduce-start.3 = {LAYER} all-reduce-start(%add.7), channel_id=1",
    "end": f"  %all-reduce-done.2 = {LAYER} all-reduce-done(%all-reduce-start.3)",
}
TPU = {
    "start": f"  %async-collective-start.2 = ({LAYER}, u32[]) fusion(%add.7), calls=%fused.3",
    "end": f"  %async-collective-done.2 = {LAYER} fusion(%gte.5), calls=%async_collective_fusion.2",
}
PRODUCTS = [
    f"  %fusion.3 = {LAYER} fusion(%p.1), kind=kOutput, calls=%gemm.3",
    f"  %dot.3 = {LAYER} dot(%p.1, %p.1), lhs_contracting_dims={{1}}",
    f'  %custom-call.3 = {LAYER} custom-call(%p.1), custom_call_target="__cublas$gemm"',
]
ADAMW = f"  %fusion.4 = {LAYER} fusion(%p.1), kind=kLoop, calls=%fused.3"
IDLE = [
    f"  %gte.5 = {LAYER} get-tuple-element(%async-collective-start.2), index=0",
    f'  %custom-call.4 = {LAYER} custom-call(), custom_call_target="AllocateBuffer"',
    "  %fusion.5 = (f32[], s32[]) fusion(%p.1), kind=kLoop, calls=%fused.3",
]
TWICE = f"  %all-reduce.4 = ({LAYER}, {LAYER}) all-reduce(%a, %b), channel_id=1"


def behind(*lines):
    return [one.behind for one in sums_sent(schedule(*lines))]


def schedule(*lines):
    return HEAD + "\n".join(lines) + "\n}\n"


@pytest.mark.parametrize("names", [GPU, TPU], ids=["gpu", "tpu"])
def test_a_sum_travels_behind_what_is_computed_between_its_start_and_its_end(names):
    start, end = names["start"], names["end"]
    assert sums_sent(schedule(start, PRODUCTS[0], end)) == [Sent(MIB, Behind.PRODUCT)]
    assert [behind(start, one, end) for one in PRODUCTS] == [[Behind.PRODUCT]] * 3
    assert behind(start, ADAMW, end) == [Behind.OTHER]
    assert [behind(start, one, end) for one in IDLE] == [[Behind.NOTHING]] * 3
    assert behind(PRODUCTS[0], start, end, PRODUCTS[0]) == [Behind.NOTHING]


def test_what_waits():
    assert sums_sent(schedule(ADAMW, TWICE, ADAMW)) == [Sent(2 * MIB, Behind.NOTHING)]
    waits = GPU["start"] + ', backend_config={"collective_backend_config":{"is_sync":true}}'
    assert behind(waits, PRODUCTS[0], GPU["end"]) == [Behind.NOTHING]


def test_losses_and_weights_are_left_out():
    assert sums_sent(schedule("  %all-reduce.4 = f32[] all-reduce(%a), channel_id=1")) == []


@pytest.mark.parametrize("before", [(), (PRODUCTS[0],)], ids=["alone", "after a product"])
def test_an_end_without_its_start_is_an_error(before):
    with pytest.raises(ValueError, match=r"no start of all-reduce-done\.2"):
        sums_sent(schedule(*before, GPU["end"]))


def test_on_a_described_tpu_the_last_microbatch_hides_sums_and_a_loop_hides_none():
    looped, peeled = (
        overlap.measured("v5e:2x4", 3, form, told=True, layers=4) for form in overlap.FORMS
    )
    assert looped["gradients sent"] == peeled["gradients sent"] == 1.0
    assert looped["sums inside loops"] == peeled["sums inside loops"] == 0
    assert looped[overlap.BACKWARD] == 0.0
    assert peeled[overlap.BACKWARD] >= 0.5


def test_the_checks_fail_for_a_loop_a_combined_sum_and_sums_inside_the_loop():
    row = {"place": "v5e:2x4", "N": 3, "options": "told", "gradients sent": 1.0}
    row |= {"sums inside loops": 0, overlap.BACKWARD: 0.0, "temporary / parameters": 1.0}
    looped, peeled = row | {"unroll": 1}, row | {"unroll": "last", overlap.BACKWARD: 0.75}
    fails = lambda *rows: [i for i, one in enumerate(overlap.checks(rows)) if not one.passed]
    assert fails(looped, peeled) == []
    assert fails(looped | {"gradients sent": 0.0, "sums inside loops": 8}, peeled) == [0, 1]
    assert fails(looped | {"gradients sent": 8.0}, peeled) == [0]
    assert fails(looped, peeled | {overlap.BACKWARD: 0.0}) == [2]
    assert fails(looped | {overlap.BACKWARD: 0.75}, peeled) == [3]
    assert fails(looped, peeled, peeled | {"options": "XLA's own"}) == [4]
    assert fails(looped, peeled | {"temporary / parameters": 2.0}) == [5]


def test_sums_of_a_loop_are_not_of_the_schedule():
    inner = "%body.1 (p.1: f32[]) -> f32[] {\n" + TWICE + "\n}\n\n"
    assert sums_sent(schedule(ADAMW).replace("ENTRY", inner + "ENTRY")) == []
