"""Docstrings as Markdown: a block of code is opened by one colon, and an example is shown as code."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


class Markdown(griffe.Extension):
    """Rewrites every docstring when it has been read."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        """Change the text that is shown, and nothing else."""
        if isinstance(obj, griffe.Object) and obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)


def shown(text: str) -> str:
    """``It equals::`` is reStructuredText; ``Example:`` and a bare ``>>>`` are the section that griffe shows as code."""
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    bare = re.search(r"^>>> ", text, flags=re.MULTILINE)
    if bare is None:
        return text
    return f"{text[: bare.start()]}Examples:\n{textwrap.indent(text[bare.start() :], '    ')}"
