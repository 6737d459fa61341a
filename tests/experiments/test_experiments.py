"""Every experiment runs at a tiny size, its checks can fail, and the command line says what it does
not know."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import __main__ as cli
from experiments import (
    _report,
    _text,
    bert,
    contrastive,
    memory,
    noise_scale,
    norms,
    precision,
    public,
    small_batch,
    speed,
    toy,
)
from experiments.models.bert import BertForMaskedLM
from experiments.public_losses import devices, masked_lm, masked_mean, moe, packed, ppo, resnet
from tests.support.helpers import INEXACT

RECORD = {"name", "question", "settings", "rows", "checks", "passed", "data", "versions"}
TINY_BERT = {
    "steps": 3,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_toy_prints_the_seed_side_by_side():
    record = toy.run()
    assert record.passed
    rows = [
        "batch 0: grad -16 weight 1",
        "batch 1: grad -20 weight 1",
        "=" * 50,
        "grad -20 weight 1.2",
    ]
    assert record.text.splitlines()[1:] == [f"{row:<50}    {row}" for row in rows]


def test_toy_fails_for_a_loop_that_forgets_to_divide(monkeypatch):
    def undivided():
        return [toy.Row(2 * row.grad, row.weight) for row in toy.torch_loop()]

    monkeypatch.setitem(toy.WAYS, "optax.MultiSteps", undivided)
    assert [check.passed for check in toy.run().checks] == [False, True]


@pytest.mark.optimized
def test_memory_measures_every_way_and_checks_ours(monkeypatch):
    options = {"layers": 12, "width": 32, "lengths": (1,), "num_microbatches": (8,)}
    record = memory.run(**options)
    ratios = {row["temporary / parameters"]: row["N = 8"] for row in record.rows}
    assert record.checks[0].value == ratios["jaxaccum"] < ratios["hand-written scan"] - 0.5
    monkeypatch.setattr(memory, "with_jaxaccum", memory.with_scan)
    monkeypatch.setitem(memory.WAYS, "jaxaccum", memory.with_scan)
    assert not memory.run(**options).passed


def test_bert_attributes_the_difference_and_leaves_rounding():
    record = bert.run(**TINY_BERT)
    failed = [check.claim for check in record.checks if not check.passed]
    assert not failed
    rows = {row["cause"]: row for row in record.rows}
    assert rows["weighting"]["Δ gradient alone"] > 1e-2
    assert rows["none: jaxaccum, the residual"]["Δ gradient alone"] < 1e-14
    assert rows["all five: usual loop"]["Δ gradient without"] < 1e-14
    assert rows["schedule and decay"]["Δ gradient alone"] < 1e-14  # it acts after the gradient
    assert rows["schedule and decay"]["Δ loss alone"] != 0


@INEXACT
def test_contrastive_fails_for_a_rule_that_is_wrong(monkeypatch):
    monkeypatch.setitem(contrastive.WAYS, "exact", contrastive.open_clip)
    options = {
        "width": 16,
        "layers": 1,
        "batch_size": 32,
        "k": 4,
        "microbatch_size": 16,
        "batches": (64,),
    }
    record = contrastive.run(**options)
    assert [check.passed for check in record.checks[:5]] == [True, False, True, True, True]
    right = contrastive.exact(4)(contrastive.towers(16, 1, "float64"), contrastive.halves(32))
    assert right["scale"] * 4 == pytest.approx(record.data["logit scale"]["open_clip"], rel=1e-9)


@pytest.fixture
def _one_block(monkeypatch):
    """The models of `public` with one block: nearly all of their time is compilation."""
    for module in (moe, packed, devices, ppo):
        monkeypatch.setattr(module, "MODEL", module.MODEL.clone(layers=1))
    config = dataclasses.replace(masked_lm.MODEL.config, num_hidden_layers=1)
    monkeypatch.setattr(masked_lm, "MODEL", BertForMaskedLM(config))
    monkeypatch.setattr(resnet, "MODEL", resnet.MODEL.clone(widths=(8,)))


@pytest.mark.usefixtures("_one_block")
def test_public_tells_the_usual_accumulation_from_ours_for_every_loss():
    record = public.run(steps=2)
    assert [check.claim for check in record.checks if not check.passed] == []
    differences = [
        public.column(record.rows, way, "Δ parameters") for way in (public.USUAL, public.OURS)
    ]
    assert len(differences[0]) == len(public.LOSSES)
    assert (differences[0] > 1e6 * differences[1]).all()


@INEXACT
@pytest.mark.usefixtures("_one_block")
def test_public_fails_for_a_loss_that_divides_by_its_own_tokens(monkeypatch):
    monkeypatch.setattr(public, "LOSSES", {"packed": "packed texts"})
    monkeypatch.setattr(packed, "mean_of_batch", masked_mean)
    assert [check.passed for check in public.run(steps=2).checks] == [
        False,
        False,
        False,
        True,
        False,
    ]


@pytest.fixture
def _as_in_a_script():
    """The experiments run under JAX's own defaults, and optax mixes dtypes."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.optimized
@pytest.mark.usefixtures("_as_in_a_script")
def test_precision_tells_the_accumulators_apart(monkeypatch):
    record = precision.run(numbers=(1, 256))
    assert record.passed
    error = {row["relative error"]: row["N = 256"] for row in record.rows}
    assert (
        error["compensated float32"]
        < error["float32"]
        < error["compensated bfloat16"]
        < error["bfloat16"]
    )
    monkeypatch.setitem(precision.WAYS, "compensated float32", precision.WAYS["float16"])
    assert not precision.run(numbers=(1, 256)).passed


def test_the_critical_batch_is_that_of_the_curve():
    sweep = {size: round(1000 * (1 + 50 / size)) for size in noise_scale.SIZES}
    assert noise_scale.critical_batch(sweep) == pytest.approx(50, rel=0.02)


@pytest.mark.usefixtures("_as_in_a_script")
def test_noise_scale_grows_as_the_loss_falls():
    losses, scales = noise_scale.measured(steps=60)
    assert losses[-1] < losses[0] / 2
    assert noise_scale.growth(scales) < 0.5 < noise_scale.growth(scales[::-1])


@pytest.mark.usefixtures("_as_in_a_script")
def test_small_batch_compares_both_rules_with_accumulation():
    record = small_batch.run(small=(32,), examples=1024, seeds=1)
    assert [(row["batch"], row["β₂ rule"]) for row in record.rows] == [
        (32, "fixed"),
        (32, "half-life"),
        (256, "fixed"),
    ]
    assert record.rows[1]["β₂"] == pytest.approx(0.95 ** (32 / 256))
    assert record.passed


@pytest.mark.usefixtures("_as_in_a_script")
def test_norms_tells_exact_from_naive():
    data = norms.digits()
    assert (
        norms.gradient_error("exact", 8, data)
        < norms.BOUND
        < norms.gradient_error("naive", 8, data) / 10
    )
    losses, accuracies = norms.trained("GroupNorm", 32, steps=20, seeds=2, data=data)
    assert (losses[:, -1] < losses[:, 0]).all()
    assert (accuracies > 0.2).all()


@pytest.mark.usefixtures("_as_in_a_script")
def test_speed_times_each_way_in_turn():
    record = speed.run(layers=1, width=16, length=4, rounds=2)
    assert record.checks[0].bound == speed.BOUND
    assert [len(times) for times in record.data["seconds"].values()] == [2, 2]


def test_masks_hide_real_tokens_only_and_at_least_one_a_text():
    corpus = _text.corpus(length=24, vocabulary=300)
    (batch,) = _text.batches(corpus, steps=1, batch_size=64, seed=0)
    chosen = batch["weight"] == 1
    assert chosen.any(axis=1).all()
    assert (batch["labels"][chosen] > _text.MASK).all()
    assert np.array_equal(batch["ids"][~chosen], batch["labels"][~chosen])
    assert np.mean(batch["ids"][chosen] == _text.MASK) == pytest.approx(
        0.8, abs=4 * (0.16 / chosen.sum()) ** 0.5
    )
    assert np.array_equal(batch["attention"], batch["labels"] != _text.PAD)


def test_the_command_line_writes_json_and_picture(tmp_path, capsys):
    assert cli.main(["toy", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "toy.json").read_text())
    assert set(record) == RECORD
    assert record["passed"]
    assert set(record["checks"][0]) == {"claim", "value", "bound", "passed"}
    assert (tmp_path / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert "grad -20 weight 1.2" in capsys.readouterr().out


def test_the_command_line_fails_with_a_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "wrong_numbers", lambda rows: float("nan"))
    assert cli.main(["toy", "--out", str(tmp_path)]) == 1
    assert not json.loads((tmp_path / "toy.json").read_text())["passed"]


def test_an_unknown_name_is_refused_with_the_names_that_exist(capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["toy", "tyo"])
    assert refused.value.code == 2
    assert (
        f"unknown experiment tyo; choose from {', '.join(cli.names())}" in capsys.readouterr().err
    )


def test_a_check_of_not_a_number_fails():
    assert not _report.Check("nothing", float("nan"), 1.0).passed
    assert _report.Check("equal", 1.0, 1.0).passed
