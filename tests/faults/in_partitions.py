"""Deliberate faults in microbatches, tags, and the loop over them."""

from tests.faults.fault import Fault

FAULTS = [
    Fault(
        "mean of means",
        "_read_tag",
        "cast(x, widen(dtype_of(x))) * reader.size)\n"
        "        weight = reader.weight(name, reader.size)",
        "cast(x, widen(dtype_of(x))))\n        weight = reader.weight(name, 1)",
        "plain/test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "the tail is dropped",
        "by_size",
        "((count, microbatch_size), (min(remainder, 1), remainder))",
        "((count, microbatch_size),)",
        "plain/test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "the tail sees rows again",
        "_of_groups",
        "start + count * size",
        "start",
        "plain/test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "division by a zero weight",
        "ratio",
        "quotient = total / jnp.where(empty, jnp.ones_like(weight), weight)",
        "quotient = total / weight",
        "plain/test_tags.py::test_a_total_weight_of_zero_gives_value_and_gradient_zero",
    ),
    Fault(
        "sums of low precision",
        "widen",
        "return jnp.dtype(jnp.float32)",
        "return dtype",
        "peers/test_bug_corpus.py::test_gradients_of_low_precision_do_not_stall",
    ),
    Fault(
        "the last gradient alone",
        "_plus",
        "return total + cast(grad, total.dtype)",
        "return cast(grad, total.dtype)",
        "plain/test_value_and_grad.py::test_the_sum_without_references_equals_the_full_batch",
    ),
    Fault(
        "the sum does not start at zero",
        "Derivative.zeros",
        "return [*map(rule.zeros, summed), *lowest]",
        "return [*summed, *lowest]",
        "plain/test_value_and_grad.py::test_argnums_name_parameters_and_the_batch",
    ),
    Fault(
        "one key for all microbatches",
        "Program._folded",
        "return jax.random.fold_in(slot.value(x), place)",
        "return slot.value(x)",
        "plain/test_keys_and_carry.py::"
        "test_a_key_is_folded_with_the_microbatch_and_so_depends_on_the_partition",
    ),
    Fault(
        "one key on all devices",
        "Program._folded",
        "index + self._shard() * self.partition.num_microbatches",
        "index",
        "meshes/test_mesh.py::test_keys_rows_and_extrema_over_shards",
    ),
    Fault(
        "example keys of the microbatch's own rows",
        "Program._folded",
        "examples = self.partition.examples(self.partition.groups[g], index)",
        "examples = jax.numpy.arange(self.partition.groups[g].size)",
        "plain/test_keys_and_carry.py::test_example_keys_make_dropout_independent_of_the_partition",
    ),
    Fault(
        "rows of a strided split stay unpermuted",
        "Partition.merge_rows",
        'after = axis + 1 if self.split == "strided" else axis',
        "after = axis",
        "plain/test_tags.py::test_concat_and_stack_keep_the_order_of_a_strided_split",
    ),
    Fault(
        "the state is not threaded",
        "_carried_state",
        "return values or entries(",
        "return entries(",
        "plain/test_keys_and_carry.py::test_state_runs_from_microbatch_to_microbatch",
    ),
    Fault(
        "a real example is taken for padding",
        "_is_padding",
        "return cast(first, dtype) >= cast(",
        "return cast(first + 1, dtype) >= cast(",
        "plain/test_value_and_grad.py::test_padding_is_skipped_at_run_time_and_compiles_once",
    ),
    Fault(
        "padding runs",
        "_is_padding",
        "return cast(first, dtype) >= cast(",
        "return cast(first, dtype) > cast(",
        "plain/test_value_and_grad.py::test_padding_is_skipped_at_run_time_and_compiles_once",
    ),
    Fault(
        "a maximum starts at the top",
        "initial",
        "neutral = _lowest(aval.dtype)",
        "neutral = _highest(aval.dtype)",
        "plain/test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "fun is traced twice",
        "FlatFunction._output",
        "        return batch_keys.returned(assignments.call(self.fun, args, kwargs, explain))\n",
        "        self.fun(*args, **kwargs)\n        return self.fun(*args, **kwargs)\n",
        "plain/test_value_and_grad.py::test_fun_is_traced_once_a_size",
    ),
    Fault(
        "a carried number comes from a key that no microbatch drew from",
        "_with_own_streams",
        "own if slot.key is not None else own | keys.keys()",
        "own",
        "flax/test_nnx.py::"
        "test_a_number_that_each_microbatch_drew_for_itself_is_no_state_of_the_whole_batch",
    ),
]
