"""Deliberate faults in the library are caught: a sample of three, each by the test that names it."""

import random

import mutations
import pytest

SAMPLE = random.Random(0).sample(mutations.FAULTS, 3)


def test_every_fault_still_has_its_place_in_the_source():
    for fault in mutations.FAULTS:
        source = (mutations.ROOT / "jaxaccum" / fault.file).read_text()
        assert fault.applied(source) != source


@pytest.mark.parametrize("fault", SAMPLE, ids=[fault.name for fault in SAMPLE])
def test_a_fault_is_caught(fault):
    assert not mutations.run([fault.test], fault)


def test_without_a_fault_the_same_tests_pass():
    assert mutations.run([fault.test for fault in SAMPLE])
