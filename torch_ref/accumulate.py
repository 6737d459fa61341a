"""Three ways to the gradient of one batch in PyTorch: full batch, naive loop, exact loop.

A loss is a function `fun(weights, batch)` of two dicts of tensors. It returns a pair `(total,
weight)`, the term total / weight, or a dict of such pairs, whose terms are summed, each over its
own denominator. A partition is the tuple of its microbatches' sizes, in order: `(3, 3, 1)` divides
7 examples.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

Arrays = Mapping[str, np.ndarray]
Tensors = Mapping[str, torch.Tensor]
Term = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[Tensors, Tensors], Term | dict[str, Term]]
ValueAndGrads = tuple[float, dict[str, np.ndarray]]


def full_batch(fun: Loss, weights: Arrays, batch: Arrays) -> ValueAndGrads:
    """The value and gradients of the whole batch in one pass."""
    leaves = as_leaves(weights)
    return backward_full_batch(fun, leaves, as_tensors(batch)), gradients(leaves)


def naive_loop(fun: Loss, weights: Arrays, batch: Arrays, *, sizes: Sequence[int]) -> ValueAndGrads:
    """The usual loop: each microbatch's own mean, divided by the number of microbatches, before
    `.backward()`."""
    leaves = as_leaves(weights)
    return backward_naive(fun, leaves, split(as_tensors(batch), sizes)), gradients(leaves)


def exact_loop(fun: Loss, weights: Arrays, batch: Arrays, *, sizes: Sequence[int]) -> ValueAndGrads:
    """The corrected loop: every microbatch's total over the one denominator of the batch, in any
    partition."""
    leaves = as_leaves(weights)
    return backward_exact(fun, leaves, split(as_tensors(batch), sizes)), gradients(leaves)


def backward_full_batch(fun: Loss, leaves: Tensors, batch: Tensors) -> float:
    """Add the batch's gradient into `leaves[…].grad` and return its value."""
    return backward_exact(fun, leaves, [batch])


def backward_naive(fun: Loss, leaves: Tensors, microbatches: Sequence[Tensors]) -> float:
    """Add the mean of the microbatches' own gradients into `leaves[…].grad`, and return the mean of
    their values."""
    value = 0.0
    for microbatch in microbatches:
        loss = sum(total / weight for total, weight in _terms(fun(leaves, microbatch)).values())
        loss = torch.as_tensor(loss) / len(microbatches)
        loss.backward()
        value += loss.item()
    return value


def backward_exact(fun: Loss, leaves: Tensors, microbatches: Sequence[Tensors]) -> float:
    """Add the batch's gradient into `leaves[…].grad`, one microbatch at a time, and return its
    value.

    A first pass sums totals T and weights W; the second adds the gradient of T / W, which is t / W
    − T w / W² a microbatch. The last part is zero where the weights do not depend on the
    parameters.
    """
    totals, weights = denominators(fun, leaves, microbatches)
    for microbatch in microbatches:
        terms = _terms(fun(leaves, microbatch))
        parts = [_share(terms[name], totals[name], weights[name]) for name in terms]
        torch.stack(parts).sum().backward()
    return sum(_ratio(totals[name], weights[name]) for name in totals)


def denominators(fun: Loss, leaves: Tensors, microbatches: Sequence[Tensors]) -> tuple[dict, dict]:
    """Each term's total and weight, summed over the microbatches without a gradient."""
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    with torch.no_grad():
        for microbatch in microbatches:
            for name, (total, weight) in _terms(fun(leaves, microbatch)).items():
                totals[name] = totals.get(name, 0.0) + total.item()
                weights[name] = weights.get(name, 0.0) + weight.item()
    return totals, weights


def split(batch: Tensors, sizes: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    """The microbatches of the given sizes, in order."""
    examples = {name: len(leaf) for name, leaf in batch.items()}
    if set(examples.values()) != {sum(sizes)}:
        raise ValueError(
            f"sizes {tuple(sizes)} add up to {sum(sizes)} examples, but the batch holds {examples}"
        )
    parts = {name: torch.split(leaf, list(sizes)) for name, leaf in batch.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(sizes))]


def as_leaves(weights: Arrays) -> dict[str, torch.Tensor]:
    """Fresh tensors that collect gradients, of the arrays' own dtypes."""
    return {name: torch.tensor(weight, requires_grad=True) for name, weight in weights.items()}


def as_tensors(batch: Arrays) -> dict[str, torch.Tensor]:
    """The batch as tensors of the arrays' own dtypes."""
    return {name: torch.tensor(leaf) for name, leaf in batch.items()}


def gradients(leaves: Tensors) -> dict[str, np.ndarray]:
    """The collected gradients; a weight that the loss does not reach has a gradient of zero."""
    return {
        name: (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).numpy()
        for name, leaf in leaves.items()
    }


def _terms(loss: Term | dict[str, Term]) -> dict[str, Term]:
    return loss if isinstance(loss, dict) else {"loss": loss}


def _share(term: Term, total: float, weight: float) -> torch.Tensor:
    # A total weight of zero gives value 0 and gradient 0, but the graph must exist for backward().
    if weight == 0:
        return 0.0 * (
            torch.zeros_like(term[0]) + sum(part.sum() for part in term if part.requires_grad)
        )
    return term[0] / weight - total * (term[1] / weight**2 if term[1].requires_grad else 0.0)


def _ratio(total: float, weight: float) -> float:
    return total / weight if weight else 0.0
