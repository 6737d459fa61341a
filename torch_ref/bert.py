"""BERT for masked-language modelling from Hugging Face, as a loss of numpy weights.

The weights have Hugging Face's own names.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from transformers import BertConfig, BertForMaskedLM, BertModel

from torch_ref.accumulate import Loss, Tensors, Term

# Tied to the word embeddings and to cls.predictions.bias: never a weight of its own.
DECODER = "cls.predictions.decoder."


def weights(config: dict[str, Any], *, seed: int) -> dict[str, np.ndarray]:
    """Hugging Face's initial weights in float32, the decoder tied and so absent."""
    torch.manual_seed(seed)
    named = BertForMaskedLM(_config(config)).named_parameters()
    return {
        name: leaf.detach().numpy().copy() for name, leaf in named if not name.startswith(DECODER)
    }


def loss(config: dict[str, Any], *, dropout: bool = False) -> Loss:
    """The masked tokens' total cross-entropy and their number.

    The batch holds `ids`, `attention` (1 for a token, 0 for padding), `labels` and `weight` (1
    where a token is to be predicted), each (examples, length). Dropout draws from torch's global
    generator.
    """
    logits_of = logits(config, dropout=dropout)

    def fun(weights: Tensors, batch: Tensors) -> Term:
        log_probs = torch.log_softmax(logits_of(weights, batch), dim=-1)
        picked = log_probs.gather(-1, batch["labels"][..., None].long())[..., 0]
        weight = batch["weight"].to(picked.dtype)
        return -(weight * picked).sum(), weight.sum()

    return fun


def logits(
    config: dict[str, Any], *, dropout: bool = False
) -> Callable[[Tensors, Tensors], torch.Tensor]:
    """The decoder's scores (examples, length, vocabulary)."""
    model = BertForMaskedLM(_config(config)).train(dropout)
    run = _call(model)
    return lambda weights, batch: run(weights, batch).logits


def hidden(config: dict[str, Any]) -> Callable[[Tensors, Tensors], torch.Tensor]:
    """`BertModel`'s last hidden states (examples, length, width), without dropout; names without
    the `bert.` prefix."""
    run = _call(BertModel(_config(config), add_pooling_layer=False).eval())
    return lambda weights, batch: run(weights, batch).last_hidden_state


def _call(model: torch.nn.Module) -> Callable[[Tensors, Tensors], Any]:
    def run(weights: Tensors, batch: Tensors) -> Any:
        inputs = {"input_ids": batch["ids"].long(), "attention_mask": batch["attention"].long()}
        if "token_types" in batch:
            inputs["token_type_ids"] = batch["token_types"].long()
        # Strict, so that a weight that is missing or misnamed is an error; the buffers hold indices
        # alone.
        tensors = {**dict(model.named_buffers()), **weights}
        return functional_call(model, tensors, (), inputs, tie_weights=True, strict=True)

    return run


def _config(config: dict[str, Any]) -> BertConfig:
    # The eager attention is the one that is written out; the others are its fused forms.
    options: dict[str, Any] = {**config, "attn_implementation": "eager"}
    return BertConfig(**options)
