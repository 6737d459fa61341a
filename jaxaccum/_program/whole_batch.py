"""The oracle: a tagged function in one pass over the whole batch, its tags resolved."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxaccum._base.types import Array, PyTree
from jaxaccum._program import no_gradient, shared_outputs, validate, whole_outputs, without_tags
from jaxaccum._program.argument_slots import Role
from jaxaccum._program.call import Call
from jaxaccum._program.example_keys import example_keys
from jaxaccum._program.flat_function import FlatFunction
from jaxaccum._program.other_sizes import Traced, traced_if_possible
from jaxaccum._program.output_parts import Outputs, Part
from jaxaccum._program.reductions import Reduction
from jaxaccum._program.tracing import traced, types_in_loop


def run(call: Call) -> PyTree:
    """The output of the call on the whole batch.

    The axis of the loop is bound with size 1, so that a collective over it sees all examples at
    once.
    """
    tree, arrays, size = call.tree, call.arrays, call.batch_size
    partition = validate.partition(
        size, num_microbatches=1, microbatch_size=None, split="contiguous"
    )
    axis_name = call.options.axis_name
    function = FlatFunction(
        call.fun, tree, partition, loss=False, has_aux=False, padded=False, audited=False,
        constant=_refusing_itself,
    )  # fmt: skip
    flat = function.at(size)

    def one(_: Array) -> list[Array]:
        own = list(arrays)
        for i in tree.positions(Role.KEY):
            own[i] = jax.random.fold_in(own[i], 0)
        for i in tree.positions(Role.EXAMPLE_KEY):
            own[i] = example_keys(own[i], jnp.arange(size, dtype=jnp.int32))
        return flat(*own)

    stacked = jax.vmap(one, axis_name=axis_name)(jnp.zeros(1))
    outputs = function.returned[0].outputs
    if outputs.whole:
        _check_untagged(call, function, outputs)
    values = list(stacked)
    for i in set(range(len(values))) - set(outputs.positions(Reduction.STACK)):
        values[i] = stacked[i][0]
    return outputs.finalize(values[: len(outputs.parts)], values[len(outputs.parts) :])


def _check_untagged(call: Call, function: FlatFunction, outputs: Outputs) -> None:
    """An error where an output without a tag would be refused in microbatches."""

    def at(size: int, number: int) -> Traced:
        types = types_in_loop(call.tree, call.arrays, size, ())
        axis = call.options.axis_name, number
        found = traced(function.elsewhere().at(size), types, axis)
        return found.trace, found.consts

    one = at(call.batch_size, 1)
    twice = functools.partial(at, 2 * call.batch_size, 2)
    outputs = without_tags.compared(outputs, one, lambda: traced_if_possible(twice))
    coupled = one[0].coupling is not None
    same = [slot.is_same(coupled=coupled) for slot in call.tree.slots]
    same = [True] * len(one[1]) + same
    outputs, traces = shared_outputs.with_shared_in_loop([one[0]], outputs, [same])
    if found := whole_outputs.refusal(traces, outputs, [same]):
        raise found


def _refusing_itself(part: Part, x: Array) -> Array:
    says = functools.partial(no_gradient.refusal, part.name, part.tag, whole=False)
    one = no_gradient.Refused((0,), says)
    return no_gradient.refusing([jax.lax.stop_gradient(x)], [x], {0: one})[0]
