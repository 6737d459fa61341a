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
    Fault(
        "the gradient of a microbatch of weight 0 is lost",
        "_mean_gradient",
        "return jnp.where(lost, jnp.full_like(mean, jnp.inf), mean)",
        "return mean",
        "accumulators/test_weights_of_zero.py::test_a_mean_of_it_is_infinite_and_so_it_is_reported",
    ),
    Fault(
        "a linear accumulator sees weights that can be 0",
        "_Pass.linear",
        'return getattr(self.accumulator, "linear", False) and not self.selective',
        "return False",
        "accumulators/test_weights_of_zero.py::"
        "test_its_gradient_counts[compensated-none is positive]",
    ),
    Fault(
        "microbatches of padding count in a mean",
        "_of_all",
        "return mean * cast(jnp.mean(visited, dtype=jnp.finfo(mean.dtype).dtype), mean.dtype)",
        "return mean",
        "accumulators/test_weights_of_zero.py::"
        "test_it_counts_with_padding_and_on_devices_of_weight_zero",
    ),
    Fault(
        "a sum in float16 holds products with the weight",
        "GradientSum.update",
        "if wide == x.dtype:",
        "if True:",
        "accumulators/test_weights_of_zero.py::"
        "test_a_sum_in_float16_takes_weights_past_its_range[skip_nonfinite]",
    ),
]
