"""Deliberate faults in the rules of the audit."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "a state that becomes rows is a constant at first",
        "_Loop.as_rows",
        "        if list(out.layout.axes) != list(varying(self.op.shapes(where))):\n",
        "        if True:\n",
        "audit/test_losses.py::test_exact_is_what_the_numbers_say[recurrent, sort]",
    ),
    Fault(
        "a stopped total cancels with itself",
        "stopped",
        "return x.like(number=walk.fresh(), root=None)",
        "return [x]",
        "audit/test_losses.py::test_exact_is_what_the_numbers_say[a stopped sum times a share]",
    ),
    Fault(
        "a stopped ratio cancels",
        "stopped",
        "    if is_weighted(x):\n        return walk.couple(op, [x], note=_STOPPED",
        "    if False:\n        return walk.couple(op, [x], note=_STOPPED",
        "audit/test_losses.py::test_exact_is_what_the_numbers_say[an adaptive weight]",
    ),
    Fault(
        "a place is read along other axes too",
        "only_place",
        "return [i for i, is_place in enumerate(indices.columns) if is_place] == [column]",
        "return indices.columns[column]",
        "audit/test_losses.py::test_exact_is_what_the_numbers_say[the diagonal]",
    ),
    Fault(
        "a size in low precision is its neighbour",
        "Sizes._power",
        "        apart = 0.0 if whole else apart\n",
        "",
        "audit/test_losses.py::test_a_size_in_low_precision_is_not_taken_for_its_neighbour",
    ),
    Fault(
        "every function of an extremum is one",
        "_extremum_of",
        "return kind if op.name in _INCREASING or op.name == kind else None",
        "return kind",
        "audit/test_losses.py::test_a_function_of_an_extremum_is_one_where_it_increases",
    ),
    Fault(
        "the line where rows are divided by their number is forgotten",
        "_scaled",
        "        walk.sized = walk.sized or walk.site(op)\n",
        "        pass\n",
        "audit/test_advice.py::test_the_fix_of_a_place_names_its_divisor_and_the_shared_key",
    ),
    Fault(
        "the audit takes a collective under vmap for one over the loop alone",
        "_under_vmap",
        '    return any(isinstance(axis, int) for axis in op.params["axes"])\n',
        "    return False\n",
        "audit/test_under_vmap.py::"
        "test_statistics_over_both_axes_are_exact_and_no_warning_says_otherwise",
    ),
    Fault(
        "the audit takes every backward pass for linear",
        "_scale",
        "    scales = {term.scale for term in x.terms if not term.fixed}\n",
        "    scales = {UNIT}\n",
        "audit/test_corners.py::"
        "test_a_backward_pass_is_exact_where_it_is_linear_or_sees_the_full_batchs_cotangent",
    ),
    Fault(
        "the audit takes all generators for threefry",
        "draw",
        "faults=_mixed_keys(walk, op) if layout.axes else frozenset()",
        "faults=frozenset()",
        "audit/test_audit.py::test_keys_of_a_generator_that_draws_for_all_of_them_together",
    ),
    Fault(
        "the audit takes every power of a root for the total",
        "power",
        "if exponent == 2 and x.root is not None:",
        "if x.root is not None:",
        "audit/test_losses.py::test_exact_is_what_the_numbers_say[norm ** 3 / n]",
    ),
    Fault(
        "the audit never thinks of NaN",
        "_is_nan",
        "if walk.may_be_nan():",
        "if False:",
        "audit/test_losses.py::test_exact_is_what_the_numbers_say[nanmean of masked rows]",
    ),
    Fault(
        "the audit counts a penalty once that a weight multiplies",
        "_undivided",
        "{term.times(scale) for term in x.terms if not term.fixed}",
        "{dataclasses.replace(term, fixed=False).times(scale) for term in x.terms}",
        "audit/test_losses.py::test_exact_is_what_the_numbers_say[Mean((mean + penalty) * n, n)]",
    ),
    Fault(
        "consequences come before their cause",
        "_reported",
        "key=lambda f: (f.order, f.note)",
        "key=lambda f: (-f.order, f.note)",
        "audit/test_advice.py::test_two_causes_come_in_the_order_of_the_program",
    ),
    Fault(
        "rows that go around are as they were",
        "exchange.one",
        'op.name == "ppermute" and x.fixed and x.index is None',
        'op.name == "ppermute"',
        "audit/test_collectives.py::test_what_every_microbatch_has_alike_may_go_around",
    ),
    Fault(
        "bits of integers are their maximum",
        "_extremum",
        "if op.eqn.invars[0].aval.dtype == bool:",
        "if True:",
        "audit/test_groups.py::test_any_and_all_are_extrema",
    ),
    Fault(
        "a key that the call declares is news",
        "judge",
        "if f.kind is FaultKind.RANDOM and not f.declared]:",
        "if f.kind is FaultKind.RANDOM]:",
        "audit/test_at_call.py::test_a_key_that_the_call_declares_is_no_news",
    ),
    Fault(
        "any slice with a step takes one row of each group",
        "slice_",
        "        if layout.inner % step == 0:  # one",
        "        if True:  # one",
        "audit/test_groups.py::test_what_the_audit_says_is_what_the_numbers_say",
    ),
    Fault(
        "our BatchNorm over one device's microbatches is that of all",
        "whole_batch_moments",
        "    if apart := (walk.mesh_axes | walk.outer_axes) - named:\n",
        "    if apart := set():\n",
        "audit/test_groups.py::test_batch_norm_of_one_device_is_no_batch_norm_of_all",
    ),
    Fault(
        "the audit takes a tag that it does not know for a Sum",
        "_claim_total",
        'raise AssertionError(f"the audit knows no claim of the tag {tag.__name__}")',
        "return _claim_sum(walk, values[0])",
        "audit/test_corners.py::"
        "test_a_tag_that_the_audit_does_not_know_is_not_taken_for_another[Reduction.SUM-Count]",
    ),
    Fault(
        "the audit takes a reduction that it does not know for a sum",
        "claim_of",
        "        case Reduction.SUM:\n            claim = _claim_total(walk, output.tag, values)\n"
        "        case _:\n            assert_never(reduction)\n",
        "        case _:\n            claim = _claim_sum(walk, values[0])\n",
        "audit/test_corners.py::"
        "test_a_tag_that_the_audit_does_not_know_is_not_taken_for_another[product-product]",
    ),
    Fault(
        "the audit lets randomness pass",
        "judge",
        "accumulates and not random, random",
        "accumulates, random",
        "audit/test_audit.py::test_keys",
    ),
    Fault(
        "the audit drops one scale of two",
        "Scale.__mul__",
        "self.power is None or other.power is None else self.power + other.power",
        "self.power is None or other.power is None else self.power",
        "audit/test_lattice.py::test_the_scales_of_a_product_multiply",
    ),
    Fault(
        "the audit drops the scale of a factor",
        "Scale.__mul__",
        "        if other.trivial:\n",
        "        if True:\n",
        "audit/test_lattice.py::test_the_scales_of_a_product_multiply",
    ),
    Fault(
        "the audit takes n - 1 for n",
        "Sizes._power",
        "return power if close and abs(power) <= 4 else None",
        "return power",
        "audit/test_audit.py::test_verdict_and_exactness_are_those_of_the_numbers[Mean by size - "
        "1]",
    ),
    Fault(
        "the audit solves a system that grows with the batch for each example",
        "_right_sides_alone",
        " and not varying(op.shapes())",
        "",
        "audit/test_primitives.py::test_exact_is_what_the_numbers_say[a triangular matrix of the "
        "batch's size]",
    ),
    Fault(
        "the audit does not look into a step under jax.checkpoint",
        "_called",
        "if len(body.eqns) != 1 or",
        "if True or",
        "audit/test_primitives.py::test_exact_is_what_the_numbers_say[a total in steps, under "
        "jax.checkpoint]",
    ),
    Fault(
        "the audit loses the examples after an axis of one",
        "_relaid",
        "axis not in ones and ",
        "",
        "audit/test_primitives.py::test_exact_is_what_the_numbers_say[an axis of one before the "
        "examples]",
    ),
]
