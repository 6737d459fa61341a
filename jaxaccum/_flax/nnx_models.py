"""A loss of nnx models as a pure function of arrays: parameters, random streams and other state.

``fun(model, batch)`` reads and writes its model. Here it becomes a function of the parameters, the
batch, the streams and the state, which returns the new streams and the new state. Everything that
is not differentiated (batch statistics, counters, keys, frozen parameters) is state. Modules that
several arguments share stay shared, since all arguments are split at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import filterlib
from flax.typing import PathParts
from jax.tree_util import KeyPath

from jaxaccum._base.adapted import Adapted
from jaxaccum._base.entries import with_entries
from jaxaccum._base.trees import leaf_name
from jaxaccum._base.types import BATCH_KEY, CARRY, Array, Fun, PyTree
from jaxaccum._flax import nnx_streams
from jaxaccum._flax.nnx_streams import Streams
from jaxaccum._program import assignments, validate
from jaxaccum._program.tags import Carry, Max, Unvaried

IN_AXES = (BATCH_KEY, None, CARRY)
"""The last arguments of `Models.pure`: the keys of example streams; their counts; the state."""


Assigned = dict[int, PyTree]
"""The parameters that a function assigns to, by their places among all of them."""


class _Parts(NamedTuple):
    """Some modules, taken apart."""

    graphdef: Any
    """Their structure."""
    params: list[PyTree]
    """For each argument, the variables that are differentiated."""
    streams: PyTree
    """The example streams."""
    rest: PyTree
    """The rest of their state."""


class _Argument(NamedTuple):
    """One argument that holds modules."""

    place: int
    value: PyTree
    accepts: filterlib.Predicate
    """Which of its variables are differentiated."""


def holds_modules(x: PyTree) -> bool:
    """Whether any part of `x` is a module or a variable of nnx."""
    return any(map(_is_node, jax.tree.leaves(x, is_leaf=_is_node)))


def _is_node(x: object) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


@dataclasses.dataclass(frozen=True)
class Models:
    """The arguments of one call that hold modules, taken apart."""

    places: tuple[int, ...]
    """Which arguments these are."""
    modules: tuple[PyTree, ...]
    split: Callable[[tuple[PyTree, ...]], _Parts]
    """Takes modules of the same structure apart."""
    parts: _Parts
    """The modules as they are before the call."""

    @property
    def streams(self) -> Streams:
        """The random streams from which each example draws its own numbers."""
        return Streams(self.parts.streams)

    @classmethod
    def among(
        cls,
        args: tuple[PyTree, ...],
        filters: Mapping[int, filterlib.Filter],
        example_streams: filterlib.Filter = False,
    ) -> Models:
        """The models among `args`; `filters` has one filter for each differentiated argument.

        As in nnx, a filter selects among the variables of modules; whatever is outside of modules
        is differentiated. `example_streams` selects the streams from which each example
        draws its own numbers.
        """
        held = [_argument(i, x, filters) for i, x in enumerate(args) if holds_modules(x)]
        modules = tuple(argument.value for argument in held)
        params = [_within(k, argument.accepts) for k, argument in enumerate(held)]
        split = functools.partial(_split, params, nnx_streams.selector(modules, example_streams))
        for argument in held:
            if argument.place in filters:
                _check_selected(argument, filters[argument.place])
        places = tuple(argument.place for argument in held)
        return cls(places, modules, split, split(modules))

    def gradient(self, i: int, grads: PyTree) -> PyTree:
        """The gradient of argument `i` as nnx returns it: a state in the place of each module."""
        if i not in self.places:
            return grads
        arg = self.modules[self.places.index(i)]
        own = lambda path, _: _at(grads, path)
        return jax.tree_util.tree_map_with_path(own, arg, is_leaf=_is_node)

    def arguments(self, args: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        """The arguments of `pure`: parameters in place of modules, then those of `IN_AXES`."""
        states = self.streams.keys(), self.streams.counts(), jax.tree.leaves(self.parts.rest)
        return (*self._placed(args, self.parts.params), *states)

    def pure(self, fun: Fun, *, has_aux: bool, draws_declared: bool = True) -> Fun:
        """`fun` as a function of arrays: ``(loss, (aux, Carry(new state), Max(new streams), new
        parameters))``.

        Every microbatch starts from the same streams and returns the same new ones. `Max` takes
        these, and is 0 where no microbatch ran. With `draws_declared` the caller has said that
        other draws may depend on the partition.
        """

        @functools.wraps(fun)
        def call(*args: PyTree, **kwargs: PyTree) -> PyTree:
            output, new, assigned = self._run(fun, args, kwargs)
            if has_aux and not (isinstance(output, tuple) and len(output) == 2):
                return output  # which value_and_grad refuses, and says why
            loss, aux = output if has_aux else (output, None)
            ran, rest = jnp.uint32(1), jax.tree.leaves(new.rest)
            *_, keys, counts, _ = args
            streams = self.streams.after(new.streams, keys, counts)
            advanced = Max((streams, ran)) if self.streams else None
            return loss, (aux, Carry(rest) if rest else None, advanced, assigned)

        names = "aux", "the model's state", "the model's streams", "the model's parameters"
        return Adapted(
            call, returns_state=True, draws_from_state=True, draws_declared=draws_declared,
            aux_names=names,
        )  # fmt: skip

    def _run(
        self, fun: Fun, args: tuple[PyTree, ...], kwargs: Mapping[str, PyTree]
    ) -> tuple[PyTree, _Parts, Assigned]:
        """What `fun` returns, what its models hold afterwards, and the parameters that it assigned
        to; `args` are those of `pure`."""
        *given, keys, counts, state = args
        params = [given[i] for i in self.places]
        before, treedef = jax.tree.flatten(params)  # now: the modules take over their variables

        def run(*arrays: Array) -> tuple[PyTree, _Parts]:
            own = self.streams.within(keys, counts)
            rest = self._state(state)
            modules = self._merged(jax.tree.unflatten(treedef, arrays), own, rest)
            output = fun(*self._placed(given, modules), **kwargs)
            new = self.split(modules)
            _check_structure(_Parts(self.parts.graphdef, params, own, self._state(state)), new)
            return output, new

        output, new = run(*before)
        if assignments.same_objects(before, jax.tree.leaves(new.params)):
            return output, new, {}
        kept = assignments.unchanged(lambda *x: jax.tree.leaves(run(*x)[1].params), before)
        return output, new, _assigned(kept, new.params)

    def _merged(self, params: list[PyTree], streams: PyTree, rest: PyTree) -> tuple[PyTree, ...]:
        """The models that hold these parameters, these streams and this state."""
        return nnx.merge(self.parts.graphdef, *_states(params), streams, rest)

    def update(
        self,
        state: list[Array] | None,
        streams: tuple[list[Array], Array] | None,
        assigned: Mapping[int, Array],
    ) -> None:
        """Put a new state into the modules, new streams, and parameters that were assigned to."""
        if assigned:
            own, treedef = jax.tree.flatten(self.parts.params)
            own = with_entries(own, assigned, assigned.values())
            nnx.update(self.modules, *_states(jax.tree.unflatten(treedef, own)))
        if state:
            nnx.update(self.modules, self._state(state))
        if streams:
            nnx.update(self.modules, self.streams.updated(*streams))

    def _placed(self, args: Sequence[PyTree], values: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """The arguments with `values` in place of the models."""
        placed = list(args)
        for i, value in zip(self.places, values, strict=True):
            placed[i] = value
        return tuple(placed)

    def _state(self, arrays: list[Array]) -> PyTree:
        """The state that holds `arrays`."""
        return jax.tree.unflatten(jax.tree.structure(self.parts.rest), arrays)


def _argument(place: int, value: PyTree, filters: Mapping[int, filterlib.Filter]) -> _Argument:
    if place not in filters:
        return _Argument(place, value, filterlib.Nothing())
    value = _with_arrays(value, f"argument {place}")
    return _Argument(place, value, _selector(value, filters[place]))


def _split(
    params: Sequence[filterlib.Predicate],
    streams: filterlib.Predicate,
    modules: tuple[PyTree, ...],
) -> _Parts:
    graphdef, *states, own, rest = nnx.split(modules, *params, streams, ...)
    selected = [state[k] if k in state else nnx.State({}) for k, state in enumerate(states)]
    return _Parts(graphdef, selected, own, rest)


def _within(place: int, accepts: filterlib.Predicate) -> filterlib.Predicate:
    """`accepts` for one argument's variables, as a predicate on those of all arguments."""
    return lambda path, variable: path[0] == place and accepts(path[1:], variable)


def _selector(arg: PyTree, filter: filterlib.Filter) -> filterlib.Predicate:
    """Whether a variable of the argument is differentiated."""
    accepts = filterlib.to_predicate(filter)
    leaves = jax.tree_util.tree_leaves_with_path(arg, is_leaf=_is_node)
    outside = {_keys(path) for path, x in leaves if not isinstance(x, nnx.Pytree)}
    return lambda path, variable: path in outside or accepts(path, variable)


def _with_arrays(arg: PyTree, name: str) -> PyTree:
    """The argument with an array for each number outside of its modules, to be differentiated."""

    def array(path: KeyPath, x: PyTree) -> PyTree:
        if _is_node(x):
            return x
        validate.differentiable(x, leaf_name(name, path))
        return jnp.asarray(x)

    return jax.tree_util.tree_map_with_path(array, arg, is_leaf=_is_node)


def _keys(path: KeyPath) -> PathParts:
    """A path of JAX as nnx writes it."""
    return tuple(map(_key, path))


def _key(entry: Any) -> Any:
    """The index, key or attribute that one entry of a path of JAX names."""
    for name in ("idx", "key", "name"):
        if hasattr(entry, name):
            return getattr(entry, name)
    raise AssertionError(f"a path of JAX holds {entry!r}")


def _at(state: PyTree, path: KeyPath) -> PyTree:
    """What is at the path; an empty state for a module that an earlier argument holds too."""
    for key in _keys(path):
        if key not in state:
            return nnx.State({})
        state = state[key]
    return state


def _check_selected(argument: _Argument, filter: filterlib.Filter) -> None:
    i, arg, accepts = argument
    if not jax.tree.leaves(nnx.split((arg,), _within(0, accepts), ...)[1]):
        raise ValueError(
            f"argument {i} is to be differentiated, and the filter "
            f"{getattr(filter, '__name__', filter)} selects none of its variables. Name others, as "
            f"in argnums=nnx.DiffState({i}, nnx.Variable), or leave it out of argnums."
        )


def _paths(tree: PyTree) -> set[str]:
    return {leaf_name("", path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def _check_structure(old: _Parts, new: _Parts) -> None:
    if old.graphdef == new.graphdef:
        return
    before, after = _paths(old[1:]), _paths(new[1:])
    changed = [f"adds {sorted(after - before)}"] if after - before else []
    changed += [f"removes {sorted(before - after)}"] if before - after else []
    raise ValueError(
        f"fun {' and '.join(changed) or 'changes an attribute that is not a variable'} in its "
        "model, and a state that runs through the microbatches keeps its structure; create every "
        "variable before the call, keep what changes in an nnx.Variable, and return intermediate "
        "values as aux (Concat for one row per example)."
    )


def _states(params: Sequence[PyTree]) -> list[nnx.State]:
    """The parameters of each argument, by their paths among all arguments."""
    return [nnx.State({k: own}) for k, own in enumerate(params) if jax.tree.leaves(own)]


def _assigned(kept: Sequence[bool], new: PyTree) -> Assigned:
    """The new parameters that are not the old ones, by their places among all of them."""
    assigned: Assigned = {}
    leaves = jax.tree_util.tree_leaves_with_path(new)
    for i, (same, (path, x)) in enumerate(zip(kept, leaves, strict=True)):
        if not same:
            assigned[i] = Unvaried(
                x,
                f"fun assigns a value to the parameter {leaf_name('', path[1:-1])}, which is "
                "differentiated, and each microbatch would assign another: the value depends on "
                "the batch, on a draw, or on a state that every microbatch changes (with "
                "example_streams=False or a filter, each state that changes is one). Assign it "
                "outside of the loss, or keep the value in a variable that is not an nnx.Param.",
            )
    return assigned
