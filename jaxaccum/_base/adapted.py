"""What an adapter, such as that of nnx models, tells the core of a function that it made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxaccum._base.types import Fun, PyTree


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A function, and what its caller has to know; the defaults hold for one that a user wrote."""

    fun: Fun
    returns_state: bool = False
    """It returns what it assigns to its arguments, so that no assignment is lost."""
    draws_from_state: bool = False
    """Keys in its state are random streams: each microbatch of a coupled loss has its own."""
    draws_declared: bool = True
    """The caller has said that what is drawn from its state may depend on the partition."""

    aux_names: tuple[str, ...] = ()
    """What errors call the parts of its aux, where these are not the user's alone."""

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        return self.fun(*args, **kwargs)


def adapted(fun: Fun) -> Adapted:
    """What is known of a function."""
    return fun if isinstance(fun, Adapted) else Adapted(fun)


def changed(fun: Fun, change: Callable[[Fun], Fun]) -> Fun:
    """The function with a change, of which the same is known as before."""
    if not isinstance(fun, Adapted):
        return change(fun)
    return dataclasses.replace(fun, fun=change(fun.fun))
