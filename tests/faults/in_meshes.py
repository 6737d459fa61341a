"""Deliberate faults on meshes of devices."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "every device takes every n-th row",
        "_Spread._own_options",
        "mesh_axes=(*outer, *self.axes),",
        'split="strided", mesh_axes=(*outer, *self.axes),',
        "meshes/test_data_parallel.py::test_groups_of_adjacent_rows_stay_together",
    ),
    Fault(
        "global arrays are cut across their shards",
        "_Spread.globally",
        "dataclasses.replace(self.options, blocks=self.shards)",
        "self.options",
        "meshes/test_data_parallel.py::"
        "test_a_microbatch_takes_the_rows_of_every_shard_that_the_split_says",
    ),
    Fault(
        "what fun raises of one device's rows is tried on global arrays",
        "_spread",
        "if not is_jaxs(error):",
        "if False:",
        "meshes/test_global_arrays.py::"
        "test_whose_error_it_is_says_whether_the_global_arrays_are_tried[off]",
    ),
    Fault(
        "a function that sees beyond its device runs device by device",
        "Tracing._check_of_one_device",
        "raise NeedsGlobalArraysError",
        "return",
        "meshes/test_global_arrays.py",
    ),
    Fault(
        "a type that JAX refuses on one device's rows is refused",
        "_spread",
        "(NotImplementedError, TypeError, ValueError)",
        "(NotImplementedError, ValueError)",
        "meshes/test_global_arrays.py::"
        "test_what_jax_refuses_device_by_device_runs_on_global_arrays[a loop from a constant]",
    ),
    Fault(
        "an error of JAX's without its frames is the user's",
        "is_jaxs",
        " or code.co_code[last.tb_lasti] != _RAISE",
        "",
        "meshes/test_global_arrays.py::"
        "test_whose_error_it_is_says_whether_the_global_arrays_are_tried[remove_frames]",
    ),
    Fault(
        "a gradient has the type of its parameter",
        "as_cotangent",
        "unreduced=own.reduced, reduced=own.unreduced",
        "unreduced=own.unreduced, reduced=own.reduced",
        "meshes/test_data_parallel.py::"
        "test_parameters_that_are_reduced_or_not_yet_have_gradients_of_jaxs_types",
    ),
    Fault(
        "every device takes a whole microbatch",
        "_Spread._own_options",
        "min(size, whole) // self.shards",
        "min(size, whole // self.shards)",
        "meshes/test_data_parallel.py::"
        "test_sizes_are_those_of_the_whole_batch[{'microbatch_size': 16}]",
    ),
    Fault(
        "parts of a parameter are added up",
        "gradient_axes",
        "(varying_axes(grad) | set(mesh_axes)) - given_axes",
        "varying_axes(grad) | set(mesh_axes)",
        "meshes/test_mesh.py::test_parameters_divided_over_another_axis[divided-value_and_grad]",
    ),
    Fault(
        "the sum before the first microbatch has no layout",
        "full",
        "out_sharding=sharding if _at_hand(sharding) else None",
        "out_sharding=None",
        "meshes/test_data_parallel.py::"
        "test_outputs_are_laid_out_as_the_parameters_that_they_come_from",
    ),
    Fault(
        "a collective over the mesh alone is transposed where types are checked",
        "with_exchanges",
        "return changed(jaxpr, change)",
        "return jaxpr",
        "coupled/test_on_meshes.py::test_gathered_losses_are_transformed_from_outside",
    ),
    Fault(
        "a loss that devices share is counted once per device",
        "_as_the_value_varies",
        "    if not further:\n",
        "    if True:\n",
        "meshes/test_further_axes.py::test_tokens_divided_over_devices",
    ),
    Fault(
        "one output that differs between devices makes all of them differ",
        "_as_the_value_varies",
        "further.intersection(*of_value)",
        "further.intersection(frozenset().union(*of_value))",
        "meshes/test_further_axes.py::test_a_shared_loss_beside_an_output_of_each_device",
    ),
    Fault(
        "an array is laid out over the mesh that its type names, whichever is at hand",
        "_at_hand",
        " and (here.empty or here == mesh)",
        "",
        "meshes/test_closed_over.py::test_the_gradient_is_jaxs_in_the_same_place",
    ),
]
