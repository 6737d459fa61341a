"""The mutation tool draws every kind of fault, catches the tested ones and reports the others."""

import pathlib

import pytest

from tests.faults import drawn

MODULE = '''"""Of two functions one is tested."""


def clipped(x: int, top: int) -> int:
    """At most `top`."""
    if top < 0:
        raise ValueError(f"top is {top + 1 - 1}")
    return min(x, top)


def shifted(x, by):
    return x - by
'''
TEST = """
import module
import pytest


def test_clipped():
    assert (module.clipped(2, 5), module.clipped(7, 5), module.clipped(0, 0)) == (2, 5, 0)
    with pytest.raises(ValueError):
        module.clipped(0, -1)
    assert module.clipped.__doc__
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "module.py").write_text(MODULE)
    (tmp_path / "test_module.py").write_text(TEST)
    return tmp_path


def test_what_no_test_reads_survives_and_the_rest_is_caught(tree):
    said = []
    found = drawn.survivors(tree, "module.py", ["test_module.py"], timeout=60, say=said.append)
    assert [str(fault) for fault in found] == ["12: x - by -> (x + by)"]
    assert said == ["module.py:12: x - by -> (x + by) SURVIVED"]
    assert (tree / "module.py").read_text() == MODULE


def test_faults_of_code_and_not_of_messages_or_types():
    assert [str(fault) for fault in drawn.faults(MODULE)] == [
        "6: top < 0 -> (top <= 0)",
        "6: top < 0 -> (top >= 0)",
        "6: top < 0 -> False",
        "6: 0 -> 1",
        "8: min -> max",
        "12: x - by -> (x + by)",
    ]


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("a = b is None", ["a = (b is not None)"]),
        ("a = b and c", ["a = b", "a = c"]),
        ("a = not b", ["a = b"]),
        ("a = -b", ["a = b"]),
        ("a = b if c else d", ["a = b", "a = d"]),
        ("a = [x for x in y if x]", ["a = [x for x in y if True]"]),
        ("a = jnp.where(b, c, d)", ["a = c", "a = d"]),
        ("a = jnp.sum(b, axis=c)", ["a = jnp.max(b, axis=c)", "a = jnp.sum(b)"]),
        ("a = take(b, axis)", ["a = take(b, 0)"]),
        ("a = lax.psum(b)", ["a = lax.pmax(b)"]),
        ("a = 2 * (b + c)", ["a = (2 / (b + c))", "a = 2 * ((b - c))", "a = 3 * (b + c)"]),
        ("a = 'é' + b", ["a = ('é' - b)"]),
        ("match a:\n    case 'b':\n        c()", ["match a:\n    case _ if False:\n        c()"]),
        ("def f(a: int = 0): ...", ["def f(a: int = 1): ..."]),
    ],
)
def test_every_kind_of_fault(source, changed):
    assert sorted(fault.applied(source) for fault in drawn.faults(source)) == sorted(changed)


@pytest.mark.parametrize("line", drawn.SAME)
def test_a_change_that_computes_the_same_is_no_fault(line, monkeypatch):
    source = line + "\n    pass" if line.endswith(":") else line
    same, kept = set(drawn.SAME[line]), {fault.change for fault in drawn.faults(source)}
    monkeypatch.setattr(drawn, "SAME", {})
    every = {fault.change for fault in drawn.faults(source)}
    assert same
    assert same <= every
    assert kept == every - same


def test_a_fault_that_never_ends_is_caught(tree):
    (tree / "module.py").write_text("while True: pass\n")
    assert not drawn.passes(tree, tree / "module.py", ["test_module.py"], timeout=5)


def test_tests_that_fail_without_a_fault_are_no_tests(tree):
    (tree / "test_module.py").write_text("def test(): assert False")
    with pytest.raises(RuntimeError, match="fail without any fault"):
        drawn.survivors(tree, "module.py", ["test_module.py"], timeout=60)


def test_every_named_test_is_there():
    files = [drawn.ROOT / "jaxaccum" / file for file in drawn.TESTS]
    tests = [drawn.ROOT / "tests" / test for named in drawn.TESTS.values() for test in named]
    assert [path for path in [*files, *tests] if not pathlib.Path(path).is_file()] == []
