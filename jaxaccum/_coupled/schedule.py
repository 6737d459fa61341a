"""Choose which boundaries to store: the fastest schedule within the memory, by a dynamic program
over cuts.

The problem. A boundary that is stored costs bytes of the full batch; one that is not costs the
stages before it again, in every pass that comes later. There are 2ⁿ sets of boundaries.

The idea. A segment from stored cut a to stored cut e is computed from its start for every one of
its stages. Forward, stage k costs the stages a to k. In reverse, stage l costs the stages a to l
again, its own derivative, and the derivative with respect to the boundary of every stage behind it
in the segment.

    forward(a, e) = Σ over k from a to e - 1 of (forward a + … + forward k)
    reverse(a, e) = Σ over l from a to e - 1 of (forward a + … + forward l-1) + back l
                                                 + (l - a) · through l
    best(e)       = min over a < e of best(a) + forward(a, e) + reverse(a, e)

What a segment costs does not depend on the others, so the best set of cuts up to cut e is the best
one up to some earlier cut a, and the segment between. Bytes and time are two aims: up to every cut
all schedules are kept that no other beats in both.

Example. Two cuts, hence three stages, each with forward = 1, back = 2 and through = 1. The last
stage runs forward with its derivative only.

    nothing stored     forward 1 + 2, reverse 2 + 4 + 6: together 15
    both stored        forward 1 + 1, reverse 2 + 2 + 2: together 8

The cost. A segment of m stages costs about m² / 2 stages forward and 2 m² in reverse. Finding the
schedule takes n² segments, and at most 256 schedules up to every cut.

Known weakness. Operations are counted in the jaxpr. The compiler may fuse or share what is counted
twice here, and time is not the same as operations.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import warnings
from collections.abc import Collection

from jaxaccum._base.source_lines import Frame
from jaxaccum._base.types import Memory
from jaxaccum._coupled.cost import Costs, bytes_of, costs, microbatch_bytes, statistics_bytes
from jaxaccum._coupled.cut import Cuts
from jaxaccum._jaxpr.variables import Var, not_among

_EXPENSIVE = 3.0
"""How many times the operations of the full batch a schedule may take without a warning."""
_KEPT = 256
"""How many of the best schedules up to a cut are remembered."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """One cut of the program: the lines of its collectives, and what its boundary takes."""

    frames: tuple[Frame | None, ...]
    bytes: int
    stored: bool


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which boundaries are stored, and what that is predicted to take."""

    stored: frozenset[int]
    cuts: tuple[Cut, ...]
    stored_bytes: int
    """The stored boundaries; a value that crosses several of them is stored once."""
    statistics_bytes: int
    """What every schedule holds of the full batch."""
    flops: float
    full_batch_flops: float

    @property
    def relative_flops(self) -> float:
        """The operations over those of the full batch."""
        return self.flops / self.full_batch_flops if self.full_batch_flops else 1.0


def choose(cuts: Cuts, memory: Memory, moved: Collection[Var]) -> frozenset[int]:
    """The boundaries to store, for a budget; `moved` are the variables that are differentiated.

    To store all of them is the fastest schedule. Where they fit, no operation has to be counted,
    which saved a third of the time of tracing a contrastive loss.
    """
    everything = range(1, len(cuts.stages))
    if _union(cuts, everything) <= _room(cuts, memory):
        return frozenset(everything)
    cost = costs(cuts, moved)
    chosen = _chosen(cuts, cost, memory, moved)
    _warn_of_a_slow(_described(cuts, cost, chosen, moved), memory, cuts)
    return chosen


def schedule(cuts: Cuts, memory: Memory, moved: Collection[Var]) -> Schedule:
    """What `choose` chooses, described."""
    return _described(cuts, costs(cuts, moved), choose(cuts, memory, moved), moved)


def _room(cuts: Cuts, memory: Memory) -> float:
    """The bytes that boundaries may take; without a budget, no more than is held anyway, by one
    microbatch and by the statistics."""
    fixed = statistics_bytes(cuts)
    if memory == "min":
        return 0
    if memory == "store":
        return math.inf
    if memory is None:
        return microbatch_bytes(cuts) + fixed
    if memory < fixed:
        raise ValueError(
            f"memory={memory} bytes is too small, and no schedule fits: the results of the "
            f"collectives at {cuts.last} cuts and the operands of the largest cut already take "
            f'{fixed} bytes. Pass at least {fixed}, or memory="min", which asks for the least.'
        )
    return memory - fixed


def _chosen(cuts: Cuts, cost: Costs, memory: Memory, moved: Collection[Var]) -> frozenset[int]:
    """The fastest schedule that fits; without a budget, the smallest one that is not too slow,
    where that one is."""
    room, limit = _room(cuts, memory), cost.full_batch * _EXPENSIVE
    schedules = _schedules(cuts, cost, math.inf if memory is None else room, moved)
    best = min((s for s in schedules if s.bytes <= room), key=lambda s: s.flops)
    if memory is None and moved and best.flops > limit:
        fast = [s for s in schedules if s.flops <= limit]
        best = min(fast, key=lambda s: s.bytes, default=schedules[-1])
    return best.stored


def _warn_of_a_slow(chosen: Schedule, memory: Memory, cuts: Cuts) -> None:
    if chosen.relative_flops > _EXPENSIVE:
        warnings.warn(
            f"memory={memory!r} takes {chosen.relative_flops:.1f} times the operations of the "
            f"full batch, since {cuts.last} cuts are computed again and again; it stores "
            f"{chosen.stored_bytes} bytes. More memory is faster: memory=None or a larger "
            f'budget, up to {_union(cuts, range(1, len(cuts.stages)))} bytes (memory="store").',
            stacklevel=2,
        )


@dataclasses.dataclass(frozen=True)
class _Candidate:
    bytes: int
    flops: float
    stored: frozenset[int]


def _schedules(cuts: Cuts, cost: Costs, room: float, moved: Collection[Var]) -> list[_Candidate]:
    """The schedules that no other beats in both bytes and operations, the smallest first."""
    count = len(cuts.stages)
    best: dict[int, list[_Candidate]] = collections.defaultdict(list)
    best[0].append(_Candidate(0, cost.once, frozenset()))
    for start in range(count):
        best[start] = _undominated(best[start])
        segment = _segments(cost, start, bool(moved))
        for end in range(start + 1, count + 1):
            extra = _extra_bytes(cuts, start, end) if end < count else 0
            stored = frozenset({end} if end < count else ())
            for s in best[start]:
                longer = _Candidate(s.bytes + extra, s.flops + segment[end], s.stored | stored)
                if longer.bytes <= room:
                    best[end].append(longer)
    return _undominated(best[count])


def _undominated(schedules: list[_Candidate]) -> list[_Candidate]:
    kept: list[_Candidate] = []
    for s in sorted(schedules, key=lambda s: (s.bytes, s.flops)):
        if not kept or s.flops < kept[-1].flops:
            kept.append(s)
    if len(kept) <= _KEPT:
        return kept
    step = (len(kept) - 1) / (_KEPT - 1)  # evenly, both ends among them
    return [kept[round(i * step)] for i in range(_KEPT)]


def _segments(cost: Costs, start: int, differentiated: bool) -> dict[int, float]:
    """The operations of the segments from `start`, by their end."""
    total, again, last = 0.0, 0.0, len(cost.forward) - 1
    found: dict[int, float] = {}
    for k in range(start, last + 1):
        if k < last or not differentiated:  # the last runs with its reverse
            total += again + cost.forward[k]
        if differentiated:
            total += again + cost.back[k] + (k - start) * cost.through[k]
        again += cost.forward[k]
        found[k + 1] = total
    return found


def _extra_bytes(cuts: Cuts, before: int, cut: int) -> int:
    """What boundary `cut` adds to boundary `before`: a value that crosses both is stored once."""
    held = set(cuts.stages[before].live)
    return bytes_of(not_among(cuts.stages[cut].live, held), cuts.axis[1])


def _union(cuts: Cuts, stored: Collection[int]) -> int:
    return bytes_of({v for c in stored for v in cuts.stages[c].live}, cuts.axis[1])


def _described(cuts: Cuts, cost: Costs, stored: frozenset[int], moved: Collection[Var]) -> Schedule:
    """What storing these boundaries is predicted to take."""
    ends = [0, *sorted(stored), len(cuts.stages)]
    flops = cost.once
    for start, end in itertools.pairwise(ends):
        flops += _segments(cost, start, bool(moved))[end]
    lines = [
        Cut(cuts.frames[c - 1], bytes_of(cuts.stages[c].live, cuts.axis[1]), c in stored)
        for c in range(1, len(cuts.stages))
    ]
    stored_bytes, fixed = _union(cuts, stored), statistics_bytes(cuts)
    return Schedule(stored, tuple(lines), stored_bytes, fixed, flops, cost.full_batch)
