"""Why an accumulated gradient is wrong: compares it with what the known wrong rules would give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import jaxaccum
from jaxaccum._base.types import PyTree
from jaxaccum._host_loop.partition import num_examples
from jaxaccum._tools.probe import weighted_sum
from jaxaccum.testing.bounds import normwise, wide
from jaxaccum.testing.oracle import LossCall, Result, draws_random_numbers, oracle

__all__ = ["likely_cause"]

CLOSE = 1e-3  # a rule is recognized by its value, not by its rounding


@dataclass(frozen=True)
class _Evidence:
    """Value and gradient of the library, of the full batch, and of each microbatch alone."""

    actual: Result
    expected: Result
    parts: Sequence[Result]
    shares: Sequence[float]
    """For each microbatch, its share of the examples."""

    def is_weighted(self, weights: Sequence[float]) -> bool:
        return _close(self.actual, weighted_sum(self.parts, weights))

    def is_last(self) -> bool:
        return len(self.parts) > 1 and self.is_weighted([0.0] * (len(self.parts) - 1) + [1.0])

    def is_sum_declared_mean(self) -> bool:
        total = weighted_sum(self.parts, [1.0] * len(self.parts))
        return self.is_weighted(self.shares) and _close(self.expected, total)

    def is_sum_of_means(self) -> bool:
        return self.is_weighted([1.0] * len(self.parts))

    def is_mean_of_means(self) -> bool:
        return self.is_weighted([1 / len(self.parts)] * len(self.parts))

    def is_mean_over_examples(self) -> bool:
        return self.is_weighted(self.shares)


RULES: tuple[tuple[Callable[[_Evidence], bool], str], ...] = (
    (_Evidence.is_last, "only the last microbatch counts: is a tag `Last` where a sum is meant?"),
    (
        _Evidence.is_sum_declared_mean,
        "fun returns a sum untagged, which declares a mean over examples: return "
        "jaxaccum.Sum(loss)",
    ),
    (
        _Evidence.is_sum_of_means,
        "the microbatches' means are summed, a factor of the number of microbatches: return "
        "jaxaccum.Mean(total, weight)",
    ),
    (
        _Evidence.is_mean_over_examples,
        "the microbatches' losses are averaged over examples, and the full batch's loss is not "
        "that average: either its normalizer is not the number of examples (return "
        "jaxaccum.Mean(total, weight)), or its examples are coupled (BatchNorm needs "
        "axis_name='microbatch')",
    ),
    (
        _Evidence.is_mean_of_means,
        "mean of the microbatches' means, although their weights differ: return "
        "jaxaccum.Mean(total, weight) with the sum as total",
    ),
)


def likely_cause(
    loss: LossCall, actual: Result, expected: Result, options: Mapping[str, Any]
) -> str:
    """The first known wrong rule that gives `actual`, or the factor by which it is off."""
    if jaxaccum.KEY in loss.in_axes:
        return (
            "jaxaccum.KEY is folded with the microbatch index, so draws depend on the partition: "
            "use BATCH_KEY"
        )
    if jaxaccum.BATCH_KEY in loss.in_axes:
        return (
            "fun draws from BATCH_KEY, so its microbatches cannot be run apart to compare them: "
            "ask jaxaccum.audit"
        )
    if jaxaccum.EXAMPLE_KEY not in loss.in_axes and draws_random_numbers(loss):
        return (
            "fun draws random numbers from a key of its own, the same for each microbatch: pass it "
            "as BATCH_KEY"
        )
    evidence = _evidence(loss, actual, expected, options)
    for holds, sentence in RULES:
        if holds(evidence):
            return sentence
    return _factor(evidence)


def _evidence(
    loss: LossCall, actual: Result, expected: Result, options: Mapping[str, Any]
) -> _Evidence:
    own = {name: options[name] for name in _OF_PARTITION if name in options}
    microbatches = jaxaccum.partition(*loss.args, in_axes=loss.in_axes, **own)
    calls = [loss.of_part(args) for args in microbatches]
    sizes = [num_examples(call.args, call.in_axes) for call in calls]
    shares = np.asarray(sizes) / num_examples(loss.args, loss.in_axes)
    parts = [jax.tree.map(wide, _pick(oracle(call))) for call in calls]
    return _Evidence(_pick(actual), _pick(expected), parts, shares.tolist())


_OF_PARTITION = ("num_microbatches", "microbatch_size", "split")
"""The options that say which examples are in which microbatch."""


def _pick(result: Result) -> Result:
    return {"value": result["value"], "gradient": result["gradient"]}


def _close(actual: PyTree, expected: PyTree) -> bool:
    return normwise(actual, expected) < CLOSE


def _flat(tree: PyTree) -> np.ndarray:
    """All entries of all leaves."""
    return np.concatenate([wide(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def _factor(evidence: _Evidence) -> str:
    """The one number by which all of the answer is off, if there is one."""
    actual, expected = _flat(evidence.actual), _flat(evidence.expected)
    square = max(np.real(np.vdot(expected, expected)), np.finfo(float).tiny)
    factor = float(np.real(np.vdot(expected, actual) / square))
    if _close(actual, factor * expected):
        return (
            f"value and gradient are {factor:.6g} times the full batch's, over "
            f"{len(evidence.parts)} microbatches"
        )
    return "none of the known wrong rules: compare jaxaccum.partition's microbatches one by one"
