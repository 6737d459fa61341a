"""What does a training step cost on a TPU pod: memory, collectives, seconds?

An AdamW step under data parallelism, compiled by libtpu for the described topology: no TPU is
needed, and none is used. Where a TPU is present, the same steps are compiled for it and run, and
the seconds are measured.

Set-up: `scanned` is 12 layers of width 1024 in float32, 64 examples of one token per device;
`decoder` has a billion bfloat16 parameters in one scan over layers, 64 sequences of 256 tokens a
device; `bert` is BERT-base in float32, 64 sequences of 128 tokens a device. Estimated seconds are
the model's operations at the chip's peak, and the bytes of collectives over its links, as
published; they rank programs and predict no clock. `scanned` fits the on-chip memory of v5e and
v6e, where XLA puts its buffers and leaves them out of the temporary memory it reports: the peak
counts them.

Command   python -m experiments tpu [--on v5e:4x4]
          (pip install 'jaxaccum[experiments,tpu]')
Cost      some twenty minutes: `scanned` for N from 1 to 64 and on every topology, the other models
          at N = 8; hours with --full, which compiles every N of every model
Expected  jaxaccum sends its gradients once per step whatever N, outside of loops; a hand-written
          scan and `optax.microbatching` N times, inside
"""

from typing import Any

from experiments import _compiled_report, _report

TOPOLOGIES = ("v5e:2x2", "v5e:16x16", "v5p:2x2x1", "v6e:2x2")


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    **options: Any,
) -> _report.Record:
    """The first model at every N on the first topology, all others at N = 8; with `full`, every N
    of every model. The `options` are those of `_compiled_report.Plan`."""
    return _compiled_report.record(
        _compiled_report.Plan("tpu", TOPOLOGIES, full=full, **options),
        name="tpu",
        question="What does a training step cost on a TPU pod: memory, collectives, seconds?",
        track=track,
    )
