"""Deliberate faults in the host loop: MultiSteps, the loss scale, checkpoints; rows for tests/faults/listed.py."""

ROWS = [
    (
        "the weight of a window outlives it", "_host_loop/multisteps.py",
        "total_weight=emptied(state.total_weight)", "total_weight=state.total_weight",
        "host_loop/test_multisteps.py::test_after_a_flush_the_next_window_is_clean",
    ),
    (
        "an empty window is flushed", "_host_loop/multisteps.py",
        "emit = jnp.greater(state.mini_step, 0)", "emit = jnp.array(True)",
        "host_loop/test_multisteps.py::test_flush_of_an_empty_window_changes_nothing",
    ),
    (
        "a flush of nothing repeats the last answer", "_host_loop/multisteps.py",
        "updated=emit,", "updated=jnp.logical_or(state.updated, emit),",
        "host_loop/test_multisteps.py::test_flush_of_an_empty_window_changes_nothing",
    ),
    (
        "a new state reads as updated", "_host_loop/multisteps.py",
        "total_weight=zero, updated=jnp.array(False)", "total_weight=zero, updated=jnp.array(True)",
        "host_loop/test_multisteps.py::test_flush_of_an_empty_window_changes_nothing",
    ),
    (
        "a new state of optax reads as updated", "_host_loop/multisteps.py",
        "jnp.logical_and(jnp.equal(state.mini_step, 0), jnp.greater(state.gradient_step, 0))",
        "jnp.equal(state.mini_step, 0)",
        "host_loop/test_multisteps.py::test_a_state_of_optax_goes_on_here_and_back[0]",
    ),
    (
        "zero times NaN is NaN", "_host_loop/multisteps.py",
        "return jnp.where(w == 0, acc, new)", "return new",
        "host_loop/test_multisteps.py::test_a_weight_of_zero_hides_what_is_not_finite",
    ),
    (
        "an open window of optax weighs nothing", "_host_loop/multisteps.py",
        "weight = cast(state.mini_step, _weight_dtype(state.acc_grads))",
        "weight = jnp.zeros((), _weight_dtype(state.acc_grads))",
        "host_loop/test_multisteps.py::test_a_state_of_optax_goes_on_here_and_back[1]",
    ),
    (
        "the optimizer sees the dtype of the sums", "_host_loop/multisteps.py",
        "return cast(acc, dtype_of(like))", "return acc",
        "host_loop/test_multisteps.py::test_the_optimizer_sees_the_dtype_that_came_in",
    ),
    (
        "the sums lie on one device", "_host_loop/multisteps.py",
        "jnp.zeros_like(parameter, dtype=wide)", "jnp.zeros(jnp.shape(parameter), wide)",
        "host_loop/test_multisteps_drop_in.py::test_sums_and_updates_are_sharded_as_the_parameters",
    ),
    (
        "updates have memory of their own", "_host_loop/step_if.py",
        "shared = _fit(like, jax.eval_shape(lambda: kept))", "shared = False",
        "host_loop/test_multisteps_drop_in.py::test_a_donated_step_needs_no_more_memory_than_optax",
    ),
    (
        "a step that waits returns its sums", "_host_loop/step_if.py",
        "_where(run, x, jnp.zeros_like(x)), updates", "x, updates",
        "host_loop/test_multisteps.py::test_has_updated_is_false_after_a_skip",
    ),
    (
        "the sums outlive their window", "_host_loop/step_if.py",
        "_where(run, jnp.zeros_like(x), x), kept", "x, kept",
        "host_loop/test_multisteps.py::test_nan_ends_with_its_window_and_does_not_reach_the_parameters_before",
    ),
    (
        "what is the same on all devices comes back as theirs", "_host_loop/step_if.py",
        "x.sharding, varying.varying_axes(x), is_inexact", "x.sharding, is_inexact",
        "host_loop/test_multisteps.py::test_shard_map_reduces_once_a_window[True]",
    ),
    (
        "a derivative is not checked", "_host_loop/traced_check.py",
        "return _checked.bind(*primals, **params), tangents[0]", "return primals[0], tangents[0]",
        "host_loop/test_multisteps_errors.py::test_a_weight_is_checked_under[grad]",
    ),
    (
        "a check sees one lane of many", "_host_loop/traced_check.py",
        "jnp.all(valid(x))", "jnp.any(valid(x))",
        "host_loop/test_multisteps_errors.py::test_a_weight_is_checked_under[vmap]",
    ),
    (
        "a bad step counts as a good one", "_host_loop/loss_scale.py",
        "jnp.where(finite, state.good_steps + 1, jnp.zeros_like(state.good_steps))",
        "state.good_steps + 1",
        "plain/test_mixed_precision.py::test_one_overflow_skips_the_batch_and_halves_the_scale",
    ),
    (
        "what a loss scale saved is lost in float16", "_host_loop/loss_scale.py",
        "return wide if is_float0(wide) else wide / cast(state.scale, wide.dtype)",
        "return as_dtype(wide / cast(state.scale, wide.dtype), grad)",
        "host_loop/test_multisteps_drop_in.py::test_a_gradient_below_float16_reaches_adam_in_float32",
    ),
    (
        "a state of low precision meets a gradient in float32", "_host_loop/loss_scale.py",
        "jax.tree.map(as_dtype, state, own)", "state",
        "host_loop/test_multisteps_drop_in.py::test_a_cond_inside_a_loss_scale",
    ),
    (
        "a checkpoint of another dtype is restored", "checkpoints.py",
        '(own["shape"], own["dtype"]) != (other["shape"], other["dtype"])',
        'own["shape"] != other["shape"]',
        "host_loop/test_resume.py::test_a_checkpoint_of_another_state_is_refused",
    ),
    (
        "a key is no more than its numbers", "checkpoints.py",
        "x = leaf if _is_key(leaf) else np.asarray(leaf)", "x = np.asarray(_data(leaf))",
        "host_loop/test_resume.py::test_a_key_comes_back_as_the_kind_that_was_saved",
    ),
]  # fmt: skip
