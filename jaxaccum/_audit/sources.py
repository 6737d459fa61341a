"""The user's line behind an equation, through cached calls into libraries."""

from __future__ import annotations

import dataclasses
import functools
import os
import sysconfig
from typing import Any

from jaxaccum._base.source_lines import _INNER, Frame

_LIBRARIES = tuple(
    path + os.sep
    for path in {
        sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")
    }
    if path
)


_HERE = os.path.dirname(__file__) + os.sep
_TRACED_FROM = (
    _HERE,
    os.path.join(os.path.dirname(os.path.dirname(__file__)), "_program", "call.py"),
)
"""The files that trace a loss: what stands below them is the loss."""


def is_library(file: str) -> bool:
    """Whether a file is installed code, JAX or this package, and so not the user's own."""
    return file.startswith(("<frozen", *_INNER)) or (
        file.startswith(_LIBRARIES) or f"{os.sep}site-packages{os.sep}" in file
    )


def is_jax(file: str) -> bool:
    """Whether a file belongs to JAX itself, whose derivative rules are taken at their word."""
    return file.startswith(_INNER[0])


@dataclasses.dataclass(frozen=True)
class Call:
    """An equation inside whose body another stands."""

    eqn: Any
    cached_library_body: bool
    """Whether JAX may have traced the body earlier, for another caller of a library function."""


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """An equation and the calls around it, the outermost first. It holds them, so that identities
    stay unique."""

    eqn: Any
    calls: tuple[Call, ...] = ()
    defined: Frame | None = None
    """Where the function is defined that stands for the equation's derivative."""

    @functools.cached_property
    def frame(self) -> Frame | None:
        """The innermost line of the user's own; of a library, where there is none; None where JAX
        kept no trace."""
        if self.defined is not None:
            return self.defined
        stack: list[Frame] = []
        cached = False
        for call in self.calls:
            stack, cached = _extended(stack, _stack(call.eqn), cached), call.cached_library_body
        stack = _extended(stack, _stack(self.eqn), cached)
        own = [frame for frame in stack if not is_library(frame.file)]
        return own[-1] if own else stack[-1] if stack else None

    @property
    def primitive(self) -> str:
        """What the equation does."""
        return self.eqn.primitive.name

    def __str__(self) -> str:
        return str(self.frame) if self.frame is not None else "an unknown line"


def _stack(eqn: Any) -> list[Frame]:
    """The frames below those that trace the loss, outside of JAX and this package, the outermost
    first."""
    traceback = eqn.source_info.traceback
    inward = list(traceback.frames) if traceback is not None else []
    depth = next(
        (i for i, f in enumerate(inward) if f.file_name.startswith(_TRACED_FROM)), len(inward)
    )
    own = [f for f in reversed(inward[:depth]) if not f.file_name.startswith(_INNER)]
    return [Frame(f.file_name, f.line_num, f.function_name) for f in own]


def _extended(outer: list[Frame], inner: list[Frame], cached: bool) -> list[Frame]:
    """The frames of an equation inside a call.

    JAX caches the body of a jitted library function together with the first caller's frames. Frames
    that do not extend the call's own are that caller's, and the line of the call is the answer; so
    it is where there is none of the user's inside.
    """
    if (
        outer
        and inner[: len(outer)] != outer
        and (cached or all(is_library(frame.file) for frame in inner))
    ):
        return outer
    return inner or outer
