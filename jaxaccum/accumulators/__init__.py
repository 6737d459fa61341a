"""How gradients combine over microbatches: what ``value_and_grad(accumulator=…)`` takes.

`in_place` and `tree` are plain sums, and the backward pass itself adds. Every other accumulator is
a record of functions that is handed each microbatch's mean gradient as a tree. `_compensated` is
the example of one, `_skip_nonfinite` of one that wraps another.
"""

from jaxaccum.accumulators._compensated import compensated as compensated
from jaxaccum.accumulators._noise_scale import NoiseScale as NoiseScale
from jaxaccum.accumulators._noise_scale import noise_scale as noise_scale
from jaxaccum.accumulators._record import Accumulator as Accumulator
from jaxaccum.accumulators._record import in_place as in_place
from jaxaccum.accumulators._record import tree as tree
from jaxaccum.accumulators._skip_nonfinite import Skipped as Skipped
from jaxaccum.accumulators._skip_nonfinite import skip_nonfinite as skip_nonfinite
