"""Random programs: an answer of "exact" is never contradicted by the numbers, and seldom withheld in vain.

The truth is float64 value and gradient on microbatches of 4 and 2 of 6 examples, combined by the tags in Python; the
audit has traced 6 and 2. ``HYPOTHESIS_PROFILE=deep pytest -s tests/test_audit_fuzz.py`` runs 5000 programs and prints
how often each primitive was walked.
"""

from collections import Counter

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_programs import ENDS, MIXING, STEPS, program
from helpers import data, parts_of
from hypothesis import given
from hypothesis import strategies as st

import jaxaccum
from jaxaccum import Mean, Sum
from jaxaccum._audit.rules import RULES
from jaxaccum.testing.bounds import normwise

PROFILE = hypothesis.settings.default.max_examples
PROGRAMS = {100: 200, 1000: 5000}.get(PROFILE, PROFILE)
PARAMS = {"w": data(3, seed=1) / 2, "m": data(3, 3, seed=2) / 2}
BATCH = {
    "x": data(6, 3, seed=3), "y": jnp.asarray([0, 2, 1, 1, 0, 2]), "mask": jnp.asarray([1.0, 0, 2, 1, 1, 0.5]),
    "keys": jax.random.split(jax.random.key(7), 6),
}  # fmt: skip
PARTS = parts_of(BATCH, [4, 2])
APART = 1e-9
"""Programs are short and in float64, and a wrong rule is wrong in the first digits."""


def accumulated(loss, parts):
    """The loss over microbatches, each term combined by its tag."""

    def total(params):
        outputs = [loss(params, part) for part in parts]
        terms = [output if isinstance(output, dict) else {"": output} for output in outputs]
        return sum(combined([term[name] for term in terms], parts) for name in terms[0])

    return total


def combined(outputs, parts):
    if isinstance(outputs[0], Mean):
        return sum(x.total for x in outputs) / sum(x.weight for x in outputs)
    if isinstance(outputs[0], Sum):
        return sum(x.x for x in outputs)
    sizes = [len(part["y"]) for part in parts]
    return sum(size * x for size, x in zip(sizes, outputs, strict=True)) / sum(sizes)


def differs(loss):
    """How far the accumulated value and gradient are from the full batch's; None where both are but rounding."""
    with jax.numpy_dtype_promotion("standard"):
        whole = jax.value_and_grad(accumulated(loss, [BATCH]))(PARAMS)
        parts = jax.value_and_grad(accumulated(loss, PARTS))(PARAMS)
    leaves = [np.abs(x) for x in jax.tree.leaves(whole)]
    largest = max(float(np.max(x)) for x in leaves)
    return normwise(parts, whole) if all(map(np.all, map(np.isfinite, leaves))) and largest > APART else None


@st.composite
def sentences(draw):
    """Mostly steps that keep examples apart; in a third of the programs one that mixes them."""
    steps = draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=4))
    if draw(st.integers(0, 2)) == 0:
        steps.insert(draw(st.integers(0, len(steps))), draw(st.sampled_from(sorted(MIXING))))
    return tuple(steps), draw(st.sampled_from(sorted(ENDS)))


counts: Counter[str] = Counter()
verdicts: Counter[str] = Counter()
vain: list[object] = []


@hypothesis.settings(max_examples=PROGRAMS)
@given(sentences())
def check(sentence):
    loss = program(*sentence)
    with jax.numpy_dtype_promotion("standard"):
        report = jaxaccum.audit(loss, PARAMS, BATCH, num_microbatches=3)
    counts.update(report.counts)
    error = differs(loss)
    verdicts[f"{report.verdict}{', exact' * report.exact}"] += 1
    if error is not None:
        assert not report.exact or error < APART, f"UNSOUND {sentence}: {report.verdict}, off by {error}"
        if not report.exact and error < APART:
            vain.append((sentence, report.verdict))


def test_exact_is_never_contradicted_and_seldom_withheld():
    check()
    total = sum(verdicts.values())
    print(f"\n{total} programs: {dict(verdicts.most_common())}; {len(vain)} withheld in vain: {vain[:20]}")
    print("walked:", ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    print("rules never walked:", ", ".join(sorted(set(RULES) - set(counts))))
    assert len(vain) <= 0.05 * total
    assert verdicts.most_common(1)[0][1] < total, "all answers are the same"


@pytest.mark.parametrize("name", [*STEPS, *MIXING])
def test_each_word_alone(name):
    """So that no rule goes unmet: a step that keeps examples apart is exact, and one that mixes them is not."""
    with jax.numpy_dtype_promotion("standard"):
        report = jaxaccum.audit(program((name,), "mean_of_squares"), PARAMS, BATCH, num_microbatches=3)
    assert report.exact == (name in STEPS), report
