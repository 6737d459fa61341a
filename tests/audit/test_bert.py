"""The audit of BERT: masked-language modelling with and without its tag, with dropout from one key
and from many."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxaccum
from experiments.models.bert import BertForMaskedLM, Config

MODEL = BertForMaskedLM(
    Config(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=12,
    )
)
IDS = jax.ShapeDtypeStruct((8, 9), jnp.int32)
BATCH = {
    "ids": IDS,
    "attention": IDS,
    "labels": IDS,
    "weight": jax.ShapeDtypeStruct((8, 9), jnp.float32),
}
PARAMS = jax.eval_shape(MODEL.init, jax.random.key(0), IDS, IDS)
KEY = jax.eval_shape(jax.random.key, 0)


def total_and_weight(params, batch, **options):
    scores = MODEL.apply(params, batch["ids"], batch["attention"], **options)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["labels"])
    return jnp.sum(losses * batch["weight"]), jnp.sum(batch["weight"])


def mean(params, batch, **options):
    return jaxaccum.Mean(*total_and_weight(params, batch, **options))


def ratio(params, batch):
    total, weight = total_and_weight(params, batch)
    return total / weight


def shared(params, batch, key):
    return mean(params, batch, dropout=0.1, rngs={"dropout": key})


def own(params, batch, keys):
    def one(row, key):
        return total_and_weight(
            params, jax.tree.map(lambda x: x[None], row), dropout=0.1, rngs={"dropout": key}
        )

    return jaxaccum.Mean(*map(jnp.sum, jax.vmap(one)(batch, keys)))


@pytest.mark.parametrize(
    ("loss", "axes", "exact", "random"),
    [
        (mean, (), True, False), (ratio, (), False, False),
        (shared, (None,), False, True), (own, (jaxaccum.EXAMPLE_KEY,), True, False),
    ],
)  # fmt: skip
def test_bert(loss, axes, exact, random):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        report = jaxaccum.audit(
            loss, PARAMS, BATCH, *([KEY] if axes else []), in_axes=(None, 0, *axes)
        )
    assert (report.verdict, report.exact, report.random) == ("RATIO", exact, random), report
