"""Deliberate faults in the audit, on explicit meshes, in plans, and in what users see. See `mutations`."""

ROWS = [
    (
        "a state that becomes rows is a constant at first", "_audit/rules/loops.py",
        "        if list(out.layout.axes) != list(varying(self.op.shapes(where))):\n", "        if True:\n",
        "test_audit_losses.py::test_exact_is_what_the_numbers_say[recurrent, sort]",
    ),
    (
        "a stopped total cancels with itself", "_audit/rules/elementwise.py",
        "return dataclasses.replace(x, number=walk.fresh(), root=None)\n\n\n_STOPPED", "return [x]\n\n\n_STOPPED",
        "test_audit_losses.py::test_exact_is_what_the_numbers_say[a stopped sum times a share]",
    ),
    (
        "a stopped ratio cancels", "_audit/rules/elementwise.py",
        "    if any(term.scale.weights for term in x.terms):\n        return walk.couple(op, [x], note=_STOPPED",
        "    if False:\n        return walk.couple(op, [x], note=_STOPPED",
        "test_audit_losses.py::test_exact_is_what_the_numbers_say[an adaptive weight]",
    ),
    (
        "a place is read along other axes too", "_audit/rules/indexing.py",
        "return [i for i, is_place in enumerate(indices.columns) if is_place] == [column]",
        "return indices.columns[column]",
        "test_audit_losses.py::test_exact_is_what_the_numbers_say[the diagonal]",
    ),
    (
        "a report is found by its operations alone", "_audit/at_call.py",
        "structure.key_of(one.trace.jaxpr) for one in seen",
        "tuple(eqn.primitive for eqn in one.trace.jaxpr.eqns) for one in seen",
        "test_audit_at_call.py::test_a_setting_inside_an_operation_is_looked_at_again",
    ),
    (
        "a report rests on numbers of an earlier call", "_audit/at_call.py",
        "report is None or (_assumes_no_nan(report) and any_nan(call.given))", "report is None",
        "test_audit_at_call.py::test_numbers_that_are_nan_are_looked_at_again",
    ),
    (
        "a size in low precision is its neighbour", "_audit/lattice.py",
        "        apart = 0.0 if whole else apart\n", "",
        "test_audit_losses.py::test_a_size_in_low_precision_is_not_taken_for_its_neighbour",
    ),
    (
        "every function of an extremum is one", "_audit/rules/elementwise.py",
        "return kind if op.name in _INCREASING or op.name == kind else None", "return kind",
        "test_audit_losses.py::test_a_function_of_an_extremum_is_one_where_it_increases",
    ),
    (
        "an attribute is taken for a global", "_program/closures.py",
        'if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")', 'if one.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR")',
        "test_audit_closures.py::test_a_field_is_not_taken_for_the_global_of_its_name",
    ),
    (
        "the line where rows are divided by their number is forgotten", "_audit/rules/arithmetic.py",
        "        walk.sized = walk.sized or walk.site(op)\n", "        pass\n",
        "test_audit_advice.py::test_the_fix_of_a_place_names_its_divisor_and_the_shared_key",
    ),
    (
        "a BatchNorm over the microbatches is told its axis all the same", "_program/assignments.py",
        "and layer.axis_name is None:", ":",
        "test_nnx_arguments.py::test_a_batch_norm_is_told_both_lines_at_once",
    ),
    (
        "an equation is derived under another mesh than it was traced under", "_jaxpr/derived_once.py",
        "    if traced_mesh(eqn) != jax.sharding.get_abstract_mesh():  # as inside of jax.sharding.auto_axes\n",
        "    if False:\n", "test_mesh.py::test_a_lookup_that_says_where_its_rows_are",
    ),
    (
        "the audit takes a collective under vmap for one over the loop alone", "_audit/rules/collectives.py",
        "    return any(isinstance(axis, int) for axis in op.params[\"axes\"])\n", "    return False\n",
        "test_audit_under_vmap.py::test_statistics_over_both_axes_are_exact_and_no_warning_says_otherwise",
    ),
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
        "every device takes every n-th row", "_transforms/explicit_mesh.py",
        "mesh_axes=(*outer, *self.axes),", 'split="strided", mesh_axes=(*outer, *self.axes),',
        "test_data_parallel.py::test_groups_of_adjacent_rows_stay_together",
    ),
    (
        "global arrays are cut across their shards", "_transforms/explicit_mesh.py",
        "dataclasses.replace(self.options, blocks=self.shards)", "self.options",
        "test_data_parallel.py::test_a_microbatch_takes_the_rows_of_every_shard_that_the_split_says",
    ),
    (
        "the keys of every block are those of the first", "_program/microbatches.py",
        "starts = jnp.arange(self.blocks, dtype=jnp.int32) *", "starts = jnp.zeros(self.blocks, dtype=jnp.int32) *",
        "test_data_parallel.py::test_example_keys_are_those_of_the_whole_batch_under_either_split",
    ),
    (
        "the whole batch is predicted like a loop", "_tools/plan.py",
        "return sorted({small, loops[-1], *self.ends, *whole})", "return sorted({small, loops[-1], *self.ends})",
        "test_plan.py::test_the_whole_batch_may_fit_where_no_loop_does",
    ),
    (
        "a plan lists what fun refuses", "_tools/plan.py",
        "return list(found), tuple(errors), any(found.values())", "return sizes, tuple(errors), any(found.values())",
        "test_plan.py::test_a_function_of_groups_is_planned_at_sizes_that_it_accepts",
    ),
    (
        "a gradient has the type of its parameter", "_devices/varying.py",
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
    (
        "the call asks no audit", "_transforms/value_and_grad.py",
        "        at_call.check(fun, options, program, arrays, numbers)\n", "",
        "test_audit_at_call.py::test_an_inexact_loss_is_warned_of_with_its_line",
    ),
    (
        "the call says nothing of a loss that it cannot decide", "_audit/at_call.py",
        "    if not report.causes:\n", "    if not report.causes or report.causes[0].kind == 'unknown':\n",
        "test_audit_at_call.py::test_a_loss_written_for_one_size_alone_may_be_inexact",
    ),
    (
        "the call remembers a loss by its shapes alone", "_audit/at_call.py",
        "    return types, roles, programs, numbers, tuple", "    return types, roles, tuple",
        "test_audit_at_call.py::test_a_loss_that_changes_its_mind_is_looked_at_again",
    ),
    (
        "the call takes one microbatch on each device for the whole batch", "_audit/at_call.py",
        "    return program.partition.num_microbatches == 1 and (\n        not program.mesh_axes or _spans_devices(program)\n    )\n", "    return program.partition.num_microbatches == 1\n",
        "test_audit_at_call.py::test_a_statistic_of_one_device_is_warned_of_even_without_microbatches",
    ),
    (
        "a cast on one device is taken for an exchange between them", "_audit/at_call.py",
        "any(eqn.primitive.name not in _ON_ONE_DEVICE for eqn in eqns)", "any(True for eqn in eqns)",
        "test_audit_at_call.py::test_a_statistic_of_one_device_is_warned_of_even_without_microbatches",
    ),
    (
        "rows that go around are as they were", "_audit/rules/collectives.py",
        'op.name == "ppermute" and x.fixed and x.index is None', 'op.name == "ppermute"',
        "test_audit.py::test_what_every_microbatch_has_alike_may_go_around",
    ),
    (
        "bits of integers are their maximum", "_audit/rules/reductions.py",
        "if op.eqn.invars[0].aval.dtype == bool:", "if True:",
        "test_audit_groups.py::test_any_and_all_are_extrema",
    ),
    (
        "the first of several inexact outputs is named alone", "_audit/at_call.py",
        "names = [name for name in rest if name != first]", "names: list[str] = []",
        "test_audit_at_call.py::test_other_outputs_that_are_inexact_are_named",
    ),
    (
        "a key that the call declares is news", "_audit/judge.py",
        "if f.kind is FaultKind.RANDOM and not f.declared), None)", "if f.kind is FaultKind.RANDOM), None)",
        "test_audit_at_call.py::test_a_key_that_the_call_declares_is_no_news",
    ),
    (
        "every carried state is a random stream", "_audit/analysis.py",
        "                    FaultKind.STATE,\n                    None,\n                    None,\n                    f\"{slot.name} changes from microbatch to microbatch\",\n",
        "                    FaultKind.RANDOM,\n                    None,\n                    None,\n                    declared=True,\n                    note=f\"{slot.name} changes from microbatch to microbatch\",\n",
        "test_audit_at_call.py::test_a_carried_key_is_a_random_stream_and_a_carried_number_is_not",
    ),
    (
        "a strided split keeps groups together", "_program/microbatches.py",
        "        adjacent = self.split == \"contiguous\"\n", "        adjacent = True\n",
        "test_audit_groups.py::test_what_the_audit_says_is_what_the_numbers_say",
    ),
    (
        "any slice with a step takes one row of each group", "_audit/rules/parts.py",
        "        if layout.inner % step == 0:  # one", "        if True:  # one",
        "test_audit_groups.py::test_what_the_audit_says_is_what_the_numbers_say",
    ),
    (
        "our BatchNorm over one device's microbatches is that of all", "_audit/rules/collectives.py",
        "    if apart := (walk.mesh_axes | walk.outer_axes) - named:\n", "    if apart := set():\n",
        "test_audit_groups.py::test_batch_norm_of_one_device_is_no_batch_norm_of_all",
    ),
    (
        "literals are compared by their values", "_jaxpr/structure.py",
        "    return v.aval, np.asarray(v.val).tobytes()\n", "    return v.aval, float(np.asarray(v.val).real)\n",
        "test_derived_once.py::test_what_differs_in_a_number_is_another_kind",
    ),
    (
        "equal types make equal equations", "_jaxpr/derived_once.py",
        "(name, value_key(x)) for name, x in sorted", "(name, type(x)) for name, x in sorted",
        "test_derived_once.py::test_what_differs_in_a_number_is_another_kind",
    ),
    (
        "a notebook takes a user's text for HTML", "_base/markup.py",
        "Markup(html.escape(text))", "Markup(text)",
        "test_notebook_views.py::test_a_report_in_a_notebook_says_what_its_text_says",
    ),
    (
        "a plan is silent while it compiles", "_tools/progress.py",
        "        progress(message)\n        yield\n", "        yield\n        progress(message)\n",
        "test_notebook_views.py::test_a_plan_says_what_it_compiles_before_it_does",
    ),
    (
        "the line of a plan stays on the terminal", "_tools/progress.py",
        "\\r{' ' * len(message)}\\r", "\\n",
        "test_notebook_views.py::test_on_a_terminal_the_line_is_shown_and_removed",
    ),
    (
        "a type checker takes a misspelt name", "__init__.py",
        "if not TYPE_CHECKING:", "if True:",
        "test_package.py::test_its_types_are_those_that_a_user_sees",
    ),
    (
        "a type checker takes any argument of a tag", "_program/tags.py",
        "@dataclass_transform(frozen_default=True)\n", "",
        "test_package.py::test_its_types_are_those_that_a_user_sees",
    ),
    (
        "importing the package imports optax", "__init__.py",
        "import importlib\n", "import importlib\n\nimport optax\n",
        "test_package.py::test_importing_it_brings_jax_and_nothing_more_and_a_name_what_it_needs",
    ),
    (
        "assert_exact needs hypothesis", "testing/__init__.py",
        "import importlib\n", "import importlib\n\nimport hypothesis\n",
        "test_package.py::test_the_core_runs_where_flax_and_optax_are_absent",
    ),
]  # fmt: skip
