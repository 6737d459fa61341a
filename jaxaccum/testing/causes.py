"""Why an accumulated gradient is wrong: compares it with what the known wrong rules would give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

import jaxaccum
from jaxaccum.testing.bounds import normwise, wide
from jaxaccum.testing.oracle import draws_random_numbers, oracle

__all__ = ["likely_cause"]

CLOSE = 1e-3  # a rule is recognized by its value, not by its rounding


@dataclass(frozen=True)
class _Evidence:
    """Value and gradient of the library, the full batch, and each microbatch alone with its share
    of examples."""

    actual: Any
    expected: Any
    parts: Sequence[Any]
    shares: Sequence[float]

    def is_weighted(self, weights: Sequence[float]) -> bool:
        return _close(self.actual, _combine(self.parts, weights))

    def is_last(self) -> bool:
        return len(self.parts) > 1 and self.is_weighted([0.0] * (len(self.parts) - 1) + [1.0])

    def is_sum_declared_mean(self) -> bool:
        return self.is_weighted(self.shares) and _close(
            self.expected, _combine(self.parts, [1.0] * len(self.parts))
        )

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
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    actual: Any,
    expected: Any,
    *,
    in_axes: Any,
    has_aux: bool,
    options: Mapping[str, Any],
) -> str:
    """One sentence: the first known wrong rule that gives `actual`, or the factor by which it is
    off."""
    entries = in_axes if isinstance(in_axes, tuple | list) else (in_axes,)
    if jaxaccum.KEY in entries:
        return (
            "jaxaccum.KEY is folded with the microbatch index, so draws depend on the partition: "
            "use EXAMPLE_KEY"
        )
    if jaxaccum.EXAMPLE_KEY not in entries and draws_random_numbers(fun, *args, in_axes=in_axes):
        return (
            "fun draws random numbers from a key of its own, the same for each microbatch: pass it "
            "as EXAMPLE_KEY"
        )
    evidence = _evidence(
        fun, args, _pick(actual), _pick(expected), in_axes=in_axes, has_aux=has_aux, options=options
    )
    named = (sentence for holds, sentence in RULES if holds(evidence))
    return next(named, None) or _factor(evidence)


def _evidence(
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    actual: Any,
    expected: Any,
    *,
    in_axes: Any,
    has_aux: bool,
    options: Mapping[str, Any],
) -> _Evidence:
    rows = len(jaxaccum.partition(*args, in_axes=in_axes, microbatch_size=1))
    microbatches = jaxaccum.partition(*args, in_axes=in_axes, **options)
    cut = tuple(
        _AFTER_PARTITION.get(axes, axes) if isinstance(axes, _Sentinel) else axes
        for axes in in_axes
    )
    sizes = [
        len(jaxaccum.partition(*each, in_axes=cut, microbatch_size=1)) for each in microbatches
    ]
    parts = [_pick(oracle(fun, *each, in_axes=cut, has_aux=has_aux)) for each in microbatches]
    return _Evidence(actual, expected, parts, [size / rows for size in sizes])


_Sentinel = type(jaxaccum.KEY)
_AFTER_PARTITION = {jaxaccum.KEY: None, jaxaccum.EXAMPLE_KEY: 0}
"""What `partition` hands out: a key that is folded already, and one key for each example."""


def _pick(result: Mapping[str, Any]) -> Any:
    return {"value": result["value"], "gradient": result["gradient"]}


def _combine(parts: Sequence[Any], weights: Sequence[float]) -> Any:
    return jax.tree.map(
        lambda *leaves: sum(
            weight * wide(leaf) for weight, leaf in zip(weights, leaves, strict=True)
        ),
        *parts,
    )


def _close(actual: Any, expected: Any) -> bool:
    return normwise(actual, expected) < CLOSE


def _factor(evidence: _Evidence) -> str:
    """The one number by which all of the answer is off, if there is one."""
    actual, expected = (
        np.concatenate([wide(leaf).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (evidence.actual, evidence.expected)
    )
    factor = float(
        np.real(
            np.vdot(expected, actual)
            / max(np.real(np.vdot(expected, expected)), np.finfo(float).tiny)
        )
    )
    if _close(actual, factor * expected):
        return (
            f"value and gradient are {factor:.6g} times the full batch's, over "
            f"{len(evidence.parts)} microbatches"
        )
    return "none of the known wrong rules: compare jaxaccum.partition's microbatches one by one"
