"""Deliberate faults in what is the same for every microbatch: outputs without a tag, and the states
and parameters of models."""

from tests.faults.fault import Fault

_OUTPUTS = "coupled/test_shared_outputs.py"
_DIFFERS = f"{_OUTPUTS}::test_what_differs_is_refused"
_MODELS = "flax/test_nnx_without_batch.py"

FAULTS = [
    Fault(
        "a sum over one of two axes is the same along both",
        "same_everywhere:_results",
        "set(axes) <= set(axes_of(eqn))",
        "set(axes) & set(axes_of(eqn))",
        f"{_OUTPUTS}::test_over_devices_the_collective_spans_them_too",
    ),
    Fault(
        "what a scan carries differs from its first step on or never",
        "_of_scan",
        "if further == carry:",
        "carry = further\n        if True:",
        f"{_DIFFERS}[carried from the second step on]",
    ),
    Fault(
        "what comes from outside is the same for every microbatch",
        "_differs_by_itself",
        "        return True\n",
        "        return False\n",
        f"{_DIFFERS}[the outside]",
    ),
    Fault(
        "what another microbatch has is the same for every one",
        "_differs_by_itself",
        "return not all(_is_same(one) or one.primitive.name in _CASTS for one in naming)",
        "return False",
        f"{_DIFFERS}[what another has]",
    ),
    Fault(
        "the index is the same for every microbatch",
        "with_shared_in_loop",
        "[True, *differ]",
        "[False, *differ]",
        f"{_DIFFERS}[the index]",
    ),
    Fault(
        "a number of microbatches follows from the batch",
        "with_shared_in_loop",
        "if results[count + i] or not reads_batch:",
        "if results[count + i]:",
        f"{_DIFFERS}[the number of microbatches]",
    ),
    Fault(
        "the derivative of an output without a tag is lost",
        "_in_loop",
        "lax.stop_gradient(x) if is_inexact(x) else x",
        "lax.stop_gradient(lax.stop_gradient(x) * 0 + 0) + lax.stop_gradient(x) "
        "if is_inexact(x) else x",
        f"{_OUTPUTS}::test_its_derivative_is_an_error",
    ),
    Fault(
        "in forward mode it is 0",
        "finalized",
        "else math.nan",
        "else 0.0",
        f"{_OUTPUTS}::test_its_derivative_is_an_error",
    ),
    Fault(
        "a constant passes in a plain loss too",
        "compared",
        "(is_constant and trace.coupling is not None)",
        "is_constant",
        "plain/test_whole_outputs.py::test_what_depends_on_more_is_refused",
    ),
    Fault(
        "a number of examples is a constant",
        "compared",
        "at_all_sizes=alike",
        "at_all_sizes=True",
        f"{_DIFFERS}[the number of rows]",
    ),
    Fault(
        "a state of a coupled loss changes from microbatch to microbatch",
        "read_before",
        "updated_once=slots[i].key is None",
        "updated_once=False",
        f"{_MODELS}::test_it_changes_once_beside_collectives",
    ),
    Fault(
        "every microbatch draws the same numbers",
        "_States.drawn_from",
        "if old[i] in drawn_from}",
        "if False}",
        f"{_MODELS}::test_microbatches_do_not_draw_the_same_numbers",
    ),
    Fault(
        "a count of examples changes once",
        "states_of_models:beside_loop",
        "other is not None and compute_alike([parts[i]], one, other)",
        "other is not None",
        f"{_MODELS}::test_a_count_of_examples_adds_up",
    ),
    Fault(
        "a state of such a count changes once",
        "states_of_models:beside_loop",
        "given = states.without_batch(given - {i for i in changing & given if not alike(i)})",
        "given = given - {i for i in changing & given if not alike(i)}",
        f"{_MODELS}::test_a_state_of_such_a_count_runs_with_it",
    ),
    Fault(
        "only the next state is followed",
        "_States.without_batch",
        "if kept == states:\n                return states",
        "if True:\n                return kept",
        f"{_MODELS}::test_a_state_of_a_state_of_the_batch_runs_with_both",
    ),
    Fault(
        "a loss that runs at one size alone changes its states once",
        "states_of_models:beside_loop",
        "other is not None and",
        "other is None or",
        f"{_MODELS}::test_a_loss_that_runs_at_one_size_alone_counts_its_microbatches",
    ),
    Fault(
        "states change once whatever the call says of streams",
        "_runs_states_of_a_model",
        " and not model.draws_declared",
        "",
        f"{_MODELS}::test_streams_that_are_not_divided_leave_all_states_to_the_loop",
    ),
    Fault(
        "a parameter may depend on the number of examples",
        "whole_outputs:refusal",
        "sized = untagged.of_model or not",
        "sized = not",
        f"{_MODELS}::test_a_parameter_that_depends_on_the_batch_is_refused[its size]",
    ),
    Fault(
        "the larger microbatches decide for the smaller ones",
        "_States.changing",
        "for g, one in enumerate(self.traces):",
        "for g, one in enumerate(self.traces[:1]):",
        f"{_MODELS}::test_a_state_that_only_small_microbatches_change_runs",
    ),
    Fault(
        "a loss that is called again returns its outputs in the old order",
        "Trace.called_again",
        "self.places[:count] or range(count)",
        "range(count)",
        f"{_MODELS}::test_a_rule_that_reads_a_variable_late_runs_beside_it",
    ),
    Fault(
        "a number of microbatches is a constant",
        "Tracing.at_another_size",
        "2 * size, 2 * number",
        "2 * size, number",
        f"{_DIFFERS}[a one, added up]",
    ),
    Fault(
        "a parameter that is assigned to stays as it was",
        "Models.update",
        "        if assigned:\n",
        "        if False:\n",
        f"{_MODELS}::test_it_changes_once[a clipped parameter-{{'num_microbatches': 3}}]",
    ),
]
