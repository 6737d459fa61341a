"""The strict rules under which every test runs, and the profiles of hypothesis."""

import collections
import functools
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import re

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A program that was compiled is read again: by the other worker, by a process that a test starts,
# after all programs were forgotten, and in the next run. JAX finds it by its text, its options and
# the kind of processor. It keeps none that calls back into Python.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A loop over a few numbers takes torch ten times as long where its threads wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Traces are many small objects that live long. Python looks through them less often, which saved
# 7 % of the time of 111 tests.
gc.set_threshold(100_000, 50, 100)

TESTS = pathlib.Path(__file__).parent
# Without torch (an environment of the other supported versions) its files are no tests; the rest
# is.
collect_ignore_glob = []
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob += [
        str(path)
        for path in TESTS.rglob("test_*.py")
        if re.search(r"^(import|from) (torch|experiments)", path.read_text(), flags=re.MULTILINE)
    ]

# The compiler for GPUs, 257 MB, comes with the extra `gpu`, which `test` does not bring.
GPU_COMPILERS = ("jax-cuda13-pjrt", "jax-cuda12-pjrt")
COMPILES_FOR_GPUS = any(list(importlib.metadata.distributions(name=name)) for name in GPU_COMPILERS)


def pytest_report_header():
    return (
        []
        if COMPILES_FOR_GPUS
        else "tests marked gpu are deselected: pip install -e '.[test,gpu]' brings their compiler"
    )


def pytest_collection_modifyitems(config, items):
    items.sort(key=is_optimized)  # a change of how programs are compiled forgets all of them
    if not COMPILES_FOR_GPUS:
        config.hook.pytest_deselected(
            items=[item for item in items if item.get_closest_marker("gpu")]
        )
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


_ALWAYS = {
    "deadline": None,
    "suppress_health_check": list(hypothesis.HealthCheck),
    "print_blob": True,
}
hypothesis.settings.register_profile("dev", max_examples=25, **_ALWAYS)
hypothesis.settings.register_profile("ci", max_examples=100, derandomize=True, **_ALWAYS)
hypothesis.settings.register_profile("deep", max_examples=1000, **_ALWAYS)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


FAST = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
"""The older emitters of XLA for CPU compile in a third of the time. JAX 0.12 has lost them."""


def compile_with_fast_emitters():
    """Have JAX use them where optimizations are off: no setting of it says so for some programs
    alone, and XLA_FLAGS is read once per process."""
    from jax._src import compiler  # private, and as it is up to JAX 0.11

    of_users = compiler.get_compile_options

    def compile_options(*args, env_options_overrides=None, **kwargs):
        fast = FAST if jax.config.read("jax_disable_most_optimizations") else {}
        overrides = fast | dict(env_options_overrides or {})
        return of_users(*args, env_options_overrides=overrides, **kwargs)

    compiler.get_compile_options = compile_options


if jax.__version_info__ < (0, 11):
    compile_with_fast_emitters()


def lower_in_one_context():
    """Have JAX lower all programs in one context of MLIR, in place of a new one for each, which
    took a sixth of the time of 148 tests: to make it, and to throw it away.

    Each of its types and attributes stays in it, so it is made anew where programs are forgotten.
    """
    from jax._src.interpreters import mlir  # private

    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
    return mlir.make_ir_context.cache_clear


forget_lowered = lower_in_one_context()


REMEMBERED = 2400
"""How many programs are compiled before all are forgotten. The time of 735 tests was less than at
800 by a sixth, and no less where none were."""
COMPILED = "/jax/core/compile/backend_compile_duration"
events = collections.Counter()


def count(event, _seconds, **_about):
    events[event] += 1


jax.monitoring.register_event_duration_secs_listener(count)


def forget_programs_if_many():
    """JAX keeps the lowered form of each program for as long as its function lives, and the
    compiler maps pieces of memory for each, of which Linux allows some 65,000.
    """
    if events[COMPILED] >= REMEMBERED:
        events.clear()
        jax.clear_caches()
        forget_lowered()
        gc.collect()  # functions that refer to themselves


def compile_fast(fast):
    """XLA without most of its optimizations, or with all of them, as for users.

    A program that was compiled in the other way is not used again: JAX would, and a bit that
    differs between two compilations would be taken for a fault.
    """
    if fast == jax.config.read("jax_disable_most_optimizations"):
        return
    jax.config.update("jax_disable_most_optimizations", fast)
    jax.clear_caches()


compile_fast(True)  # what test files compute when they are imported, too


def is_optimized(item):
    """Whether XLA compiles as for users, as it does for the examples of docstrings."""
    return not item.path.is_relative_to(TESTS) or item.get_closest_marker("optimized") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Nearly all of the time is compilation, of programs that run once.

    Marked `optimized` is what reads the compiled program, what compares bits of sums, and what
    differentiates a maximum of computed float32 numbers: on CPU XLA may compute these twice, with
    two roundings, so that none equals the maximum, and JAX's rule divides by how many do. This is
    so without jaxaccum.
    """
    compile_fast(not is_optimized(item))


def pytest_runtest_teardown(nextitem):
    """For the examples of docstrings, which lie outside of tests/, pytest runs no hook of ours."""
    forget_programs_if_many()
    if nextitem is not None:
        compile_fast(not is_optimized(nextitem))


@pytest.fixture(autouse=True)
def forgotten_programs():
    """After each test of a deep run, no compiled program: past some 65,000 mapped pieces of memory,
    Linux's limit, XLA for CPU crashes when it compiles.
    """
    yield
    if hypothesis.settings.default.max_examples > 100:
        jax.clear_caches()
