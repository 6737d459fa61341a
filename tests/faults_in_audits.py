"""Deliberate faults in the audit, on explicit meshes and in plans. See `mutations`."""

ROWS = [
    (
        "the audit takes every backward pass for linear", "_audit/rules/derivatives.py",
        "    scales = {term.scale for term in x.terms if not term.fixed}\n", "    scales = {UNIT}\n",
        "test_audit_corners.py::test_a_backward_pass_is_exact_where_it_is_linear_or_sees_the_full_batchs_cotangent",
    ),
    (
        "the audit takes all generators for threefry", "_audit/rules/randomness.py",
        "faults=_mixed_keys(walk, op) if layout.axes else frozenset()", "faults=frozenset()",
        "test_audit.py::test_keys_of_a_generator_that_draws_for_all_of_them_together",
    ),
    (
        "the audit does not look which operands an equation takes", "_audit/walk.py",
        "isinstance(w, jex.Literal) or twins[v] is not w", "isinstance(w, jex.Literal)",
        "test_audit.py::test_the_same_primitives_are_not_the_same_program",
    ),
    (
        "the audit does not look at an equation's parameters", "_audit/twins.py",
        "    return all(_agree(name, eqn, other) for name in eqn.params)\n", "    return True\n",
        "test_audit.py::test_the_same_primitives_are_not_the_same_program",
    ),
    (
        "the audit takes every power of a root for the total", "_audit/rules/arithmetic.py",
        "if exponent == 2 and x.root is not None:", "if x.root is not None:",
        "test_audit_losses.py::test_exact_is_what_the_numbers_say[norm ** 3 / n]",
    ),
    (
        "the audit never thinks of NaN", "_audit/rules/arithmetic.py",
        "if walk.may_be_nan():", "if False:",
        "test_audit_losses.py::test_exact_is_what_the_numbers_say[nanmean of masked rows]",
    ),
    (
        "the audit counts a penalty once that a weight multiplies", "_audit/rules/arithmetic.py",
        "{term.times(scale) for term in x.terms if not term.fixed}",
        "{dataclasses.replace(term, fixed=False).times(scale) for term in x.terms}",
        "test_audit_losses.py::test_exact_is_what_the_numbers_say[Mean((mean + penalty) * n, n)]",
    ),
    (
        "the audit computes with shapes at one size", "_audit/walk.py",
        "replace(self.constant(first, second), closure", "replace(self.constant(first, first), closure",
        "test_audit_losses.py::test_exact_is_what_the_numbers_say[keras]",
    ),
    (
        "the audit lets the row of one example be repeated", "_audit/walk.py",
        "if out.rows and not wrong and not self._fits(op.out_shapes(i), out.layout):", "if False:",
        "test_audit_closures.py::test_microbatches_of_one_example_repeat_it",
    ),
    (
        "the audit forgets the name of a key on its way", "_audit/walk.py",
        "closure=out.closure or _closure_of(ins),", "closure=out.closure,",
        "test_audit_closures.py::test_a_key_is_named_where_every_microbatch_draws_the_same_numbers",
    ),
    (
        "every device takes every n-th row", "_explicit.py",
        "mesh_axes=(*outer, *self.axes),", 'split="strided", mesh_axes=(*outer, *self.axes),',
        "test_data_parallel.py::test_groups_of_adjacent_rows_stay_together",
    ),
    (
        "global arrays are cut across their shards", "_explicit.py",
        "dataclasses.replace(self.options, blocks=self.shards)", "self.options",
        "test_data_parallel.py::test_a_microbatch_takes_the_rows_of_every_shard_that_the_split_says",
    ),
    (
        "the keys of every block are those of the first", "_batch.py",
        "starts = jnp.arange(self.blocks, dtype=jnp.int32) *", "starts = jnp.zeros(self.blocks, dtype=jnp.int32) *",
        "test_data_parallel.py::test_example_keys_are_those_of_the_whole_batch_under_either_split",
    ),
    (
        "the whole batch is predicted like a loop", "_plan.py",
        "return sorted({small, loops[-1], *self.ends, *whole})", "return sorted({small, loops[-1], *self.ends})",
        "test_plan.py::test_the_whole_batch_may_fit_where_no_loop_does",
    ),
    (
        "a plan lists what fun refuses", "_plan.py",
        "return list(found), tuple(errors), any(found.values())", "return sizes, tuple(errors), any(found.values())",
        "test_plan.py::test_a_function_of_groups_is_planned_at_sizes_that_it_accepts",
    ),
    (
        "a gradient has the type of its parameter", "_mesh.py",
        "unreduced=own.reduced, reduced=own.unreduced", "unreduced=own.unreduced, reduced=own.reduced",
        "test_data_parallel.py::test_parameters_that_are_reduced_or_not_yet_have_gradients_of_jaxs_types",
    ),
    (
        "a BatchNorm forgets the axis of its devices", "_audit/fixes.py",
        "for name in (*known, axis_name)", "for name in (axis_name,)",
        "test_audit_advice.py::test_haikus_is_told_by_its_own_argument",
    ),
    (
        "consequences come before their cause", "_audit/judge.py",
        "key=lambda f: (f.order, f.note)", "key=lambda f: (-f.order, f.note)",
        "test_audit_advice.py::test_two_causes_come_in_the_order_of_the_program",
    ),
    (
        "what follows from a wrong value is news", "_audit/walk.py",
        "if not settled and any(f.kind not in HARMLESS for f in before):", "if False:",
        "test_audit_advice.py::test_the_first_finding_is_the_cause_and_no_line_is_jaxs_own",
    ),
]  # fmt: skip
