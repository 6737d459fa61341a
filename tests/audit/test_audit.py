"""What the audit says of tags, arguments and aux; every answer of "exact" or not is that of the
numbers, too."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxaccum
from jaxaccum import CARRY, EXAMPLE_KEY, KEY, Carry, Concat, Last, Max, Mean, Min, Stack, Sum
from jaxaccum.__main__ import main
from jaxaccum.testing import assert_exact
from tests.support.helpers import data, refused

W = data(3)
BATCH = {"x": data(8, 3), "y": data(8, seed=1), "mask": jnp.asarray([1.0, 0, 1, 1, 0, 1, 1, 0])}


def errors(w, b):
    return (b["x"] @ w - b["y"]) ** 2


def masked(w, b):
    return jnp.sum(errors(w, b) * b["mask"])


LOSSES = {
    # loss: verdict, exact
    "mean": (lambda w, b: jnp.mean(errors(w, b)), "MEAN", True),
    "mean + penalty": (lambda w, b: jnp.mean(errors(w, b)) + jnp.sum(w**2), "MEAN", True),
    "3 means": (lambda w, b: 3.0 * jnp.mean(errors(w, b)) - 1.0, "MEAN", True),
    "penalty": (lambda w, b: jnp.sum(w**2), "UNBATCHED", True),
    "sum": (lambda w, b: jnp.sum(errors(w, b)), "SUM", False),
    "ratio": (lambda w, b: masked(w, b) / jnp.sum(b["mask"]), "RATIO", False),
    "rms": (lambda w, b: jnp.sqrt(jnp.mean(errors(w, b))), "COUPLED", False),
    "sum + mean": (
        lambda w, b: jnp.sum(errors(w, b)) + jnp.mean(errors(w, b)), "MIS_SCALED", False,
    ),
    "sum + penalty": (lambda w, b: jnp.sum(errors(w, b)) + jnp.sum(w**2), "MIS_SCALED", False),
    "size": (lambda w, b: jnp.sum(w) * len(b["y"]), "MIS_SCALED", False),
    "places": (
        lambda w, b: jnp.mean(errors(w, b) * jnp.arange(1.0 * len(b["y"]))), "POSITION", False,
    ),
    "a constant of the size": (
        lambda w, b: jnp.mean(b["x"] @ (w * (np.arange(3.0) / len(b["y"])))), "MIS_SCALED", False,
    ),
    "first": (lambda w, b: jnp.mean(errors(w, b)[:2]), "COUPLED", False),
    "Sum": (lambda w, b: Sum(jnp.sum(errors(w, b))), "SUM", True),
    "Sum of a mean": (lambda w, b: Sum(jnp.mean(errors(w, b))), "MIS_SCALED", False),
    "Sum of a penalty": (lambda w, b: Sum(jnp.sum(w**2)), "MIS_SCALED", False),
    "Sum with a penalty": (
        lambda w, b: Sum(jnp.sum(errors(w, b)) + jnp.sum(w**2)), "MIS_SCALED", False,
    ),
    "Sum with a penalty each": (
        lambda w, b: Sum(jnp.sum(errors(w, b) + jnp.sum(w**2))), "SUM", True,
    ),
    "Mean": (lambda w, b: Mean(masked(w, b), jnp.sum(b["mask"])), "RATIO", True),
    "Mean by size": (lambda w, b: Mean(jnp.sum(errors(w, b)), b["y"].size), "RATIO", True),
    "Mean by ones": (
        lambda w, b: Mean(jnp.sum(errors(w, b)), jnp.sum(jnp.ones_like(b["y"]))), "RATIO", True,
    ),
    "Mean by 1": (lambda w, b: Mean(jnp.sum(errors(w, b)), 1.0), "MIS_SCALED", False),
    "Mean by size - 1": (
        lambda w, b: Mean(jnp.sum(errors(w, b)), b["y"].size - 1), "MIS_SCALED", False,
    ),
    "Mean of a mean": (lambda w, b: Mean(jnp.mean(errors(w, b)), 1.0), "MIS_SCALED", False),
    "Mean of a ratio": (
        lambda w, b: Mean(masked(w, b) / jnp.sum(b["mask"]), jnp.sum(b["mask"])),
        "MIS_SCALED", False,
    ),
    "Mean, guarded": (lambda w, b: Mean(masked(w, b), jnp.sum(b["mask"]) + 1.0), "RATIO", False),
    "Mean, clipped": (
        lambda w, b: Mean(masked(w, b), jnp.maximum(jnp.sum(b["mask"]), 2.0)), "RATIO", False,
    ),
    "Mean by a weight with parameters": (
        lambda w, b: Mean(masked(w, b), jnp.sum(jnp.exp(b["x"] @ w))), "RATIO", True,
    ),
    "Mean of a root": (
        lambda w, b: Mean(jnp.sqrt(jnp.sum(errors(w, b))), b["y"].size), "COUPLED", False,
    ),
    "2 Mean": (lambda w, b: 2.0 * Mean(masked(w, b), jnp.sum(b["mask"])), "RATIO", True),
    "dict": (
        lambda w, b: {"a": jnp.mean(errors(w, b)), "b": Mean(masked(w, b), jnp.sum(b["mask"]))},
        "RATIO", True,
    ),
    "dict with a sum": (
        lambda w, b: {"a": jnp.sum(errors(w, b)), "b": jnp.mean(errors(w, b))}, "SUM", False,
    ),
    "dict of Sum": (
        lambda w, b: {"a": Sum(jnp.sum(errors(w, b))), "b": jnp.mean(errors(w, b))}, "SUM", True,
    ),
}  # fmt: skip


def is_exact(loss, batch=BATCH):
    """By the numbers: whether every partition gives the full batch's value and gradient."""
    try:
        assert_exact(loss, W, batch, partitions=[3])
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", LOSSES)
def test_verdict_and_exactness_are_those_of_the_numbers(name):
    loss, verdict, exact = LOSSES[name]
    report = jaxaccum.audit(loss, W, BATCH)
    assert (report.verdict, report.exact, report.random) == (verdict, exact, False)
    assert is_exact(loss) == exact
    assert exact or (
        report.findings and report.findings[0].fix and report.findings[0].fix in str(report)
    )


def test_the_fix_of_an_untagged_sum_and_ratio_is_the_tag_and_its_lines_are_apart():
    for loss, tag in (
        (LOSSES["sum"][0], "jaxaccum.Sum"),
        (LOSSES["ratio"][0], "jaxaccum.Mean(total, weight)"),
    ):
        (finding,) = jaxaccum.audit(loss, W, BATCH).findings
        assert finding.origin is None
        assert finding.use is None
        assert tag in finding.fix
        assert finding.fix_lines
        assert all(frame.file == __file__ for frame in finding.fix_lines)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (LOSSES["sum + penalty"][0], "outside"),
        (LOSSES["sum + mean"][0], "dict"),
        (LOSSES["Mean, guarded"][0], "guard"),
        (
            lambda w, b: jnp.mean((b["x"] - b["x"].mean(0, keepdims=True)) @ w),
            "once on the full batch",
        ),
        (
            lambda w, b: jnp.mean(
                jax.random.normal(jax.random.key(0), b["y"].shape) * (b["x"] @ w)
            ),
            "BATCH_KEY",
        ),
        (lambda w, b: jax.nn.logsumexp(b["x"] @ jnp.diag(w) @ b["x"].T), "all_gather"),
    ],
)
def test_fixes(loss, says):
    assert any(says in finding.fix for finding in jaxaccum.audit(loss, W, BATCH).findings)


def test_a_report_prints_the_marked_line_and_raises():
    report = jaxaccum.audit(LOSSES["rms"][0], W, BATCH)
    (finding,) = report.findings
    assert finding.kind == "coupling"
    assert finding.origin.file == __file__
    assert "jnp.sqrt" in pathlib.Path(__file__).read_text().splitlines()[finding.origin.line - 1]
    assert finding.origin.function == "<lambda>"
    assert f"> {finding.origin.line:4d} |" in str(report)
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match="COUPLED"):
            report.raise_if_inexact()
    jaxaccum.audit(LOSSES["mean"][0], W, BATCH).raise_if_inexact()


def test_assert_exact_reads_the_loss_first():
    with pytest.raises(AssertionError, match="COUPLED"):
        assert_exact(LOSSES["rms"][0], W, BATCH, audit=True)
    assert_exact(LOSSES["Mean"][0], W, BATCH, audit=True)


# -- arguments -------------------------------------------------------------------------------------


def dropped(w, x, key, shape):
    return jnp.where(jax.random.bernoulli(key, 0.5, shape), x @ w, 0.0)


def test_keys():
    shared = lambda w, x, key: jnp.mean(dropped(w, x, key, (len(x),)))
    own = lambda w, x, keys: jnp.mean(jax.vmap(lambda x, key: dropped(w, x, key, ()))(x, keys))
    key = jax.random.key(0)
    for loss, axes, random in (
        (shared, None, True),
        (shared, KEY, True),
        (own, EXAMPLE_KEY, False),
    ):
        for given in (key, jax.random.key_data(key)):
            report = jaxaccum.audit(loss, W, BATCH["x"], given, in_axes=(None, 0, axes))
            assert (report.verdict, report.random, report.exact) == ("MEAN", random, not random)
    noise = lambda w, x, key: jnp.mean(x @ (w + jax.random.normal(key, w.shape)))
    assert jaxaccum.audit(
        noise, W, BATCH["x"], key, in_axes=(None, 0, None)
    ).exact  # the same for every microbatch
    assert jaxaccum.audit(noise, W, BATCH["x"], key, in_axes=(None, 0, KEY)).random
    unused = lambda w, x, key: jnp.mean(x @ w)
    assert jaxaccum.audit(unused, W, BATCH["x"], key, in_axes=(None, 0, KEY)).exact


GENERATORS = {"threefry2x32": True, "rbg": False, "unsafe_rbg": False}


@pytest.mark.parametrize("impl", GENERATORS)
def test_keys_of_a_generator_that_draws_for_all_of_them_together(impl):
    """The oracle: the numbers of the last five of eight keys, drawn alone."""
    keys = jax.random.split(jax.random.key(7, impl=impl), 8)
    draw = lambda key: jax.random.normal(key, (3,), jnp.float64)
    halves = lambda key: draw(jax.random.split(key)[1])
    seeded = lambda key: draw(jax.random.fold_in(key, jax.random.randint(key, (), 0, 9)))
    for map_, kept in ((jax.vmap, GENERATORS[impl]), (lambda f: lambda k: lax.map(f, k), True)):
        for one in (draw, halves, seeded):
            numbers = map_(one)
            assert np.array_equal(numbers(keys)[3:], numbers(keys[3:])) == kept
            loss = lambda w, b, numbers=numbers: jnp.mean((b["x"] * numbers(b["keys"])) @ w)
            report = jaxaccum.audit(loss, W, BATCH | {"keys": keys})
            assert (report.verdict, report.random, report.exact) == ("MEAN", not kept, kept)
            says = [finding.fix for finding in report.findings]
            assert all("jax.lax.map(draw, keys)" in fix and "threefry2x32" in fix for fix in says)
            assert bool(says) is not kept


def test_keys_that_are_split_alone_stay_apart():
    """Of `rbg` keys only the numbers are drawn together, and a key made for each example is its
    own."""
    keys = jax.random.split(jax.random.key(7, impl="rbg"), 8)
    draw = lambda key: jax.random.normal(key, (3,), jnp.float64)
    own = lambda keys: lax.map(
        draw, jax.vmap(lambda key: jax.random.fold_in(jax.random.split(key)[0], 3))(keys)
    )
    assert np.array_equal(own(keys)[3:], own(keys[3:]))
    assert jaxaccum.audit(
        lambda w, b: jnp.mean((b["x"] * own(b["k"])) @ w), W, {"x": BATCH["x"], "k": keys}
    ).exact


def test_keys_made_of_the_place_in_the_batch():
    def loss(w, x, place):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), place(len(x)))
        return jnp.mean(jax.vmap(lambda x, key: dropped(w, x, key, ()))(x, keys))

    report = jaxaccum.audit(lambda w, x: loss(w, x, lambda n: jnp.arange(n)), W, BATCH["x"])
    assert (report.verdict, report.random, report.exact) == ("MEAN", True, False)
    own = lambda n: lax.axis_index("microbatch") * n + jnp.arange(n, dtype=jnp.int32)
    report = jaxaccum.audit(lambda w, x: loss(w, x, own), W, BATCH["x"])
    assert (report.verdict, report.random, report.exact) == ("MEAN", False, True)


def test_a_carried_state_matters_where_the_loss_reads_it():
    unread = lambda w, x, s: (jnp.mean(x @ w), Carry(s + 1.0))
    read = lambda w, x, s: (jnp.mean(x @ w * s), Carry(s + 1.0))
    kept = lambda w, x, s: (jnp.mean(x @ w * s), Carry(s))
    for loss, verdict, exact in (
        (unread, "MEAN", True),
        (read, "COUPLED", False),
        (kept, "MEAN", True),
    ):
        report = jaxaccum.audit(loss, W, BATCH["x"], 1.0, in_axes=(None, 0, CARRY), has_aux=True)
        assert (report.verdict, report.exact) == (verdict, exact)


def test_a_state_that_comes_back_elsewhere_is_changed():
    """Swapped, or as aux beside the new one: the next microbatch reads another."""
    states = {
        "numbers": (jnp.float64(1.0), jnp.float64(2.0)),
        "keys": (jax.random.key(0), jax.random.key(1)),
    }
    scale = lambda s: (
        s if jnp.issubdtype(s.dtype, jnp.floating) else jax.random.uniform(s, (), jnp.float64)
    )
    swapped = lambda w, x, s: (jnp.mean(x @ w) * scale(s[0]), Carry((s[1], s[0])))
    beside = lambda w, x, s: (
        jnp.mean(x @ w) * scale(s[0]),
        {"new": Carry((s[1], s[1])), "old": Last(s[0])},
    )
    kept = lambda w, x, s: (jnp.mean(x @ w) * scale(s[0]), Carry((s[0], s[1])))
    for name, state in states.items():
        kind = "random" if name == "keys" else "state"
        for loss, exact in ((swapped, False), (beside, False), (kept, True)):
            report = jaxaccum.audit(
                loss, W, BATCH["x"], state, in_axes=(None, 0, CARRY), has_aux=True
            )
            assert report.exact is exact
            assert [f.kind for f in report.findings] == ([] if exact else [kind])


def test_a_carried_key_that_comes_back_is_no_changed_state():
    def noisy(w, x, state, change):
        scale = jax.random.uniform(state["key"], (), x.dtype)
        return jnp.mean(x @ w) * scale, Carry(
            {"key": jax.random.split(state["key"])[0] if change else state["key"]}
        )

    for change in (False, True):
        report = jaxaccum.audit(
            lambda w, x, s, change=change: noisy(w, x, s, change),
            W, BATCH["x"], {"key": jax.random.key(0)},
            in_axes=(None, 0, CARRY), has_aux=True,
        )  # fmt: skip
        assert report.exact is not change
        assert [f.kind for f in report.findings] == (["random"] if change else [])
        assert report.random is change


def test_aux_is_judged_by_its_tags():
    x = BATCH["x"]
    own = lambda z: {
        "rows": Concat(z), "sum": Sum(jnp.sum(z)), "top": Max(jnp.max(z)), "low": Min(jnp.min(z)),
        "mean": jnp.mean(z), "any": Stack(jnp.sqrt(jnp.mean(z))), "end": Last(jnp.std(z)),
    }  # fmt: skip
    assert jaxaccum.audit(lambda w, x: (jnp.mean(x @ w), own(x @ w)), W, x, has_aux=True).exact
    wrong = {
        "a sum": lambda z: jnp.sum(z), "Max of a sum": lambda z: Max(jnp.sum(z)),
        "Min of a maximum": lambda z: Min(jnp.max(z)),
        "rows elsewhere": lambda z: Concat(z[::-1]), "rms": lambda z: jnp.sqrt(jnp.mean(z**2)),
    }  # fmt: skip
    for name, aux in wrong.items():
        report = jaxaccum.audit(
            lambda w, x, name=name, aux=aux: (jnp.mean(x @ w), {name: aux(x @ w)}),
            W,
            x,
            has_aux=True,
        )
        assert report.verdict == "MEAN"
        assert not report.exact, name
        assert any(name in finding.output for finding in report.findings)


def test_axes_shapes_and_sizes():
    loss = lambda w, b: jnp.mean(b["x"].T @ w + b["c"])
    axes = ({"x": 1, "c": None},)
    batch = {"x": jnp.zeros((3, 9)), "c": jnp.ones(())}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (W, batch))
    for given in ((W, batch), shapes):
        for count in (1, 2, 4, 9):  # 4: microbatches of 3 and of 2
            assert (
                jaxaccum.audit(loss, *given, in_axes=(None, *axes), num_microbatches=count).verdict
                == "MEAN"
            )
    coupled = lambda w, b: jnp.mean((b["x"] - b["x"].mean(1, keepdims=True)).T @ w)
    assert jaxaccum.audit(coupled, W, batch, in_axes=(None, *axes)).verdict == "COUPLED"
    assert jaxaccum.audit(lambda w, x: jnp.mean(w * x), 1.0, jnp.ones(4)).exact
    refused(
        lambda: jaxaccum.audit(loss, W, batch, in_axes=(None, *axes), num_microbatches=10),
        "num_microbatches=10",
        "9",
    )
    refused(lambda: jaxaccum.audit(lambda w, x: (x, x), W, BATCH["x"]), "has_aux=True")


def test_code_that_depends_on_the_size_is_not_exact():
    branches = lambda w, x: jnp.mean(x @ w) if len(x) > 4 else jnp.mean(jnp.tanh(x @ w))
    reshapes = lambda w, x: jnp.mean(x.reshape(8, 3) @ w)
    scales = lambda w, x: jnp.mean(jnp.tanh(x @ w / len(x)))
    for loss, verdict in ((branches, "UNKNOWN"), (reshapes, "UNKNOWN"), (scales, "MIS_SCALED")):
        report = jaxaccum.audit(loss, W, BATCH["x"])
        assert (report.verdict, report.exact) == (verdict, False)
        assert not is_exact(loss, BATCH["x"]) if loss is not reshapes else report.findings[0].note


def either(large, small):
    """One of two functions of rows, by the number of the rows."""
    return lambda w, x: jnp.mean((large if len(x) > 4 else small)(jnp.tanh(x * w[None]), w))


SAME_PRIMITIVES = {
    # the same primitives in the same order, and another function at each size
    "operands swapped": either(lambda h, w: h - jnp.sin(h), lambda h, w: jnp.sin(h) - h),
    "another intermediate value": either(
        lambda h, w: h * [jnp.sum(w), jnp.sum(w**2)][0],
        lambda h, w: h * [jnp.sum(w), jnp.sum(w**2)][1]
    ),
    "another entry": either(lambda h, w: h * w[0], lambda h, w: h * w[1]),
    "other columns": either(lambda h, w: h[:, :2], lambda h, w: h[:, 1:]),
    "another axis": either(
        lambda h, w: h @ jnp.outer(w, w**2).sum(0), lambda h, w: h @ jnp.outer(w, w**2).sum(1)
    ),
    "another power": either(lambda h, w: h**2, lambda h, w: h**3),
    "another permutation": either(
        lambda h, w: h @ jnp.outer(w, w**2).transpose(0, 1),
        lambda h, w: h @ jnp.outer(w, w**2).transpose(1, 0)
    ),
    "another result": either(
        lambda h, w: h * lax.sort((w, w**2))[0][0], lambda h, w: h * lax.sort((w, w**2))[1][0]
    ),
    "another border": either(
        lambda h, w: h * jnp.pad(w, (1, 0))[None, :3], lambda h, w: h * jnp.pad(w, (0, 1))[None, :3]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME_PRIMITIVES)
def test_the_same_primitives_are_not_the_same_program(name):
    loss = SAME_PRIMITIVES[name]
    report = jaxaccum.audit(loss, W, BATCH["x"])
    assert (report.verdict, report.exact) == ("UNKNOWN", False)
    assert report.findings[0].origin.file == __file__
    assert not is_exact(loss, BATCH["x"])


def test_the_last_and_smaller_microbatches_are_judged_too():
    tail = lambda w, x: jnp.mean(x @ w) if len(x) != 2 else jnp.mean(jnp.tanh(x @ w))
    for count, verdict in ((2, "MEAN"), (3, "UNKNOWN")):  # of 4; of 3, 3 and 2 examples
        report = jaxaccum.audit(tail, W, BATCH["x"], num_microbatches=count)
        assert (report.verdict, report.exact) == (verdict, verdict == "MEAN")


# -- the probe and the command line ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["mean", "sum", "ratio", "rms", "Mean", "Sum"])
def test_the_probe_agrees(name):
    loss, _, exact = LOSSES[name]
    report = jaxaccum.audit(loss, W, BATCH, probe=True)
    assert report.probe.exact == exact == report.exact
    assert report.probe.sizes == (5, 3)
    assert set(report.probe.errors) == {"['value']", "['gradient']"}
    assert (max(report.probe.errors.values()) < 1e-12) == exact
    assert "float64" in str(report)


def test_the_probe_needs_values():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (W, BATCH))
    refused(lambda: jaxaccum.audit(LOSSES["mean"][0], *shapes, probe=True), "probe", "shapes")


MODULE = """
import jax, jax.numpy as jnp, jaxaccum
w, x = jnp.ones(3, jnp.float32), jax.ShapeDtypeStruct((8, 3), jnp.float32)
good = lambda: (lambda w, x: jnp.mean(x @ w), w, x)
bad = lambda: {"fun": lambda w, x: jnp.std(x @ w), "args": (w, x), "num_microbatches": 4}
report = lambda: jaxaccum.audit(*good())
number = lambda: 7
without = lambda: {"args": (w, x)}
def fails():
    raise RuntimeError("no data")
unsure = lambda: (lambda w, x: jnp.mean(x @ w) if len(x) > 4 else jnp.mean(x), w, x)
"""


def test_the_command_line_exits_by_verdict(tmp_path):
    (tmp_path / "train.py").write_text(MODULE)
    root = str(pathlib.Path(__file__).parents[2])
    statuses = {
        "good": (0, "MEAN"),
        "bad": (1, "train.py"),
        "unsure": (3, "UNKNOWN"),
        "none": (2, "none"),
    }
    environment = {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    for name, (status, says) in statuses.items():
        command = [sys.executable, "-m", "jaxaccum", "audit", f"train:{name}"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        assert says in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("target", "status", "says"),
    [
        ("train:good", 0, "MEAN"),
        ("train:report", 0, "MEAN"),
        ("train:bad", 1, "COUPLED"),
        ("train:number", 2, "returned int; return (loss, *arguments)"),
        ("train", 2, "name a function"),
        ("missing:good", 2, "missing"),
        ("train:without", 2, "lacks 'fun'"),
        ("train:fails", 2, "RuntimeError: no data"),
        ("train:good --num-microbatches=0", 2, "at least 1; got 0"),
        ("train:report --probe", 2, "pass probe to audit there"),
    ],
)
def test_a_wrong_call_has_a_status_of_its_own(target, status, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "train", raising=False)
    try:
        found = main(["audit", *target.split()])
    except SystemExit as stopped:
        found = stopped.code
    assert found == status
    printed = capsys.readouterr()
    assert says in printed.out + printed.err
