"""Whole arrays made inside loops are counted in HLO text, each kind of operation by how often it
runs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments._compiled_hlo import whole_results

SHAPE = (4, 8, 8)
PROGRAM = """HloModule jit_step

%update (sum: f32[4,8,8], slice: f32[1,8,8], i: s32[]) -> f32[4,8,8] {{
  %sum = f32[4,8,8]{{2,1,0}} parameter(0)
  %slice = f32[1,8,8]{{2,1,0}} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  %written = f32[4,8,8]{{2,1,0}} dynamic-update-slice(%sum, %slice, %i, %zero, %zero)
  ROOT %shown = f32[4,8,8]{{2,1,0}} bitcast(%written)
}}

%other (sum: f32[4,8,8]) -> (f32[4,8,8], f32[]) {{
  %sum.1 = f32[4,8,8]{{2,1,0}} parameter(0)
  %one = f32[] constant(1)
  %doubled = f32[4,8,8]{{2,1,0}} multiply(%sum.1, %sum.1)
  ROOT %both = (f32[4,8,8]{{2,1,0}}, f32[]) tuple(%doubled, %one)
}}

%layers (state: (s32[], f32[4,8,8])) -> (s32[], f32[4,8,8]) {{
  %state = (s32[], f32[4,8,8]{{2,1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state), index=0
  %sum.2 = f32[4,8,8]{{2,1,0}} get-tuple-element(%state), index=1
  %gradient = f32[1,8,8]{{2,1,0}} fusion(%i.1), kind=kLoop, calls=%small
  %added = f32[4,8,8]{{2,1,0:T(8,128)}} fusion(%sum.2, %gradient, %i.1), kind=kLoop, calls=%update
  {inner}
  ROOT %next = (s32[], f32[4,8,8]{{2,1,0}}) tuple(%i.1, %added)
}}

%more (state.1: (s32[], f32[4,8,8])) -> pred[] {{
  %state.1 = (s32[], f32[4,8,8]{{2,1,0}}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.1), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%i.2, %four), direction=LT
}}

%microbatches (state.2: (s32[], f32[4,8,8])) -> (s32[], f32[4,8,8]) {{
  %state.2 = (s32[], f32[4,8,8]{{2,1,0}}) parameter(0)
  {outer}
  ROOT %loop = (s32[], f32[4,8,8]{{2,1,0}}) while(%state.2), condition=%more, body=%layers
}}

ENTRY %main (w: f32[4,8,8]) -> f32[4,8,8] {{
  %w = f32[4,8,8]{{2,1,0}} parameter(0)
  %start = s32[] constant(0)
  %zeros = f32[4,8,8]{{2,1,0}} broadcast(%start), dimensions={{}}
  %first = (s32[], f32[4,8,8]{{2,1,0}}) tuple(%start, %zeros)
  %all = (s32[], f32[4,8,8]{{2,1,0}}) while(%first), condition=%more.1, body=%microbatches, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  ROOT %sums = f32[4,8,8]{{2,1,0}} get-tuple-element(%all), index=1
}}
"""


def found(inner="", outer=""):
    return whole_results(PROGRAM.format(inner=inner, outer=outer), SHAPE)


def test_a_sum_in_place_makes_no_whole_array():
    """Zeros before the loop are the one accumulator, and a fusion is what its root is."""
    assert found() == {}


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("%x = f32[4,8,8]{2,1,0} copy(%sum.2)", "copy"),
        ("%x = bf16[4,8,8]{2,1,0:T(8,128)(2,1)S(1)} add(%sum.2, %sum.2)", "add"),
        ("%x = (f32[4,8,8]{2,1,0}, f32[4,8,8]{2,1,0}, u32[]) copy-start(%sum.2)", "copy-start"),
        ("%x = (f32[4,8,8]{2,1,0}, f32[]) fusion(%sum.2), kind=kLoop, calls=%other", "multiply"),
        ("%x = f32[4,8,8]{2,1,0} all-reduce(%sum.2), to_apply=%plus", "all-reduce"),
    ],
    ids=str,
)
def test_a_whole_array_counts_as_often_as_it_is_made(operation, kind):
    """Three times in the outer loop, by the compiler's note; in the inner one four times each, by
    its condition."""
    assert found(outer=operation) == {kind: 3}
    assert found(inner=operation) == {kind: 12}


def test_another_shape_does_not_count():
    assert (
        found(inner="%x = f32[4,8,9]{2,1,0} copy(%y)", outer="%x = f32[14,8,8]{2,1,0} copy(%y)")
        == {}
    )


@pytest.mark.optimized
def test_compiled_programs_for_the_present_device_tell_the_two_loops_apart():
    rows, layers = jax.ShapeDtypeStruct((3, 8), jnp.float32), 32
    zeros = lambda: jnp.zeros((layers, 8, 8), jnp.float32)

    def whole(rows):
        add = lambda total, x: (total + jnp.sin(total * x[None, None]), None)
        return lax.scan(add, zeros(), rows)[0]

    def in_place(rows):
        def layer(total, i, x):
            old = lax.dynamic_index_in_dim(total, i, keepdims=False)
            return lax.dynamic_update_index_in_dim(total, old + jnp.outer(x, x), i, 0), None

        add = lambda total, x: (
            lax.scan(lambda t, i: layer(t, i, x), total, jnp.arange(layers))[0],
            None,
        )
        return lax.scan(add, zeros(), rows)[0]

    texts = [jax.jit(fn).lower(rows).compile().as_text() for fn in (whole, in_place)]
    counts = [sum(whole_results(text, (layers, 8, 8)).values()) for text in texts]
    assert counts[0] >= 3  # once per microbatch
    assert counts[1] == 0
