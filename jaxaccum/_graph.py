"""nnx models as arrays: arguments that hold modules, split into what is differentiated and what is threaded.

A loss ``fun(model, batch)`` that reads and writes its model becomes a pure function of the parameters, the batch and
the rest of the state, which returns the new state. Everything that is no parameter to differentiate (batch statistics,
counters, keys of random streams, frozen parameters) is state. Modules that several arguments share stay shared, since
all arguments are split at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx import filterlib

from jaxaccum._tags import Carry
from jaxaccum._tree import leaf_name
from jaxaccum._types import Array, Fun, PyTree, WithStreams


def holds_modules(x: PyTree) -> bool:
    """Whether any part of `x` is a module or a variable of nnx."""
    is_node = lambda leaf: isinstance(leaf, nnx.Pytree | nnx.Variable)
    return any(is_node(leaf) for leaf in jax.tree.leaves(x, is_leaf=is_node))


@dataclasses.dataclass(frozen=True)
class Models:
    """The arguments of one call that hold modules, taken apart."""

    places: tuple[int, ...]
    """Which arguments these are."""
    modules: tuple[Any, ...]
    split: Callable[[Any], tuple[Any, list[Any], Any]]
    """Of modules: their structure, the parameters to differentiate in each, and the rest of their state."""
    graphdef: Any
    params: list[Any]
    rest: Any

    @classmethod
    def among(cls, args: tuple[Any, ...], filters: Mapping[int, Any]) -> Models:
        """The models among `args`; `filters` says for each differentiated argument which of its variables."""
        places = tuple(i for i, arg in enumerate(args) if holds_modules(arg))
        modules = tuple(args[i] for i in places)
        split = functools.partial(_split, [_within(k, filters.get(i, False)) for k, i in enumerate(places)])
        return cls(places, modules, split, *split(modules))

    def arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `pure` is called with: parameters in place of modules, and the state, a list of arrays, last."""
        return (*self._placed(args, self.params), jax.tree.leaves(self.rest))

    def pure(self, fun: Fun, *, has_aux: bool) -> Fun:
        """`fun` as a function of arrays that returns ``(loss, (aux, Carry(new state)))``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            *given, state = args
            params, rest = [given[i] for i in self.places], self._state(state)
            before = jax.tree.leaves(params)  # now: the modules take over their variables
            states = [nnx.State({k: own}) for k, own in enumerate(params) if jax.tree.leaves(own)]
            modules = nnx.merge(self.graphdef, *states, rest)
            output = fun(*self._placed(tuple(given), modules), **kwargs)
            graphdef, new_params, new_rest = self.split(modules)
            _check_structure(self.graphdef, graphdef, (params, rest), (new_params, new_rest))
            _check_unassigned(before, new_params)
            new = jax.tree.leaves(new_rest)
            if has_aux and not (isinstance(output, tuple) and len(output) == 2):
                return output  # which value_and_grad refuses, and says why
            loss, aux = output if has_aux else (output, None)
            return loss, (aux, Carry(new) if new else None)

        return WithStreams(call)

    def update(self, state: list[Array]) -> None:
        """Put a new state into the modules."""
        nnx.update(self.modules, self._state(state))

    def _placed(self, args: tuple[Any, ...], values: Sequence[Any]) -> tuple[Any, ...]:
        by_place = dict(zip(self.places, values, strict=True))
        return tuple(by_place.get(i, arg) for i, arg in enumerate(args))

    def _state(self, arrays: list[Array]) -> Any:
        """The state that holds `arrays`."""
        return jax.tree.unflatten(jax.tree.structure(self.rest), arrays)


def _split(filters: list[Any], modules: tuple[Any, ...]) -> tuple[Any, list[Any], Any]:
    graphdef, *states, rest = nnx.split(modules, *filters, ...)
    return graphdef, [state[k] if k in state else nnx.State({}) for k, state in enumerate(states)], rest


def _within(place: int, filter: Any) -> Any:
    """The filter of one argument, for variables of all arguments."""
    accepts = filterlib.to_predicate(filter)
    return lambda path, variable: path[0] == place and accepts(path[1:], variable)


def _paths(tree: PyTree) -> set[str]:
    return {leaf_name("", path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _check_structure(old: Any, new: Any, old_states: Any, new_states: Any) -> None:
    if old == new:
        return
    before, after = _paths(old_states), _paths(new_states)
    changed = [f"adds {sorted(after - before)}"] if after - before else []
    changed += [f"removes {sorted(before - after)}"] if before - after else []
    raise ValueError(
        f"fun {' and '.join(changed) or 'changes an attribute that is no variable'} in its model, and a state that "
        "runs through the microbatches keeps its structure; create every variable before the call, keep what changes "
        "in an nnx.Variable, and return intermediate values as aux (Concat for one row an example)."
    )


def _check_unassigned(old: Sequence[Any], new: PyTree) -> None:
    for before, (path, after) in zip(old, jax.tree_util.tree_leaves_with_path(new), strict=True):
        if before is not after:
            raise ValueError(
                f"fun assigns to the parameter {leaf_name('', path[1:-1])}, which is differentiated; every microbatch "
                "sees the parameters as they were. Assign outside the loss, or keep the value in a variable that is "
                "no nnx.Param."
            )
