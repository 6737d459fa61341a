"""Deliberate faults in entries by name, outputs without a tag, and derivatives that would be lost."""

ROWS = [
    (
        "entries by name reach keywords alone", "_program/axes_by_name.py",
        "tuple(map(entry, _positional_names(parameters, count)))", "(None,) * count",
        "test_in_axes_by_name.py::test_an_entry_by_name_holds_wherever_the_argument_stands",
    ),
    (
        "a misspelled name passes", "_program/axes_by_name.py",
        "if unknown := [name for name in in_axes if name not in known]:", "if unknown := []:",
        "test_in_axes_by_name.py::test_is_refused",
    ),
    (
        "a misspelled option passes", "_program/axes_by_name.py",
        "        if name not in known:\n            raise TypeError(",
        "        if False:\n            raise TypeError(",
        "test_in_axes_by_name.py::test_is_refused",
    ),
    (
        "keyword arguments are whole", "_program/argument_slots.py",
        "axes = given.of(number)",
        "axes = None if isinstance(number, str) else given.of(number)",
        "test_in_axes_by_name.py::test_keys_and_a_state_by_name",
    ),
    (
        "a derivative is lost", "_program/finalize.py",
        "    return found\n", "    return {}\n",
        "test_no_gradient.py::test_a_derivative_that_would_be_lost_is_refused",
    ),
    (
        "a derivative is lost from outside", "_program/no_gradient.py",
        "return same(*primals), safe_map", "return primals[0], safe_map",
        "test_no_gradient.py::test_it_is_refused_of_an_auxiliary_output_that_is_differentiated_from_outside",
    ),
    (
        "what the loss stops is refused", "_jaxpr/reversible.py",
        'if any(operands) and eqn.primitive.name != "stop_gradient":', "if any(operands):",
        "test_no_gradient.py::test_a_value_that_the_loss_itself_stops_is_a_constant",
    ),
    (
        "what depends on rows passes without a tag", "_jaxpr/traces.py",
        "        return any(used) and all(\n            may for may, reads in zip([False, *allowed], used, strict=True) if reads\n        )\n",
        "        return any(used)\n",
        "test_whole_outputs.py::test_what_depends_on_more_is_refused",
    ),
    (
        "a constant passes without a tag", "_jaxpr/traces.py",
        "        return any(used) and all(\n            may for may, reads in zip([False, *allowed], used, strict=True) if reads\n        )\n", "        return all(may for may, reads in zip([False, *allowed], used, strict=True) if reads)\n",
        "test_whole_outputs.py::test_what_depends_on_more_is_refused",
    ),
    (
        "a sum over microbatches passes without a tag", "_jaxpr/traces.py",
        "if outside or alone.coupling is not None or", "if outside or",
        "test_whole_outputs.py::test_what_depends_on_more_is_refused",
    ),
    (
        "every device counts what is whole", "_transforms/microbatch.py",
        "return finalized(program, arrays, program.over_mesh(parts))", "return finalized(program, summed, program.over_mesh(parts))",
        "test_whole_outputs.py::test_devices_count_it_once",
    ),
    (
        "a device's share is taken for the whole", "_program/prepare.py",
        "is Role.WHOLE and not given_axes[i] & set(device_axes)", "is Role.WHOLE",
        "test_whole_outputs.py::test_explicit_meshes",
    ),
    (
        "the loop computes what is whole", "_program/prepare.py",
        "traces = [one.first(len(outputs.parts)) for one in traces]",
        "traces = [dataclasses.replace(one, jaxpr=one.jaxpr.replace("
        "outvars=one.jaxpr.outvars[: len(outputs.parts)])) for one in traces]",
        "test_whole_outputs.py::test_no_loop_computes_it",
    ),
    (
        "the index of an example is read in the dtype of their number", "_loop/loop.py",
        "dtype = promote(first, num_examples)", "dtype = num_examples.dtype",
        "test_variable_batches.py::test_the_number_of_examples_has_any_integer_dtype",
    ),
]  # fmt: skip
