"""A covering meets every value of every parameter, and in deep runs every combination."""

import itertools

import pytest

from tests.support.covering import covering

AXES = [("abc", [1, 2]), ("ab", "cd"), ("abcdefgh", range(6), [None]), ("a", [1])]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_every_value_is_met(axes):
    rows = covering(*axes, every=False)
    assert len(rows) == max(map(len, axes))
    for axis, met in zip(axes, zip(*rows, strict=True), strict=True):
        assert set(met) == set(axis)


def test_a_shorter_axis_does_not_always_meet_the_same_values():
    assert covering("abcd", [1, 2], every=False) == [("a", 1), ("b", 2), ("c", 2), ("d", 1)]
    rows = covering("abcdef", [1, 2], "xy", every=False)
    assert len({row[1:] for row in rows}) == 4


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_a_deep_run_has_every_combination(axes):
    assert covering(*axes, every=True) == list(itertools.product(*axes))
