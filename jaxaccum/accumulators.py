"""How gradients combine over microbatches: what ``value_and_grad(accumulator=…)`` takes."""

from jaxaccum._accumulators import Accumulator as Accumulator
from jaxaccum._accumulators import in_place as in_place
from jaxaccum._accumulators import tree as tree
from jaxaccum._compensated import compensated as compensated
from jaxaccum._noise_scale import NoiseScale as NoiseScale
from jaxaccum._noise_scale import noise_scale as noise_scale
from jaxaccum._skip_nonfinite import Skipped as Skipped
from jaxaccum._skip_nonfinite import skip_nonfinite as skip_nonfinite
