"""What a tool does while its user waits: told to a function, or shown on the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[str], object]
"""Takes one line of text, as ``print`` does."""


@contextlib.contextmanager
def during(message: str, progress: Progress | None) -> Iterator[None]:
    """Say what the block does, before it starts.

    None shows the message on stderr while the block runs, if that is a terminal: a log, a pipe or a
    notebook would keep it.
    """
    if progress is not None:
        if not callable(progress):
            raise TypeError(f"progress={progress!r}: pass a function of one text, such as print.")
        progress(message)
        yield
    elif sys.stderr is not None and sys.stderr.isatty():
        yield from _shown(message)
    else:
        yield


def _shown(message: str) -> Iterator[None]:
    print(f"\r{message}", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * len(message)}\r", end="", file=sys.stderr, flush=True)
