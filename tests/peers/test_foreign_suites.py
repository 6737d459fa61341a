"""Other libraries' suites, with jaxaccum in the place of `jax.grad`: what passes, fails or is
inapplicable."""

import pytest

from tests.peers import foreign_suites
from tests.peers.foreign_plugin import APPLIED, BOTH_RAISE, NOT_TRACED, Settings
from tests.peers.foreign_suites import Suite

SOURCE = """
import jax
import jax.numpy as jnp
import jax.test_util
import pytest
from jax import grad, value_and_grad


def loss(w, x):
    return jnp.sum((w * x - 1) ** 2)


@jax.custom_vjp
def squared_backward(x):
    return x * 1.0


squared_backward.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent**2,))


def test_right():
    assert grad(loss)(2.0, 3.0) == 30
    assert grad(loss, argnums=-1)(2.0, 3.0) == 20
    value, (w, x) = value_and_grad(loss, (0, 1))(2.0, 3.0)
    assert (value, w, x) == (25, 30, 20)


def test_aux():
    def inner(x):
        g, aux = grad(lambda x: (x**3, {"twice": 2 * x, "step": jnp.int32(4)}), has_aux=True)(x)
        assert aux["step"].dtype == jnp.int32
        return g * aux["twice"]

    assert grad(inner)(2.0) == 6 * 3 * 2.0**2


def test_keywords_and_transformations():
    scaled = lambda w, x, *, scale: scale * loss(w, x)
    assert jax.jit(grad(scaled))(2.0, 3.0, scale=2.0) == 60
    assert jax.vmap(grad(loss), (0, None))(jnp.asarray([2.0, 1.0]), 3.0).tolist() == [30, 12]


def test_nothing():
    assert loss(2.0, 3.0) == 25


def test_holomorphic():
    assert grad(lambda x: x**2, holomorphic=True)(1j) == 2j


def test_refused():
    with pytest.raises(TypeError, match="only 1 positional"):
        grad(loss, argnums=1)(2.0)


def test_python_reads_the_value():
    assert grad(lambda x: x if x > 0 else -x)(-2.0) == -1


def test_wrong():
    assert grad(squared_backward)(2.0) == 1


def test_no_crash():
    grad(squared_backward)(2.0)


def test_checked_against_differences():
    jax.test_util.check_grads(loss, (jnp.ones(2), jnp.ones(2)), 1, ["rev"], 1e-1, 1e-1)


def test_wrong_where_it_is_checked():
    jax.test_util.check_grads(squared_backward, (jnp.ones(2),), 1, ["rev"], 10.0, 10.0)


def test_fails_by_itself():
    assert grad(loss)(2.0, 3.0) == 31
"""
NAMES = {
    "right": APPLIED, "aux": APPLIED, "keywords_and_transformations": APPLIED, "wrong": APPLIED,
    "no_crash": APPLIED,
    "refused": BOTH_RAISE, "python_reads_the_value": NOT_TRACED,
}  # fmt: skip


@pytest.fixture(scope="module")
def _quick():
    """Each run is a process, which loads no plugin but ours and optimizes no program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory, _quick):
    """The records of each run, by the name of the test."""
    checkout = tmp_path_factory.mktemp("checkout")
    (checkout / "tests").mkdir()
    (checkout / "tests/theirs_test.py").write_text(SOURCE)
    suite = Suite("theirs", "jax", "tests/theirs_test.py")

    def records(name, count, *, compare=False):
        settings = Settings(count, compare, checkout / name, None)
        found = foreign_suites.run(suite, checkout, settings)
        return {record.test.split("::test_")[1]: record for record in found}

    return {
        "own": records("own", 0),
        "one": records("one", 1),
        "two": records("two", 2, compare=True),
    }


@pytest.mark.parametrize("run", ["one", "two"])
def test_what_became_of_the_gradients(runs, run):
    records = {name: record for name, record in runs[run].items() if name in NAMES}
    found = {name: kind for name, kind in NAMES.items() if kind in records[name].counts}
    assert found == NAMES
    assert not any(APPLIED in records[name].counts for name in NAMES if NAMES[name] != APPLIED)


def test_own_gradients_are_those_of_jax(runs):
    failed = [name for name, record in runs["own"].items() if record.outcome != "passed"]
    assert failed == ["fails_by_itself"]
    assert not any(record.refused for record in runs["own"].values())


def test_a_wrong_gradient_fails_and_is_seen_without_an_assertion(runs):
    """A backward rule that is not linear in its cotangent: half, squared, twice, is half."""
    failed = {name for name, record in runs["two"].items() if record.outcome != "passed"}
    assert failed == {"wrong", "wrong_where_it_is_checked", "fails_by_itself"}
    different = {name for name, record in runs["two"].items() if record.different}
    assert different == {"wrong", "wrong_where_it_is_checked", "no_crash"}
    assert runs["one"]["wrong"].outcome == "passed"


def test_the_report_counts_and_explains(runs, capsys, monkeypatch):
    own, two = list(runs["own"].values()), list(runs["two"].values())
    two = [
        record for record in two if record.test in {x.test for x in foreign_suites.applicable(own)}
    ]
    assert foreign_suites.report("theirs", own, two, False) == 2
    said = capsys.readouterr().out
    assert "theirs: 5 passed, 2 failed, 5 inapplicable" in said
    assert "inapplicable 1: failed with JAX's own gradients" in said
    assert "failed test_wrong: NOT EXPLAINED" in said
    monkeypatch.setattr(foreign_suites, "KNOWN", [("test_wrong", "not linear")])
    assert foreign_suites.report("theirs", own, two, False) == 0
    assert "failed test_wrong: not linear" in capsys.readouterr().out


@pytest.mark.usefixtures("_quick")
def test_a_file_that_cannot_load_is_an_error(tmp_path):
    (tmp_path / "broken_test.py").write_text("import nothing_of_this_name")
    settings = Settings(1, False, tmp_path / "log", None)
    with pytest.raises(RuntimeError, match="nothing_of_this_name"):
        foreign_suites.run(Suite("broken", "jax", "broken_test.py"), tmp_path, settings)
