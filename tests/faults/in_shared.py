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
        "kept_by_loop",
        "[True, *differ]",
        "[False, *differ]",
        f"{_DIFFERS}[the index]",
    ),
    Fault(
        "a number of microbatches follows from the batch",
        "kept_by_loop",
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
        "other_sizes:constants",
        "if one[0].coupling is None:",
        "if False:",
        "plain/test_whole_outputs.py::test_what_depends_on_more_is_refused",
    ),
    Fault(
        "a number of examples is a constant",
        "other_sizes:constants",
        "if compute_alike([i], one, other)]",
        "]",
        f"{_DIFFERS}[the number of rows]",
    ),
    Fault(
        "a state of a coupled loss changes from microbatch to microbatch",
        "states_of_models:updated_once",
        "updated_once=slots[i].key is None",
        "updated_once=False",
        f"{_MODELS}::test_it_changes_once_beside_collectives",
    ),
    Fault(
        "every microbatch draws the same numbers",
        "states_of_models:beside_loop",
        " or argument[i] in drawn_from",
        "",
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
        "given = _without_batch(given - running, parts, slots, trace, sources)",
        "given = given - running",
        f"{_MODELS}::test_a_state_of_such_a_count_runs_with_it",
    ),
    Fault(
        "only the next state is followed",
        "states_of_models:_without_batch",
        "        if kept == states:\n            return states\n        states = kept\n",
        "        return kept\n",
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
        "a parameter that is assigned to stays as it was",
        "Models.update",
        "        if assigned:\n",
        "        if False:\n",
        f"{_MODELS}::test_it_changes_once[a clipped parameter-{{'num_microbatches': 3}}]",
    ),
]
