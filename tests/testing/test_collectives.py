"""Collectives of a compiled program: a loop counts its trips, an asynchronous one counts once."""

from jaxaccum.testing import collectives

MIB = 2**20
HEAD = "HloModule jit_run, is_scheduled=true\n\nENTRY %main.9 (p.1: f32[]) -> f32[] {\n"
LAYER = "f32[512,512]{1,0:T(8,128)S(1)}"


def schedule(*lines):
    return HEAD + "\n".join(lines) + "\n}\n"


def test_a_sum_in_a_loop_is_counted_with_its_trips_and_an_asynchronous_one_once():
    """A user's own counter, on what XLA for TPU writes: start, step and end hold the collective."""
    inner = f"  %all-reduce.9 = {LAYER} all-reduce(%p.1), channel_id=1, to_apply=%add.1"
    loop = f"  %while.1 = {LAYER} while(%p.1), condition=%cond.1, body=%body.1"
    trips = ', backend_config={"known_trip_count":{"n":"8"}}'
    body = f"%body.1 (p.1: f32[]) -> f32[] {{\n{inner}\n}}\n\n"
    in_a_loop = schedule(loop + trips).replace("ENTRY", body + "ENTRY")
    assert [(c.bytes, c.times, c.loops) for c in collectives(in_a_loop)] == [(MIB, 8, 1)]
    parts = "".join(
        f"%{name} (p.1: f32[]) -> f32[] {{\n{inner}\n}}\n\n"
        for name in ("first.1", "async_collective_fusion.2", "final.1")
    )
    lines = (
        f"  %async-collective-start.2 = ({LAYER}, u32[]) fusion(%add.7), calls=%first.1",
        f"  %fusion.7 = {LAYER} fusion(%gte.1), calls=%async_collective_fusion.2",
        f"  %async-collective-done.2 = {LAYER} fusion(%gte.5), calls=%final.1",
    )
    sent_once = schedule(*lines).replace("ENTRY", parts + "ENTRY")
    assert [(c.bytes, c.times, c.loops) for c in collectives(sent_once)] == [(MIB, 1, 0)]
