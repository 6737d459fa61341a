"""Deliberate faults in what a call takes in and gives back: weights, dtypes, keys, models."""

ROWS = [
    (
        "a weight of the index is taken for a constant", "_transforms/summed_gradients.py",
        "read.isdisjoint(trace.jaxpr.invars)", "read.isdisjoint(trace.jaxpr.invars[1:])",
        "test_weights.py::test_a_weight_of_the_index_is_that_of_each_microbatch",
    ),
    (
        "a weight of the device is taken for a constant", "_transforms/summed_gradients.py",
        "not trace.other_axes and read", "read",
        "test_weights.py::test_a_weight_of_the_device_is_that_of_each_device",
    ),
    (
        "skipped microbatches count", "_transforms/summed_gradients.py",
        "if program.coupled or program.limit is not None:", "if program.coupled:",
        "test_weights.py::test_constant_weights_count_as_often_as_their_totals_do",
    ),
    (
        "a weight counts padding", "_program/prepare.py",
        "if program.depends([leaf.part], rows):", "if False:",
        "test_weights.py::test_a_weight_that_counts_padding_is_refused",
    ),
    (
        "the place of a device keeps its type", "_devices/without_checks.py",
        "return eqn.replace(primitive=_index)", "return eqn",
        "test_weights.py::test_a_weight_of_the_device_is_that_of_each_device",
    ),
    (
        "narrow integers are summed as they are", "_base/trees.py",
        "return jax.dtypes.canonicalize_dtype(widest)", "return dtype",
        "test_weights.py::test_integers_of_any_width_are_counted",
    ),
    (
        "weights are counted in integers", "_program/output_parts.py",
        "self.part(name, Reduction.SUM, cast(x, floating(dtype_of(x))))",
        "self.part(name, Reduction.SUM, x)",
        "test_weights.py::test_token_counts_beyond_32_bits",
    ),
    (
        "a maximum starts at an infinity that is none", "_program/reductions.py",
        "if not np.isnan(np.asarray(infinity).astype(dtype)):", "if True:",
        "test_weights.py::test_extrema_of_dtypes_without_an_infinity",
    ),
    (
        "keys of every generator are folded together", "_program/example_keys.py",
        'in ("threefry2x32", "rbg")', 'in ("threefry2x32", "rbg", "unsafe_rbg")',
        "test_keys_and_carry.py::test_example_keys_of_every_generator_depend_on_the_example_alone",
    ),
    (
        "the loop holds typed keys", "_program/prepare.py",
        "slots, arrays = _unwrapped(slots, arrays)", "slots, arrays = list(slots), list(arrays)",
        "test_keys_and_carry.py::test_folded_keys_pass_the_check_for_keys_used_twice",
    ),
    (
        "an argument handed on is its own", "_program/assignments.py",
        "return [place == i for i, place", "return [place is not None for i, place",
        "test_nnx_arguments.py::test_parameters_that_change_places_are_assigned_to",
    ),
    (
        "what a scan carries is changed", "_program/assignments.py",
        "carry = [i if i == consts + k else None", "carry = [None",
        "test_nnx_arguments.py::test_a_model_goes_through_transformations_of_nnx",
    ),
    (
        "what a scan reads and writes is changed", "_program/assignments.py",
        "written = [i if i is not None and i >= consts + carried else None", "written = [None",
        "test_nnx_arguments.py::test_a_model_goes_through_transformations_of_nnx",
    ),
    (
        "assignments to a model are lost", "_program/assignments.py",
        "if (name := _assigned(fun, before, treedef)) is not None:", "if False:",
        "test_nnx_arguments.py::test_an_assignment_that_would_be_lost_is_refused",
    ),
    (
        "a filter selects outside of models too", "_flax/nnx_models.py",
        "path in outside or accepts(path, variable)", "accepts(path, variable)",
        "test_nnx_arguments.py::test_gradients_are_those_of_nnx_for_whatever_holds_variables",
    ),
    (
        "an empty gradient passes", "_flax/nnx_models.py",
        "if not jax.tree.leaves(nnx.split((arg,), _within(0, accepts), ...)[1]):", "if False:",
        "test_nnx_arguments.py::test_an_argument_without_anything_to_differentiate_is_refused",
    ),
    (
        "the report of a model's gradient is dropped", "nnx.py",
        "return (grads, *value[1:]) if isinstance(value, tuple) else grads",
        "return (grads, value[1]) if has_aux else grads",
        "test_nnx_arguments.py::test_a_report_comes_last",
    ),
    (
        "strided rows are merged along the first axis", "_program/microbatches.py",
        'after = axis + 1 if self.split == "strided" else axis',
        'after = 1 if self.split == "strided" else axis',
        "test_partition.py::test_rows_return_to_their_places_along_any_axis",
    ),
]  # fmt: skip
