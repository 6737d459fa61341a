"""What `torch_ref` uses of transformers: pyright takes 40 seconds to read the package itself."""

from typing import Any

import torch

class BertConfig:
    def __init__(self, **kwargs: Any) -> None: ...

class BertModel(torch.nn.Module):
    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None: ...

class BertForMaskedLM(torch.nn.Module):
    def __init__(self, config: BertConfig) -> None: ...
