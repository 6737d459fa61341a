"""Docstrings as Markdown: a block of code is opened by one colon, and an example is shown as
code."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe


class Markdown(griffe.Extension):
    """Changes what is shown, and nothing else."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **_: Any) -> None:
        """Rewrite every docstring when it has been read."""
        if isinstance(obj, griffe.Object) and obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Show how a record is made: tags and named tuples, whose constructors nobody wrote."""
        made_by = [str(decorator.value) for decorator in cls.decorators] + [
            str(base) for base in cls.bases
        ]
        if {"_tag", "NamedTuple"} & set(made_by):
            cls.set_member("__init__", constructor(cls))


def shown(text: str) -> str:
    """``It equals::`` is reStructuredText, and ``Example:`` or a bare ``>>>`` is griffe's section
    of examples."""
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    bare = re.search(r"^>>> ", text, flags=re.MULTILINE)
    if bare is None:
        return text
    return f"{text[: bare.start()]}Examples:\n{textwrap.indent(text[bare.start() :], '    ')}"


def constructor(cls: griffe.Class) -> griffe.Function:
    """A function of the fields, in their order."""
    kind = griffe.ParameterKind.positional_or_keyword
    fields = [
        griffe.Parameter(name, kind=kind, default=x.value)
        for name, x in cls.attributes.items()
        if x.annotation
    ]
    return griffe.Function(
        "__init__", parameters=griffe.Parameters(griffe.Parameter("self", kind=kind), *fields)
    )
