"""Deliberate faults in the library are caught: a sample of three, each by the test that names it."""

import random

import pytest

from tests.faults import listed

SAMPLE = random.Random(0).sample(listed.FAULTS, 3)


def test_every_fault_still_has_its_place_in_the_source():
    for fault in listed.FAULTS:
        source = (listed.ROOT / "jaxaccum" / fault.file).read_text()
        assert fault.applied(source) != source


@pytest.mark.parametrize("fault", SAMPLE, ids=[fault.name for fault in SAMPLE])
def test_a_fault_is_caught(fault):
    assert not listed.run([fault.test], fault)


def test_without_a_fault_the_same_tests_pass():
    assert listed.run([fault.test for fault in SAMPLE])
