"""What does a training step cost on GPUs: memory, collectives inside and outside of loops, seconds?

An AdamW step under data parallelism, compiled by XLA's CUDA plug-in for H100s that are only
described: no GPU is needed, and none is used. Where a GPU is present, the same steps are compiled
for it and run, and the seconds are measured.

Set-up: the models, ways and columns of `tpu`, on 1, 8, 32 and 256 GPUs in hosts of eight. Without a
device XLA tunes no kernel, so the matrix products are not those that a real H100 would choose;
memory and collectives do not depend on that. Estimated seconds are the model's operations at the
chip's peak, and the bytes of collectives over NVLink, as published; they rank programs and predict
no clock. XLA combines all-reduces only in part, so bytes are counted, not operations.

Command   python -m experiments gpu [--on h100:1x2x8]
          (pip install 'jaxaccum[experiments,gpu]'; libraries of CUDA are not needed)
Cost      some ten minutes: `scanned` for N from 1 to 64 and on every topology, the other models at
          N = 8; an hour and more with --full, which compiles every N of every model
Expected  jaxaccum adds to one accumulator in place, where no loop makes a whole gradient of the
          layers, and sends it once per step whatever N and the number of GPUs, outside of loops;
          a hand-written scan and `optax.microbatching` make a second, and send it N times, inside
"""

from typing import Any

from experiments import _compiled_report, _report

TOPOLOGIES = ("h100:1x1x8", "h100:1x1x1", "h100:1x4x8", "h100:1x32x8")
BOUND = 1.5  # one accumulator and a microbatch's activations; a second would make it more than 2


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    **options: Any,
) -> _report.Record:
    """The first model at every N on the first topology, all others at N = 8; with `full`, every N
    of every model. The `options` are those of `_compiled_report.Plan`."""
    return _compiled_report.record(
        _compiled_report.Plan("gpu", TOPOLOGIES, full=full, bound=BOUND, **options),
        name="gpu",
        question="What does a training step cost on GPUs: memory, collectives, seconds?",
        track=track,
    )
