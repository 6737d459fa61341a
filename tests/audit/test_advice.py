"""What the audit advises: the cause first, the line of the user's, and a fix that fits what is
there."""

import functools
import importlib.util
import os
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxaccum
from jaxaccum import EXAMPLE_KEY, KEY
from tests.support import jitted
from tests.support.helpers import EXACT, data, normwise, refused
from tests.support.modules import Module

W, X = data(3, 5), np.asarray(data(8, 3, seed=1))


@pytest.fixture(autouse=True)
def _as_the_libraries_are_used():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# -- BatchNorm that sums over devices already ------------------------------------------------------


def linen(axis_name):
    layer = nn.BatchNorm(use_running_average=False, axis_name=axis_name, param_dtype=jnp.float64)
    variables = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64).init(
        jax.random.key(0), X @ W
    )
    return lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0]


def of_nnx(axis_name):
    layer = nnx.BatchNorm(5, axis_name=axis_name, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    wide = lambda: jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64), state
    )  # its running averages too
    return lambda x: nnx.merge(graphdef, wide())(x)


LAYER = """
import jax
import jax.numpy as jnp

class BatchNorm:
    def __init__(self, {keyword}=None):
        self.axes = {keyword}

    def __call__(self, x):
        mean, square = jnp.mean(x, 0, keepdims=True), jnp.mean(x**2, 0, keepdims=True)
        if self.axes is not None:
            mean, square = jax.lax.pmean((mean, square), self.axes)
        return (x - mean) * jax.lax.rsqrt(square - mean**2 + 1e-3)
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A layer of another library, from a file that lies where the library's own does."""

    def load(path, keyword):
        file = tmp_path / "site-packages" / path
        os.makedirs(file.parent)
        file.write_text(LAYER.format(keyword=keyword))
        name = f"installed_{keyword}"
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module.BatchNorm

    return load


def normalized(layer):
    return lambda w, x: jnp.mean(jnp.tanh(layer(x @ w)) ** 2)


def reports_on_devices(losses):
    """What the audit says inside `pmap`, where the axis has a meaning."""
    found = []

    def step(w, x):
        found.extend(jaxaccum.audit(loss, w, x) for loss in losses)
        return jnp.mean(x)

    jax.pmap(step, axis_name="batch", in_axes=(None, 0))(W, np.stack([X, X]))
    return found


@pytest.mark.parametrize("make", [linen, of_nnx])
def test_a_batch_norm_is_told_to_add_the_loops_axis_to_its_own(make):
    alone, shared, both = reports_on_devices(
        [normalized(make(n)) for n in (None, "batch", ("batch", "microbatch"))]
    )
    assert 'axis_name="microbatch":' in alone.findings[0].fix
    at_once = {
        of_nnx: 'model.set_attributes(nnx.BatchNorm, axis_name="microbatch");',
        linen: 'with jaxaccum.linen.batch_norm_over("microbatch") around model.apply;',
    }
    assert at_once[make] in alone.findings[0].fix
    in_vmap = 'axis_name="example") write axis_name=("example", "microbatch"))'
    assert in_vmap in alone.findings[0].fix
    assert 'axis_name=("batch", "microbatch"):' in shared.findings[0].fix
    assert "example" not in shared.findings[0].fix
    assert (alone.exact, shared.exact, both.exact) == (False, False, True)
    assert alone.findings[0].use.file == shared.findings[0].use.file == __file__


def test_haikus_is_told_by_its_own_argument(installed):
    layer = installed("haiku/_src/batch_norm.py", "cross_replica_axis")
    names = (None, "batch", ("batch", "microbatch"))
    losses = [normalized(layer(cross_replica_axis=name)) for name in names]
    alone, shared, both = reports_on_devices(losses)
    assert 'cross_replica_axis="microbatch":' in alone.findings[0].fix
    assert 'None if hk.running_init() else "microbatch";' in alone.findings[0].fix
    assert 'cross_replica_axis=("batch", "microbatch"):' in shared.findings[0].fix
    assert both.exact


def test_equinoxs_has_an_axis_of_vmap_which_it_keeps(installed):
    layer = installed("equinox/nn/_batch_norm.py", "axis_name")
    report = jaxaccum.audit(normalized(layer()), W, X)
    assert (
        'axis_name=("batch", "microbatch"), where "batch" is the axis of your jax.vmap'
        in report.findings[0].fix
    )


def test_a_batch_norm_with_a_mask_is_told_of_one_that_counts_rows():
    """It has the loop's axis, and averages means of unequal numbers of rows."""
    mask = np.arange(8)[:, None] < 6

    def loss(layer):
        return lambda w, x, mask: masked_mean(jnp.tanh(layer(x @ w, mask)) ** 2, mask)

    variables = nn.BatchNorm(use_running_average=False, param_dtype=jnp.float64).init(
        jax.random.key(0), X @ W
    )

    def of(kind):
        layer = kind(use_running_average=False, axis_name="microbatch", param_dtype=jnp.float64)
        apply = lambda x, mask: layer.apply(variables, x, mask=mask, mutable=["batch_stats"])[0]
        return jaxaccum.audit(loss(apply), W, X, mask, in_axes=(None, 0, 0))

    flax, ours = of(nn.BatchNorm), of(jaxaccum.linen.BatchNorm)
    assert "jaxaccum.linen.BatchNorm or jaxaccum.nnx.BatchNorm" in flax.findings[0].fix
    assert "axis_name" not in flax.findings[0].fix
    assert ours.exact


def masked_mean(x, mask):
    return jaxaccum.Mean(jnp.sum(x * mask), jnp.sum(mask))


def test_numbers_of_a_module_of_equinox_are_settings(monkeypatch):
    """They are no parameters: a dropout rate of 0.0 is a branch of Python's."""
    monkeypatch.setitem(sys.modules, "equinox", types.SimpleNamespace(Module=Module))

    def loss(module, x):
        return jnp.mean((x if module.field == 0.0 else -x) @ module.weight)

    assert jaxaccum.audit(loss, Module(W, 0.0), X).exact
    with pytest.raises(jax.errors.TracerBoolConversionError):
        jaxaccum.audit(lambda w, x: loss(Module(*w), x), (W, 0.0), X)


def test_an_axis_without_a_meaning_is_one_clear_error():
    for make in (linen, of_nnx):
        loss = normalized(make("batch"))
        refused(
            lambda loss=loss: jaxaccum.audit(loss, W, X), "an axis", "batch", __file__, "jax.pmap"
        )
    with pytest.raises(NameError, match="undefined"):
        jaxaccum.audit(lambda w, x: undefined, W, X)  # noqa: F821


def test_a_model_of_nnx_that_draws_is_told_of_its_streams():
    """Its layer draws from a key that the model carries, which no caller can pass per example."""
    graphdef, state = nnx.split(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    loss = lambda state, x: jnp.mean(nnx.merge(graphdef, state)(x) ** 2)
    of_model = jaxaccum.audit(loss, state, X).findings[0]
    by_hand = jaxaccum.audit(lambda w, x: jnp.mean(noisy(x @ w)), W, X).findings[0]
    assert of_model.kind == by_hand.kind == "random"
    assert "with jaxaccum.nnx.value_and_grad" in of_model.fix
    assert "BATCH_KEY" in by_hand.fix
    assert "example_streams" not in by_hand.fix


def noisy(x):
    return x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape)


# -- the cause first -------------------------------------------------------------------------------


@jax.custom_jvp
def gate(x):
    return jnp.maximum(x, 0.0)


gate.defjvps(lambda t, _, x: jnp.where(x > 0, t, 0.0))  # its rule stands in a file of JAX's


def score(w, x, t, key):
    """The loss of one example of a diffusion model at time t."""
    noise = jax.random.normal(key, x.shape, x.dtype)
    std = jnp.sqrt(jnp.maximum(1 - jnp.exp(-t), 1e-5))
    h = gate((x * jnp.exp(-0.5 * t) + std * noise) @ w)
    h = jax.nn.gelu((h - jnp.mean(h)) / jnp.sqrt(jnp.var(h) + 1e-5) * t)
    return (1 - jnp.exp(-t)) * jnp.mean((h + jnp.sum(noise) / std) ** 2)


def diffusion(w, x, key):
    """Times that are spread evenly over the microbatch, and not over the batch."""
    keys, n = jax.random.split(key, len(x) + 1), len(x)
    t = jax.random.uniform(keys[0], (n,), x.dtype, 0.0, 10.0 / n)
    t = t + (10.0 / n) * jnp.arange(1.0 * n)
    return jnp.mean(jax.vmap(functools.partial(score, w))(x, t, keys[1:]))


def scaled(w, x, keys):
    """Times that depend on the number of examples alone."""
    t = jnp.full(len(x), 10.0 / len(x))
    return jnp.mean(jax.vmap(functools.partial(score, w))(x, t, keys))


def line(report):
    """The source of the line that the first finding points to."""
    frame = report.findings[0].origin
    with open(frame.file) as source:
        return source.readlines()[frame.line - 1]


def test_the_first_finding_is_the_cause_and_no_line_is_jaxs_own():
    report = jaxaccum.audit(diffusion, W, X, jax.random.key(0), in_axes=(None, 0, KEY))
    assert (report.verdict, report.findings[0].kind) == ("POSITION", "position")
    assert "jnp.arange" in line(report)
    assert [finding.kind for finding in report.findings[1:]] == ["random"] * (
        len(report.findings) - 1
    )
    report_of_size = jaxaccum.audit(scaled, W, X, jax.random.key(0), in_axes=(None, 0, EXAMPLE_KEY))
    (finding,) = report_of_size.findings
    assert finding.kind == "batch_size"
    for each in (*report.findings, finding):
        frames = [frame for frame in (each.origin, each.use) if frame is not None]
        assert all(frame.file == __file__ for frame in frames)


def stratified(w, x, key, place=None, size=None):
    """One time per example, spread evenly over the batch where its `place` and `size` are the
    batch's."""
    size = len(x) if size is None else size
    place = jnp.arange(1.0 * size) if place is None else place
    t = (jax.random.uniform(key, (), x.dtype) + place) / size
    return jnp.mean((x @ w * t[:, None]) ** 2)


def test_the_fix_of_a_place_names_its_divisor_and_the_shared_key():
    """Each piece of the advice is needed: what follows half of it is told the other half, at the
    right line."""
    key, places = jax.random.key(0), jnp.arange(8.0)
    keyed = jaxaccum.grad(stratified, num_microbatches=4, in_axes=(None, 0, KEY), audit="raise")
    says = "position = jnp.arange(n)", "divide by n", "a key with None in in_axes"
    refused(lambda: keyed(W, X, key), *says, error=jaxaccum.InexactError)
    halved = jaxaccum.grad(
        stratified, num_microbatches=4, in_axes=(None, 0, None, 0), audit="raise"
    )
    says = "test_advice.py:", "place) / size\n", "where another value needs the size"
    refused(lambda: halved(W, X, key, places), *says, error=jaxaccum.InexactError)
    whole = {"place": places, "size": 8}
    mended = functools.partial(stratified, size=8)
    assert jaxaccum.audit(mended, W, X, key, places, in_axes=(None, 0, None, 0)).exact
    step = jaxaccum.grad(mended, num_microbatches=4, in_axes=(None, 0, None, 0))
    full = jitted.grad(stratified)(W, X, key, **whole)
    assert normwise(step(W, X, key, places), full) < EXACT
    unmended = jaxaccum.grad(stratified, num_microbatches=4, in_axes=(None, 0, None), audit=None)
    assert normwise(unmended(W, X, key), full) > 1e3 * EXACT


def clip(w, x):
    """Two towers, compared within the rows that there are."""
    a, b = jnp.tanh(x @ w), jnp.tanh(x @ w[::-1])
    logits = a @ b.T
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.diag(logits))


def gathered_clip(w, x):
    """The same as the advice has it."""
    a, b = jnp.tanh(x @ w), jnp.tanh(x @ w[::-1])
    others = jax.lax.all_gather(b, "microbatch", tiled=True)
    return jnp.mean(jax.nn.logsumexp(a @ others.T, axis=1) - jnp.sum(a * b, axis=1))


def test_the_fix_of_pairs_is_what_makes_them_exact():
    fix = jaxaccum.audit(clip, W, X).findings[0].fix
    assert 'others = jax.lax.all_gather(b, "microbatch", tiled=True)' in fix
    assert "jnp.sum(a * b, axis=1)" in fix
    full = jitted.grad(clip)(W, X)
    assert normwise(jaxaccum.grad(gathered_clip, num_microbatches=4)(W, X), full) < EXACT
    assert normwise(jaxaccum.grad(clip, num_microbatches=4, audit=None)(W, X), full) > 1e3 * EXACT


def in_chunks(w, x):
    """Two chunks of the batch, one after the other, to save memory."""
    return sum(jnp.sum(jnp.tanh(chunk @ w) ** 2) for chunk in jnp.split(x, 2)) / len(x)


def in_scanned_chunks(w, x):
    """The same as the advice has it."""
    add = lambda total, chunk: (total + jnp.sum(jnp.tanh(chunk @ w) ** 2), None)
    return jax.lax.scan(add, 0.0, x.reshape(2, -1, 3))[0] / len(x)


def first_half_against_second(w, x):
    return jnp.mean(jnp.multiply(*jnp.split(jnp.tanh(x @ w), 2)))


def as_rows_of_pairs(w, pairs):
    """The same for one row for each pair, as the advice has it."""
    return jnp.mean(jnp.prod(jnp.tanh(pairs @ w), axis=1))


def test_the_fix_of_parts_is_followed_and_exact():
    for loss in (in_chunks, first_half_against_second):
        fix = jaxaccum.audit(loss, W, X).findings[0].fix
        assert "x.reshape(k, -1, …) with jax.lax.scan" in fix
        assert "make one row of them before the call" in fix
    pairs = np.stack(np.split(X, 2), axis=1)
    for loss, batch in ((in_scanned_chunks, X), (as_rows_of_pairs, pairs)):
        assert jaxaccum.audit(loss, W, batch).exact
    full = jitted.grad(first_half_against_second)(W, X)
    grads = jaxaccum.grad(as_rows_of_pairs, num_microbatches=2)(W, pairs)
    assert normwise(grads, full) < EXACT
    grads = jaxaccum.grad(first_half_against_second, num_microbatches=2, audit=None)(W, X)
    assert normwise(grads, full) > 1e3 * EXACT


def test_the_fix_of_a_sort_speaks_of_an_order_and_of_no_mean():
    by_expert = lambda w, x: jnp.mean((x[jnp.argsort(jnp.argmax(x @ w, 1))] @ w) ** 2)
    fix = jaxaccum.audit(by_expert, W, X).findings[0].fix
    assert "tokens that are sorted by expert, pass audit=None" in fix
    assert "pmean" not in fix
    grads = jaxaccum.grad(by_expert, num_microbatches=4, audit=None)(W, X)
    assert normwise(grads, jitted.grad(by_expert)(W, X)) < EXACT


def test_the_fix_of_a_maximum_is_what_makes_the_loss_exact():
    furthest = lambda w, x: jnp.max(jnp.sum(x @ w, axis=1))
    fix = jaxaccum.audit(furthest, W, X).findings[0].fix
    assert 'jax.lax.pmax(x, "microbatch")' in fix
    assert "jaxaccum.Max(x)" in fix
    mended = lambda w, x: jax.lax.pmax(furthest(w, x), "microbatch")
    full = jitted.grad(furthest)(W, X)
    assert normwise(jaxaccum.grad(mended, num_microbatches=4)(W, X), full) < EXACT
    off = normwise(jaxaccum.grad(furthest, num_microbatches=4, audit=None)(W, X), full)
    assert off > 1e3 * EXACT


OF_AUX = {
    "a number of examples": (
        lambda w, x: jnp.float64(len(x)),
        lambda w, x: jaxaccum.Sum(len(x)),
        "in aux count examples by jaxaccum.Sum(len(x))",
        float(len(X)),
    ),
    "a penalty under Sum": (
        lambda w, x: jaxaccum.Sum(jnp.sum(w**2)),
        lambda w, x: jnp.sum(w**2),
        "in aux return it without a tag",
        float(jnp.sum(W**2)),
    ),
}


@pytest.mark.parametrize("name", OF_AUX)
def test_the_fix_of_an_aux_speaks_of_aux_and_is_followed(name):
    wrong, mended, advice, whole = OF_AUX[name]
    loss = lambda aux: lambda w, x: (jnp.mean((x @ w) ** 2), aux(w, x))
    options = {"num_microbatches": 4, "has_aux": True}
    (finding,) = jaxaccum.audit(loss(wrong), W, X, **options).findings
    assert advice in finding.fix
    assert "the loss" not in finding.note
    assert jaxaccum.audit(loss(mended), W, X, **options).exact
    value = lambda aux: jaxaccum.value_and_grad(loss(aux), audit=None, **options)(W, X)[0][1]
    assert normwise(value(mended), whole) < EXACT
    assert normwise(value(wrong), whole) > 1e3 * EXACT


@pytest.mark.parametrize("along", [lambda x: jnp.cumsum(x)[2], jnp.sort])
def test_what_runs_along_the_examples_is_not_told_of_a_mean(along):
    fix = jaxaccum.audit(lambda w, x: jnp.sum(along(jnp.sum(x @ w, 1))), W, X).findings[0].fix
    assert "jaxaccum.Concat(x)" in fix
    assert "pmean" not in fix


def test_the_fix_of_a_median_is_what_makes_the_loss_exact():
    median = lambda w, x, all_rows=lambda rows: rows: jnp.median(all_rows(jnp.sum(x @ w, 1)))
    fix = jaxaccum.audit(median, W, X).findings[0].fix
    assert 'as a median, take over all rows, jax.lax.all_gather(x, "microbatch", tiled=True)' in fix
    gathered = lambda rows: jax.lax.all_gather(rows, "microbatch", tiled=True)
    grads = jaxaccum.grad(lambda w, x: median(w, x, gathered), num_microbatches=4)(W, X)
    full = jitted.grad(median)(W, X)
    assert normwise(grads, full) < EXACT
    of_means = lambda w, x: jax.lax.pmean(median(w, x), "microbatch")
    grads = jaxaccum.grad(of_means, num_microbatches=4, audit=None)(W, X)
    assert normwise(grads, full) > 1e3 * EXACT


def test_two_causes_come_in_the_order_of_the_program():
    def loss(w, x):
        centred = jnp.tanh(x - jnp.mean(x, axis=0, keepdims=True)) @ w
        scaled = jnp.tanh(x @ w / len(x))
        return jnp.mean(centred) + jnp.mean(scaled)

    kinds = [finding.kind for finding in jaxaccum.audit(loss, W, X).findings]
    assert kinds == ["coupling", "batch_size"]


def test_a_rule_without_a_file_of_the_users_is_told_of_where_it_is_called():
    mixing = jax.custom_jvp(lambda x: x)
    mixing.defjvps(lambda t, _, x: t - jnp.mean(t, axis=0, keepdims=True))
    (finding,) = jaxaccum.audit(lambda w, x: jnp.mean(mixing(x @ w) ** 2), W, X).findings
    assert finding.origin.file == __file__
    assert finding.kind == "coupling"


def test_a_report_says_fix_with_a_colon():
    report = jaxaccum.audit(lambda w, x: jnp.sum(x @ w), W, X)
    assert f"    fix: {report.findings[0].fix}" in str(report).splitlines()


# -- an inner gradient -----------------------------------------------------------------------------


def sharpness_aware(w, x, over=lambda g: g):
    own = lambda w: jnp.mean(jnp.tanh(x @ w) ** 2)
    return own(w + 0.5 * over(jax.grad(own)(w)))


def test_an_inner_gradient_is_made_the_batchs():
    step = functools.partial(jaxaccum.grad, num_microbatches=2)
    advice = r'jax\.lax\.pmean\(jax\.grad\(f\)\(params\), "microbatch"\)'
    expected = jitted.grad(sharpness_aware)(W, X)
    with pytest.warns(jaxaccum.InexactWarning, match=advice):
        assert normwise(step(sharpness_aware)(W, X), expected) > EXACT
    over = lambda g: jax.lax.pmean(g, "microbatch")
    mended = functools.partial(sharpness_aware, over=over)
    assert normwise(step(mended, audit="raise")(W, X), expected) <= EXACT
