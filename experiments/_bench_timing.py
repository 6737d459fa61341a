"""Times that a busy machine does not spoil: ratios of runs made in pairs, one after the other.

A round visits every rival. Beside each of its runs there is one of ours, before it in even rounds
and after it in odd ones, so that both meet the same state of the machine. What is reported is the
median of these ratios, with quartiles.
"""

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Run = Callable[[], None]
SHORTEST = (
    0.02  # seconds: a shorter run is repeated, so that the clock and the scheduler do not count
)
FEWEST, OF_SLOW = 7, 3  # pairs per rival; of one that takes ten times as long as ours


class Seconds(NamedTuple):
    """Of one run: by the clock, and by the processor, all threads of this process together."""

    wall: float
    cpu: float


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What our runs took, and the rival's next to them."""

    ours: Sequence[Seconds]
    rival: Sequence[Seconds]

    @property
    def ratios(self) -> np.ndarray:
        """Ours over the rival's by the clock, pair by pair: below 1 where we are faster."""
        return walls(self.ours) / walls(self.rival)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratios."""
        low, middle, high = np.quantile(self.ratios, [0.25, 0.5, 0.75])
        return float(low), float(middle), float(high)

    @property
    def cpu_ratio(self) -> float:
        """The median ratio of the processor's seconds, which other programs on the machine hardly
        change."""
        ratios = [own.cpu / other.cpu for own, other in zip(self.ours, self.rival, strict=True)]
        return median(ratios)


def walls(times: Sequence[Seconds]) -> np.ndarray:
    """The seconds by the clock."""
    return np.array([one.wall for one in times])


def in_pairs(
    ours: Run, rivals: Mapping[str, Run], *, rounds: int, seconds: float
) -> dict[str, Pairs]:
    """Pairs of every rival: at most `rounds`, in about `seconds` for each rival, and never fewer
    than seven."""
    lengths = {name: clocked(run).wall for name, run in rivals.items()}
    own = clocked(ours).wall
    repeats = max(1, math.ceil(SHORTEST / own))
    count = lambda length: max(
        OF_SLOW if length > 10 * own else FEWEST, int(seconds / (repeats * (own + length)))
    )
    counts = {name: min(rounds, count(length)) for name, length in lengths.items()}
    found: dict[str, list[tuple[Seconds, Seconds]]] = {name: [] for name in rivals}
    for i in range(max(counts.values(), default=0)):
        for name in in_turn([name for name in rivals if i < counts[name]], i):
            found[name].append(pair(ours, rivals[name], repeats, first=i % 2 == 0))
    return {name: Pairs(*zip(*pairs, strict=True)) for name, pairs in found.items()}


def in_turn(names: Sequence[str], i: int) -> Iterator[str]:
    """The names, in the opposite order in every other round."""
    return reversed(names) if i % 2 else iter(names)


def pair(ours: Run, rival: Run, repeats: int, *, first: bool) -> tuple[Seconds, Seconds]:
    """The seconds of both, ours first or last."""
    if first:
        own = clocked(ours, repeats)
        return own, clocked(rival, repeats)
    other = clocked(rival, repeats)
    return clocked(ours, repeats), other


def clocked(run: Run, repeats: int = 1) -> Seconds:
    """The seconds of one run, the mean of so many."""
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        run()
    return Seconds((time.perf_counter() - start) / repeats, (time.process_time() - cpu) / repeats)


# -- the machine -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Peak:
    """What this machine reaches at its best: operations a second of a matrix product, bytes a
    second of a long sum."""

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """No step takes less: its operations and its bytes at the peak, one hidden behind the
        other."""
        return max(flops / self.flops, moved / self.bytes)


def peak(*, size: int = 1024, length: int = 2**23, repeats: int = 30) -> Peak:
    """Measured: the fastest of many runs of each: one of them meets a free machine."""
    x, held = jnp.ones((size, size), jnp.float32), [jnp.ones(length, jnp.float32)]
    product, add = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1, donate_argnums=0)

    def grow() -> None:
        held[0] = jax.block_until_ready(add(held[0]))

    of_product = fastest(lambda: jax.block_until_ready(product(x, x)), repeats)
    of_sum = fastest(grow, repeats)
    return Peak(2 * size**3 / of_product, 2 * 4 * length / of_sum)


def fastest(run: Callable[[], Any], repeats: int) -> float:
    """The shortest of so many runs, without the first."""
    run()
    return min(clocked(run).wall for _ in range(repeats))


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "python": platform.python_version(),
    }


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
