"""The options of the transformations, once for all of them, as typed dictionaries.

`value_and_grad` and `microbatch`, which users read first, spell them out: an editor then shows each
option with its default. `grad` and those of `jaxaccum.nnx` take ``**options`` of this type and pass
them on. `plan` and `audit` spell out theirs, because their keywords are arguments of the loss.
`tests/plain/test_options.py` compares all of them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypedDict, TypeVar

from jaxaccum._base.types import Audit, Gather, InAxes, Memory, Split, Unroll
from jaxaccum.accumulators._record import AccumulatorLike

F = TypeVar("F", bound=Callable[..., Any])


class LoopOptions(TypedDict, total=False):
    """How the batch is cut, what each argument is, and which axes are summed over."""

    num_microbatches: int | None
    microbatch_size: int | None
    in_axes: InAxes
    split: Split
    num_examples_argnum: int | None
    axis_name: str
    mesh_axes: str | Sequence[str] | None
    memory: Memory
    unroll: Unroll
    audit: Audit


class GradientOptions(LoopOptions, total=False):
    """The same, and how gradients add up and parameters are gathered."""

    accumulator: AccumulatorLike | None
    gather: Gather


def check_known(options: Collection[str], caller: str) -> None:
    """Refuse a name that is not an option of `caller`, and say which one is meant."""
    known = sorted(GradientOptions.__optional_keys__)
    for name in options:
        if name not in known:
            meant = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {meant[0]!r}?" if meant else f"it has {', '.join(known)}."
            raise TypeError(f"jaxaccum.{caller} has no option {name!r}; {hint}")


def shows_options_of(spelled: Callable[..., Any]) -> Callable[[F], F]:
    """Give a function of ``**options`` the signature that lists them, as `spelled` does.

    So ``help``, ``inspect.signature`` and editors show each option with its default.
    """
    listed = [p for p in inspect.signature(spelled).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        shown = signature.replace(parameters=[*own, *listed])
        function.__signature__ = shown  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return decorate
