"""The truth of a loss: float64 value and gradient of the whole batch, and of microbatches combined
by their tags."""

import jax
import numpy as np

from jaxaccum import Mean, Sum
from jaxaccum.testing.bounds import normwise

APART = 1e-9
"""Programs are short and in float64, and a wrong rule is wrong in the first digits."""


def accumulated(loss, parts):
    """The loss over microbatches."""
    return lambda params: _total([loss(params, part) for part in parts], parts)


def as_devices(loss, batch, number):
    """The loss over equal microbatches, each a device under one axis: collectives are those of
    `jax.vmap`."""

    def total(params):
        parts = jax.tree.map(lambda x: x.reshape(number, len(x) // number, *x.shape[1:]), batch)
        outputs = jax.vmap(lambda part: loss(params, part), axis_name="microbatch")(parts)
        of = lambda tree: [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(number)]
        return _total(of(outputs), of(parts))

    return total


def _total(outputs, parts):
    """Each term combined by its tag."""
    terms = [output if isinstance(output, dict) else {"": output} for output in outputs]
    return sum(_combined([term[name] for term in terms], parts) for name in terms[0])


def _combined(outputs, parts):
    if isinstance(outputs[0], Mean):
        return sum(x.total for x in outputs) / sum(x.weight for x in outputs)
    if isinstance(outputs[0], Sum):
        return sum(x.x for x in outputs)
    sizes = [len(part["y"]) for part in parts]
    return sum(size * x for size, x in zip(sizes, outputs, strict=True)) / sum(sizes)


def differs(loss, params, batch, parts):
    """How far the accumulated value and gradient are from the full batch's; None where both are but
    rounding."""
    return distance(accumulated(loss, [batch]), accumulated(loss, parts), params)


def distance(whole, parts, params):
    """How far the values and gradients of two functions are apart, on the scale of the first."""
    both = jax.jit(
        lambda params: [jax.value_and_grad(function)(params) for function in (whole, parts)]
    )
    with jax.numpy_dtype_promotion("standard"):
        expected, actual = both(params)
    leaves = [np.abs(x) for x in jax.tree.leaves(expected)]
    largest = max(float(np.max(x)) for x in leaves)
    return (
        normwise(actual, expected)
        if all(map(np.all, map(np.isfinite, leaves))) and largest > APART
        else None
    )
