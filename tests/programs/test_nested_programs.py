"""The law of nested programs: every engine gives the gradient that JAX gives for the whole batch.

The oracle is `jax.value_and_grad`, compiled. It takes a third of the time of the same under
`jax.disable_jit`, whose loops are Python loops, so that it shares no transposed loop with what it
judges: this one has the last word where the two differ, and every word under
`HYPOTHESIS_PROFILE=deep`, which runs 5000 programs.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxaccum
from jaxaccum.testing.bounds import leaf_differences, wide
from jaxaccum.testing.strategies import partitions
from tests.programs.nested_blocks import NESTS
from tests.programs.nested_programs import Program, compose, define, programs
from tests.programs.nested_words import COLLECTIVES, LEAVES
from tests.programs.nested_writer import Step
from tests.support.helpers import EXACT, data

PROFILE = hypothesis.settings.default.max_examples
PROGRAMS = {1000: 2500}.get(PROFILE, PROFILE)
"""For each of the two laws; together 200 under `ci`, and 5000 under `deep`."""

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
Form = Callable[[Program], bool]
"""Whether a program has a certain form."""
TAGS = {"Mean": jaxaccum.Mean, "Sum": jaxaccum.Sum}
CHECKED = itertools.count(1)


@functools.cache
def whole(text: str) -> Any:
    """The oracle of Python loops."""
    return _whole(text, BATCH)


def _whole(text: str, batch: Any) -> Any:
    loss = define(text, **WHOLE)
    step = jax.value_and_grad(lambda p: _sum(loss(p, batch)))
    try:
        with jax.disable_jit():
            return step(PARAMS)
    # JAX alone: there it cannot derive a custom_vjp of constants inside a custom_jvp's rule
    except TypeError as error:
        if not _is_forward_mode(error):
            raise
    try:
        return jax.jit(step)(PARAMS)
    except TypeError as error:
        if not _is_forward_mode(error):
            raise
        hypothesis.reject()  # nor compiled: then there is nothing to compare with


def _is_forward_mode(error: TypeError) -> bool:
    return "to a custom_vjp function" in str(error)


def by_value_and_grad(program: Program, **options: Any) -> Any:
    loss = define(repr(program), **TAGS)
    return jax.jit(jaxaccum.value_and_grad(loss, audit=None, **options))(PARAMS, BATCH)


def by_microbatch(program: Program, **options: Any) -> Any:
    spread = jaxaccum.microbatch(define(repr(program), **TAGS), audit=None, **options)
    return jax.jit(jax.value_and_grad(lambda p, batch: _sum(spread(p, batch))))(PARAMS, BATCH)


def _sum(loss: Any) -> Any:
    return sum(jax.tree.leaves(loss))


def excess(actual: Any, expected: Any) -> float:
    """The largest difference over what rounding may make of it: 1 or less where they are equal.

    A leaf of lower precision rounds the gradient of each microbatch and of each of its readers. A
    gradient that cancels to zero is the rounding of terms as large as the value: in
    `h - pmean(h.mean(0))`, say, what a psum added to every row of h has no effect.
    """
    value, grads = expected
    largest = max(float(np.max(np.abs(wide(leaf)))) for leaf in grads.values())
    scale = max(largest, abs(float(value))) or 1.0
    differences = leaf_differences(actual, expected)
    ratios = [differences["[0]"] / (EXACT * abs(float(value)))]
    for name, param in PARAMS.items():
        eps = float(jnp.finfo(param.dtype).eps)
        tolerance = EXACT if eps < EXACT else 16 * eps
        ratios.append(differences[f"[1]['{name}']"] / (tolerance * scale))
    return max(ratios)


def check(program: Program, engine: Any, **options: Any) -> None:
    """The law."""
    if next(CHECKED) % 200 == 0:
        jax.clear_caches()  # 2500 compiled programs at once are more than Linux maps (see conftest)
    actual = engine(program, **options)
    if PROFILE <= 100 and agrees_with_compiled(actual, program):
        return
    expected = whole(repr(program))
    error = excess(actual, expected)
    if not error <= 1:
        with optimized():
            error = excess(engine(program, **options), expected)
            error /= max(1.0, 8 * excess(compiled_whole(program), expected))
    assert error <= 1, f"off by {error:.1e} times what rounding may do"


@contextlib.contextmanager
def optimized() -> Iterator[None]:
    """As users compile. Without optimizations XLA may compute a value twice and round it in two
    ways, so that no entry equals the maximum, and the derivative of a maximum is NaN."""
    setting = "jax_disable_most_optimizations"
    before = jax.config.read(setting)
    jax.config.update(setting, False)
    try:
        yield
    finally:
        jax.config.update(setting, before)


def agrees_with_compiled(actual: Any, program: Program) -> bool:
    """Whether the compiled oracle says the same; some programs of custom rules have none."""
    try:
        return excess(actual, compiled_whole(program)) <= 1
    except TypeError as error:
        if not _is_forward_mode(error):
            raise
        return False


def compiled_whole(program: Program) -> Any:
    """The whole batch by compiled loops, which round otherwise than Python loops.

    It says what rounding does where terms cancel, as in the mean of `h - pmean(h.mean(0))`: such
    values and gradients are much smaller than what they are made of.
    """
    loss = define(repr(program), **WHOLE)
    return jax.jit(jax.value_and_grad(lambda p: _sum(loss(p, BATCH))))(PARAMS)


ENGINES = st.sampled_from([by_value_and_grad, by_microbatch])
MEMORY = st.sampled_from([None, "min", "store"])


@hypothesis.settings(max_examples=PROGRAMS)
@given(programs(), ENGINES, partitions(6))
def test_a_plain_program_has_the_gradient_of_the_whole_batch(program, engine, options):
    check(program, engine, **options)


@pytest.mark.filterwarnings("ignore:.*operations of the full batch")
@hypothesis.settings(max_examples=PROGRAMS)
@given(programs(coupled=True), ENGINES, partitions(6, equal=True), MEMORY)
def test_a_coupled_program_has_the_gradient_of_the_whole_batch(program, engine, options, memory):
    check(program, engine, memory=memory, **options)


# -- the generator --------------------------------------------------------------------------------

DRAWN = [compose(random.Random(seed).choice, coupled=seed % 2 == 1) for seed in range(400)]
SMALL = sorted(DRAWN[::2], key=lambda program: len(repr(program)))[40:52]
"""A few plain programs of two steps or three."""


def test_every_kind_of_step_and_every_word_is_drawn():
    kinds = Counter(step.kind for program in DRAWN for _, step in program.walk())
    assert {*NESTS, *LEAVES, *COLLECTIVES, "let"} == {*kinds}
    assert min(kinds[kind] for kind in NESTS) >= 10, kinds


def test_programs_are_python_and_nest_three_deep():
    assert max(len(above) for program in DRAWN for above, _ in program.walk()) == 3
    for program in DRAWN:
        assert callable(define(repr(program)))


def of_kind(program: Program, *kinds: str) -> list[Step]:
    return [step for _, step in program.walk() if step.kind in kinds]


def raw(step: Step) -> list[str]:
    """The operands that are parameters as they are."""
    return [text for text in step.operands if is_raw(text)]


def is_raw(text: str) -> bool:
    return re.fullmatch(r'p\["\w"\]', text) is not None


def scanned(program: Program) -> list[str]:
    """The parameters that loops scan, once for each loop."""
    return [text for step in of_kind(program, "scan", "map") for text in set(raw(step))]


def closes_over_what_it_scans(program: Program) -> bool:
    for step in of_kind(program, "scan", "map"):
        inside = repr(step.inner)
        if any(text in inside for text in raw(step)):
            return True
    return False


def reads_twice(*kinds: str) -> Form:
    return lambda program: any(has_twice(raw(step)) for step in of_kind(program, *kinds))


def has_twice(texts: Sequence[str]) -> bool:
    return len(set(texts)) < len(texts)


def mixes(*, parameter_first: bool) -> Form:
    """A loop reads a parameter as it is and a value computed from one, in this order."""

    def found(program: Program) -> bool:
        for step in of_kind(program, "scan", "map"):
            orders = [is_raw(text) for text in step.operands if 'p["' in text]
            if len(set(orders)) == 2 and orders[0] is parameter_first:
                return True
        return False

    return found


def nested(*kinds: str) -> Form:
    """Some step of the last kind is in one of the kind before, and so on."""

    def found(program: Program) -> bool:
        paths = [(*above, step.kind) for above, step in program.walk()]
        return any(path[-len(kinds) :] == kinds for path in paths)

    return found


def layers(kind: str) -> Form:
    """A stack of parameters is scanned as layers, each under a step of the kind."""

    def found(program: Program) -> bool:
        scans = [step for step in of_kind(program, "scan") if {'p["S"]', 'p["R"]'} & {*raw(step)}]
        return any(inner.kind == kind for step in scans for inner in step.inner)

    return found


def scans_and_slices(program: Program) -> bool:
    text = repr(program)
    return any(f"{name}[" in text or f"slice({name}" in text for name in scanned(program))


def scans_in_reverse(program: Program) -> bool:
    """A loop from the last entry of a parameter to the first, which reads what it scans."""
    for step in of_kind(program, "scan"):
        call = [line for line in step.lines if "reverse=True" in line and line[0] != " "]
        slices = re.findall(r"[mv]\d+", step.lines[2])
        counts = Counter(re.findall(r"\w+", repr(step.inner)))
        if call and raw(step) and all(counts[name] for name in slices):
            return True
    return False


FORMS: dict[str, Form] = {
    "a loop closes over what it scans": closes_over_what_it_scans,
    "one parameter twice in a jit": reads_twice("jit"),
    "one parameter twice in a loop": reads_twice("scan", "map"),
    "one parameter twice in branches": reads_twice("cond", "switch"),
    "one parameter twice in a custom rule": reads_twice("custom_vjp", "custom_jvp"),
    "one parameter twice in a line": reads_twice(*LEAVES, "let"),
    "a loop reads a parameter, then a computed value": mixes(parameter_first=True),
    "a loop reads a computed value, then a parameter": mixes(parameter_first=False),
    "scan, jit, scan": nested("scan", "jit", "scan"),
    "scan in a scan": nested("scan", "scan"),
    "layers under jit": layers("jit"),
    "layers under checkpoint": layers("checkpoint"),
    "layers under custom_vjp": layers("custom_vjp"),
    "one parameter scanned by two loops": lambda program: has_twice(scanned(program)),
    "scanned in reverse": scans_in_reverse,
    "scanned and sliced": scans_and_slices,
    "hypot of a parameter with itself": lambda program: 'hypot(p["a"], p["a"])' in repr(program),
    "terms with denominators of their own": lambda program: '"second"' in repr(program),
}


@pytest.mark.parametrize("form", FORMS)
def test_common_forms_are_drawn_often(form):
    """In one of two hundred programs at least."""
    assert sum(map(FORMS[form], DRAWN)) >= len(DRAWN) / 200


@pytest.mark.parametrize("form", FORMS)
def test_the_shortest_plain_program_of_each_form_is_exact(form):
    shortest = min(filter(FORMS[form], DRAWN[::2]), key=lambda program: len(repr(program)))
    check(shortest, by_value_and_grad, num_microbatches=3)


# -- what is wrong is found -----------------------------------------------------------------------


def reading_twice_counts_once(program: Program) -> Any:
    """The whole batch, but of two readings in one line only the first has a gradient."""
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


FAULTS = [reading_twice_counts_once, two_gradients_change_places, the_last_microbatch_is_left_out]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_engine_is_found(fault):
    """Negative control: among the first programs there are some in which the fault shows."""
    found = [excess(fault(program), whole(repr(program))) > 1 for program in SMALL]
    assert sum(found) >= 2
