"""Tests for your own loss: `assert_exact`, rounding bounds, strategies, and a compiled program.

Imported by name: `import jaxaccum.testing`. The strategies need hypothesis; nothing else does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxaccum.testing.bounds import normwise as normwise
from jaxaccum.testing.bounds import sum_bound as sum_bound
from jaxaccum.testing.collectives import Collective as Collective
from jaxaccum.testing.collectives import collectives as collectives
from jaxaccum.testing.exactness import assert_exact as assert_exact
from jaxaccum.testing.language import Layer as Layer
from jaxaccum.testing.language import Model as Model
from jaxaccum.testing.language import build_model as build_model

if TYPE_CHECKING:
    from jaxaccum.testing.linen_models import linen_model as linen_model
    from jaxaccum.testing.strategies import batches as batches
    from jaxaccum.testing.strategies import masks as masks
    from jaxaccum.testing.strategies import model_batches as model_batches
    from jaxaccum.testing.strategies import models as models
    from jaxaccum.testing.strategies import partitions as partitions
    from jaxaccum.testing.strategies import weights as weights

_LAZY = {
    "linen_model": "linen_models",
    "batches": "strategies",
    "masks": "strategies",
    "model_batches": "strategies",
    "models": "strategies",
    "partitions": "strategies",
    "weights": "strategies",
}
"""Names whose module needs flax or hypothesis, and is imported when they are first used."""


if not TYPE_CHECKING:  # a type checker that sees it takes every misspelt name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
