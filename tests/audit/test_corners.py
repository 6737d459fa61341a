"""Losses at the corners of the audit's rules: "exact" is never said of one that the numbers
refute."""

import dataclasses

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum import Concat, Max, Mean, Sum
from jaxaccum._program.reductions import Reduction
from jaxaccum._program.tags import Tag
from jaxaccum.testing import assert_exact
from tests.support import jitted
from tests.support.helpers import EXACT, INEXACT, data, normwise

W = data(3)
BATCH = {"x": data(8, 3), "y": data(8, seed=1), "mask": jnp.asarray([1.0, 0, 1, 1, 0, 1, 1, 0])}
MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
rows = lambda w, b: jnp.tanh(b["x"] @ w)
root = lambda w, b: jnp.sqrt(jnp.sum(rows(w, b) ** 2))


called = lambda: jax.experimental.io_callback(
    lambda: np.float64(1), jax.ShapeDtypeStruct((), float)
)
SHARED, SHARDED = P(), P("data")


def by_device(fun, out=SHARDED):
    """`fun(w, x)` on each of two devices' share of the examples."""
    over = jax.shard_map(fun, mesh=MESH, in_specs=(SHARED, SHARDED), out_specs=out)
    return lambda w, b: over(w, b["x"])


def each_of(w, x):
    return jnp.tanh(x @ w)


@jax.custom_vjp
def mistaken(x):
    return x


mistaken.defvjp(lambda x: (x - jnp.mean(x), None), lambda _, g: (g,))


@jax.custom_vjp
def failing(x):
    return x


failing.defvjp(lambda x: (x, None), lambda _, g: (_["missing"],))


def added(w, b):
    total, _ = lax.scan(lambda s, x: (s + jnp.tanh(x @ w), None), jnp.zeros(()), b["x"])
    return total


def numbered(w, b):
    return lax.scan(lambda i, x: (i + 1.0, i * jnp.tanh(x @ w)), jnp.zeros(()), b["x"])[1]


LOSSES = {
    # loss: verdict, exact
    "Mean by a root": (lambda w, b: Mean(jnp.sum(rows(w, b)), root(w, b)), "COUPLED", False),
    "Mean of rows": (lambda w, b: Mean(rows(w, b), jnp.sum(b["mask"])), "MIS_SCALED", False),
    "Sum of rows": (lambda w, b: Sum(rows(w, b)), "MIS_SCALED", False),
    "Sum of a root": (lambda w, b: Sum(root(w, b)), "COUPLED", False),
    "a batch of devices": (lambda w, b: jnp.mean(by_device(each_of)(w, b)), "MEAN", True),
    "a sum over devices": (
        lambda w, b: (
            Sum(by_device(lambda w, x: lax.psum(jnp.sum(each_of(w, x)), "data"), SHARED)(w, b))
        ),
        "SUM", True,
    ),
    "each device's own mean": (
        lambda w, b: (
            jnp.mean(by_device(lambda w, x: (each_of(w, x) - jnp.mean(each_of(w, x))) ** 2)(w, b))
        ),
        "COUPLED", False,
    ),
    "a maximum over devices": (
        lambda w, b: (
            jnp.mean(by_device(lambda w, x: each_of(w, x) * lax.pmax(jnp.max(x), "data"))(w, b))
        ),
        "COUPLED", False,
    ),
    "the index of a device": (
        lambda w, b: (
            jnp.mean(
                by_device(lambda w, x: each_of(w, x) * lax.axis_index("data").astype(x.dtype))(w, b)
            )
        ),
        "POSITION", False,
    ),
    "parameters on devices": (
        lambda w, b: (
            jnp.mean(rows(w, b))
            * jnp.sum(by_device(lambda w, x: w * lax.psum(1.0, "data"), SHARED)(w, b))
        ),
        "MEAN", True,
    ),
    "a callback without operands": (lambda w, b: jnp.mean(rows(w, b)) * called(), "UNKNOWN", False),
    "a reshape of rows without entries": (
        lambda w, b: jnp.mean(rows(w, b)) + jnp.sum(b["x"][:, :0].reshape(len(b["x"]), 2, 0)),
        "UNKNOWN",
        False,
    ),
    "a scan that adds": (lambda w, b: Sum(added(w, b)), "SUM", True),
    "a scan that counts": (lambda w, b: jnp.mean(numbered(w, b)), "POSITION", False),
    "chunks": (
        lambda w, b: jnp.mean(lax.map(lambda x: jnp.tanh(x @ w), b["x"].reshape(-1, 2, 3))),
        "MEAN", True,
    ),
    "a branch by size": (
        lambda w, b: (
            lax.cond(jnp.sum(w) * len(b["y"]) > 1, jnp.sin, jnp.cos, jnp.sum(w))
            * jnp.mean(rows(w, b))
        ),
        "MIS_SCALED", False,
    ),
    "a branch by data": (
        lambda w, b: (
            lax.cond(jnp.sum(b["y"]) > 0, jnp.sin, jnp.cos, jnp.sum(w)) * jnp.mean(rows(w, b))
        ),
        "COUPLED", False,
    ),
    "either of two kinds": (
        lambda w, b: lax.cond(w[0] > 0, lambda: jnp.mean(rows(w, b)), lambda: jnp.max(rows(w, b))),
        "UNKNOWN", False,
    ),
    "either total": (
        lambda w, b: (
            Sum(lax.cond(w[0] > 0, lambda: jnp.sum(rows(w, b)), lambda: 2 * jnp.sum(rows(w, b))))
        ),
        "SUM", True,
    ),
    "as many steps as examples": (
        lambda w, b: (
            jnp.mean(rows(w, b)) * lax.fori_loop(0, len(b["y"]), lambda _, s: s * 0.9, jnp.sum(w))
        ),
        "MIS_SCALED", False,
    ),
    "until the data says so": (
        lambda w, b: jnp.mean(rows(w, b)) * lax.while_loop(
            lambda s: s < lax.stop_gradient(jnp.sum(b["y"] ** 2)), lambda s: 2 * s, jnp.ones(())
        ), "UNKNOWN", False,
    ),
    "a forward rule of its own": (
        lambda w, b: jnp.mean(mistaken(rows(w, b)) ** 2), "COUPLED", False,
    ),
    "a backward rule that fails": (lambda w, b: jnp.mean(failing(rows(w, b))), "UNKNOWN", False),
    "a table of the size": (
        lambda w, b: jnp.mean(rows(w, b) * np.full(len(b["y"]), 2.0)), "MEAN", True,
    ),
    "a table of places": (
        lambda w, b: jnp.mean(rows(w, b) * np.arange(1.0 * len(b["y"]))), "POSITION", False,
    ),
    "an entry of a total": (lambda w, b: Sum(jnp.sum(b["x"] * w[None], axis=0)[1]), "SUM", True),
    "an entry by another total": (
        lambda w, b: jnp.mean(rows(w, b)) * w[jnp.sum(b["y"] > 0).astype(int) % 3],
        "COUPLED", False,
    ),
    "padded": (lambda w, b: jnp.mean(jnp.pad(rows(w, b), (1, 1))), "COUPLED", False),
    "halves": (
        lambda w, b: jnp.mean(jnp.multiply(*jnp.split(rows(w, b), 2))), "COUPLED", False,
    ),
    "a running total": (lambda w, b: jnp.mean(jnp.cumsum(rows(w, b))), "COUPLED", False),
    "two totals multiplied": (
        lambda w, b: jnp.sum(b["x"] * w[None], 0) @ jnp.sum(b["x"], 0), "COUPLED", False,
    ),
    "a matrix of examples": (
        lambda w, b: (
            jnp.linalg.slogdet(jnp.eye(len(b["y"])) + jnp.outer(rows(w, b), rows(w, b)))[1]
        ),
        "COUPLED", False,
    ),
    "keys of a total": (
        lambda w, b: jnp.mean(rows(w, b)) * jax.random.normal(jax.random.key(jnp.sum(b["y"] > 0))),
        "COUPLED", False,
    ),
    "repeated": (lambda w, b: jnp.mean(jnp.tile(rows(w, b), 3)), "MEAN", True),
    "other outputs": (
        lambda w, b: {name: jnp.mean(rows(w, b)) for name in ("a", "b")[: len(b["y"]) // 4]},
        "UNKNOWN", False,
    ),
    "another function": (
        lambda w, b: jnp.mean((jnp.sin if len(b["y"]) > 4 else jnp.cos)(rows(w, b))),
        "UNKNOWN", False,
    ),
    "another constant": (
        lambda w, b: jnp.mean(rows(w, b)) * jnp.sum(np.ones(3) if len(b["y"]) > 4 else w),
        "UNKNOWN", False,
    ),
    "a number for a parameter": (
        lambda w, b: jnp.mean(rows(w, b) * (2.0 if len(b["y"]) > 4 else jnp.sum(w))) + jnp.sum(w),
        "UNKNOWN", False,
    ),
    "a penalty repeated": (
        lambda w, b: jnp.mean(rows(w, b) + jnp.tile(jnp.sum(w)[None], len(b["y"]))), "MEAN", True,
    ),
    "a table reshaped": (
        lambda w, b: jnp.mean(rows(w, b) * (jnp.sum(w) * jnp.ones((len(b["y"]), 1))).reshape(-1)),
        "MEAN", True,
    ),
}  # fmt: skip


# -- backward passes that are not linear in the cotangent ------------------------------------------


def ruled(backward, function=lambda x: x):
    """A function with a backward pass of its own: ``backward(x, cotangent)``."""
    own = jax.custom_vjp(function)
    own.defvjp(lambda x: (function(x), x), lambda x, g: (backward(x, g),))
    return own


BACKWARD = {
    # backward pass: whether it is linear in the cotangent
    "identity": (ruled(lambda x, g: g), True),
    "straight through": (ruled(lambda x, g: jnp.where(jnp.abs(x) <= 9, g, 0.0), jnp.tanh), True),
    "reversed": (ruled(lambda x, g: -0.3 * g), True),
    "clipped": (ruled(lambda x, g: jnp.clip(g, -0.05, 0.05)), False),
    "normalized": (ruled(lambda x, g: g / (1e-3 + jnp.abs(g))), False),
    "affine": (ruled(lambda x, g: g + 0.1), False),
    "constant": (ruled(lambda x, g: jnp.ones_like(g)), False),
}
APPLIED = {
    # where the function is applied: whether every microbatch hands it the full batch's cotangent
    "to the mean": (lambda f, w, b: f(jnp.mean(rows(w, b))), False),
    "to a mean under a Mean": (
        lambda f, w, b: Mean(f(jnp.mean(rows(w, b))) * b["y"].size, b["y"].size),
        False,
    ),
    "to rows divided by their number": (
        lambda f, w, b: jnp.sum(f(rows(w, b) / len(b["y"]))),
        False,
    ),
    "to a mean and a penalty": (lambda f, w, b: f(jnp.mean(rows(w, b)) + jnp.sum(w**2)), False),
    "to the parameters": (lambda f, w, b: jnp.mean(rows(f(w), b)), False),
    "to the rows": (lambda f, w, b: jnp.mean(f(rows(w, b))), True),
    "to the sum": (lambda f, w, b: f(jnp.sum(rows(w, b))) / len(b["y"]), True),
    "to the total of a Mean": (lambda f, w, b: Mean(f(jnp.sum(rows(w, b))), b["y"].size), True),
    "to a Sum": (lambda f, w, b: Sum(f(jnp.sum(rows(w, b)))), True),
}
A_SUM_NO_MORE = {("straight through", place) for place in APPLIED} - {
    ("straight through", "to the rows"), ("straight through", "to the parameters"),
}  # fmt: skip
RULED = sorted({(rule, place) for rule in BACKWARD for place in APPLIED} - A_SUM_NO_MORE)


@INEXACT
@pytest.mark.parametrize(("rule", "place"), RULED)
def test_a_backward_pass_is_exact_where_it_is_linear_or_sees_the_full_batchs_cotangent(rule, place):
    (function, linear), (apply, same) = BACKWARD[rule], APPLIED[place]
    loss = lambda w, b: apply(function, w, b)
    report = jaxaccum.audit(loss, W, BATCH)
    expected = jitted.grad(jaxaccum.full_batch(loss))(W, BATCH)
    actual = jaxaccum.grad(loss, num_microbatches=2)(W, BATCH)
    assert report.exact == (linear or same), report
    assert (normwise(actual, expected) < EXACT) == report.exact
    if not report.exact:
        (finding,) = report.findings
        assert (report.verdict, finding.kind) == ("MIS_SCALED", "derivative")
        assert (finding.origin.file, finding.origin.function) == (__file__, "<lambda>")
        wanted = "optax.clip" if place == "to the parameters" else "before the division"
        assert wanted in finding.fix


@pytest.mark.parametrize("name", LOSSES)
def test_verdicts(name):
    loss, verdict, exact = LOSSES[name]
    report = jaxaccum.audit(loss, W, BATCH)
    assert (report.verdict, report.exact) == (verdict, exact), report
    if exact:
        assert_exact(loss, W, BATCH, partitions=[2, 4])


@INEXACT
def test_the_numbers_refute_a_coupled_forward_rule():
    """It runs under differentiation alone, so that evaluation shows nothing."""
    loss = LOSSES["a forward rule of its own"][0]
    assert_equal = lambda f, g: np.testing.assert_allclose(f(W, BATCH), g(W, BATCH), rtol=1e-12)
    assert_equal(jaxaccum.microbatch(loss, num_microbatches=2), loss)
    with pytest.raises(AssertionError):
        assert_exact(loss, W, BATCH, partitions=[4])


AUX = {
    # aux: exact
    "Concat of a statistic": (lambda w, b: Concat(rows(w, b) - jnp.mean(rows(w, b))), False),
    "Concat of a root": (lambda w, b: Concat(root(w, b)), False),
    "Concat of columns": (lambda w, b: Concat(b["x"].T * w[:, None]), False),
    "Max of a parameter": (lambda w, b: Max(jnp.max(w)), True),
    "Max of a maximum": (lambda w, b: Max(jnp.max(jnp.max(b["x"] * w[None], axis=0))), True),
}


@pytest.mark.parametrize("name", AUX)
def test_aux(name):
    aux, exact = AUX[name]
    fun = lambda w, b: (jnp.mean(rows(w, b)), aux(w, b))
    report = jaxaccum.audit(fun, W, BATCH, has_aux=True)
    assert (report.verdict, report.exact) == ("MEAN", exact), report
    if exact:
        assert_exact(fun, W, BATCH, has_aux=True, partitions=[4])


def test_a_report_is_shown_with_and_without_color(capsys, monkeypatch):
    report = jaxaccum.audit(LOSSES["padded"][0], W, BATCH)
    (finding,) = report.findings
    assert str(finding) in str(report)
    report.show()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report.show()
    assert capsys.readouterr().out.count(finding.fix) == 2


def test_a_probe_that_cannot_run_says_so():
    report = jaxaccum.audit(LOSSES["Mean of rows"][0], W, BATCH, probe=True)
    assert report.probe.exact is None
    assert "could not be computed (TypeError" in str(report)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Count(Tag):
    """A tag that the audit does not know."""

    x: object


@pytest.mark.parametrize(
    ("reduction", "says"), [(Reduction.SUM, "Count"), ("product", "product")], ids=str
)
def test_a_tag_that_the_audit_does_not_know_is_not_taken_for_another(reduction, says, monkeypatch):
    """Whether it is added up, or combines in a way of its own."""
    monkeypatch.setattr(Count, "reduction", reduction, raising=False)
    loss = lambda w, b: (jnp.mean(rows(w, b)), Count(jnp.sum(b["mask"])))
    with pytest.raises(AssertionError, match=says):
        jaxaccum.audit(loss, W, BATCH, has_aux=True)
    known = lambda w, b: (jnp.mean(rows(w, b)), Sum(jnp.sum(b["mask"])))
    assert jaxaccum.audit(known, W, BATCH, has_aux=True).exact


def test_at_the_call_a_tag_that_the_audit_does_not_know_is_undecided(monkeypatch):
    monkeypatch.setattr(Count, "reduction", Reduction.SUM, raising=False)
    loss = lambda w, b: (jnp.mean(rows(w, b)), Count(jnp.sum(b["mask"])))
    step = jaxaccum.value_and_grad(loss, has_aux=True, num_microbatches=2, audit="raise")
    with pytest.raises(jaxaccum.InexactError, match=r"may not be exact.*Count"):
        step(W, BATCH)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_backward_rule_that_adds_up_in_a_while(start):
    """From 0 it is a sum over examples; from 1, each microbatch adds the 1 once more."""

    @jax.custom_vjp
    def decayed(w, x):
        return x * (1 - w[None]) ** 3

    def forward(w, x):
        return decayed(w, x), (w, x)

    def backward(residuals, g):
        w, x = residuals

        def step(state):
            total, adjoint, i = state
            return total + jnp.sum(adjoint * x, axis=0), adjoint * (1 - w[None]), i + 1

        begin = jnp.full_like(w, start), -g * (1 - w[None]) ** 2, 0
        total, adjoint, _ = lax.while_loop(lambda state: state[2] < 3, step, begin)
        return total, adjoint

    decayed.defvjp(forward, backward)
    w, x = data(3), data(8, 3, seed=1)
    loss = lambda w, x: jaxaccum.Sum(jnp.sum(decayed(w, x) ** 2))
    grads = jaxaccum.grad(loss, num_microbatches=2, audit=None)(w, x)
    whole = jitted.grad(lambda w: jnp.sum(decayed(w, x) ** 2))(w)
    exact = jaxaccum.audit(loss, w, x).exact
    assert exact == (normwise(grads, whole) <= EXACT) == (start == 0.0)
