"""The model language means the same in PyTorch, linen and nnx: outputs and gradients agree in
float64."""

import contextlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaccum.testing import Layer, build_model, linen_model, normwise
from jaxaccum.testing.language import BLOCKS, CLASSES, block
from jaxaccum.testing.strategies import model_batches, models
from tests.support.covering import EVERY
from tests.support.nnx_builder import nnx_model
from tests.support.tagged_losses import LOSSES, Loss, loss_terms, losses

with contextlib.suppress(ModuleNotFoundError):
    from torch_ref import losses as torch_losses

WIDTH = 4
EXAMPLES = hypothesis.settings.default.max_examples
EVERY_TERM = LOSSES[-1]
HEAD = Layer("dense", "head", size=CLASSES)
EMBEDDING = Layer("embedding", "embedding", size=WIDTH)

MODELS = {kind: (*block(kind, 0, WIDTH), HEAD) for kind in BLOCKS} | {
    "batch_norm_train": (Layer("batch_norm", "norm", choice="train"), HEAD),
    "mean_pooling": (Layer("pooling", choice="mean"), HEAD),
    "max_pooling": (Layer("pooling", choice="max"), HEAD),
    "embedding": (EMBEDDING, HEAD),
    "tied_decoder": (EMBEDDING, *block("dense", 0, WIDTH), Layer("decode", "embedding")),
}

# Few shapes, so that what is dispatched op by op is compiled once; a scan is compiled anew each
# time it is traced.
UNROLLED = tuple(kind for kind in BLOCKS if kind not in ("scan", "checkpoint"))


def a_batch(size=5, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random((size, 3)) < 0.7
    mask[0], mask[1] = True, False
    return {
        "features": rng.normal(size=(size, 3, WIDTH)),
        "tokens": rng.integers(0, CLASSES, (size, 3)),
        "mask": mask,
        "keep": rng.random((size, 2, WIDTH)) < 0.5,
        "labels": rng.integers(0, CLASSES, (size, 3)),
        "targets": rng.normal(size=(size, 3, CLASSES)),
        "weight": rng.integers(1, 5, size) / 4,
    }


def value_and_gradient(apply, model, loss, batch, *, compiled):
    """In one pass, with the terms divided by hand: nothing of jaxaccum's core."""

    def fun(weights):
        terms = loss_terms(loss, apply(weights, model.state, batch)[0], batch)
        return sum(total / weight for total, weight in terms.values())

    step = jax.value_and_grad(fun)
    return (jax.jit(step) if compiled else step)(model.weights)


def assert_same(model, loss, batch, *, compiled=True):
    options = {"model": model, "loss": loss, "batch": batch, "compiled": compiled}
    linen = value_and_gradient(linen_model(model.layers), **options)
    nnx = value_and_gradient(nnx_model(model.layers, model.width), **options)
    assert normwise(nnx, linen) <= 1e-12
    if "torch_losses" in globals():
        torch = torch_losses.value_and_gradient(model, loss, batch)
        assert normwise(linen[0], torch[0]) <= 1e-12
        assert normwise(linen[1], torch[1]) <= 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_the_same_in_each_framework(name):
    assert_same(build_model(MODELS[name], WIDTH, seed=1), EVERY_TERM, a_batch())


@hypothesis.settings(max_examples=EXAMPLES if EXAMPLES >= EVERY else 25)
@given(st.data())
def test_compositions_are_the_same_in_each_framework(data):
    model = data.draw(models(kinds=UNROLLED, widths=(4,)))
    batch = data.draw(model_batches(model.width, sizes=(4,)))
    assert_same(model, data.draw(losses()), batch, compiled=False)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_every_loss_is_the_same_in_each_framework(loss):
    assert_same(build_model((HEAD,), WIDTH, seed=1), loss, a_batch())


def outputs(name, batch, seed=1):
    model = build_model(MODELS[name], WIDTH, seed=seed)
    return jax.jit(linen_model(model.layers))(model.weights, model.state, batch)[0]


def test_attention_reads_no_masked_token():
    batch = a_batch()
    changed = batch | {"features": np.where(batch["mask"][..., None], batch["features"], 7.0)}
    difference = np.abs(outputs("attention", batch) - outputs("attention", changed)).max(axis=-1)
    assert (difference[batch["mask"]] == 0).all()
    assert (difference[~batch["mask"]] > 0).all()


def test_dropout_reads_the_given_mask():
    batch = a_batch()
    none = batch | {"keep": np.zeros_like(batch["keep"])}
    changed = none | {"features": batch["features"] + 1}
    assert normwise(outputs("feed_forward", none), outputs("feed_forward", batch)) > 1e-3
    head = build_model(MODELS["feed_forward"], WIDTH, seed=1).weights["head"]
    residual = (
        changed["features"] @ head["kernel"] + head["bias"]
    )  # with all dropped, the residual alone is left
    assert normwise(outputs("feed_forward", changed), residual) <= 1e-12


def test_checkpointed_scan_is_the_scan():
    assert normwise(outputs("checkpoint", a_batch()), outputs("scan", a_batch())) <= 1e-15


@pytest.mark.parametrize("choice", ["mean", "max"])
def test_pooling_leaves_a_length_of_one(choice):
    assert outputs(f"{choice}_pooling", a_batch()).shape == (5, 1, CLASSES)


def test_training_batch_norm_couples_examples_and_moves_its_state():
    model = build_model(MODELS["batch_norm_train"], WIDTH, seed=1)
    batch = a_batch()
    others_changed = batch | {
        "features": np.concatenate([batch["features"][:1], 2 * batch["features"][1:]])
    }
    before, after = (
        jax.jit(linen_model(model.layers))(model.weights, model.state, each)
        for each in (batch, others_changed)
    )
    nnx = jax.jit(nnx_model(model.layers, WIDTH))(model.weights, model.state, batch)
    assert model.coupled
    assert not build_model(MODELS["batch_norm"], WIDTH, seed=1).coupled
    assert normwise(before[0][0], after[0][0]) > 1e-3
    assert normwise(before[1], nnx[1]) <= 1e-12
    mean = 0.9 * model.state["norm"]["mean"] + 0.1 * batch["features"].mean(axis=(0, 1))
    assert normwise(before[1]["norm"]["mean"], mean) <= 1e-12


@pytest.mark.parametrize("builder", ["linen", "nnx"])
@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_dtype(name, builder):
    model = build_model(MODELS[name], WIDTH, seed=1).astype(jnp.bfloat16)
    apply = (
        linen_model(model.layers)
        if builder == "linen"
        else nnx_model(model.layers, WIDTH, dtype=jnp.bfloat16)
    )
    batch = {
        key: entry.astype(jnp.bfloat16) if entry.dtype == float else entry
        for key, entry in a_batch().items()
    }
    assert jax.eval_shape(apply, model.weights, model.state, batch)[0].dtype == jnp.bfloat16


def test_same_layers_give_the_same_function():
    assert linen_model(MODELS["dense"]) is linen_model((*block("dense", 0, WIDTH), HEAD))


def test_loss_terms_are_by_name():
    loss = Loss(("squared_error", "z"))
    terms = loss_terms(loss, jnp.zeros((5, 3, CLASSES)), a_batch())
    assert list(terms) == ["squared_error", "z"]
    assert float(terms["z"][1]) == 5


@pytest.mark.parametrize(
    "build", [linen_model, lambda layers: nnx_model(layers, WIDTH)], ids=["linen", "nnx"]
)
def test_an_unknown_layer_is_refused(build):
    model = build_model((HEAD,), WIDTH, seed=0)
    with pytest.raises(ValueError, match="no layer of kind 'lattice'"):
        build((Layer("lattice", "head", size=CLASSES),))(model.weights, model.state, a_batch())
