"""The models that `bench` measures: each is a loss, its parameters and a batch.

The models are plain functions of a dict of arrays, so that `_bench_torch` can state the same ones
line for line. The digits and the text are real. A loss is `total / weight`, over the rows that it
is given.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments import _text, contrastive
from experiments._digits import data as digits
from experiments.models.bert import BertForMaskedLM, Config

Params = Any
Batch = Any
HEADS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss and its data. `terms(params, rows)` is the loss of these rows as `(total, weight)`.

    `weighted`: microbatches have unequal weights, so that the mean of their means is not the mean
    of the batch.
    `coupled`: the examples of a batch interact; `loop_loss` is the loss with collectives over the
    loop's axis.
    """

    name: str
    terms: Callable[[Params, Batch], tuple[jax.Array, Any]]
    params: Params
    batch: Batch
    weighted: bool = False
    coupled: bool = False
    loop_loss: Callable[[Params, Batch], jax.Array] | None = None
    has_torch: bool = True

    def mean(self, params: Params, rows: Batch) -> jax.Array:
        """The loss of the rows at hand: what the full batch minimizes, and what the usual loop
        averages."""
        total, weight = self.terms(params, rows)
        return total / weight

    @property
    def parameter_bytes(self) -> int:
        """The size of one accumulator."""
        return bytes_of(self.params)


def bytes_of(tree: Any) -> int:
    """The bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def mean_of(
    loss_of_rows: Callable[[Params, Batch], jax.Array],
) -> Callable[[Params, Batch], tuple[jax.Array, Any]]:
    """Terms of a loss that gives one number per entry, each of which counts as 1."""

    def terms(params: Params, rows: Batch) -> tuple[jax.Array, Any]:
        entries = loss_of_rows(params, rows)
        return jnp.sum(entries), entries.size

    return terms


# -- layers ----------------------------------------------------------------------------------------


def normal(rng: np.random.Generator, *shape: int, scale: float | None = None) -> np.ndarray:
    """Normal numbers in float32 whose variance is one over the inputs of a matrix."""
    deviation = shape[-2] ** -0.5 if scale is None else scale
    return (rng.normal(size=shape) * deviation).astype(np.float32)


def norm(x: jax.Array) -> jax.Array:
    """Zero mean and unit variance over the width."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def block(layer: Params, x: jax.Array, *, causal: bool) -> jax.Array:
    """A transformer layer, its norms first."""
    examples, length, width = x.shape
    split = lambda y: y.reshape(examples, length, HEADS, width // HEADS)
    q, k, v = map(split, jnp.split(norm(x) @ layer["qkv"], 3, axis=-1))
    scores = jnp.einsum("eqhd,ekhd->ehqk", q, k) * (width // HEADS) ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(length, dtype=bool)[None, None], scores, -1e9)
    attended = jnp.einsum("ehqk,ekhd->eqhd", jax.nn.softmax(scores), v)
    x = x + attended.reshape(x.shape) @ layer["out"]
    return x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]


def block_params(rng: np.random.Generator, width: int) -> Params:
    """The four matrices of a transformer layer."""
    shapes = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    return {name: normal(rng, *shape) for name, shape in shapes.items()}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """One number per label."""
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


# -- the cases -------------------------------------------------------------------------------------


def transformer(
    *, layers: int = 3, width: int = 256, length: int = 32, batch_size: int = 16
) -> Case:
    """Pre-norm layers, one after another."""
    rng = np.random.default_rng(0)

    def squares(params: Params, x: jax.Array) -> jax.Array:
        for layer in params:
            x = block(layer, x, causal=False)
        return norm(x)[..., 0] * x[..., 1]

    params = [block_params(rng, width) for _ in range(layers)]
    batch = normal(rng, batch_size, length, width, scale=1.0)
    return Case("transformer", mean_of(squares), params, batch)


def bert(
    *,
    layers: int = 2,
    width: int = 128,
    length: int = 64,
    batch_size: int = 16,
    vocabulary: int = 4096,
) -> Case:
    """BERT on real text: the masks make the weights of microbatches unequal."""
    corpus = _text.corpus(length=length, vocabulary=vocabulary)
    (batch,) = _text.batches(corpus, steps=1, batch_size=batch_size, seed=0)
    model = BertForMaskedLM(Config(len(corpus.kept), width, layers, HEADS, 4 * width, length))
    params = jax.jit(model.init)(jax.random.key(0), batch["ids"][:1], batch["attention"][:1])

    def terms(params: Params, rows: Batch) -> tuple[jax.Array, Any]:
        scores: Any = model.apply(params, rows["ids"], rows["attention"])
        entries = cross_entropy(scores, rows["labels"])
        weight = rows["weight"].astype(entries.dtype)
        return jnp.sum(weight * entries), jnp.sum(weight)

    return Case("BERT", terms, numpy_of(params), batch, weighted=True, has_torch=False)


def scanned(*, layers: int = 12, width: int = 768, batch_size: int = 16) -> Case:
    """Layers under one scan, one token per example: parameters dominate."""

    def squares(params: Params, x: jax.Array) -> jax.Array:
        layer = lambda x, leaf: (x + jnp.tanh(x @ leaf["w"] + leaf["b"][None]), None)
        return lax.scan(layer, x, params)[0] ** 2

    params, batch = deep(layers, width, batch_size)
    return Case("scanned MLP", mean_of(squares), params, batch)


def untied(*, layers: int = 12, width: int = 768, batch_size: int = 16) -> Case:
    """The same layers, each with leaves of its own."""

    def squares(params: Params, x: jax.Array) -> jax.Array:
        for leaf in params:
            x = x + jnp.tanh(x @ leaf["w"] + leaf["b"][None])
        return x**2

    stacked, batch = deep(layers, width, batch_size)
    params = [{"w": w, "b": b} for w, b in zip(stacked["w"], stacked["b"], strict=True)]
    return Case("untied layers", mean_of(squares), params, batch)


def deep(layers: int, width: int, batch_size: int) -> tuple[Params, Batch]:
    """Stacked matrices and biases, and one token per example."""
    rng = np.random.default_rng(0)
    params = {"w": normal(rng, layers, width, width), "b": normal(rng, layers, width, scale=0.1)}
    return params, normal(rng, batch_size, width, scale=1.0)


def cnn(*, channels: tuple[int, ...] = (32, 64, 128), batch_size: int = 64, size: int = 32) -> Case:
    """Three convolutions, the last two of them with stride 2; 32 x 32 x 3 pixels, ten
    classes."""
    rng = np.random.default_rng(0)

    def entries(params: Params, rows: Batch) -> jax.Array:
        x, labels = rows
        for i, kernel in enumerate(params["kernels"]):
            stride = (1, 1) if i == 0 else (2, 2)
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(
                x, kernel, stride, [(1, 1), (1, 1)], dimension_numbers=dimensions
            )
            x = jax.nn.relu(x)
        return cross_entropy(jnp.mean(x, axis=(1, 2)) @ params["head"], labels)

    pairs = zip((3, *channels), channels, strict=False)
    kernels = [normal(rng, 3, 3, i, o, scale=(9 * i) ** -0.5) for i, o in pairs]
    params = {"kernels": kernels, "head": normal(rng, channels[-1], 10)}
    return Case("CNN", mean_of(entries), params, images(batch_size, size))


def images(batch_size: int, size: int) -> Batch:
    """scikit-learn's digits, enlarged, as they are and shifted by a pixel in two ways; and their
    classes."""
    rows, labels = digits()
    small = np.asarray(rows[:batch_size]).reshape(-1, 8, 8)
    large = np.kron(small, np.ones((1, size // 8, size // 8), np.float32))
    pixels = np.stack([large, np.roll(large, 1, axis=1), np.roll(large, 1, axis=2)], axis=-1)
    return pixels, np.asarray(labels[:batch_size])


def embedding(
    *, rows: int = 50_000, width: int = 128, length: int = 32, batch_size: int = 64
) -> Case:
    """A large table, a few rows read per batch, and a small classifier of their mean."""
    rng = np.random.default_rng(0)

    def entries(params: Params, batch: Batch) -> jax.Array:
        ids, labels = batch
        x = jnp.mean(params["table"][ids], axis=1)
        return cross_entropy(jnp.tanh(x @ params["hidden"]) @ params["head"], labels)

    params = {
        "table": normal(rng, rows, width, scale=1.0),
        "hidden": normal(rng, width, width),
        "head": normal(rng, width, 16),
    }
    batch = rng.integers(rows, size=(batch_size, length)), rng.integers(16, size=batch_size)
    batch = jax.tree.map(lambda x: x.astype(np.int32), batch)
    return Case("embedding", mean_of(entries), params, batch)


def tied_lm(
    *, layers: int = 2, width: int = 128, length: int = 32, batch_size: int = 16, tokens: int = 8192
) -> Case:
    """A decoder of real text whose table is read twice: for the words and for their scores."""
    rng = np.random.default_rng(0)
    corpus = _text.corpus(length=128, vocabulary=tokens)
    flat = corpus.ids[corpus.ids != _text.PAD]
    batch = flat[: batch_size * (length + 1)].reshape(batch_size, length + 1)

    def entries(params: Params, ids: Batch) -> jax.Array:
        x = params["table"][ids[:, :-1]] + params["positions"][None]
        for layer in params["layers"]:
            x = block(layer, x, causal=True)
        return cross_entropy(norm(x) @ params["table"].T, ids[:, 1:])

    params = {
        "table": normal(rng, tokens, width, scale=0.05),
        "positions": normal(rng, length, width, scale=0.05),
        "layers": [block_params(rng, width) for _ in range(layers)],
    }
    return Case("tied LM", mean_of(entries), params, batch)


def clip(*, width: int = 256, layers: int = 6, batch_size: int = 1024) -> Case:
    """Two towers under CLIP's loss: every example is compared with all others."""
    params = numpy_of(contrastive.towers(width, layers, jnp.float32))
    batch = jax.tree.map(lambda x: np.asarray(x, np.float32), contrastive.halves(batch_size))

    def terms(params: Params, rows: Batch) -> tuple[jax.Array, Any]:
        return contrastive.clip(params, rows), 1

    def loop_loss(params: Params, rows: Batch) -> jax.Array:
        own = contrastive.embed(params, rows)
        a, b = (lax.all_gather(z, "microbatch", tiled=True) for z in own)
        first = lax.axis_index("microbatch") * len(own[0])
        rows_of = functools.partial(contrastive.cross_entropy, params["scale"])
        return (rows_of(own[0], b, first) + rows_of(own[1], a, first)) / 2

    options: dict[str, Any] = {"coupled": True, "loop_loss": loop_loss, "has_torch": False}
    return Case("contrastive", terms, params, batch, **options)


def tiny(*, width: int = 32, batch_size: int = 64) -> Case:
    """A network so small that a step is what it costs to call one."""
    rng = np.random.default_rng(0)
    rows, labels = digits()

    def entries(params: Params, batch: Batch) -> jax.Array:
        x, labels = batch
        return cross_entropy(jnp.tanh(x @ params["hidden"]) @ params["head"], labels)

    params = {"hidden": normal(rng, 64, width), "head": normal(rng, width, 10)}
    batch = np.asarray(rows[:batch_size]), np.asarray(labels[:batch_size])
    return Case("tiny", mean_of(entries), params, batch)


def numpy_of(tree: Any) -> Any:
    """The same leaves as numpy arrays."""
    return jax.tree.map(np.asarray, tree)


CASES: dict[str, Callable[..., Case]] = {
    "transformer": transformer,
    "BERT": bert,
    "scanned MLP": scanned,
    "untied layers": untied,
    "CNN": cnn,
    "embedding": embedding,
    "tied LM": tied_lm,
    "contrastive": clip,
    "tiny": tiny,
}
