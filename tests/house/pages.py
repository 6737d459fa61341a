"""Code in Markdown pages: it runs as a reader runs it, and prints what the page says that it
prints."""

import contextlib
import io
import linecache
import re
from typing import Any, NamedTuple

import jax

_BLOCK = re.compile(r'```python\n(.*?)```(?:\s*```text title="output"\n(.*?)```)?', flags=re.DOTALL)


class Block(NamedTuple):
    """One block of Python, and the text that the page shows as its output; None where it shows
    none."""

    code: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """The blocks of Python of a page, in order."""
    found = _BLOCK.findall(page)
    stated = ['```text title="output"' in match[0] for match in _BLOCK.finditer(page)]
    return [
        Block(code, output if has else None)
        for (code, output), has in zip(found, stated, strict=True)
    ]


def title(block: Block) -> str:
    """Its first line, as the name of a test."""
    return block.code.strip().splitlines()[0][:60]


def run(block: Block, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a block among the `names` that blocks before it left, and compare what it prints.

    It runs under JAX's own numerics, and not under the strict ones of these tests.
    """
    names = {"__name__": "page"} if names is None else names
    linecache.cache["train.py"] = (
        len(block.code),
        None,
        block.code.splitlines(keepends=True),
        "train.py",
    )
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        exec(compile(block.code, "train.py", "exec"), names)
    if block.output is not None:
        assert printed.getvalue() == block.output
    return names
