"""Deliberate faults in coupled losses."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "a shifted value is taken for shared",
        "COLLECTIVES",
        '"pmax", "pmin", "all_gather")',
        '"pmax", "pmin", "all_gather", "ppermute")',
        "coupled/test_coupled.py::test_every_collective[store]",
    ),
    Fault(
        "a reversed scan runs forward",
        "_unroll",
        'reversed(range(length)) if params["reverse"] else range(length)',
        "range(length)",
        "coupled/test_composition.py::test_inside[reversed scan of checkpoints]",
    ),
    Fault(
        "a minimum is derived as the maximum",
        "_EXTREMA",
        "(lax.pmin, jnp.min)",
        "(lax.pmin, jnp.max)",
        "coupled/test_coupled.py::test_extrema_are_differentiated_as_reduce_max",
    ),
    Fault(
        "a mapped reverse keeps every pass",
        "Sweep.over_microbatches",
        "sums=sums, checkpoint=again)",
        "sums=sums)",
        "plain/test_memory.py::"
        "test_rows_under_an_outer_vmap_keep_one_microbatchs_activations[coupled]",
    ),
    Fault(
        "the adjoint of a statistic is the last microbatch's",
        "_Step.visit",
        "shared = list(map(self.reverse.combined, self.shared, sums.shared, grads.shared))",
        "shared = list(grads.shared)",
        "coupled/test_errors.py::test_distinct_names_nest",
    ),
    Fault(
        "of two readers of a statistic one counts",
        "Reverse._add",
        "table[v] = self.combined(v, table[v], x) if v in table else x",
        "table[v] = x",
        "coupled/test_coupled.py::test_a_statistic_that_two_stages_read",
    ),
    Fault(
        "adjoints of low precision",
        "Reverse._before",
        "dtype, value = widen(type_of(v).dtype), self.sweep.shared[v]",
        "dtype, value = type_of(v).dtype, self.sweep.shared[v]",
        "coupled/test_coupled.py::test_adjoints_of_low_precision_statistics_are_summed_in_float32",
    ),
    Fault(
        "to compute again costs nothing",
        "_segments",
        "total += again + cost.back[k]",
        "total += cost.back[k]",
        "coupled/test_schedule.py::"
        "test_the_prediction_is_that_of_the_compiled_program[perceptron-min]",
    ),
    Fault(
        "what collectives take costs no memory",
        "statistics_bytes",
        "return _bytes_of_batch(cuts, results) + largest",
        "return _bytes_of_batch(cuts, results)",
        "coupled/test_schedule.py::test_stored_bytes_are_those_of_the_boundaries",
    ),
    Fault(
        "a sum over devices is of one device",
        "_summed",
        "x = _one(over, x, name) if _manual(name) else",
        "x = x if _manual(name) else",
        "coupled/test_on_meshes.py::test_a_coupled_loss_of_divided_parameters",
    ),
    Fault(
        "a gather over the mesh is transposed where types are checked",
        "_one",
        "return exchanged(collective, x) if _manual(name) else collective(x)",
        "return collective(x)",
        "coupled/test_on_meshes.py::test_gathered_losses_are_transformed_from_outside",
    ),
    Fault(
        "a gather takes its axes in the wrong order",
        "_gathered",
        "for name in reversed(axes):",
        "for name in axes:",
        "coupled/test_on_meshes.py::test_a_contrastive_loss_gathers_from_devices_and_microbatches",
    ),
    Fault(
        "who receives nothing in a permutation has what somebody else sent",
        "_permuted",
        "return jnp.where(own, received, jnp.zeros_like(received))",
        "return received",
        "coupled/test_coupled.py::test_who_receives_nothing_in_a_permutation_has_zeros[store]",
    ),
    Fault(
        "a layer of devices loses its own axis",
        "batch_norm_over",
        "[*_names(own), *_names(axis_name)]",
        "[*_names(axis_name)]",
        "flax/test_norms.py::test_the_context_adds_to_the_axes_of_a_layer",
    ),
    Fault(
        "a layer keeps the axis of a context",
        "batch_norm_over",
        'object.__setattr__(layer, "axis_name", own)',
        "pass",
        "flax/test_norms.py::test_a_bound_layer_has_its_own_axes_after_the_context",
    ),
    Fault(
        "a compiled function that is opened loses its constants",
        "retraced",
        "if not consts:",
        "if True:",
        "programs/test_constants_inside.py::test_they_are_read",
    ),
]
