"""Deliberate faults in the library are caught: a sample of three, each by the test that names
it."""

import random
import shutil

import pytest

from tests.faults import listed
from tests.faults.fault import Fault

PACKAGE = listed.ROOT / "jaxaccum"
SAMPLE = random.Random(1).sample(listed.FAULTS, 3)
MODULE = """
def mean(x):
    return sum(x) / len(x)


class Sums:
    def add(self, x):
        return sum(x) + sum(self)
"""


def test_every_fault_still_has_its_place_in_the_source():
    for fault in listed.FAULTS:
        assert fault.applied(PACKAGE) != fault.found(PACKAGE).file.read_text()


def test_every_fault_has_a_name_of_its_own():
    names = [fault.name for fault in listed.FAULTS]
    assert len(set(names)) == len(names)


@pytest.fixture
def package(tmp_path):
    (tmp_path / "module.py").write_text(MODULE)
    return tmp_path


def fault_in(place, old):
    return Fault("a sum is lost", place, old, "x[0]", "no test")


@pytest.mark.parametrize(("place", "line"), [("mean", 3), ("Sums.add", 8), ("module:mean", 3)])
def test_a_fault_is_in_its_function_alone(package, place, line):
    before = MODULE.splitlines()
    after = fault_in(place, "sum(x)").applied(package).splitlines()
    changed = [i for i, (a, b) in enumerate(zip(after, before, strict=True), 1) if a != b]
    assert changed == [line]


def test_a_fault_survives_that_its_file_is_moved(package):
    fault = fault_in("mean", "sum(x)")
    expected = fault.applied(package)
    room = package / "room"
    room.mkdir()
    shutil.move(package / "module.py", room / "renamed.py")
    assert fault.applied(room) == expected


@pytest.mark.parametrize(
    ("place", "old"), [("mean", "x"), ("mean", "max(x)"), ("gone", "sum(x)"), ("Sums", "sum(")]
)
def test_a_text_that_does_not_occur_once_is_an_error(package, place, old):
    with pytest.raises(ValueError, match="it must occur once"):
        fault_in(place, old).applied(package)


@pytest.mark.parametrize("fault", SAMPLE, ids=[fault.name for fault in SAMPLE])
def test_a_fault_is_caught(fault):
    assert not listed.run([fault.test], fault)


def test_without_a_fault_the_same_tests_pass():
    assert listed.run([fault.test for fault in SAMPLE])
