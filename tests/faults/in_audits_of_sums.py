"""Deliberate faults in what the audit knows of sums that are none: in integers, of NaN, of solvers,
and of places in another order."""

from tests.faults.fault import Fault

_TESTS = "audit/test_sums_that_are_none.py"

FAULTS = [
    Fault(
        "sums of bytes are sums",
        "checks:overflow",
        "jnp.iinfo(dtype).bits < 32",
        "jnp.iinfo(dtype).bits < 8",
        f"{_TESTS}::test_a_sum_that_may_overflow_is_no_sum",
    ),
    Fault(
        "sums of booleans are sums",
        "checks:overflow",
        "dtype == jnp.bool_ or jnp.iinfo(dtype).bits < 32",
        "dtype != jnp.bool_ and jnp.iinfo(dtype).bits < 32",
        f"{_TESTS}::test_a_sum_that_may_overflow_is_no_sum[a product of booleans]",
    ),
    Fault(
        "unsigned differences do not wrap",
        "checks:overflow",
        'op.name in ("sub", "neg")',
        'op.name in ("neg",)',
        f"{_TESTS}::test_a_sum_that_may_overflow_is_no_sum[an unsigned difference]",
    ),
    Fault(
        "loops sum in any dtype",
        "Walk._of_steps",
        "common | overflow(self, op, i, ins, x)",
        "common",
        f"{_TESTS}::test_a_sum_that_may_overflow_is_no_sum[a loop in bytes]",
    ),
    Fault(
        "no row is NaN",
        "compare",
        "x.number == y.number and x.summary:",
        "x.number == y.number:",
        f"{_TESTS}::test_a_mean_of_what_is_not_nan_has_a_weight",
    ),
    Fault(
        "every solver is linear",
        "linear_solve",
        "not _is_solved_linearly(op)",
        "False",
        f"{_TESTS}::test_a_solver_that_is_not_linear_in_the_cotangent",
    ),
    Fault(
        "the steps of an adjoint are linear",
        "derivatives:_WRAPPERS",
        ', "ode.py")',
        ")",
        f"{_TESTS}::test_the_steps_of_an_adjoint_depend_on_the_cotangent",
    ),
    Fault(
        "a function of a place is the place",
        "GatheredOrder.is_own_place",
        "kept = self.op.name in _KEEP_PLACES",
        "kept = True",
        f"{_TESTS}::test_a_place_that_is_moved_is_another_in_another_order",
    ),
    Fault(
        "any place in the order picks",
        "GatheredOrder.picks",
        "indices.own_place or not picked",
        "indices.by_order or not picked",
        f"{_TESTS}::test_a_place_that_is_moved_is_another_in_another_order",
    ),
    Fault(
        "a reshape keeps rows wherever they go",
        "GatheredOrder.keeps_rows",
        'if self.op.name == "reshape":',
        "if False:",
        f"{_TESTS}::test_rows_and_features_are_told_apart[a reshape across the rows]",
    ),
    Fault(
        "features as many as rows are rows",
        "all_rows",
        "> 1:",
        "> 2:",
        f"{_TESTS}::test_rows_and_features_are_told_apart",
    ),
    Fault(
        "reports of a user's derivative rules are kept",
        "_report",
        "if _has_rules_of_users(program):",
        "if False:",
        f"{_TESTS}::test_a_derivative_rule_that_changes_is_audited_anew",
    ),
]
