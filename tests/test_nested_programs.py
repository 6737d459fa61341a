"""The law of nested programs: whatever JAX differentiates on the whole batch, every engine gives the same gradient of.

The oracle is `jax.value_and_grad` of the whole batch under `jax.disable_jit`: loops are Python loops there, so that it
shares no transpose of a loop with what it judges. `HYPOTHESIS_PROFILE=deep` runs 5000 programs.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EXACT, data
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from nested_programs import NESTS, Program, compose, define, programs
from nested_words import COLLECTIVES, LEAVES

import jaxaccum
from jaxaccum.testing.bounds import leaf_differences, wide
from jaxaccum.testing.strategies import partitions

PROFILE = hypothesis.settings.default.max_examples
PROGRAMS = {1000: 2500}.get(PROFILE, PROFILE)
"""For each of the two laws: 200 together under `ci`, 5000 under `deep`."""

PARAMS = {
    **{name: data(3, 3, seed=i) / 2 for i, name in enumerate("abc")},
    **{name: data(3, seed=i) / 2 for i, name in enumerate("uv")},
    **{name: data(2, 3, 3, seed=i) / 2 for i, name in enumerate("SR")},
    **{name: data(2, 3, seed=i) / 2 for i, name in enumerate("BD")},
    "T": data(5, 3, seed=1) / 2,
    "z": lax.complex(data(3, 3, seed=3), data(3, 3, seed=4)) / 2,
    "e": data(3, 3, seed=5, dtype=jnp.float32) / 2,
    "f": data(3, 3, seed=6, dtype=jnp.bfloat16) / 2,
}
BATCH = {
    "x": data(6, 3, seed=7),
    "ids": jnp.asarray([0, 2, 4, 1, 1, 3], jnp.int32),
    "weight": jnp.asarray([1.0, 0.0, 2.0, 1.0, 0.5, 1.0]),
}
WHOLE = {
    "Mean": lambda total, weight: total / weight,
    "Sum": lambda x: x,
    **dict.fromkeys(("psum", "pmean", "pmax", "gather"), lambda x: x),
}
"""What the names of a program mean where the batch is whole."""
TAGS = {"Mean": jaxaccum.Mean, "Sum": jaxaccum.Sum}
MICROBATCHES = {"num_microbatches": 3}


@functools.cache
def whole(text: str) -> Any:
    """The oracle."""
    return _whole(text, BATCH)


def _whole(text: str, batch: Any) -> Any:
    loss = define(text, **WHOLE)
    with jax.disable_jit():
        return jax.value_and_grad(lambda p: _sum(loss(p, batch)))(PARAMS)


def by_value_and_grad(program: Program, **options: Any) -> Any:
    loss = define(repr(program), **TAGS)
    return jax.jit(jaxaccum.value_and_grad(loss, **options))(PARAMS, BATCH)


def by_microbatch(program: Program, **options: Any) -> Any:
    spread = jaxaccum.microbatch(define(repr(program), **TAGS), **options)
    return jax.jit(jax.value_and_grad(lambda p, batch: _sum(spread(p, batch))))(PARAMS, BATCH)


def _sum(loss: Any) -> Any:
    return sum(jax.tree.leaves(loss))


def excess(actual: Any, expected: Any) -> float:
    """The largest difference, of the value or of any leaf, over what rounding may make of it: at most 1 if exact.

    A leaf of lower precision rounds each microbatch's share of its gradient, and of each of its readers.
    """
    scale = max(float(np.max(np.abs(wide(leaf)))) for leaf in jax.tree.leaves(expected))
    differences = leaf_differences(actual[1], expected[1])
    ratios = [abs(float(actual[0] - expected[0])) / (EXACT * scale)]
    for name, param in PARAMS.items():
        eps = float(jnp.finfo(param.dtype).eps)
        tolerance = EXACT if eps < EXACT else 16 * eps
        ratios.append(differences[f"['{name}']"] / (tolerance * scale))
    return max(ratios)


def check(program: Program, engine: Any, **options: Any) -> None:
    """The law."""
    error = excess(engine(program, **options), whole(repr(program)))
    assert error <= 1, f"off by {error:.1e} times what rounding may do"


ENGINES = st.sampled_from([by_value_and_grad, by_microbatch])


@pytest.mark.usefixtures("compiling_fast")
@hypothesis.settings(max_examples=PROGRAMS)
@given(programs(), ENGINES, partitions(6))
def test_a_plain_program_has_the_gradient_of_the_whole_batch(program, engine, options):
    check(program, engine, **options)


@pytest.mark.filterwarnings("ignore:.*operations of the full batch")
@pytest.mark.usefixtures("compiling_fast")
@hypothesis.settings(max_examples=PROGRAMS)
@given(programs(coupled=True), ENGINES, partitions(6, equal=True), st.sampled_from([None, "min", "store"]))
def test_a_coupled_program_has_the_gradient_of_the_whole_batch(program, engine, options, memory):
    check(program, engine, memory=memory, **options)


# -- the generator ----------------------------------------------------------------------------------------------------

DRAWN = [compose(random.Random(seed).choice, coupled=seed % 2 == 1) for seed in range(400)]


SMALL = sorted(DRAWN[::2], key=lambda program: len(repr(program)))[40:52]
"""A few plain programs of two steps or three."""


def test_every_kind_of_step_is_drawn_and_every_word():
    kinds = Counter(step.kind for program in DRAWN for _, step in program.walk())
    missing = {*NESTS, *LEAVES, *COLLECTIVES, "let"} - {*kinds}
    assert not missing
    assert all(kinds[kind] >= 10 for kind in NESTS), kinds


def test_programs_nest_three_deep_and_print_what_they_run():
    assert max(len(above) for program in DRAWN for above, _ in program.walk()) == 3
    for program in DRAWN:
        assert callable(define(repr(program)))


def _is_raw(text: str) -> bool:
    return text.startswith("p[") and text.endswith('"]') and len(text) == len('p["a"]')


def _steps(program: Program, *kinds: str) -> list[Any]:
    return [(above, step) for above, step in program.walk() if step.kind in kinds]


def _closes_over_its_xs(program: Program) -> bool:
    found = _steps(program, "scan", "map", "vmap")
    return any(text in "\n".join(inner.lines) for _, step in found for text in step.operands
               for inner in step.inner if _is_raw(text))  # fmt: skip


def _reads_twice(*kinds: str) -> Any:
    def reads(program: Program) -> bool:
        raw = [[text for text in step.operands if _is_raw(text)] for _, step in _steps(program, *kinds)]
        return any(len(set(texts)) < len(texts) for texts in raw)

    return reads


def _mixes(first: bool) -> Any:
    """A loop reads a parameter as it is, and a value computed from parameters, in the one order or the other."""

    def mixes(program: Program) -> bool:
        for _, step in _steps(program, "scan", "map"):
            orders = [_is_raw(text) for text in step.operands if 'p["' in text]
            if len(set(orders)) == 2 and orders[0] is first:
                return True
        return False

    return mixes


def _nested(*kinds: str) -> Any:
    return lambda program: any((*above, step.kind)[-len(kinds) :] == kinds for above, step in program.walk())


def _layers(kind: str) -> Any:
    """A stack of parameters scanned as layers, each under `kind`."""

    def layers(program: Program) -> bool:
        scans = [step for _, step in _steps(program, "scan") if {'p["S"]', 'p["R"]'} & {*step.operands}]
        return any(inner.kind == kind for step in scans for inner in step.inner)

    return layers


def _scans_again(program: Program) -> bool:
    scanned = [text for _, step in _steps(program, "scan", "map") for text in {*step.operands} if _is_raw(text)]
    return len(set(scanned)) < len(scanned)


def _scans_and_slices(program: Program) -> bool:
    scanned = {text for _, step in _steps(program, "scan", "map") for text in step.operands if _is_raw(text)}
    return any(f"{text}[" in repr(program) or f"slice({text}" in repr(program) for text in scanned)


FORMS = {
    "a loop closes over what it scans": _closes_over_its_xs,
    "one parameter twice in a jit": _reads_twice("jit"),
    "one parameter twice in a loop": _reads_twice("scan", "map"),
    "one parameter twice in branches": _reads_twice("cond", "switch"),
    "one parameter twice in a custom rule": _reads_twice("custom_vjp", "custom_jvp"),
    "one parameter twice in a line": _reads_twice(*LEAVES, "let"),
    "a loop reads a parameter, then a computed value": _mixes(True),
    "a loop reads a computed value, then a parameter": _mixes(False),
    "scan, jit, scan": _nested("scan", "jit", "scan"),
    "scan in a scan": _nested("scan", "scan"),
    "layers under jit": _layers("jit"),
    "layers under checkpoint": _layers("checkpoint"),
    "layers under custom_vjp": _layers("custom_vjp"),
    "one parameter scanned by two loops": _scans_again,
    "scanned in reverse": lambda program: "reverse=True" in repr(program),
    "scanned and sliced": _scans_and_slices,
    "terms with denominators of their own": lambda program: '"second"' in repr(program),
}


@pytest.mark.parametrize("form", FORMS)
def test_common_forms_are_drawn_often(form):
    """In one of a hundred programs at least."""
    assert sum(FORMS[form](program) for program in DRAWN) >= len(DRAWN) / 100


# -- what is wrong is found -------------------------------------------------------------------------------------------


def reading_twice_counts_once(program: Program) -> Any:
    """The whole batch, but where a line reads a parameter twice, only the first reading has a gradient."""
    return whole("\n".join(_once(line) for line in repr(program).splitlines()))


def _once(line: str) -> str:
    for name in PARAMS:
        read = f'p["{name}"]'
        before, found, after = line.partition(read)
        line = before + found + after.replace(read, f"lax.stop_gradient({read})")
    return line


def two_gradients_change_places(program: Program) -> Any:
    """The whole batch, with the gradients of two parameters of one shape exchanged."""
    value, grads = whole(repr(program))
    return value, {**grads, "a": grads["b"], "b": grads["a"]}


def the_last_microbatch_is_left_out(program: Program) -> Any:
    """The value of the whole batch, and the gradient of four of the six examples."""
    rows = jax.tree.map(lambda x: x[:4], BATCH)
    return whole(repr(program))[0], _whole(repr(program), rows)[1]


@pytest.mark.usefixtures("compiling_fast")
@pytest.mark.parametrize(
    "fault", [reading_twice_counts_once, two_gradients_change_places, the_last_microbatch_is_left_out]
)
def test_a_faulty_engine_is_found(fault):
    """Negative control: among the first programs there are some in which the fault shows."""
    found = [excess(fault(program), whole(repr(program))) > 1 for program in SMALL]
    assert sum(found) >= 2
