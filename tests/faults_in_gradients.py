"""Deliberate faults in how gradients add up and in the derivatives of `microbatch`; rows for tests/mutations.py."""

ROWS = [
    (
        "a declared maximum is summed", "_program/argument_slots.py",
        "overwritten=axis is MAX_GRAD or _OVERWRITTEN in name", "overwritten=_OVERWRITTEN in name",
        "test_float8.py::test_a_declared_maximum_is_the_full_batchs",
    ),
    (
        "maxima of a coupled loss are summed", "_coupled/gradient.py",
        "return jnp.maximum(old, new) if v in self.overwritten else old + new", "return old + new",
        "test_float8.py::test_of_a_coupled_loss_too",
    ),
    (
        "a maximum that has seen no example overwrites the value", "_loop/maxima.py",
        "jnp.where(maximum == _lowest(maximum.dtype), cast(value, maximum.dtype), maximum)", "maximum",
        "test_float8.py::test_an_argument_of_its_own_and_where_all_examples_are_padding",
    ),
    (
        "a maximum is one device's", "_transforms/summed_gradients.py",
        "        maximum, value = lax.pmax((maximum, value), names)\n",
        "        maximum, value = lax.pmin((maximum, value), names)\n",
        "test_float8.py::test_over_devices_it_is_the_largest_of_all",
    ),
    (
        "a parameter read twice counts once", "_jaxpr/running_sums.py",
        "sums[place] = add(sums[place], ", "sums[place] = add(cotangents[1][place], ",
        "test_running_sums.py::test_the_sum_grows_by_the_gradient",
    ),
    (
        "a scan adds to the first layer", "_jaxpr/running_sums.py",
        "indices = jnp.arange(eqn.params[\"length\"], dtype=jnp.int32)",
        "indices = jnp.zeros(eqn.params[\"length\"], jnp.int32)",
        "test_running_sums.py::test_the_sum_grows_by_the_gradient",
    ),
    (
        "a scan in reverse runs forwards", "_jaxpr/running_sums.py",
        'for name in ("length", "reverse", "unroll")', 'for name in ("length", "unroll")',
        "test_nested_programs.py::test_the_shortest_plain_program_of_each_form_is_exact",
    ),
    (
        "two scanned parameters change places", "_jaxpr/running_sums.py",
        "for i, row in zip(scanned, read, strict=True):",
        "for i, row in zip(scanned, read[::-1], strict=True):",
        "test_nested_programs.py::test_the_shortest_plain_program_of_each_form_is_exact",
    ),
    (
        "what a loop scans and closes over has one gradient", "_jaxpr/running_sums.py",
        'outs = inner.called(eqn.params["jaxpr"], operands, shared)',
        'outs = inner.called(eqn.params["jaxpr"], operands, {} if scanned else shared)',
        "test_nested_programs.py::test_the_shortest_plain_program_of_each_form_is_exact",
    ),
    (
        "a slice adds to the start", "_jaxpr/running_sums.py",
        'where = [jnp.int32(start) for start in eqn.params["start_indices"]]',
        'where = [jnp.int32(0) for _ in eqn.params["start_indices"]]',
        "test_running_sums.py::test_the_sum_grows_by_the_gradient",
    ),
    (
        "what a scan carries is threaded", "_jaxpr/running_sums.py",
        "return [i for i in found if i < num_consts] + rows", "return found",
        "test_running_sums.py::test_the_sum_grows_by_the_gradient",
    ),
    (
        "a checkpoint drops its sums", "_jaxpr/running_sums.py",
        "return inner.called(eqn.params[\"jaxpr\"], values, local), inner.sums",
        "return inner.called(eqn.params[\"jaxpr\"], values, local), sums",
        "test_running_sums.py::test_a_stack_of_layers_is_never_added_whole",
    ),
    (
        "an output that is a parameter passes no gradient", "_jaxpr/running_sums.py",
        "found = {v for v in jaxpr.outvars if _holds(v, places)}", "found = set()",
        "test_running_sums.py::test_the_sum_grows_by_the_gradient",
    ),
    (
        "a backward rule sees the cotangent 1", "_transforms/microbatch.py",
        "if len(reached) != 1 or program.has_backward_rule:", "if len(reached) != 1:",
        "test_user_rules.py::test_a_backward_rule_sees_the_cotangent_of_the_full_batch",
    ),
    (
        "a backward rule sees its microbatch's weight", "_transforms/custom_accumulator.py",
        "return jnp.where(jnp.isfinite(whole) & (whole != 0), whole, weight)", "return weight",
        "test_user_rules.py::test_a_backward_rule_sees_the_cotangent_of_the_full_batch",
    ),
    (
        "a while loop is taken for reversible", "_jaxpr/reversible.py",
        'if name == "while":\n        return False', 'if name == "while":\n        return True',
        "test_user_rules.py::test_forward_mode_needs_no_reverse_rule",
    ),
    (
        "every linear solve is taken for reversible", "_jaxpr/reversible.py",
        'return eqn.params["jaxprs"].transpose_solve is not None', "return True",
        "test_user_rules.py::test_forward_mode_needs_no_reverse_rule",
    ),
    (
        "gradients keep the dtype of their sum", "accumulators/_record.py",
        "return grad if explicit else cast(grad, parameter.dtype)", "return grad",
        "test_accumulators.py::test_gradients_have_the_dtype_of_their_parameters",
    ),
    (
        "named tuples of programs become tuples", "_jaxpr/equations.py",
        "jax.tree.unflatten(jax.tree.structure(value, is_leaf=_is_part), new)", "tuple(new)",
        "test_user_rules.py::test_a_check_and_a_solve",
    ),
    (
        "a constant state is a Python scalar", "_coupled/cut.py",
        "[jnp.asarray(x, dtype_of(v.aval)) for v, x in zip(self.writes, values, strict=True)]", "list(values)",
        "test_user_rules.py::test_a_coupled_state_may_become_a_constant",
    ),
    (
        "checks of a microbatch are dropped", "_transforms/microbatch.py",
        "if program.has_checks:", "if False:",
        "test_user_rules.py::test_checks_inside_the_loss_are_reported",
    ),
    (
        "float8 maxima are summed", "_loop/maxima.py",
        "[jnp.maximum(old, cast(new, old.dtype))", "[old + cast(new, old.dtype)",
        "test_float8.py::test_scales_and_maxima_are_those_of_the_full_batch",
    ),
    (
        "an empty state is no state", "_program/argument_slots.py",
        "carry, bool(states))", "carry, any(slot.role is Role.CARRY for slot in slots))",
        "test_arguments_as_they_come.py::test_a_state_without_leaves_is_carried",
    ),
    (
        "batch groups of a convolution are its batch", "_jaxpr/convolutions.py",
        "x = _batch_groups_as_feature_groups(x, groups)",
        "x = x.reshape(len(x) // groups, *x.shape[1:-1], groups * x.shape[-1])",
        "test_convolutions.py::test_any_convolution_and_both_of_its_gradients",
    ),
    (
        "a convolution comes back in the fast layout", "_jaxpr/convolutions.py",
        "return jnp.transpose(y, _places(numbers.out_spec))",
        "return y.reshape([y.shape[i] for i in _places(numbers.out_spec)])",
        "test_convolutions.py::test_any_convolution_and_both_of_its_gradients",
    ),
    (
        "every device has the layout of the CPU", "_jaxpr/convolutions.py",
        "cpu=canonical, default=as_it_is", "cpu=canonical, default=canonical",
        "test_convolutions.py::test_on_other_devices_the_program_is_what_it_was[tpu]",
    ),
    (
        "convolutions in the loop stay as they are", "_loop/loop.py",
        "fast_on_cpu(step) if has_convolutions", "step if has_convolutions",
        "test_convolutions.py::test_on_cpu_every_convolution_in_the_loop_has_the_fast_layout",
    ),
    (
        "a kept program is taken for another of its shapes", "_jaxpr/structure.py",
        "operands = _operands(eqn.invars, place)", "operands = ()",
        "test_eager.py::test_what_the_function_reads_may_change_between_calls",
    ),
    (
        "negative zero is zero", "_jaxpr/structure.py",
        "return v.aval, np.asarray(v.val).tobytes()", "return v.aval, np.asarray(v.val).tolist()",
        "test_eager.py::test_the_sign_of_zero_is_seen",
    ),
    (
        "every eager call compiles", "_transforms/eager.py",
        "run = _compiled(_Keyed(key_of(jaxpr), jaxpr))", "run = _compiled(_Keyed(id(jaxpr), jaxpr))",
        "test_eager.py::test_the_second_call_compiles_nothing",
    ),
    (
        "a kept program is run under settings of an earlier call", "_jaxpr/structure.py",
        "context = compat.context_key(eqn)", "context = ()",
        "test_eager.py::test_settings_of_jax_may_change_between_calls",
    ),
    (
        "an array of numpy is what it was", "_jaxpr/structure.py",
        "return held.shape, held.dtype, held.tobytes()", "return held.shape, held.dtype",
        "test_eager.py::test_an_array_of_numpy_may_change_in_place",
    ),
]  # fmt: skip
