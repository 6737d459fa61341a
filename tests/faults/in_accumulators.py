"""Deliberate faults in the accumulators."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "a microbatch without weight is a sample",
        "noise_scale.update",
        "jnp.where(w > 0, jnp.int32(1), jnp.int32(0))",
        "jnp.int32(1)",
        "accumulators/test_accumulators.py::test_a_microbatch_without_weight_makes_no_noise",
    ),
    Fault(
        "the squared norm keeps its noise",
        "noise_scale.finalize",
        "square - trace / jnp.where(many, state.weight, jnp.ones_like(square))",
        "square",
        "accumulators/test_accumulators.py::test_the_noise_scale_of_microbatches_of_many_weights",
    ),
    Fault(
        "what is not finite is added",
        "skip_nonfinite.update",
        "unless(ok, held.update(state.inner, mean_grads, weight, index), state.inner)",
        "held.update(state.inner, mean_grads, weight, index)",
        "accumulators/test_accumulators.py::"
        "test_where_nothing_is_finite_value_and_gradient_are_zero",
    ),
    Fault(
        "what was rounded away is forgotten",
        "add",
        "low = pair.low + ((pair.high",
        "low = ((pair.high",
        "accumulators/test_accumulators.py::"
        "test_the_error_of_a_compensated_sum_does_not_grow[True-float32]",
    ),
]
