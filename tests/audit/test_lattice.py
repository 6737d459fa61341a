"""The worked examples at the head of the audit's lattice: what the walk knows after each
equation."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest

from jaxaccum import Sum, audit
from jaxaccum._audit.lattice import IRREGULAR, UNIT, FaultKind, Kind, Scale
from jaxaccum._audit.walk import Walk

BATCH = {
    "x": jax.ShapeDtypeStruct((8, 3), jnp.float32),
    "mask": jax.ShapeDtypeStruct((8,), jnp.float32),
}


def _mean(w, batch):
    r = (batch["x"] @ w) ** 2
    return jnp.sum(r) / len(r)


def _mean_and_penalty(w, batch):
    return _mean(w, batch) + 0.1 * jnp.sum(w**2)


def _sum_and_penalty(w, batch):
    return Sum(jnp.sum((batch["x"] @ w) ** 2) + 0.1 * jnp.sum(w**2))


def _ratio(w, batch):
    return jnp.sum((batch["x"] @ w) ** 2) / jnp.sum(batch["mask"])


def _centred(w, batch):
    h = batch["x"] @ w
    return jnp.mean((h - jnp.mean(h)) ** 2)


def _centred_over_the_batch(w, batch):
    h = batch["x"] @ w
    return jnp.mean((h - jax.lax.pmean(jnp.mean(h), "microbatch")) ** 2)


def _cancelled(w, batch):
    h, m = batch["x"] @ w, jnp.mean(batch["x"] @ w)
    return jnp.mean(h - m + m)


def _by_one_more(w, batch):
    r = (batch["x"] @ w) ** 2
    return jnp.sum(r) / (len(r) + 1)


def _walked(monkeypatch, loss):
    """The report, and the values of each primitive's results, in the order of the program."""
    found = {}
    apply = Walk.apply

    def recording(walk, op, ins):
        outs = apply(walk, op, ins)
        found.setdefault(op.name, []).extend(outs)
        return outs

    monkeypatch.setattr(Walk, "apply", recording)
    return audit(loss, jax.ShapeDtypeStruct((3,), jnp.float32), BATCH), found


def _terms(value):
    return {(term.scale.power, term.fixed) for term in value.terms}


def _kinds_of_faults(value):
    return {fault.kind for fault in value.faults}


def test_a_mean_is_a_total_over_the_batch_size(monkeypatch):
    report, found = _walked(monkeypatch, _mean)
    (r,), (s,), (mean,) = found["integer_pow"], found["reduce_sum"], found["div"]
    assert r.kind is Kind.ROWS
    assert s.kind is Kind.TOTAL
    assert _terms(s) == {(0, False)}
    assert mean.kind is Kind.TOTAL
    assert _terms(mean) == {(-1, False)}
    assert (report.verdict, report.exact) == ("MEAN", True)


@pytest.mark.parametrize(
    ("loss", "power", "verdict", "exact"),
    [(_mean_and_penalty, -1, "MEAN", True), (_sum_and_penalty, 0, "MIS_SCALED", False)],
)
def test_a_penalty_is_a_fixed_term(monkeypatch, loss, power, verdict, exact):
    report, found = _walked(monkeypatch, loss)
    (added,) = found["add"]
    assert added.kind is Kind.TOTAL
    assert _terms(added) == {(power, False), (0, True)}
    assert (report.verdict, report.exact) == (verdict, exact)


def test_a_ratio_has_a_total_in_its_scale(monkeypatch):
    report, found = _walked(monkeypatch, _ratio)
    (ratio,), (_, weight) = found["div"], found["reduce_sum"]
    assert {(w.number, w.exponent) for w in ratio.scale.weights} == {(weight.number, -1)}
    assert (report.verdict, report.exact) == ("RATIO", False)


def test_rows_that_meet_a_microbatchs_total_are_coupled(monkeypatch):
    report, found = _walked(monkeypatch, _centred)
    mean, loss = found["div"]
    (centred,) = found["sub"]
    assert mean.kind is Kind.TOTAL
    assert _terms(mean) == {(-1, False)}
    assert not mean.faults
    assert centred.kind is Kind.ROWS
    assert _kinds_of_faults(centred) == {FaultKind.COUPLING}
    assert _terms(loss) == {(-1, False)}
    assert loss.faults == centred.faults
    assert (report.verdict, report.exact) == ("COUPLED", False)


def test_the_full_batchs_mean_is_fixed_and_couples_nothing(monkeypatch):
    report, found = _walked(monkeypatch, _centred_over_the_batch)
    _, shared, _ = found["div"]
    (centred,) = found["sub"]
    assert shared.kind is Kind.FIXED
    assert shared.scale.power == Fraction(0)
    assert centred.kind is Kind.ROWS
    assert FaultKind.COUPLING not in _kinds_of_faults(centred)
    assert (report.verdict, report.exact) == ("COUPLED", True)


@pytest.mark.parametrize(
    ("loss", "verdict"), [(_cancelled, "COUPLED"), (_by_one_more, "MIS_SCALED")]
)
def test_the_lattice_has_no_algebra(monkeypatch, loss, verdict):
    """Its known weakness: what cancels counts, and n + 1 follows no power of n."""
    report, _ = _walked(monkeypatch, loss)
    assert (report.verdict, report.exact) == (verdict, False)


def test_the_scales_of_a_product_multiply():
    """n · 1/n is a constant, n · n is none, and what follows no law stays without one."""
    n, share = Scale(Fraction(1)), Scale(Fraction(-1))
    assert (n * share).trivial
    assert n * n == Scale(Fraction(2))
    assert n * UNIT == UNIT * n == n
    assert n * IRREGULAR == UNIT * IRREGULAR == IRREGULAR
