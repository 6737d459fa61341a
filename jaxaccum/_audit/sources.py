"""The user's line behind an equation, through cached calls into libraries."""

from __future__ import annotations

import dataclasses
import functools
import os
import sysconfig

import jax.extend.core as jex

from jaxaccum._base.source_lines import _INNER, Frame

_FOLDERS = sysconfig.get_paths()
_LIBRARIES = tuple(
    _FOLDERS[name] + os.sep
    for name in ("purelib", "platlib", "stdlib", "platstdlib")
    if _FOLDERS[name]
)
"""Where Python keeps its own modules and those that are installed."""

_HERE = os.path.dirname(__file__) + os.sep
_TRACED_FROM = (
    _HERE,
    os.path.join(os.path.dirname(os.path.dirname(__file__)), "_program", "flat_function.py"),
)
"""The files that trace a loss: the frames that they call are the loss."""


def is_library(file: str) -> bool:
    """Whether a file is installed code, JAX or this package, and so not the user's own."""
    installed = file.startswith(_LIBRARIES) or f"{os.sep}site-packages{os.sep}" in file
    return installed or file.startswith(("<frozen", *_INNER))


@dataclasses.dataclass(frozen=True)
class Enclosing:
    """An equation whose body holds another one: a call, a loop, a branch."""

    eqn: jex.JaxprEqn
    cached_library_body: bool
    """Whether JAX may have traced the body earlier, for another caller of a library function."""


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """An equation and the calls around it, the outermost first. It holds them, so that identities
    stay unique."""

    eqn: jex.JaxprEqn
    calls: tuple[Enclosing, ...] = ()
    defined: Frame | None = None
    """Where the function is defined that computes the equation's derivative."""

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
        innermost = own or stack
        return innermost[-1] if innermost else None

    @property
    def primitive(self) -> str:
        """What the equation does."""
        return self.eqn.primitive.name

    @property
    def is_transposed(self) -> bool:
        """Whether it belongs to a backward pass inside the user's function."""
        eqns = [self.eqn, *[call.eqn for call in self.calls]]
        return any("transpose(" in str(eqn.source_info.name_stack) for eqn in eqns)

    def __str__(self) -> str:
        return str(self.frame) if self.frame is not None else "an unknown line"


def line_of(site: Site | None) -> Frame | None:
    """The line of a site, where there is one."""
    return site.frame if site is not None else None


def _stack(eqn: jex.JaxprEqn) -> list[Frame]:
    """The frames below those that trace the loss, outside of JAX and this package, the outermost
    first."""
    traceback = eqn.source_info.traceback
    stack: list[Frame] = []
    for frame in traceback.frames if traceback is not None else ():  # the innermost first
        if frame.file_name.startswith(_TRACED_FROM):
            break
        if not frame.file_name.startswith(_INNER):
            stack.append(Frame(frame.file_name, frame.line_num, frame.function_name))
    return stack[::-1]


def _extended(outer: list[Frame], inner: list[Frame], cached: bool) -> list[Frame]:
    """The frames of an equation inside a call.

    JAX caches the body of a jitted library function together with the first caller's frames. Frames
    that do not extend the call's own are that caller's, and the line of the call is the answer. So
    it is if no frame inside is the user's.
    """
    if not outer or inner[: len(outer)] == outer:
        return inner or outer
    of_another_caller = cached or all(is_library(frame.file) for frame in inner)
    return outer if of_another_caller else inner
