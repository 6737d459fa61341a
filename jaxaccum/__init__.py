"""Exact gradient accumulation for JAX: the gradient is that of the full batch."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxaccum import accumulators as accumulators
from jaxaccum._audit import AuditReport as AuditReport
from jaxaccum._audit import InexactError as InexactError
from jaxaccum._audit import InexactWarning as InexactWarning
from jaxaccum._base.types import BATCH_KEY as BATCH_KEY
from jaxaccum._base.types import CARRY as CARRY
from jaxaccum._base.types import EXAMPLE_KEY as EXAMPLE_KEY
from jaxaccum._base.types import KEY as KEY
from jaxaccum._base.types import MAX_GRAD as MAX_GRAD
from jaxaccum._host_loop.partition import pad_batch as pad_batch
from jaxaccum._host_loop.partition import partition as partition
from jaxaccum._program.tags import Carry as Carry
from jaxaccum._program.tags import Concat as Concat
from jaxaccum._program.tags import Last as Last
from jaxaccum._program.tags import Max as Max
from jaxaccum._program.tags import Mean as Mean
from jaxaccum._program.tags import Min as Min
from jaxaccum._program.tags import Stack as Stack
from jaxaccum._program.tags import Sum as Sum
from jaxaccum._tools.audit import audit as audit
from jaxaccum._tools.plan import Plan as Plan
from jaxaccum._tools.plan import plan as plan
from jaxaccum._transforms.microbatch import full_batch as full_batch
from jaxaccum._transforms.microbatch import microbatch as microbatch
from jaxaccum._transforms.value_and_grad import grad as grad
from jaxaccum._transforms.value_and_grad import value_and_grad as value_and_grad

if TYPE_CHECKING:
    from jaxaccum import checkpoints as checkpoints
    from jaxaccum import linen as linen
    from jaxaccum import nnx as nnx
    from jaxaccum._host_loop.loss_scale import LossScaleState as LossScaleState
    from jaxaccum._host_loop.loss_scale import dynamic_loss_scale as dynamic_loss_scale
    from jaxaccum._host_loop.multisteps import MultiSteps as MultiSteps
    from jaxaccum._host_loop.multisteps import MultiStepsState as MultiStepsState

__version__ = "0.1.0"

_LAZY = {
    "MultiSteps": "_host_loop.multisteps",
    "MultiStepsState": "_host_loop.multisteps",
    "LossScaleState": "_host_loop.loss_scale",
    "dynamic_loss_scale": "_host_loop.loss_scale",
    "checkpoints": None,
    "linen": None,
    "nnx": None,
}
"""Names whose module needs optax or flax, and is imported when they are first used; None: the name
is a module."""


if not TYPE_CHECKING:  # a type checker that sees it takes every misspelt name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"{__name__}.{_LAZY[name] or name}")
        return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
