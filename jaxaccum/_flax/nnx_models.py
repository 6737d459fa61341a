"""nnx models as arrays: arguments that hold modules, split into what is differentiated and what is
threaded.

A loss ``fun(model, batch)`` that reads and writes its model becomes a pure function of the
parameters, the batch and the rest of the state, which returns the new state. Everything that is no
parameter to differentiate (batch statistics, counters, keys of random streams, frozen parameters)
is state. Modules that several arguments share stay shared, since all arguments are split at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import filterlib

from jaxaccum._base.trees import leaf_name
from jaxaccum._base.types import CARRY, EXAMPLE_KEY, Array, Fun, PyTree, WithStreams
from jaxaccum._flax import nnx_streams
from jaxaccum._flax.nnx_streams import Streams
from jaxaccum._program import assignments, validate
from jaxaccum._program.example_keys import Shape
from jaxaccum._program.tags import Carry, Max

IN_AXES = (EXAMPLE_KEY, None, CARRY)
"""The last arguments of `Models.pure`: keys of streams, one per example; the streams; the state."""


def holds_modules(x: PyTree) -> bool:
    """Whether any part of `x` is a module or a variable of nnx."""
    return any(map(_is_node, jax.tree.leaves(x, is_leaf=_is_node)))


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


@dataclasses.dataclass(frozen=True)
class Models:
    """The arguments of one call that hold modules, taken apart."""

    places: tuple[int, ...]
    """Which arguments these are."""
    modules: tuple[Any, ...]
    split: Callable[[Any], tuple[Any, list[Any], Any, Any]]
    """Of modules: their structure, the parameters to differentiate in each, the streams, the
    rest."""
    graphdef: Any
    params: list[Any]
    streams: Streams
    """The random streams of which every example has its own."""
    rest: Any
    """The rest of their state."""

    @classmethod
    def among(
        cls, args: tuple[Any, ...], filters: Mapping[int, Any], example_streams: Any = False
    ) -> Models:
        """The models among `args`; `filters` says for each differentiated argument which of its
        variables.

        As in nnx, a filter selects among the variables of modules; whatever is outside of modules
        is differentiated. `example_streams` selects the streams of which every example has its own.
        """
        places, modules, selected = [], [], []
        for i, arg in enumerate(args):
            if holds_modules(arg):
                arg = _with_arrays(arg, f"argument {i}") if i in filters else arg
                places.append(i)
                modules.append(arg)
                selected.append(_selector(arg, filters[i]) if i in filters else _nothing)
        params = [_within(k, accepts) for k, accepts in enumerate(selected)]
        own = nnx_streams.selector(tuple(modules), example_streams)
        split = functools.partial(_split, params, own)
        for i, arg, accepts in zip(places, modules, selected, strict=True):
            if i in filters:
                _check_selected(i, arg, accepts, filters[i])
        graphdef, params, streams, rest = split(tuple(modules))
        return cls(tuple(places), tuple(modules), split, graphdef, params, Streams(streams), rest)

    def gradient(self, i: int, grads: Any) -> PyTree:
        """The gradient of argument `i` as nnx returns it: like the argument, with a state for each
        module."""
        if i not in self.places:
            return grads
        arg = self.modules[self.places.index(i)]
        own = lambda path, _: _at(grads, path)
        return jax.tree_util.tree_map_with_path(own, arg, is_leaf=_is_node)

    def arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What `pure` is called with: parameters in place of modules, then states, as `IN_AXES`
        says."""
        states = self.streams.keys(), self.streams.arrays(), jax.tree.leaves(self.rest)
        return (*self._placed(args, self.params), *states)

    def pure(self, fun: Fun, *, has_aux: bool) -> Fun:
        """`fun` as a function of arrays: ``(loss, (aux, Carry(new state), Max(new streams)))``.

        Every microbatch starts from the same streams and returns the same new ones. `Max` takes
        these, and is 0 where no microbatch ran.
        """

        def call(larger: frozenset[Shape], *args: Any, **kwargs: Any) -> Any:
            *given, keys, streams, state = args
            params = [given[i] for i in self.places]
            before, treedef = jax.tree.flatten(params)  # now: the modules take over their variables

            def run(*arrays: Any) -> tuple[Any, Any, Any, Any]:
                own = self.streams.joined(streams, keys, larger)
                modules = self._merged(jax.tree.unflatten(treedef, arrays), own, self._state(state))
                output = fun(*self._placed(tuple(given), modules), **kwargs)
                graphdef, new_params, new_streams, new_rest = self.split(modules)
                states = (params, own, self._state(state)), (new_params, new_streams, new_rest)
                _check_structure(self.graphdef, graphdef, *states)
                return output, new_params, new_streams, new_rest

            output, new_params, new_streams, new_rest = run(*before)
            if not assignments.same_objects(before, jax.tree.leaves(new_params)):
                kept = assignments.unchanged(lambda *x: jax.tree.leaves(run(*x)[1]), before)
                _check_unassigned(kept, new_params)
            new = jax.tree.leaves(new_rest)
            if has_aux and not (isinstance(output, tuple) and len(output) == 2):
                return output  # which value_and_grad refuses, and says why
            loss, aux = output if has_aux else (output, None)
            ran = jnp.uint32(1)
            advanced = Max((self.streams.after(new_streams), ran)) if self.streams else None
            return loss, (aux, Carry(new) if new else None, advanced)

        def drawing(larger: frozenset[Shape]) -> Fun:
            return functools.wraps(fun)(functools.partial(call, larger))

        return WithStreams(drawing(frozenset()), drawing if self.streams else None)

    def _merged(self, params: list[Any], streams: Any, rest: Any) -> Any:
        """The models that hold these parameters, these streams and this state."""
        states = [nnx.State({k: own}) for k, own in enumerate(params) if jax.tree.leaves(own)]
        return nnx.merge(self.graphdef, *states, streams, rest)

    def update(self, state: list[Array] | None, streams: tuple[list[Array], Array] | None) -> None:
        """Put a new state into the modules, and new streams."""
        if state:
            nnx.update(self.modules, self._state(state))
        if streams:
            nnx.update(self.modules, self.streams.updated(*streams))

    def _placed(self, args: tuple[Any, ...], values: Sequence[Any]) -> tuple[Any, ...]:
        by_place = dict(zip(self.places, values, strict=True))
        return tuple(by_place.get(i, arg) for i, arg in enumerate(args))

    def _state(self, arrays: list[Array]) -> Any:
        """The state that holds `arrays`."""
        return jax.tree.unflatten(jax.tree.structure(self.rest), arrays)


def _split(
    params: list[Any], streams: Any, modules: tuple[Any, ...]
) -> tuple[Any, list[Any], Any, Any]:
    graphdef, *states, own, rest = nnx.split(modules, *params, streams, ...)
    selected = [state[k] if k in state else nnx.State({}) for k, state in enumerate(states)]
    return graphdef, selected, own, rest


def _within(place: int, accepts: Any) -> Any:
    """The selection among variables of one argument, of the variables of all arguments."""
    return lambda path, variable: path[0] == place and accepts(path[1:], variable)


def _nothing(path: Any, variable: Any) -> bool:
    del path, variable
    return False


def _selector(arg: PyTree, filter: Any) -> Any:
    """Whether a variable of the argument is differentiated."""
    accepts = filterlib.to_predicate(filter)
    leaves = jax.tree_util.tree_leaves_with_path(arg, is_leaf=_is_node)
    outside = {_keys(path) for path, x in leaves if not isinstance(x, nnx.Pytree)}
    return lambda path, variable: path in outside or accepts(path, variable)


def _with_arrays(arg: PyTree, name: str) -> PyTree:
    """The argument with an array for every number outside of its modules, as derivatives ask
    for."""

    def array(path: Any, x: Any) -> Any:
        if _is_node(x):
            return x
        validate.differentiable(x, leaf_name(name, path))
        return jnp.asarray(x)

    return jax.tree_util.tree_map_with_path(array, arg, is_leaf=_is_node)


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A path of JAX as nnx writes it."""
    names = ("idx", "key", "name")
    return tuple(next(getattr(e, name) for name in names if hasattr(e, name)) for e in path)


def _at(state: Any, path: tuple[Any, ...]) -> Any:
    """What stands at the path; an empty state for a module that an earlier argument holds too."""
    for key in _keys(path):
        if key not in state:
            return nnx.State({})
        state = state[key]
    return state


def _check_selected(i: int, arg: PyTree, accepts: Any, filter: Any) -> None:
    if not jax.tree.leaves(nnx.split((arg,), _within(0, accepts), ...)[1]):
        raise ValueError(
            f"argument {i} is to be differentiated, and the filter "
            f"{getattr(filter, '__name__', filter)} selects none of its variables. Name others, as "
            f"in argnums=nnx.DiffState({i}, nnx.Variable), or leave it out of argnums."
        )


def _paths(tree: PyTree) -> set[str]:
    return {leaf_name("", path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _check_structure(old: Any, new: Any, old_states: Any, new_states: Any) -> None:
    if old == new:
        return
    before, after = _paths(old_states), _paths(new_states)
    changed = [f"adds {sorted(after - before)}"] if after - before else []
    changed += [f"removes {sorted(before - after)}"] if before - after else []
    raise ValueError(
        f"fun {' and '.join(changed) or 'changes an attribute that is no variable'} in its model, "
        "and a state that runs through the microbatches keeps its structure; create every variable "
        "before the call, keep what changes in an nnx.Variable, and return intermediate values as "
        "aux (Concat for one row per example)."
    )


def _check_unassigned(kept: Sequence[bool], new: PyTree) -> None:
    for same, (path, _) in zip(kept, jax.tree_util.tree_leaves_with_path(new), strict=True):
        if not same:
            raise ValueError(
                f"fun assigns to the parameter {leaf_name('', path[1:-1])}, which is "
                "differentiated; every microbatch sees the parameters as they were. Assign outside "
                "the loss, or keep the value in a variable that is no nnx.Param."
            )
