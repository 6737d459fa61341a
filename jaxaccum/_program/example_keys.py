"""Keys of examples: each example of a batch has one, whatever the partition."""

from __future__ import annotations

import jax

from jaxaccum._base.types import Array
from jaxaccum._jaxpr import compat


def example_keys(key: Array, examples: Array, batch_size: int | None = None) -> Array:
    """The keys of some examples: their rows of ``jax.random.split(key, batch_size)``.

    By default these examples are the whole batch.
    """
    if compat.draws_by_place() and jax.random.key_impl(key) in ("threefry2x32", "rbg"):
        # The same keys, without those of the other examples.
        return jax.vmap(jax.random.fold_in, (None, 0))(key, examples)
    count = len(examples) if batch_size is None else batch_size
    # A clone, since every microbatch splits the key anew.
    return jax.random.split(jax.random.clone(key), count)[examples]
