"""Deliberate faults in what the audit says of tables and parts that change with the batch size."""

from tests.faults.fault import Fault

_FOUND = "audit/test_parts_that_change.py::test_it_is_found_and_the_numbers_say_so"
_OF_ONE = "audit/test_parts_that_change.py::test_a_program_for_one_example_is_not_taken_for_another"

FAULTS = [
    Fault(
        "an axis shorter than the batch holds the batch",
        "_relaid_uniform",
        "    outer = first // sizes.first\n",
        "    outer = max(first // sizes.first, 1)\n    second = outer * sizes.second\n"
        "    first = outer * sizes.first\n",
        f"{_FOUND}[repeated]",
    ),
    Fault(
        "a table that is divided by the batch's length is uniform",
        "_stays_uniform",
        "matters = long & uniform or (grown & set(result) and not long & own)",
        "matters = long & uniform",
        f"{_FOUND}[divided]",
    ),
    Fault(
        "uniform axes merge with others and stay uniform",
        "_stays_uniform",
        "if matters and not long <= uniform:",
        "if False:",
        f"{_FOUND}[repeated]",
    ),
    Fault(
        "examples of two halves are taken together as pairs are",
        "reshape",
        "together = layout.axes[0] in varying(outs) and walk.keeps_groups(group)",
        "together = walk.keeps_groups(group)",
        f"{_FOUND}[two models]",
    ),
    Fault(
        "a strided split keeps neighbours together",
        "reshape",
        "together = layout.axes[0] in varying(outs) and walk.keeps_groups(group)",
        "together = layout.axes[0] in varying(outs)",
        "audit/test_parts_that_change.py::test_a_strided_split_takes_no_adjacent_examples_together",
    ),
    Fault(
        "a window may be as long as the batch",
        "_window_grows",
        "return any(_grow(window) and not _grow(whole) for window, whole in _windows(op))",
        "return False",
        f"{_FOUND}[split]",
    ),
    Fault(
        "an index may be the batch's length",
        "_index_is_scaled",
        "return any(not (x.placed or x.scale.trivial) for x in indices)",
        "return False",
        f"{_FOUND}[taken]",
    ),
    Fault(
        "a table of indices forgets how its other columns are scaled",
        "_indices",
        "any_summary(ins) or not all_unscaled(others)",
        "any_summary(ins)",
        f"{_FOUND}[last column]",
    ),
    Fault(
        "the padding of a convolution is about its axes",
        "_has_entry_for_each_axis",
        "len(x) == axes",
        "axes",
        f"{_FOUND}[padded]",
    ),
    Fault(
        "whatever is made of one number is one number",
        "combine",
        "RULES[op.name].uniform and all_scalar(ins)",
        "all_scalar(ins)",
        f"{_FOUND}[summed up]",
    ),
    Fault(
        "a choice between two numbers is one number",
        "select",
        "return added(walk, op, cases).like(scalar=all_scalar(ins))",
        "return added(walk, op, cases)",
        f"{_FOUND}[chosen]",
    ),
    Fault(
        "chunks hold one entry for each example",
        "_Loop.stacked_rows",
        "if layout == Layout((0,), looped=True):",
        "if layout.axes == (0,):",
        f"{_FOUND}[two entries for each of a chunk]",
    ),
    Fault(
        "the shapes for one example are not looked at",
        "_is_shape",
        "return [a for a in foretold if a != 1] == [a for a in found if a != 1]",
        "return True",
        f"{_OF_ONE}[a sum over features]",
    ),
    Fault(
        "the numbers for one example are not looked at",
        "_is_number",
        "return of_one.power(many.val, found.val) == sizes.power(many.val, few.val)",
        "return True",
        f"{_OF_ONE}[another factor for one]",
    ),
    Fault(
        "a rule of the user's own has the derivative of its value",
        "_by_a_rule",
        "return x.like(number=walk.fresh(), root=None, weight=None)",
        "return x",
        "audit/test_parts_that_change.py::test_a_rule_of_the_users_own_cancels_with_nothing",
    ),
    Fault(
        "no total is NaN, and nothing is said",
        "_is_nan",
        "    if walk.may_be_nan():\n",
        "    if x.summary:\n        return Settled([never])\n    if walk.may_be_nan():\n",
        "audit/test_parts_that_change.py::test_a_nan_of_a_total_is_assumed_away_in_words",
    ),
    Fault(
        "gathered values are places",
        "_is_place",
        "return x.index not in (None, Index.GATHERED)",
        "return x.index is not None",
        "audit/test_parts_that_change.py::"
        "test_a_comparison_of_gathered_values_with_zero_is_no_comparison_of_places",
    ),
    Fault(
        "a sum over one example is looked for",
        "_reduces_ones",
        "all(length == 1 for (length,) in _reduced(eqn))",
        "True",
        "audit/test_parts_that_change.py::"
        "test_an_inner_gradient_of_one_example_lacks_a_sum_over_one_example",
    ),
    Fault(
        "any sum may be missing for one example",
        "_reduced",
        'return [tuple(shape[axis] for shape in shapes) for axis in eqns[0].params["axes"]]',
        "return []",
        "audit/test_parts_that_change.py::"
        "test_a_program_for_one_example_is_not_taken_for_another[a sum over features]",
    ),
    Fault(
        "an inner gradient is advised as a value",
        "Site.is_transposed",
        'any("transpose(" in str(eqn.source_info.name_stack) for eqn in eqns)',
        "False",
        "audit/test_advice.py::test_an_inner_gradient_is_made_the_batchs",
    ),
    Fault(
        "a gathered parameter of no type is taken for whole",
        "_of_shared",
        "not axes_of(op) & walk.untyped_axes",
        "True",
        "meshes/test_further_axes.py::test_a_gathered_parameter_of_no_type_is_told[shard_map-2]",
    ),
    Fault(
        "with one microbatch, a gathered parameter makes the loss whole",
        "check",
        "whole and not _gathers_untyped(program)",
        "whole",
        "meshes/test_further_axes.py::test_a_gathered_parameter_of_no_type_is_told[shard_map-1]",
    ),
    Fault(
        "with one microbatch, statistics over the devices are told",
        "_of_gathers",
        "finding.kind == FaultKind.GATHERED",
        "True",
        "meshes/test_further_axes.py::test_what_devices_gather_of_their_rows_is_not_told[1]",
    ),
    Fault(
        "what starts at 0 in a while starts anywhere",
        "while_loop",
        "next_state(all_numbered(walk, initial))",
        "next_state(all_numbered(walk, map(_unknown_number, initial)))",
        "audit/test_corners.py::test_a_backward_rule_that_adds_up_in_a_while[0.0]",
    ),
]
