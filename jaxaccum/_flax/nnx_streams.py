"""Example streams: random streams of an nnx model from which each example draws its own numbers.

These are the numbers that it draws in the whole batch. Flax's ``split_rngs`` does something else:
it splits keys over an axis that a model is mapped over, and here no model is mapped.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import filterlib

from jaxaccum._base.trees import as_key, key_data, key_impl, leaf_name
from jaxaccum._base.types import Array, PyTree
from jaxaccum._program import batch_keys
from jaxaccum._program.batch_keys import UndividedError


@dataclasses.dataclass(frozen=True)
class Streams:
    """The keys and counts of streams, as the model holds them before the call.

    Every microbatch starts from these, and the model advances them once, as the full batch does.
    """

    state: PyTree

    def __bool__(self) -> bool:
        return bool(self._leaves)

    @property
    def _leaves(self) -> list[Array]:
        return jax.tree.leaves(self.state)

    def keys(self) -> list[Array]:
        """The keys, of which each microbatch draws its own rows."""
        return list(filter(_is_key, self._leaves))

    def counts(self) -> list[Array]:
        """How often each was drawn from."""
        return list(itertools.filterfalse(_is_key, self._leaves))

    def within(self, keys: Sequence[Array], counts: Sequence[Array]) -> PyTree:
        """The state in one microbatch: its keys, and the counts."""
        return self._state(self._arrays(keys, counts))

    def _arrays(self, keys: Sequence[Array], counts: Sequence[Array]) -> list[Array]:
        own, others = iter(keys), iter(counts)
        return [next(own if _is_key(x) else others) for x in self._leaves]

    def after(self, state: PyTree, keys: Sequence[Array], counts: Sequence[Array]) -> list[Array]:
        """The streams' own new arrays: of the state after a model has run with these `keys` and
        `counts` in one microbatch."""
        new, named = [], jax.tree_util.tree_leaves_with_path(state)
        for (path, x), old in zip(named, self._arrays(keys, counts), strict=True):
            _check_kept(leaf_name("", path[1:-1]), x, old)
            new.append(batch_keys.integers(x) if _is_key(old) else x)
        return new

    def updated(self, arrays: Sequence[Array], ran: Array) -> PyTree:
        """The state of these arrays; as it was where no microbatch ran, so that `ran` is 0."""

        def latest(new: Array, old: Array) -> Array:
            return as_key(jnp.where(ran > 0, new, key_data(old)), old)

        return self._state(list(map(latest, arrays, self._leaves)))

    def _state(self, leaves: Sequence[Array]) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(self.state), leaves)


def selector(modules: PyTree, filter: filterlib.Filter) -> filterlib.Predicate:
    """Which variables of the arguments belong to streams that the filter accepts.

    These are variables that hold keys, and the counts of draws next to them.
    """
    if filter is None or filter is False:
        return filterlib.Nothing()
    accepts = filterlib.to_predicate(filter)
    keys = [(path, x) for path, x in nnx.to_flat_state(nnx.state(modules)) if _holds_keys(x)]
    chosen = {path for path, x in keys if accepts(path[1:], x)}
    if keys and not chosen:
        tags = sorted({repr(getattr(x, "tag", None)) for _, x in keys})
        raise ValueError(
            f"example_streams={filter!r} selects none of the model's random streams. Their tags "
            f"are {', '.join(tags)}: pass one of these, True for all, or another filter of nnx."
        )
    streams = {path[:-1] for path in chosen}
    counts = lambda path, x: isinstance(x, nnx.RngCount) and path[:-1] in streams
    return lambda path, x: path in chosen or counts(path, x)


def _is_key(x: Array) -> bool:
    return key_impl(x) is not None


def _holds_keys(variable: PyTree) -> bool:
    return any(map(_is_key, jax.tree.leaves(variable)))


def _check_kept(name: str, new: Array, old: Array) -> None:
    if batch_keys.is_batch_key(old.dtype) and not batch_keys.is_batch_key(new.dtype):
        raise UndividedError(
            f"example_streams: fun puts another key into {name}, from which all microbatches would "
            "draw the same numbers. Put it there before the call, or make it from the key that is "
            "there, by jax.random.fold_in."
        )
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"fun changes {name} from {_type(old)} to {_type(new)}; leave the streams of the model "
            "with the shapes and dtypes that came in."
        )


def _type(x: Array) -> str:
    return f"{x.dtype}{list(x.shape)}"
