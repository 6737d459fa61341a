"""Random programs: an answer of "exact" is never contradicted by the numbers, and seldom withheld
in vain.

The truth is float64 value and gradient on microbatches of 4 and 2 of 6 examples, combined by the
tags in Python; of 3 microbatches as devices where there are collectives. The audit has traced 6 and
2. ``HYPOTHESIS_PROFILE=deep pytest -s tests/audit/test_fuzz.py`` runs 5000 programs and prints how
often each primitive was walked. What never is has another version's name, or no gradient, or no
rule but that it couples.
"""

from collections import Counter

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxaccum
from jaxaccum._audit.rules import RULES
from tests.audit.devices import DECLARED
from tests.audit.programs import ENDS, MIXING, STEPS, program
from tests.audit.truth import APART, as_devices, differs, distance
from tests.support.helpers import data, parts_of

PROFILE = hypothesis.settings.default.max_examples
PROGRAMS = {1000: 5000}.get(PROFILE, PROFILE)
PARAMS = {"w": data(3, seed=1) / 2, "m": data(3, 3, seed=2) / 2}
BATCH = {
    "x": data(6, 3, seed=3), "y": jnp.asarray([0, 2, 1, 1, 0, 2]),
    "mask": jnp.asarray([1.0, 0, 2, 1, 1, 0.5]),
    "keys": jax.random.split(jax.random.key(7), 6),
}  # fmt: skip
PARTS = parts_of(BATCH, [4, 2])


@st.composite
def sentences(draw):
    """Mostly steps that keep examples apart; one mixes them in a third of the programs, in a sixth
    by a collective."""
    steps = draw(st.lists(st.sampled_from(sorted(STEPS)), max_size=4))
    others = {0: MIXING, 1: MIXING, 2: DECLARED}.get(draw(st.integers(0, 5)))
    if others is not None:
        steps.insert(draw(st.integers(0, len(steps))), draw(st.sampled_from(sorted(others))))
    return tuple(steps), draw(st.sampled_from(sorted(ENDS)))


counts: Counter[str] = Counter()
verdicts: Counter[str] = Counter()
vain: list[object] = []


def error_of(steps, loss):
    """Of microbatches as devices, where there are collectives, which ask for equal ones."""
    if set(steps) & set(DECLARED):
        return distance(as_devices(loss, BATCH, 1), as_devices(loss, BATCH, 3), PARAMS)
    return differs(loss, PARAMS, BATCH, PARTS)


@hypothesis.settings(max_examples=PROGRAMS)
@given(sentences())
def check(sentence):
    loss = program(*sentence)
    with jax.numpy_dtype_promotion("standard"):
        report = jaxaccum.audit(loss, PARAMS, BATCH, num_microbatches=3)
    counts.update(report.counts)
    error = error_of(sentence[0], loss)
    verdicts[f"{report.verdict}{', exact' * report.exact}"] += 1
    if error is not None:
        assert not report.exact or error < APART, (
            f"UNSOUND {sentence}: {report.verdict}, off by {error}"
        )
        if not report.exact and error < APART:
            vain.append((sentence, report.verdict))


def test_exact_is_never_contradicted_and_seldom_withheld():
    check()
    total = sum(verdicts.values())
    print(
        f"\n{total} programs: {dict(verdicts.most_common())}; {len(vain)} withheld in vain: "
        f"{vain[:20]}"
    )
    print("walked:", ", ".join(f"{name} {count}" for name, count in counts.most_common()))
    print("rules never walked:", ", ".join(sorted(set(RULES) - set(counts))))
    assert len(vain) <= 0.05 * total
    assert verdicts.most_common(1)[0][1] < total, "all answers are the same"


@pytest.mark.parametrize("name", [*STEPS, *MIXING, *DECLARED])
def test_each_word_alone(name):
    """So that no rule goes unmet: a step that keeps examples apart is exact, and one that mixes
    them is not, unless it declares so."""
    with jax.numpy_dtype_promotion("standard"):
        report = jaxaccum.audit(
            program((name,), "mean_of_squares"), PARAMS, BATCH, num_microbatches=3
        )
    assert report.exact == (name in STEPS or name.endswith("as_declared")), report


@pytest.mark.parametrize("name", ["averaged_moving", "refined_in_turn"])
def test_a_state_that_goes_from_example_to_example_is_named(name):
    report = jaxaccum.audit(program((name,), "mean_of_squares"), PARAMS, BATCH, num_microbatches=3)
    assert "carries one example's state to the next" in report.causes[0].note
