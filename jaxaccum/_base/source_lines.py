"""Where in the user's program an equation comes from."""

from __future__ import annotations

import dis
import inspect
import os
import sys
from types import TracebackType
from typing import NamedTuple

import jax
import jax.extend.core as jex

from jaxaccum._base.types import Fun

_HERE = os.path.dirname(os.path.dirname(__file__))  # the package, in whatever room its code is
_INNER = (os.path.dirname(jax.__file__) + os.sep, _HERE + os.sep)


class Frame(NamedTuple):
    """One line of a program."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


def frame_of(eqn: jex.JaxprEqn) -> Frame | None:
    """The innermost line outside of JAX and this package that caused `eqn`; None where JAX kept no
    trace of it."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not frame.file_name.startswith(_INNER):
            return Frame(frame.file_name, frame.line_num, frame.function_name)
    return None


def is_jax(file: str) -> bool:
    """Whether a file belongs to JAX itself, whose derivative rules are taken at their word."""
    return file.startswith(_INNER[0])


def is_of_package(file: str) -> bool:
    """Whether a file belongs to this package."""
    return file.startswith(_INNER[1])


def parameters_of(fun: Fun | None) -> list[inspect.Parameter]:
    """The parameters of a function; none where Python knows no signature."""
    if fun is None:
        return []
    try:
        return list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        return []


def callers_depth() -> int:
    """For ``warnings.warn``: how far above the function that asks the innermost line of the user's
    own is."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        depth, frame = depth + 1, frame.f_back
    return depth


def is_ours(error: BaseException) -> bool:
    """Whether this package raised an error, and not the function that it called."""
    last = _innermost(error)
    return last is not None and last.tb_frame.f_code.co_filename.startswith(_INNER[1])


def is_jaxs(error: BaseException) -> bool:
    """Whether JAX raised an error, and neither this package nor the user's function.

    JAX removes its own frames from tracebacks. What is left of an error of JAX's then ends in a
    call, and any other error in a ``raise``.
    """
    if (last := _innermost(error)) is None:
        return False
    code = last.tb_frame.f_code
    return code.co_filename.startswith(_INNER[0]) or code.co_code[last.tb_lasti] != _RAISE


_RAISE = dis.opmap["RAISE_VARARGS"]


def line_of_error(error: BaseException) -> Frame | None:
    """The innermost line outside of JAX and this package that an error passed through."""
    found, link = None, error.__traceback__
    while link is not None:
        code = link.tb_frame.f_code
        if not code.co_filename.startswith(_INNER):
            found = Frame(code.co_filename, link.tb_lineno, code.co_qualname)
        link = link.tb_next
    return found


def _innermost(error: BaseException) -> TracebackType | None:
    """Where an error was raised, as far as its traceback says."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last
