"""What a loss returned, leaf by leaf and before it is prepared for the loop: what the audit
judges."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._base.trees import leaves_with_names
from jaxaccum._base.types import PyTree
from jaxaccum._program.tags import Mean, Tag, is_tag


@dataclasses.dataclass(frozen=True)
class Output:
    """One leaf of what the loss returned: its tag, if it has one, its shape, and whether it is aux.

    It is one array, or two of a `Mean`: the total and the weight.
    """

    name: str
    tag: type[Tag] | None
    aux: bool
    shape: tuple[int, ...]
    count: int = 1
    """How many arrays it is."""


def leaves(tree: PyTree, name: str, *, aux: bool) -> Iterator[tuple[Output, list[Any]]]:
    """The leaves of a loss, of aux, or of any output, each with its arrays."""
    for leaf_name, leaf in leaves_with_names(tree, name, is_leaf=is_tag):
        yield from _leaf(leaf_name, leaf, aux)


def _leaf(name: str, leaf: Any, aux: bool) -> Iterator[tuple[Output, list[Any]]]:
    if isinstance(leaf, Mean):
        yield from _mean(name, leaf, aux)
    elif is_tag(leaf):
        for part, x in leaves_with_names(leaf.content, name):
            yield Output(part, type(leaf), aux, jnp.shape(x)), [x]
    else:
        yield Output(name, None, aux, jnp.shape(leaf)), [leaf]


def _mean(name: str, mean: Mean, aux: bool) -> Iterator[tuple[Output, list[Any]]]:
    totals, weights = leaves_with_names(mean.total, name), jax.tree.leaves(mean.weight)
    if len(weights) == 1:
        weights = weights * len(totals)
    for (part, total), weight in zip(totals, weights, strict=True):
        yield Output(part, Mean, aux, jnp.shape(total), count=2), [total, weight]
