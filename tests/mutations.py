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
import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).parent.parent
COPIED = ["jaxaccum", "torch_ref", "tests", "pyproject.toml"]


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
        "mean of means", "_outputs.py",
        "cast(x, widen(dtype_of(x))) * reader.size)\n        weight = reader.part(name, Reduction.SUM, reader.size)",
        "cast(x, widen(dtype_of(x))))\n        weight = reader.part(name, Reduction.SUM, 1)",
        "test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "the tail is dropped", "_batch.py",
        "((count, microbatch_size), (min(remainder, 1), remainder))", "((count, microbatch_size),)",
        "test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "the tail sees rows again", "_batch.py",
        "start + count * size", "start",
        "test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "one denominator for all terms", "_direct.py",
        "ratio(one, known[term.weight])", "ratio(one, known[program.terms[0].weight])",
        "test_value_and_grad.py::test_argnums_name_parameters_and_the_batch",
    ),
    Fault(
        "a weight passes no gradient", "_direct.py",
        "return [term.weight] if program.depends([term.weight], wrt) else []", "return []",
        "test_value_and_grad.py::test_argnums_name_parameters_and_the_batch",
    ),
    Fault(
        "division by a zero weight", "_tree.py",
        "quotient = total / jnp.where(empty, jnp.ones_like(weight), weight)", "quotient = total / weight",
        "test_tags.py::test_a_total_weight_of_zero_gives_value_and_gradient_zero",
    ),
    Fault(
        "sums of low precision", "_tree.py",
        "return jnp.dtype(jnp.float32)", "return dtype",
        "test_bug_corpus.py::test_gradients_of_low_precision_do_not_stall",
    ),
    Fault(
        "the last gradient alone", "_loop.py",
        "added.append([x + cast(y, x.dtype) for", "added.append([cast(y, x.dtype) for",
        "test_value_and_grad.py::test_the_sum_without_references_equals_the_full_batch",
    ),
    Fault(
        "the sum does not start at zero", "_loop.py",
        "in_references([zeros for _ in gradient.sets]", "in_references([inputs for _ in gradient.sets]",
        "test_value_and_grad.py::test_argnums_name_parameters_and_the_batch",
    ),
    Fault(
        "references are differentiated", "_loop.py",
        "    return accumulate\n", "    return in_place\n",
        "test_composition.py::test_around[value_and_grad-three scanned steps]",
    ),
    Fault(
        "one key for all microbatches", "_program.py",
        "return jax.random.fold_in(x, index + self._shard() * self.partition.num_microbatches)", "return x",
        "test_keys_and_carry.py::test_a_key_is_folded_with_the_microbatch_and_so_depends_on_the_partition",
    ),
    Fault(
        "one key on all devices", "_program.py",
        "index + self._shard() * self.partition.num_microbatches", "index",
        "test_mesh.py::test_keys_rows_and_extrema_over_shards",
    ),
    Fault(
        "example keys of the microbatch's own rows", "_program.py",
        "examples = self.partition.examples(self.partition.groups[g], index)",
        "examples = jax.numpy.arange(self.partition.groups[g].size)",
        "test_keys_and_carry.py::test_example_keys_make_dropout_independent_of_the_partition",
    ),
    Fault(
        "rows of a strided split stay unpermuted", "_batch.py",
        'after = axis + 1 if self.split == "strided" else axis', "after = axis",
        "test_tags.py::test_concat_and_stack_keep_the_order_of_a_strided_split",
    ),
    Fault(
        "the state is not threaded", "_loop.py",
        "return values or [arrays[i]", "return [arrays[i]",
        "test_keys_and_carry.py::test_state_runs_from_microbatch_to_microbatch",
    ),
    Fault(
        "a real example is taken for padding", "_loop.py",
        "index) >= arrays[program.limit]", "index) + 1 >= arrays[program.limit]",
        "test_value_and_grad.py::test_padding_is_skipped_at_run_time_and_compiles_once",
    ),
    Fault(
        "padding runs", "_loop.py",
        "index) >= arrays[program.limit]", "index) > arrays[program.limit]",
        "test_value_and_grad.py::test_padding_is_skipped_at_run_time_and_compiles_once",
    ),
    Fault(
        "the mask counts a row of padding", "_partition.py",
        "jnp.arange(capacity) < count", "jnp.arange(capacity) <= count",
        "test_partition.py::test_pad_batch_fills_with_zeros_and_masks_them",
    ),
    Fault(
        "gradients stay on their device", "_direct.py",
        "axes.append(_mesh.gradient_axes(grad, program.given_axes[i], program.mesh_axes) if whole else ())",
        "axes.append(())",
        "test_mesh.py::test_value_and_gradient_of_the_whole_batch[2-False]",
    ),
    Fault(
        "a denominator of one device's examples", "_direct.py",
        "totals = _over_mesh(restricted, _coupled.run(restricted, arrays))",
        "totals = _coupled.run(restricted, arrays)",
        "test_mesh.py::test_value_and_gradient_of_the_whole_batch[2-False]",
    ),
    Fault(
        "a maximum starts at the top", "_reduce.py",
        "neutral = _lowest(aval.dtype)", "neutral = _highest(aval.dtype)",
        "test_value_and_grad.py::test_aux_is_combined_by_its_tags",
    ),
    Fault(
        "side effects happen twice", "_direct.py",
        "if any(trace.effects for trace in restricted.traces):", "if False:",
        "test_value_and_grad.py::test_side_effects_happen_once_a_microbatch",
    ),
    Fault(
        "fun is traced twice", "_program.py",
        "            output = self.fun(*args, **kwargs)\n",
        "            self.fun(*args, **kwargs)\n            output = self.fun(*args, **kwargs)\n",
        "test_value_and_grad.py::test_fun_is_traced_once_a_size",
    ),
]  # fmt: skip

if importlib.metadata.version("jax").startswith("0.10."):  # later versions add into references without strides
    FAULTS.append(
        Fault(
            "slices keep no strides",
            "_trace.py",
            "closed = closed.replace(jaxpr=with_strides(closed.jaxpr))",
            "del axis[2:]",
            "test_composition.py::test_slices_of_parameters_add_in_place",
        )
    )


def run(tests: Sequence[str], fault: Fault | None = None) -> bool:
    """Whether the tests pass in a copy of the tree that has the fault."""
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        _copy(tree)
        if fault:
            file = tree / "jaxaccum" / fault.file
            file.write_text(fault.applied(file.read_text()))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        nodes = [f"tests/{test}" for test in tests]
        result = subprocess.run([*command, *nodes], cwd=tree, capture_output=True, text=True, timeout=600)
    if result.returncode not in (0, 1):  # neither passed nor failed: a test that is not there, a file that cannot load
        raise RuntimeError(f"pytest stopped with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def _copy(tree: pathlib.Path) -> None:
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
