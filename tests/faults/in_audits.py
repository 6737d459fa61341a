"""Deliberate faults in the audit, in plans, and in what users see."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "a report is found by its operations alone",
        "_signature",
        "structure.key_of(one.trace.jaxpr) for one in seen",
        "tuple(eqn.primitive for eqn in one.trace.jaxpr.eqns) for one in seen",
        "audit/test_at_call.py::test_a_setting_inside_an_operation_is_looked_at_again",
    ),
    Fault(
        "a report rests on numbers of an earlier call",
        "_report",
        "report is None or (_assumes_no_nan(report) and any_nan(call.given))",
        "report is None",
        "audit/test_at_call.py::test_numbers_that_are_nan_are_looked_at_again",
    ),
    Fault(
        "an attribute is taken for a global",
        "_global_names",
        'if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")',
        'if one.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR")',
        "audit/test_closures.py::test_a_field_is_not_taken_for_the_global_of_its_name",
    ),
    Fault(
        "a BatchNorm over the microbatches is told its axis all the same",
        "_statistics",
        "and layer.axis_name is None for",
        "for",
        "flax/test_nnx_arguments.py::test_a_batch_norm_is_told_both_lines_at_once",
    ),
    Fault(
        "an equation is derived under another mesh than it was traced under",
        "_kind",
        "    if traced_mesh(eqn) != jax.sharding.get_abstract_mesh():  # as inside "
        "of jax.sharding.auto_axes\n",
        "    if False:\n",
        "meshes/test_mesh.py::test_a_lookup_that_says_where_its_rows_are",
    ),
    Fault(
        "the audit does not look which operands an equation takes",
        "Walk.run.read",
        "isinstance(w, jex.Literal) or twins[v] is not w",
        "isinstance(w, jex.Literal)",
        "audit/test_audit.py::test_the_same_primitives_are_not_the_same_program",
    ),
    Fault(
        "the audit does not look at an equation's parameters",
        "same_function",
        "    return all(_agree(name, eqn, other) for name in eqn.params)\n",
        "    return True\n",
        "audit/test_audit.py::test_the_same_primitives_are_not_the_same_program",
    ),
    Fault(
        "the audit computes with shapes at one size",
        "Walk._folded",
        "replace(self.constant(first, second), closure",
        "replace(self.constant(first, first), closure",
        "audit/test_losses.py::test_exact_is_what_the_numbers_say[keras]",
    ),
    Fault(
        "the audit lets the row of one example be repeated",
        "Walk._checked",
        "if out.rows and not wrong and not self._fits(op.out_shapes(i), out.layout):",
        "if False:",
        "audit/test_closures.py::test_microbatches_of_one_example_repeat_it",
    ),
    Fault(
        "the audit forgets the name of a key on its way",
        "Walk._checked",
        "closure=out.closure or _closure_of(ins),",
        "closure=out.closure,",
        "audit/test_closures.py::test_a_key_is_named_where_every_microbatch_draws_the_same_numbers",
    ),
    Fault(
        "the keys of every block are those of the first",
        "Partition.examples",
        "starts = jnp.arange(self.blocks, dtype=jnp.int32) *",
        "starts = jnp.zeros(self.blocks, dtype=jnp.int32) *",
        "meshes/test_data_parallel.py::"
        "test_example_keys_are_those_of_the_whole_batch_under_either_split",
    ),
    Fault(
        "the whole batch is predicted like a loop",
        "_Search._anchors",
        "return sorted({small, loops[-1], *self.ends, *whole})",
        "return sorted({small, loops[-1], *self.ends})",
        "tools/test_plan.py::test_the_whole_batch_may_fit_where_no_loop_does",
    ),
    Fault(
        "a plan lists what fun refuses",
        "_accepted",
        "list(found), tuple(errors), any(found.values())",
        "sizes, tuple(errors), any(found.values())",
        "tools/test_plan.py::test_a_function_of_groups_is_planned_at_sizes_that_it_accepts",
    ),
    Fault(
        "a BatchNorm forgets the axis of its devices",
        "_names",
        "for name in (*known, axis_name)",
        "for name in (axis_name,)",
        "audit/test_advice.py::test_haikus_is_told_by_its_own_argument",
    ),
    Fault(
        "what follows from a wrong value is news",
        "Walk._checked",
        "if not settled and any(f.kind not in HARMLESS for f in before):",
        "if False:",
        "audit/test_advice.py::test_the_first_finding_is_the_cause_and_no_line_is_jaxs_own",
    ),
    Fault(
        "the call asks no audit",
        "value_and_grad.plain",
        "        at_call.check(fun, options, program, arrays, numbers)\n",
        "",
        "audit/test_at_call.py::test_an_inexact_loss_is_warned_of_with_its_line",
    ),
    Fault(
        "the call says nothing of a loss that it cannot decide",
        "check",
        "    if not report.causes:\n",
        "    if not report.causes or report.causes[0].kind == 'unknown':\n",
        "audit/test_at_call.py::test_a_loss_written_for_one_size_alone_may_be_inexact",
    ),
    Fault(
        "the call remembers a loss by its shapes alone",
        "_signature",
        "    return types, roles, programs, numbers, tuple",
        "    return types, roles, tuple",
        "audit/test_at_call.py::test_a_loss_that_changes_its_mind_is_looked_at_again",
    ),
    Fault(
        "the call takes one microbatch on each device for the whole batch",
        "_is_whole",
        "    return program.partition.num_microbatches == 1 and (\n"
        "        not program.mesh_axes or _spans_devices(program)\n"
        "    )\n",
        "    return program.partition.num_microbatches == 1\n",
        "audit/test_at_call_models.py::"
        "test_a_statistic_of_one_device_is_warned_of_even_without_microbatches",
    ),
    Fault(
        "a cast on one device is taken for an exchange between them",
        "_spans_devices",
        "any(eqn.primitive.name not in _ON_ONE_DEVICE for eqn in eqns)",
        "any(True for eqn in eqns)",
        "audit/test_at_call_models.py::"
        "test_a_statistic_of_one_device_is_warned_of_even_without_microbatches",
    ),
    Fault(
        "the first of several inexact outputs is named alone",
        "_others",
        "names = [name for name in rest if name != first]",
        "names: list[str] = []",
        "audit/test_at_call_models.py::test_other_outputs_that_are_inexact_are_named",
    ),
    Fault(
        "every carried state is a random stream",
        "_walked",
        "                    FaultKind.STATE,\n"
        "                    None,\n"
        "                    None,\n"
        '                    f"{slot.name} changes from microbatch to microbatch",\n',
        "                    FaultKind.RANDOM,\n"
        "                    None,\n"
        "                    None,\n"
        "                    declared=True,\n"
        '                    note=f"{slot.name} changes from microbatch to microbatch",\n',
        "audit/test_at_call.py::test_a_carried_key_is_a_random_stream_and_a_carried_number_is_not",
    ),
    Fault(
        "a strided split keeps groups together",
        "Partition.keeps_groups",
        '        adjacent = self.split == "contiguous"\n',
        "        adjacent = True\n",
        "audit/test_groups.py::test_what_the_audit_says_is_what_the_numbers_say",
    ),
    Fault(
        "literals are compared by their values",
        "literal_key",
        "    return v.aval, np.asarray(v.val).tobytes()\n",
        "    return v.aval, float(np.asarray(v.val).real)\n",
        "programs/test_derived_once.py::test_what_differs_in_a_number_is_another_kind",
    ),
    Fault(
        "equal types make equal equations",
        "_kind",
        "params_key(eqn.params), jax.sharding",
        "tuple(eqn.params), jax.sharding",
        "programs/test_derived_once.py::test_what_differs_in_a_number_is_another_kind",
    ),
    Fault(
        "a notebook takes a user's text for HTML",
        "escaped",
        "Markup(html.escape(text))",
        "Markup(text)",
        "tools/test_notebook_views.py::test_a_report_in_a_notebook_says_what_its_text_says",
    ),
    Fault(
        "a plan is silent while it compiles",
        "during",
        "        progress(message)\n        yield\n",
        "        yield\n        progress(message)\n",
        "tools/test_notebook_views.py::test_a_plan_says_what_it_compiles_before_it_does",
    ),
    Fault(
        "the line of a plan stays on the terminal",
        "_shown",
        "\\r{' ' * len(message)}\\r",
        "\\n",
        "tools/test_notebook_views.py::test_on_a_terminal_the_line_is_shown_and_removed",
    ),
    Fault(
        "a type checker takes a misspelt name",
        "__init__.py",
        "if not TYPE_CHECKING:",
        "if True:",
        "house/test_package.py::test_its_types_are_those_that_a_user_sees",
    ),
    Fault(
        "a type checker takes any argument of a tag",
        "_tag",
        "@dataclass_transform(frozen_default=True)\n",
        "",
        "house/test_package.py::test_its_types_are_those_that_a_user_sees",
    ),
    Fault(
        "importing the package imports optax",
        "__init__.py",
        "import importlib\n",
        "import importlib\n\nimport optax\n",
        "house/test_package.py::"
        "test_importing_it_brings_jax_and_nothing_more_and_a_name_what_it_needs",
    ),
    Fault(
        "assert_exact needs hypothesis",
        "testing/__init__.py",
        "import importlib\n",
        "import importlib\n\nimport hypothesis\n",
        "house/test_package.py::test_the_core_runs_where_flax_and_optax_are_absent",
    ),
    Fault(
        "the best is predicted and not compiled",
        "_Search.run",
        "if choice in self.known:",
        "if self.known:",
        "tools/test_plan.py::test_the_best_is_the_largest_that_fits",
    ),
    Fault(
        "the audit reads one size of microbatch",
        "report_on",
        "for group in partition.groups:",
        "for group in partition.groups[:1]:",
        "audit/test_audit.py::test_the_last_and_smaller_microbatches_are_judged_too",
    ),
    Fault(
        "the audit lets a constant of the size pass",
        "Constants._array",
        "fixed(Scale() if same(a, b) else IRREGULAR, number=self.fresh(), at=at)",
        "fixed(number=self.fresh())",
        "audit/test_audit.py::test_verdict_and_exactness_are_those_of_the_numbers[a "
        "constant of the size]",
    ),
    Fault(
        "the audit reads no aux",
        "Loss.trace.flat",
        ', *leaves(aux, "aux", aux=True)]',
        "]",
        "audit/test_audit.py::test_aux_is_judged_by_its_tags",
    ),
    Fault(
        "a carried key that comes back is taken for a changed state",
        "_unchanged",
        "made_of.get(v, v) for v in new",
        "v for v in new",
        "audit/test_audit.py::test_a_carried_key_that_comes_back_is_no_changed_state",
    ),
    Fault(
        "a plan extrapolates a coupled loss",
        "_Search.__init__",
        "self.ends = [sizes[0], sizes[-1]] if ends else []",
        "self.ends = []",
        "tools/test_plan.py::test_nothing_of_a_coupled_loss_is_extrapolated",
    ),
]
