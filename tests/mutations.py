"""Would the tests notice? Deliberate faults in the library, one at a time, each with the test that must catch it.

    python tests/mutations.py --all          # every fault, and that the tests pass without any
    python tests/mutations.py NAME…          # these alone
    python tests/mutations.py                # their names

A fault is a substitution in a temporary copy of the tree; nothing here is changed. The exit status is 1 when a fault
survives, and the text that a fault replaces must stand in its file exactly once.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import faults_in_arguments
import faults_in_audits
import faults_in_gradients
import faults_in_host_loop
import faults_in_keys
import faults_in_outputs

ROOT = pathlib.Path(__file__).parent.parent
PAPERS = ["README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"]
COPIED = ["jaxaccum", "torch_ref", "tests", "pyproject.toml", *PAPERS]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One substitution in one file of the package, and the test that fails for it."""

    name: str
    file: str
    old: str
    new: str
    test: str

    def applied(self, source: str) -> str:
        """The source with the fault in it."""
        if (found := source.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {found} times in {self.file}; it must stand once.")
        return source.replace(self.old, self.new)


FAULTS = [
    Fault(
        "mean of means", "_program/output_parts.py",
        "cast(x, widen(dtype_of(x))) * reader.size)\n        weight = reader.weight(name, reader.size)",
        "cast(x, widen(dtype_of(x))))\n        weight = reader.weight(name, 1)",
        "test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "the tail is dropped", "_program/microbatches.py",
        "((count, microbatch_size), (min(remainder, 1), remainder))", "((count, microbatch_size),)",
        "test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "the tail sees rows again", "_program/microbatches.py",
        "start + count * size", "start",
        "test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "one denominator for all terms", "_transforms/summed_gradients.py",
        "ratio(one, known[term.weight])", "ratio(one, known[program.terms[0].weight])",
        "test_value_and_grad.py::test_argnums_name_parameters_and_the_batch",
    ),
    Fault(
        "a weight passes no gradient", "_transforms/summed_gradients.py",
        "return [term.weight] if program.depends([term.weight], wrt) else []", "return []",
        "test_value_and_grad.py::test_argnums_name_parameters_and_the_batch",
    ),
    Fault(
        "division by a zero weight", "_base/trees.py",
        "quotient = total / jnp.where(empty, jnp.ones_like(weight), weight)", "quotient = total / weight",
        "test_tags.py::test_a_total_weight_of_zero_gives_value_and_gradient_zero",
    ),
    Fault(
        "sums of low precision", "_base/trees.py",
        "return jnp.dtype(jnp.float32)", "return dtype",
        "test_bug_corpus.py::test_gradients_of_low_precision_do_not_stall",
    ),
    Fault(
        "the last gradient alone", "_loop/derivative.py",
        "            total + cast(grad, total.dtype)\n            for total, grad in zip(sums[:count], grads[:count], strict=True)\n", "            cast(grad, total.dtype) for total, grad in zip(sums[:count], grads[:count], strict=True)\n",
        "test_value_and_grad.py::test_the_sum_without_references_equals_the_full_batch",
    ),
    Fault(
        "the sum does not start at zero", "_loop/derivative.py",
        "summed = [sums.zeros(self.arrays[i]) for", "summed = [self.arrays[i] for",
        "test_value_and_grad.py::test_argnums_name_parameters_and_the_batch",
    ),
    Fault(
        "a reader forgets the sum", "_jaxpr/running_sums.py",
        "return total + gradient", "return gradient",
        "test_running_sums.py::test_the_sum_grows_by_the_gradient",
    ),
    Fault(
        "one key for all microbatches", "_program/program.py",
        "return jax.random.fold_in(slot.value(x), place)", "return slot.value(x)",
        "test_keys_and_carry.py::test_a_key_is_folded_with_the_microbatch_and_so_depends_on_the_partition",
    ),
    Fault(
        "one key on all devices", "_program/program.py",
        "index + self._shard() * self.partition.num_microbatches", "index",
        "test_mesh.py::test_keys_rows_and_extrema_over_shards",
    ),
    Fault(
        "example keys of the microbatch's own rows", "_program/program.py",
        "examples = self.partition.examples(self.partition.groups[g], index)",
        "examples = jax.numpy.arange(self.partition.groups[g].size)",
        "test_keys_and_carry.py::test_example_keys_make_dropout_independent_of_the_partition",
    ),
    Fault(
        "rows of a strided split stay unpermuted", "_program/microbatches.py",
        'after = axis + 1 if self.split == "strided" else axis', "after = axis",
        "test_tags.py::test_concat_and_stack_keep_the_order_of_a_strided_split",
    ),
    Fault(
        "the state is not threaded", "_loop/loop.py",
        "return values or [arrays[i]", "return [arrays[i]",
        "test_keys_and_carry.py::test_state_runs_from_microbatch_to_microbatch",
    ),
    Fault(
        "a real example is taken for padding", "_loop/loop.py",
        "return cast(first, dtype) >= cast(", "return cast(first + 1, dtype) >= cast(",
        "test_value_and_grad.py::test_padding_is_skipped_at_run_time_and_compiles_once",
    ),
    Fault(
        "padding runs", "_loop/loop.py",
        "return cast(first, dtype) >= cast(", "return cast(first, dtype) > cast(",
        "test_value_and_grad.py::test_padding_is_skipped_at_run_time_and_compiles_once",
    ),
    Fault(
        "the mask counts a row of padding", "_host_loop/partition.py",
        "jnp.arange(capacity) < count", "jnp.arange(capacity) <= count",
        "test_partition.py::test_pad_batch_fills_with_zeros_and_masks_them",
    ),
    Fault(
        "gradients stay on their device", "_transforms/summed_gradients.py",
        "    return varying.gradient_axes(grad, program.given_axes[slot], program.mesh_axes)\n",
        "    return ()\n",
        "test_mesh.py::test_value_and_gradient_of_the_whole_batch[2-False]",
    ),
    Fault(
        "a denominator of one device's examples", "_transforms/summed_gradients.py",
        "totals = restricted.over_mesh(engine.run(restricted, arrays))",
        "totals = engine.run(restricted, arrays)",
        "test_mesh.py::test_value_and_gradient_of_the_whole_batch[2-False]",
    ),
    Fault(
        "a maximum starts at the top", "_program/reductions.py",
        "neutral = _lowest(aval.dtype)", "neutral = _highest(aval.dtype)",
        "test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "side effects happen twice", "_transforms/summed_gradients.py",
        "program.pure().only(", "program.only(",
        "test_value_and_grad.py::test_side_effects_happen_once_a_microbatch",
    ),
    Fault(
        "fun is traced twice", "_program/call.py",
        "        return assignments.call(self.fun, args, kwargs, explain)\n",
        "        self.fun(*args, **kwargs)\n        return self.fun(*args, **kwargs)\n",
        "test_value_and_grad.py::test_fun_is_traced_once_a_size",
    ),
    Fault(
        "a shifted value is taken for shared", "_coupled/cut.py",
        '"pmax", "pmin", "all_gather"}', '"pmax", "pmin", "all_gather", "ppermute"}',
        "test_coupled.py::test_every_collective[store]",
    ),
    Fault(
        "a reversed scan runs forward", "_coupled/trace.py",
        'reversed(range(length)) if params["reverse"] else range(length)', "range(length)",
        "test_coupled_composition.py::test_inside[reversed scan of checkpoints]",
    ),
    Fault(
        "a minimum is derived as the maximum", "_coupled/collectives.py",
        "(lax.pmin, jnp.min)", "(lax.pmin, jnp.max)",
        "test_coupled.py::test_extrema_are_differentiated_as_reduce_max",
    ),
    Fault(
        "a mapped reverse keeps every pass", "_coupled/execute.py",
        "sums=sums, checkpoint=again)", "sums=sums)",
        "test_memory.py::test_rows_under_an_outer_vmap_keep_one_microbatchs_activations[coupled]",
    ),
    Fault(
        "the adjoint of a statistic is the last microbatch's", "_coupled/gradient.py",
        "shared = [self.reverse.combined(v, old, new) for", "shared = [cast(new, old.dtype) for",
        "test_coupled_errors.py::test_distinct_names_nest",
    ),
    Fault(
        "of two readers of a statistic one counts", "_coupled/gradient.py",
        "table[v] = self.combined(v, table[v], x) if v in table else x", "table[v] = x",
        "test_coupled.py::test_a_statistic_that_two_stages_read",
    ),
    Fault(
        "adjoints of low precision", "_coupled/gradient.py",
        "dtype, value = widen(v.aval.dtype), self.sweep.shared[v]", "dtype, value = v.aval.dtype, self.sweep.shared[v]",
        "test_coupled.py::test_adjoints_of_low_precision_statistics_are_summed_in_float32",
    ),
    Fault(
        "to compute again costs nothing", "_coupled/schedule.py",
        "total += again + cost.back[k]", "total += cost.back[k]",
        "test_coupled_schedule.py::test_the_prediction_is_that_of_the_compiled_program[perceptron-min]",
    ),
    Fault(
        "what collectives take costs no memory", "_coupled/cost.py",
        "bytes_of(stacked(results), size) + largest", "bytes_of(stacked(results), size)",
        "test_coupled_schedule.py::test_stored_bytes_are_those_of_the_boundaries",
    ),
    Fault(
        "the running variance is biased", "_flax/batch_moments.py",
        "jnp.maximum(self.counted - 1, 0)", "self.counted",
        "test_norms.py::test_running_statistics_of_torch_are_unbiased[linen]",
    ),
    Fault(
        "the variance is that within microbatches", "_flax/batch_moments.py",
        "total(parts.squares + weighted(_square(apart)))", "total(parts.squares)",
        "test_norms.py::test_masked_microbatches_have_the_statistics_of_the_whole_batch[2-linen]",
    ),
    Fault(
        "the rounding of the mean stays", "_flax/batch_moments.py",
        "jnp.maximum(squares - counted * _square(error), 0)", "squares",
        "test_norms.py::test_the_rounding_of_the_mean_leaves_the_variance",
    ),
    Fault(
        "an empty batch moves running statistics", "_flax/batch_norm.py",
        "jnp.where(new.counted > 0, average, before)", "average",
        "test_norms.py::test_an_empty_batch_moves_nothing_and_has_gradient_zero[linen]",
    ),
    Fault(
        "statistics of low precision", "linen.py",
        "batch_norm.at_least_float32 if self.force_float32_reductions else jnp.dtype", "jnp.dtype",
        "test_norms.py::test_statistics_of_low_precision_are_float32[bfloat16-linen]",
    ),
    Fault(
        "the model forgets its state", "nnx.py",
        "        models.update(state, streams)\n", "",
        "test_nnx.py::test_it_is_the_host_loop_of_nnx_with_all_of_its_state[jit-{'num_microbatches': 3}]",
    ),
    Fault(
        "a microbatch without weight is a sample", "accumulators/_noise_scale.py",
        "jnp.where(w > 0, jnp.int32(1), jnp.int32(0))", "jnp.int32(1)",
        "test_accumulators.py::test_a_microbatch_without_weight_makes_no_noise",
    ),
    Fault(
        "the squared norm keeps its noise", "accumulators/_noise_scale.py",
        "square - trace / jnp.where(many, state.weight, jnp.ones_like(square))", "square",
        "test_accumulators.py::test_the_noise_scale_of_microbatches_of_many_weights",
    ),
    Fault(
        "what is not finite is added", "accumulators/_skip_nonfinite.py",
        "unless(ok, held.update(state.inner, mean_grads, weight, index), state.inner)",
        "held.update(state.inner, mean_grads, weight, index)",
        "test_accumulators.py::test_where_nothing_is_finite_value_and_gradient_are_zero",
    ),
    Fault(
        "what was rounded away is forgotten", "accumulators/_compensated.py",
        "low = pair.low + ((pair.high", "low = ((pair.high",
        "test_accumulators.py::test_the_error_of_a_compensated_sum_does_not_grow[True-float32]",
    ),
    Fault(
        "the best is predicted and not compiled", "_tools/plan.py",
        "if choice in self.known:", "if self.known:",
        "test_plan.py::test_the_best_is_the_largest_that_fits",
    ),
    Fault(
        "every device takes a whole microbatch", "_transforms/explicit_mesh.py",
        "min(size, whole) // self.shards", "min(size, whole // self.shards)",
        "test_data_parallel.py::test_sizes_are_those_of_the_whole_batch[{'microbatch_size': 16}]",
    ),
    Fault(
        "parts of a parameter are added up", "_devices/varying.py",
        "(varying_axes(grad) | set(mesh_axes)) - given_axes", "varying_axes(grad) | set(mesh_axes)",
        "test_mesh.py::test_parameters_divided_over_another_axis[divided-value_and_grad]",
    ),
    Fault(
        "the audit reads one size of microbatch", "_audit/analysis.py",
        "for group in partition.groups:", "for group in partition.groups[:1]:",
        "test_audit.py::test_the_last_and_smaller_microbatches_are_judged_too",
    ),
    Fault(
        "the audit lets randomness pass", "_audit/judge.py",
        "accumulates and not draws, bool", "accumulates, bool",
        "test_audit.py::test_keys",
    ),
    Fault(
        "the audit lets a constant of the size pass", "_audit/constants.py",
        "fixed(Scale() if same(a, b) else IRREGULAR, number=self.fresh(), at=at)", "fixed(number=self.fresh())",
        "test_audit.py::test_verdict_and_exactness_are_those_of_the_numbers[a constant of the size]",
    ),
    Fault(
        "the audit drops one scale of two", "_audit/lattice.py",
        "self.power is None or other.power is None else self.power + other.power",
        "self.power is None or other.power is None else self.power",
        "test_audit.py::test_verdict_and_exactness_are_those_of_the_numbers[Sum of a mean]",
    ),
    Fault(
        "the audit takes n - 1 for n", "_audit/lattice.py",
        "return power if close and abs(power) <= 4 else None", "return power",
        "test_audit.py::test_verdict_and_exactness_are_those_of_the_numbers[Mean by size - 1]",
    ),
    Fault(
        "the audit reads no aux", "_audit/traces.py",
        ', *leaves(aux, "aux", aux=True)]', "]",
        "test_audit.py::test_aux_is_judged_by_its_tags",
    ),
    Fault(
        "a coupled cotangent counts once per device", "_transforms/engine.py",
        "return typed(result, program.axes)", "return varying.vary(result, program.axes)",
        "test_coupled_on_meshes.py::test_values_and_gradients_of_a_coupled_loss_are_differentiated_from_outside",
    ),
    Fault(
        "the sum before the first microbatch has no layout", "_devices/varying.py",
        "out_sharding=sharding if abstract else None", "out_sharding=None",
        "test_data_parallel.py::test_outputs_are_laid_out_as_the_parameters_that_they_come_from",
    ),
    Fault(
        "a carried number comes from a key that no microbatch drew from", "_program/prepare.py",
        "own if slot.key is not None else own | keys.keys()", "own",
        "test_nnx.py::test_a_number_that_each_microbatch_drew_for_itself_is_no_state_of_the_whole_batch",
    ),
    Fault(
        "a sum over devices is of one device", "_coupled/collectives.py",
        "x = _one(over, x, name) if _manual(name) else", "x = x if _manual(name) else",
        "test_coupled_on_meshes.py::test_a_coupled_loss_of_divided_parameters[columns-by device-min]",
    ),
    Fault(
        "a gather over the mesh is transposed where types are checked", "_coupled/collectives.py",
        "return exchanged(collective, x) if _manual(name) else collective(x)", "return collective(x)",
        "test_coupled_on_meshes.py::test_gathered_losses_are_transformed_from_outside",
    ),
    Fault(
        "a collective over the mesh alone is transposed where types are checked", "_devices/without_checks.py",
        "return changed(jaxpr, change)", "return jaxpr",
        "test_coupled_on_meshes.py::test_gathered_losses_are_transformed_from_outside",
    ),
    Fault(
        "a gather takes its axes in the wrong order", "_coupled/collectives.py",
        "for name in reversed(axes):", "for name in axes:",
        "test_coupled_on_meshes.py::test_a_contrastive_loss_gathers_from_devices_and_microbatches",
    ),
    Fault(
        "a carried key that comes back is taken for a changed state", "_audit/analysis.py",
        "made_of.get(v, v) for v in new", "v for v in new",
        "test_audit.py::test_a_carried_key_that_comes_back_is_no_changed_state",
    ),
    Fault(
        "a plan extrapolates a coupled loss", "_tools/plan.py",
        "self.ends = [sizes[0], sizes[-1]] if ends else []", "self.ends = []",
        "test_plan.py::test_nothing_of_a_coupled_loss_is_extrapolated",
    ),
]  # fmt: skip

MORE = [
    *faults_in_arguments.ROWS, *faults_in_audits.ROWS, *faults_in_gradients.ROWS, *faults_in_host_loop.ROWS,
    *faults_in_keys.ROWS, *faults_in_outputs.ROWS,
]  # fmt: skip
FAULTS += [Fault(*row) for row in MORE]


def run(tests: Sequence[str], fault: Fault | None = None) -> bool:
    """Whether the tests pass in a copy of the tree that has the fault."""
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        copy_tree(tree)
        if fault:
            file = tree / "jaxaccum" / fault.file
            file.write_text(fault.applied(file.read_text()))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        nodes = [f"tests/{test}" for test in tests]
        result = subprocess.run([*command, *nodes], cwd=tree, capture_output=True, text=True, timeout=600)
    if result.returncode not in (0, 1):  # neither passed nor failed: a test that is not there, a file that cannot load
        raise RuntimeError(f"pytest stopped with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def copy_tree(tree: pathlib.Path) -> None:
    """Copy what the tests need."""
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignored)
        else:
            shutil.copy(source, tree / name)


def rows(faults: Sequence[Fault]) -> Iterator[tuple[Fault, bool, float]]:
    """Each fault, whether its test caught it, and the seconds that took."""
    for fault in faults:
        start = time.perf_counter()
        caught = not run([fault.test], fault)
        yield fault, caught, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the faults that the command line names; 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the faults to run")
    parser.add_argument("--all", action="store_true", help="run every fault")
    options = parser.parse_args(arguments)
    known = {fault.name: fault for fault in FAULTS}
    if unknown := set(options.names) - set(known):
        parser.error(f"no fault is called {sorted(unknown)}; they are {sorted(known)}")
    if not options.names and not options.all:
        print(*known, sep="\n")
        return 0
    chosen = FAULTS if options.all else [known[name] for name in options.names]
    if not run(sorted({fault.test for fault in chosen})):
        print("the tests fail without any fault")
        return 1
    survivors = 0
    for fault, caught, seconds in rows(chosen):
        survivors += not caught
        print(f"| {fault.name} | {fault.test if caught else 'SURVIVED'} | {seconds:.0f} s |", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults caught")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
