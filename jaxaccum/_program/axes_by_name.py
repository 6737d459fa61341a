"""Which entry of ``in_axes`` each argument has: by its place in a tuple, by its name in a dict."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping

from jaxaccum._base.source_lines import parameters_of
from jaxaccum._base.types import Axes, Fun, InAxes, PyTree


@dataclasses.dataclass(frozen=True)
class ArgumentAxes:
    """The entry of every argument of one call."""

    positional: tuple[Axes, ...]
    keywords: dict[str, Axes]

    def of(self, argument: int | str) -> Axes:
        """The entry of an argument, by its position or its keyword."""
        return self.keywords[argument] if isinstance(argument, str) else self.positional[argument]


def by_name(
    in_axes: Mapping[str, Axes], count: int, keywords: Collection[str], fun: Fun | None
) -> ArgumentAxes:
    """The entries that a dict gives to `count` positional arguments and to `keywords`.

    An argument that it does not name has the entry None.

    The names of positional arguments are those of the parameters of `fun`. The entry of ``*rest``,
    named ``"rest"``, is that of each argument in it.
    """
    parameters = parameters_of(fun)
    named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    known = list(dict.fromkeys([*named, *keywords]))
    if unknown := [name for name in in_axes if name not in known]:
        raise ValueError(
            f"in_axes names {', '.join(map(repr, unknown))}, and no {_argument_of(fun)} has that "
            f"name; the names are {', '.join(known) or 'none'}. A tuple in_axes gives the entries "
            "of positional arguments by their order instead."
        )
    entry = lambda name: None if name is None else in_axes.get(name)
    positional = tuple(map(entry, _positional_names(parameters, count)))
    return ArgumentAxes(positional, {name: entry(name) for name in keywords})


def check_keywords(
    kwargs: Mapping[str, PyTree], in_axes: InAxes, tool: str, fun: Fun | None = None
) -> None:
    """Keywords among the options of a tool are arguments of `fun`, and not misspelled options."""
    named = list(in_axes) if isinstance(in_axes, Mapping) else []
    known = [*named, *(p.name for p in parameters_of(fun))]
    for name in kwargs:
        if name not in known:
            raise TypeError(
                f"jaxaccum.{tool} has no option {name!r}. If it is an argument of the function, "
                f'name it in in_axes: {{"{name}": 0}}, or {{"{name}": None}} for one that every '
                "microbatch sees whole."
            )


def by_position(
    fun: Fun, args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree], axes: ArgumentAxes
) -> tuple[Fun, tuple[PyTree, ...], tuple[Axes, ...]]:
    """The same call by positions alone: the function, its arguments, keywords last, their axes."""
    if not kwargs:
        return fun, args, axes.positional
    names, count = tuple(kwargs), len(args)

    def positional(*given: PyTree) -> PyTree:
        return fun(*given[:count], **dict(zip(names, given[count:], strict=True)))

    entries = (*axes.positional, *map(axes.of, names))
    return positional, (*args, *kwargs.values()), entries


def _positional_names(parameters: list[inspect.Parameter], count: int) -> list[str | None]:
    """The names of the first `count` positional arguments; None where the signature has no name."""
    named, rest = [], None
    for p in parameters:
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
            named.append(p.name)
        elif p.kind is p.VAR_POSITIONAL:
            rest = p.name
    return [*named, *[rest] * count][:count]


def _argument_of(fun: Fun | None) -> str:
    """``argument of loss``; `partition` is given no function, and knows names of keywords alone."""
    return "keyword argument" if fun is None else f"argument of {getattr(fun, '__name__', 'fun')}"
