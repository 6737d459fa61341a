"""Deliberate faults in entries by name, outputs without a tag, and derivatives that would be
lost."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "entries by name reach keywords alone",
        "by_name",
        "tuple(map(entry, _positional_names(parameters, count)))",
        "(None,) * count",
        "plain/test_in_axes_by_name.py::test_an_entry_by_name_holds_wherever_the_argument_stands",
    ),
    Fault(
        "a misspelled name passes",
        "by_name",
        "if unknown := [name for name in in_axes if name not in known]:",
        "if unknown := []:",
        "plain/test_in_axes_by_name.py::test_is_refused",
    ),
    Fault(
        "a misspelled option passes",
        "check_keywords",
        "        if name not in known:\n            raise TypeError(",
        "        if False:\n            raise TypeError(",
        "plain/test_in_axes_by_name.py::test_is_refused",
    ),
    Fault(
        "keyword arguments are whole",
        "read",
        "axes = given.of(number)",
        "axes = None if isinstance(number, str) else given.of(number)",
        "plain/test_in_axes_by_name.py::test_keys_and_a_state_by_name",
    ),
    Fault(
        "a derivative is lost",
        "_movers",
        "    return found\n",
        "    return {}\n",
        "plain/test_no_gradient.py::test_a_derivative_that_would_be_lost_is_refused",
    ),
    Fault(
        "a derivative is lost from outside",
        "refusing.rule",
        "return same(*primals), safe_map",
        "return primals[0], safe_map",
        "plain/test_no_gradient.py::test_it_is_refused_of_an_auxiliary_output_that_is_differentiated_from_outside",
    ),
    Fault(
        "what the loss stops is refused",
        "movers",
        'if any(operands) and eqn.primitive.name != "stop_gradient":',
        "if any(operands):",
        "plain/test_no_gradient.py::test_a_value_that_the_loss_itself_stops_is_a_constant",
    ),
    Fault(
        "what depends on rows passes without a tag",
        "Trace.is_of",
        "        if not self._dependencies.is_vague(output):\n            return False\n",
        "        return True\n",
        "plain/test_whole_outputs.py::test_what_depends_on_more_is_refused",
    ),
    Fault(
        "a constant passes without a tag",
        "whole_outputs:refusal",
        "untagged.of_model or not traces[0].depends(i, [True] * len(traces[0].arguments))",
        "untagged.of_model",
        "plain/test_whole_outputs.py::test_what_depends_on_more_is_refused",
    ),
    Fault(
        "a sum over microbatches passes without a tag",
        "Trace.is_of",
        "if outside or self.with_jaxpr(jaxpr).coupling is not None or",
        "if outside or",
        "plain/test_whole_outputs.py::test_what_depends_on_more_is_refused",
    ),
    Fault(
        "every device counts what is whole",
        "_output",
        "return finalized(program, arrays, program.over_mesh(parts))",
        "return finalized(program, summed, program.over_mesh(parts))",
        "plain/test_whole_outputs.py::test_devices_count_it_once",
    ),
    Fault(
        "a device's share is taken for the whole",
        "_same_everywhere",
        "append(slot.is_same(coupled=coupled) and over_devices.isdisjoint(axes))",
        "append(slot.is_same(coupled=coupled))",
        "plain/test_whole_outputs.py::test_explicit_meshes",
    ),
    Fault(
        "the loop computes what is whole",
        "without_tags:apart",
        "tuple(one.first(len(outputs.parts)) for one in traces)",
        "tuple(one.with_jaxpr(one.jaxpr.replace("
        "outvars=one.jaxpr.outvars[: len(outputs.parts)])) for one in traces)",
        "plain/test_whole_outputs.py::test_no_loop_computes_it",
    ),
    Fault(
        "the index of an example is read in the dtype of their number",
        "_is_padding",
        "dtype = promote(first, num_examples)",
        "dtype = num_examples.dtype",
        "plain/test_variable_batches.py::test_the_number_of_examples_has_any_integer_dtype",
    ),
    Fault(
        "a closed-over dict of two kinds of keys hides the loss's own error",
        "_leaves",
        "except (TypeError, ValueError):",
        "except ZeroDivisionError:",
        "audit/test_closures.py::test_what_is_no_pytree_hides_no_error_of_the_loss",
    ),
]
