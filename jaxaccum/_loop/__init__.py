"""The loop over microbatches, and the sums of gradients that it carries.

A `Program` and the arrays of the call enter; the combined parts of the output leave, and where they
are asked for the gradients of the whole batch. It is made of ``lax.scan`` and ``jax.vjp`` alone, so
every transformation of JAX applies to it. It imports the rooms below: programs, accumulators,
devices.
"""

from jaxaccum._loop.derivative import Derivative as Derivative
from jaxaccum._loop.derivative import Gradient as Gradient
from jaxaccum._loop.derivative import Result as Result
from jaxaccum._loop.derivative import run_with_gradient as run_with_gradient
from jaxaccum._loop.loop import Scanned as Scanned
from jaxaccum._loop.loop import run as run
from jaxaccum._loop.loop import scan as scan
from jaxaccum._loop.loop import whole_shape as whole_shape
from jaxaccum._loop.maxima import next_values as next_values
