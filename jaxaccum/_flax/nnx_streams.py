"""Random streams of nnx models of which every example has its own: into the loop, and out of it.

They are called example streams after ``EXAMPLE_KEY``, whose keys they hold. Flax's ``split_rngs``
is another thing: it splits keys over an axis that a model is mapped over, and here none is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import filterlib

from jaxaccum._base.trees import key_impl, leaf_name
from jaxaccum._base.types import Array
from jaxaccum._program import example_keys
from jaxaccum._program.example_keys import Shape


@dataclasses.dataclass(frozen=True)
class Streams:
    """The keys and counts of streams, as the model holds them before the call.

    Every microbatch starts from these, and the model advances them once, as the full batch does.
    """

    state: Any

    def __bool__(self) -> bool:
        return bool(self._leaves)

    @property
    def _leaves(self) -> list[Array]:
        return jax.tree.leaves(self.state)

    def keys(self) -> list[Array]:
        """Every single key, to be split over the examples."""
        keys = [x.reshape(-1) for x in self._leaves if key_impl(x) is not None]
        return [key for own in keys for key in own]

    def arrays(self) -> list[Array]:
        """The keys, as the integers that they are made of, and the counts."""
        return [x if key_impl(x) is None else jax.random.key_data(x) for x in self._leaves]

    def joined(
        self, arrays: Sequence[Array], keys: Sequence[Array], larger: frozenset[Shape]
    ) -> Any:
        """The state in one microbatch, whose keys hold those of the examples.

        `keys` has an array for each single key, with one key per example.
        """
        rest, leaves = iter(keys), []
        for own in self._typed(arrays):
            if key_impl(own) is not None:
                examples = jnp.stack([next(rest) for _ in range(own.size)])
                own = example_keys.joined(own, examples.reshape(*own.shape, -1), larger)
            leaves.append(own)
        return self._state(leaves)

    def after(self, state: Any) -> list[Array]:
        """The streams' own new arrays, of the state after a model has run."""
        new, named = [], jax.tree_util.tree_leaves_with_path(state)
        for (path, x), old in zip(named, self._leaves, strict=True):
            _check_kept(leaf_name("", path[1:-1]), x, old)
            new.append(x if key_impl(old) is None else example_keys.stream_data(x))
        return new

    def updated(self, arrays: Sequence[Array], ran: Array) -> Any:
        """The state of these arrays; as it was where no microbatch ran, so that `ran` is 0."""
        pairs = zip(arrays, self.arrays(), strict=True)
        return self._state(self._typed([jnp.where(ran > 0, new, old) for new, old in pairs]))

    def _typed(self, arrays: Sequence[Array]) -> list[Array]:
        pairs = zip(arrays, map(key_impl, self._leaves), strict=True)
        return [x if impl is None else jax.random.wrap_key_data(x, impl=impl) for x, impl in pairs]

    def _state(self, leaves: Sequence[Array]) -> Any:
        return jax.tree.unflatten(jax.tree.structure(self.state), leaves)


def selector(modules: tuple[Any, ...], filter: filterlib.Filter) -> filterlib.Predicate:
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


def _holds_keys(variable: Any) -> bool:
    return any(key_impl(x) is not None for x in jax.tree.leaves(variable))


def _check_kept(name: str, new: Array, old: Array) -> None:
    is_key = key_impl(old) is not None
    if is_key and not example_keys.is_joined(new.dtype):
        raise ValueError(
            f"example_streams: fun puts another key into {name}, from which all microbatches would "
            "draw the same numbers. Put it there before the call, or make it from the key that is "
            "there, by jax.random.fold_in."
        )
    if new.shape != old.shape or (new.dtype != old.dtype and not is_key):
        before, after = (f"{x.dtype}{list(x.shape)}" for x in (old, new))
        raise ValueError(
            f"fun changes {name} from {before} to {after}; leave the streams of the model with the "
            "shapes and dtypes that came in."
        )
