"""Keys that hold one key per example: a draw for a whole microbatch gives each example its numbers.

A layer draws one mask for all rows of its input, from one key. Here that key belongs to a generator
of this module. It holds the key of a stream and one key for each example, and what acts on a key
(``split``, ``fold_in``) acts on each of them. A draw is divided by its shape. The axis that grows
with the microbatch is the examples', and each example's numbers come from its own key. A draw
without such an axis is shared by the batch, and comes from the key of the stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._base.source_lines import frame_of
from jaxaccum._base.types import Array
from jaxaccum._jaxpr import compat

Shape = tuple[int, ...]
_TAG = "examples"


def example_keys(key: Array, examples: Array, batch_size: int | None = None) -> Array:
    """The keys of some examples: their rows of ``jax.random.split(key, batch_size)``.

    By default these examples are the whole batch.
    """
    if compat.splits_by_index() and jax.random.key_impl(key) in ("threefry2x32", "rbg"):
        # The same keys, without those of the other examples.
        return jax.vmap(jax.random.fold_in, (None, 0))(key, examples)
    count = len(examples) if batch_size is None else batch_size
    # A clone, since every microbatch splits the key anew.
    return jax.random.split(jax.random.clone(key), count)[examples]


# -- keys that hold those of the examples ----------


@functools.partial(jax.jit, static_argnums=2)  # a call, which the audit knows by its name
def joined(stream: Array, examples: Array, larger: frozenset[Shape]) -> Array:
    """A key that holds the stream's own key and those of the examples, the last axis of `examples`.

    `larger` holds the shapes of all draws of twice as many examples: they tell which axis grows.
    """
    data = jax.random.key_data(stream)[..., None, :], jax.random.key_data(examples)
    generator = _generator(jax.random.key_impl(stream), examples.shape[-1], larger)
    return jax.random.wrap_key_data(jnp.concatenate(data, axis=-2), impl=generator)


def is_joined(dtype: Any) -> bool:
    """Whether keys of the dtype were made by `joined`."""
    return getattr(dtype, "name", None) == f"key<{_TAG}>"


@jax.jit  # a call, which the audit knows by its name
def stream_data(key: Array) -> Array:
    """The integers of the stream's own key."""
    return jax.random.key_data(key)[..., 0, :]


@functools.cache
def _generator(base: Hashable, size: int, larger: frozenset[Shape]) -> Any:
    """The generator of keys that hold `size` + 1 keys of the generator `base`, the stream's first.

    Equal arguments give one generator, so that its keys have one type and nothing is traced again.
    """
    typed: Callable[[Array], Array] = functools.partial(jax.random.wrap_key_data, impl=base)
    each = _each(base)

    def seed(seed: Array) -> Array:
        raise TypeError(
            "a key of example_streams is made from a stream; make others by jax.random.key(seed)."
        )

    def split(data: Array, shape: Shape) -> Array:
        own = lambda key: jax.random.key_data(jax.random.split(typed(key), shape))
        return jnp.moveaxis(each(own)(data), 0, -2)

    def fold_in(data: Array, message: Any) -> Array:
        own = lambda key: jax.random.key_data(jax.random.fold_in(typed(key), message))
        return each(own)(data)

    def random_bits(data: Array, width: int, shape: Shape) -> Array:
        axis, dtype = _axis(tuple(shape), size, larger), jnp.dtype(f"uint{width}")
        if axis is None:
            return jax.random.bits(typed(data[0]), shape, dtype)
        own = lambda key: jax.random.bits(typed(key), (*shape[:axis], *shape[axis + 1 :]), dtype)
        return jnp.moveaxis(each(own)(data[1:]), 0, axis)

    single = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=base)))
    return compat.key_implementation(
        key_shape=(size + 1, *single.shape), seed=seed, split=split, random_bits=random_bits,
        fold_in=fold_in, name=_TAG, tag=_TAG,
    )  # fmt: skip


def _each(base: Hashable) -> Callable[[Callable[[Array], Array]], Callable[[Array], Array]]:
    """A function applied to each of some keys.

    Under `jax.vmap` JAX's default generator alone keeps keys apart; others draw from the first one.
    """
    if base == "threefry2x32":
        return jax.vmap
    return lambda fn: lambda keys: jax.lax.map(fn, keys)


# -- which axis of a draw holds the examples ----------


class Draw(NamedTuple):
    """One draw of a program from a key that holds those of the examples."""

    keys: Shape
    """The shape of the array of keys that are drawn from."""
    shape: Shape
    """The shape of what each of them draws."""
    eqn: jex.JaxprEqn


def draws(jaxpr: jex.Jaxpr) -> Iterator[Draw]:
    """The draws of a program, at any depth, in their order."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("random_bits", "random_gamma"):
            keys, drawn = _type(eqn.invars[0]), _type(eqn.outvars[0])
            if is_joined(keys.dtype):
                yield Draw(keys.shape, drawn.shape[len(keys.shape) :], eqn)
        for sub in jex.jaxprs_in_params(eqn.params):
            yield from draws(sub)


def _type(variable: Any) -> Any:
    return variable.aval


def check(found: Sequence[Draw], larger: Sequence[Draw], size: int) -> None:
    """Every draw of a microbatch of `size` examples is shared, or one axis of it is the examples'.

    `larger` are the same draws of a microbatch of twice as many.
    """
    if len(found) != len(larger):
        raise ValueError(
            f"example_streams: fun draws {len(found)} times for {size} examples and {len(larger)} "
            f"times for {2 * size}; draw as often for every size, all rows at once."
        )
    shapes = frozenset(draw.shape for draw in larger)
    for one, two in zip(found, larger, strict=True):
        _check_draw(one, two, size, shapes)


def _check_draw(one: Draw, two: Draw, size: int, larger: frozenset[Shape]) -> None:
    where = f"example_streams: the draw at {frame_of(one.eqn)}"
    sizes = f"for {size} examples and {list(two.shape)} for {2 * size}"
    if one.keys != two.keys:
        raise ValueError(
            f"{where} is from an array of keys, {list(one.keys)} for {size} examples and "
            f"{list(two.keys)} for {2 * size}: fun makes a key for each example itself. A key of "
            "the stream holds one for each example already: draw all their rows from it at once."
        )
    if one.eqn.primitive.name == "random_gamma" and one.shape != two.shape:
        raise ValueError(
            f"{where} is of a gamma distribution (gamma, beta, dirichlet, t, …). JAX draws each of "
            "its numbers from another key, and no example's from its own. Pass a key to fun as "
            "jaxaccum.EXAMPLE_KEY, and draw from it under jax.vmap."
        )
    axis = _axis(one.shape, size, larger)
    if two.shape == (one.shape if axis is None else _grown(one.shape, axis)):
        return
    if one.shape == two.shape:
        raise ValueError(
            f"{where} has shape {list(one.shape)} {sizes}: all examples share it. Another draw of "
            "this shape has one row per example, and the two cannot be told apart. Choose another "
            "microbatch size."
        )
    raise ValueError(
        f"{where} has shape {list(one.shape)} {sizes}: no axis of it is the examples' alone. Draw "
        "before that axis is merged with another one. Or leave this stream out, and its numbers "
        "depend on the partition: example_streams takes any filter of nnx, such as a stream's tag, "
        'example_streams="dropout".'
    )


def _axis(shape: Shape, size: int, larger: frozenset[Shape]) -> int | None:
    """The axis of a draw that holds the examples, if one does."""
    axes = (i for i, length in enumerate(shape) if length == size and _grown(shape, i) in larger)
    return next(axes, None)


def _grown(shape: Shape, axis: int) -> Shape:
    """The shape of a draw for twice as many examples."""
    return (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
