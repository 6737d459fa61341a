"""Deliberate faults in what the audit says of orders, of other steps and of backward passes."""

from tests.faults.fault import Fault

_TESTS = "audit/test_where_numbers_differ.py"
_FOUND = f"{_TESTS}::test_what_depends_on_the_partition_is_found"
_ORDER = f"{_TESTS}::test_a_strided_split_has_another_order"

FAULTS = [
    Fault(
        "a cotangent may be another one for each part",
        "_Backward._mismatch",
        "result.fixed and not result.placed and are_alike([x, result])",
        "result.fixed and not result.placed",
        f"{_FOUND}[a cotangent for each part]",
    ),
    Fault(
        "a cotangent may be a place",
        "_Backward._mismatch",
        "result.fixed and not result.placed and",
        "result.fixed and",
        f"{_FOUND}[a cotangent that is a place]",
    ),
    Fault(
        "a weight without its gradient cancels with the one that has it",
        "stopped",
        "weight=_without_gradient(walk, x)",
        "weight=x.weight",
        f"{_FOUND}[a weight without its gradient]",
    ),
    Fault(
        "a step's total is that of the step before",
        "of_an_earlier_step",
        "if all(w.number < since",
        "if True or all(w.number < since",
        f"{_FOUND}[a total of the step before]",
    ),
    Fault(
        "places may be fewer than the entries that they are written to",
        "_at_each_place",
        "return whole and",
        "return",
        f"{_FOUND}[a place left out]",
    ),
    Fault(
        "a window is as long as what it is written to",
        "_is_written_whole",
        "return lengths(op.shapes(2), [window]) == lengths(op.shapes(), [axis])",
        "return window >= 0",
        f"{_FOUND}[the first places]",
    ),
    Fault(
        "an integer never wraps",
        "elementwise:holds",
        "return few.min <= max(many.min, -(2**31)) and few.max >= min(many.max, 2**31 - 1)",
        "return bool(few and many)",
        f"{_FOUND}[an integer that wraps]",
    ),
    Fault(
        "a sum goes through a truth value",
        "_changes_dtype",
        "inexact(old) == inexact(new) and holds(new, old)",
        "inexact(old) == inexact(new)",
        f"{_FOUND}[a truth that is counted]",
    ),
    Fault(
        "zero is minus zero",
        "_is_uniform",
        "return x.tobytes() == x.flat[0].tobytes() * x.size",
        "return bool(np.all(x == x.flat[0]))",
        f"{_FOUND}[zeros of two signs]",
    ),
    Fault(
        "a strided split has the order of the batch",
        "Partition.keeps_order",
        'self.split == "contiguous" and',
        "True and",
        f"{_ORDER}[a table at its place]",
    ),
    Fault(
        "gathered rows meet a table",
        "GatheredOrder.matters",
        "return not (self.keeps_rows(rule) and self.meets_no_table())",
        "return not self.keeps_rows(rule)",
        f"{_ORDER}[a table for the gathered]",
    ),
    Fault(
        "one of the gathered rows is taken",
        "GatheredOrder.keeps_rows",
        "return len(self.axes(self.op.out_shapes())) == len(self.axes_of(0))",
        "return True",
        f"{_ORDER}[one of the gathered]",
    ),
    Fault(
        "a branch keeps no order",
        "Walk._of_bodies",
        "asks = order is not None and order.is_of_steps()",
        "asks = False",
        f"{_ORDER}[a table for a branch of the gathered]",
    ),
    Fault(
        "a place may be an output",
        "claim_of",
        "not any(value.placed or value.by_order for value in values)",
        "not any(value.by_order for value in values)",
        f"{_TESTS}::test_a_place_is_no_output",
    ),
    Fault(
        "rows in another order may be an output",
        "claim_of",
        "not any(value.placed or value.by_order for value in values)",
        "not any(value.placed for value in values)",
        f"{_TESTS}::test_rows_in_the_order_of_the_microbatches_are_no_output",
    ),
    Fault(
        "the cotangent of rows in another order is in the batch's",
        "_dual",
        '"by_order": out.by_order}',
        '"by_order": False}',
        f"{_TESTS}::test_what_asks_for_no_order_is_exact_in_any[rectified-strided]",
    ),
    Fault(
        "a report forgets what long constants hold",
        "_content",
        "or not is_numeric(constant):",
        "or not is_numeric(constant) or aval.size > 64:",
        f"{_TESTS}::test_a_long_constant_that_changes_is_audited_anew",
    ),
    Fault(
        "a second try forgets the axes without types",
        "notes:GIVEN",
        '"untyped_axes"',
        '"in_order"',
        f"{_TESTS}::test_a_gathered_parameter_is_told_of_where_examples_come_in_pairs",
    ),
    Fault(
        "integers of one example are whatever they are",
        "same_work",
        "if not found.of_integers <= many.of_integers:",
        "if False:",
        f"{_TESTS}::test_integers_of_a_microbatch_of_one_are_compared",
    ),
]
