"""Gradient accumulation for JAX that is exact: the microbatched gradient equals the full-batch gradient."""

from jaxaccum import accumulators as accumulators
from jaxaccum._microbatch import full_batch as full_batch
from jaxaccum._microbatch import microbatch as microbatch
from jaxaccum._partition import pad_batch as pad_batch
from jaxaccum._partition import partition as partition
from jaxaccum._plan import Plan as Plan
from jaxaccum._plan import plan as plan
from jaxaccum._tags import Carry as Carry
from jaxaccum._tags import Concat as Concat
from jaxaccum._tags import Last as Last
from jaxaccum._tags import Max as Max
from jaxaccum._tags import Mean as Mean
from jaxaccum._tags import Min as Min
from jaxaccum._tags import Stack as Stack
from jaxaccum._tags import Sum as Sum
from jaxaccum._types import CARRY as CARRY
from jaxaccum._types import EXAMPLE_KEY as EXAMPLE_KEY
from jaxaccum._types import KEY as KEY
from jaxaccum._value_and_grad import grad as grad
from jaxaccum._value_and_grad import value_and_grad as value_and_grad

__version__ = "0.1.0"
