"""How gradients combine over microbatches: what ``value_and_grad(accumulator=…)`` takes."""

from jaxaccum._accumulators import in_place as in_place
from jaxaccum._accumulators import tree as tree
