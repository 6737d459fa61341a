"""Keys of the batch: a draw for a microbatch has the rows of the draw for the whole batch.

A layer draws one mask for all rows of its input, from one key. In a microbatch that key belongs to
a generator of this module: it holds the key as it came, and the index of the microbatch's first
example. What acts on a key (``split``, ``fold_in``) acts on the one that it holds. A draw is
divided by its shape. The axis that grows with the microbatch is the examples', and the microbatch
gets the rows of its own examples. A draw without such an axis is the batch's, and comes as it is.

Example. Of 6 examples, the microbatch 1 holds two. There ``bits(key, (2, 3))`` is rows 2 and 3 of
``bits(key, (6, 3))``. Under JAX's default generator the entry (i, j) is a function of the key and
of its place 3 i + j, so no more than these two rows are computed.

Cost: what the draw costs alone. Other generators make the numbers of all examples in each
microbatch, and take the rows. `fun` is traced once more, for twice as many examples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxaccum._base.source_lines import Frame, frame_of
from jaxaccum._base.types import Array, PyTree
from jaxaccum._jaxpr import compat
from jaxaccum._jaxpr.derivative_rules import WITH_RULES
from jaxaccum._program.example_keys import example_keys

Shape = tuple[int, ...]
_TAG = "rows of "
_THREEFRY = "threefry2x32"


class Drawn(NamedTuple):
    """What one call draws from a key: numbers, or keys of their own."""

    keys: bool
    shape: Shape


class Larger(NamedTuple):
    """What twice as many examples draw: it tells which axis of a draw grows."""

    drawn: frozenset[Drawn]
    grown: frozenset[Drawn]  # those that may be larger than for the microbatch itself
    has_gamma: bool  # whether a gamma distribution is drawn from, whose splits no program shows


@dataclasses.dataclass(frozen=True)
class Rows:
    """The examples that a microbatch has of its batch, but for the index of the first."""

    offsets: tuple[int, ...]
    """Of each example, from the first."""
    batch_size: int

    @classmethod
    def all(cls, size: int) -> Rows:
        """Those of a batch that is one microbatch."""
        return cls(tuple(range(size)), size)

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.offsets)

    def after(self, first: Array) -> Array:
        """Their indices in the batch, uint32 of shape (size,)."""
        return first + np.asarray(self.offsets, np.uint32)


class UndividedError(ValueError):
    """A draw cannot be divided among the examples."""


# -- keys that know which rows they draw ----------


def data_of(key: Array) -> Array:
    """The integers of a key whose microbatch starts at example 0: its own, and that index."""
    own = jax.random.key_data(key)
    return jnp.concatenate([own, jnp.zeros((*own.shape[:-1], 1), own.dtype)], axis=-1)


def moved(data: Array, first: Array) -> Array:
    """The same key in the microbatch that starts at example `first`."""
    return data.at[..., -1].set(jnp.asarray(first).astype(data.dtype))


@jax.jit  # a call, which the audit knows by its name
def key_of_batch(key: Array) -> Array:
    """The integers of the key as it came."""
    return jax.random.key_data(key)[..., :-1]


def integers(key: Array) -> Array:
    """The integers of a key as it came, of this module or an ordinary one."""
    return key_of_batch(key) if _is_batch_key(key) else jax.random.key_data(key)


def ordinary(data: Array, base: Hashable) -> Array:
    """The key as it came, of the integers that `data_of` gives."""
    return jax.random.wrap_key_data(data[..., :-1], impl=base)


def returned(output: PyTree) -> PyTree:
    """What `fun` returns: its keys as the whole batch would return them."""
    if not any(map(_is_batch_key, jax.tree.leaves(output))):
        return output  # not built anew: some classes check what they hold
    return jax.tree.map(lambda x: _key_of_batch(x) if _is_batch_key(x) else x, output)


def _is_batch_key(x: Any) -> bool:
    return is_batch_key(getattr(x, "dtype", None))


def _key_of_batch(key: Array) -> Array:
    return jax.random.wrap_key_data(key_of_batch(key), impl=base_of(key.dtype))


def base_of(dtype: Any) -> str | None:
    """Of keys of this module, the name of the generator that draws; None of other keys."""
    name = getattr(dtype, "name", "")
    prefix = f"key<{_TAG}"
    return name[len(prefix) : -1] if name.startswith(prefix) else None


def is_batch_key(dtype: Any) -> bool:
    """Whether keys of the dtype know which rows they draw."""
    return base_of(dtype) is not None


@functools.cache
def generator(base: Hashable, rows: Rows, larger: Larger | None) -> Any:
    """The generator of keys that draw these rows as the generator `base` draws the batch.

    Without `larger` the rows are the whole batch, and no draw is divided.
    Equal arguments give one generator, so that its keys have one type and nothing is traced again.
    """
    typed: Callable[[Array], Array] = functools.partial(jax.random.wrap_key_data, impl=base)

    def seed(seed: Array) -> Array:
        raise TypeError(
            f"{_A_KEY} is made from the key of the call; make others by jax.random.key(seed)."
        )

    def keeping(data: Array, keys: Array) -> Array:
        own = jax.random.key_data(keys)
        first = jnp.broadcast_to(data[-1], (*own.shape[:-1], 1))
        return jnp.concatenate([own, first], axis=-1)

    def axis_of(drawn: Drawn) -> int | None:
        axis = _axis(drawn, rows.size, larger)
        if axis is None:
            _check_compared(drawn, larger)
        return axis

    def taken(draw: Callable[[Shape], Array], shape: Shape, axis: int, first: Array) -> Array:
        whole = draw(_with(shape, axis, rows.batch_size))
        return whole[(slice(None),) * axis + (rows.after(first),)]

    def split(data: Array, shape: Shape) -> Array:
        draw = functools.partial(jax.random.split, typed(data[:-1]))
        axis = axis_of(Drawn(True, tuple(shape)))
        if axis is None:
            return keeping(data, draw(shape))
        if len(shape) > 1:
            return keeping(data, taken(draw, shape, axis, data[-1]))
        return keeping(data, example_keys(typed(data[:-1]), rows.after(data[-1]), rows.batch_size))

    def fold_in(data: Array, message: Any) -> Array:
        return keeping(data, jax.random.fold_in(typed(data[:-1]), message))

    def random_bits(data: Array, width: int, shape: Shape) -> Array:
        dtype = jnp.dtype(f"uint{width}")
        draw = functools.partial(jax.random.bits, typed(data[:-1]), dtype=dtype)
        axis = axis_of(Drawn(False, tuple(shape)))
        if axis is None:
            return draw(shape)
        places = None
        if base == _THREEFRY and compat.draws_by_place():
            places = _places(shape, axis, rows.after(data[-1]), rows.batch_size)
        if places is None:
            return taken(draw, shape, axis, data[-1])
        return compat.threefry_bits(data[:-1], *places, dtype)

    name = f"{_TAG}{base}"
    single = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=base)))
    return compat.key_implementation(
        key_shape=(single.shape[0] + 1,), seed=seed, split=split, random_bits=random_bits,
        fold_in=fold_in, name=name, tag=name,
    )  # fmt: skip


def _check_compared(drawn: Drawn, larger: Larger | None) -> None:
    """A draw that is not divided is one that twice as many examples share."""
    if larger is None or drawn in larger.drawn or larger.has_gamma:
        return
    raise UndividedError(
        f"{_A_KEY}: a draw of shape {list(drawn.shape)} is not in the traced program, so jaxaccum "
        f"cannot tell which of its axes holds the examples. {_OUTSIDE}"
    )


def _places(shape: Shape, axis: int, examples: Array, size: int) -> tuple[Array, Array] | None:
    """The place of each entry among all entries of the batch's draw: the high half and the low half
    of 64 bits. None where an axis is too long for 32 bits.
    """
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    if before * size >= 2**32 or after >= 2**32:
        return None
    row = examples[None] + size * np.arange(before, dtype=np.uint32)[:, None]
    high, low = _product(row[:, :, None], after)
    entry = np.arange(after, dtype=np.uint32)[None, None]
    place = low + entry
    high = jnp.broadcast_to(high, place.shape) + (place < entry).astype(jnp.uint32)
    return high.reshape(shape), place.reshape(shape)


def _product(x: Array, factor: int) -> tuple[Array, Array]:
    """``x * factor`` in 64 bits, of 32 each: the high half and the low half."""
    half, low_half = jnp.uint32(16), jnp.uint32(0xFFFF)
    x1, x0 = x >> half, x & low_half
    f1, f0 = jnp.uint32(factor >> 16), jnp.uint32(factor & 0xFFFF)
    middle = x1 * f0 + ((x0 * f0) >> half)
    carried = x0 * f1 + (middle & low_half)
    return x1 * f1 + (middle >> half) + (carried >> half), x * jnp.uint32(factor)


# -- which axis of a draw holds the examples ----------


def what_is_drawn(larger: Sequence[Draw]) -> Larger:
    """What these draws, of twice as many examples, draw."""
    drawn = frozenset(draw.drawn for draw in larger)
    return Larger(drawn, drawn, any(draw.is_gamma for draw in larger))


def what_grows(found: Sequence[Draw], larger: Sequence[Draw]) -> Larger:
    """The same, where the draws of the microbatch itself tell which of them are larger."""
    pairs = zip(found, larger, strict=False)  # `check` refuses other numbers of draws
    grown = frozenset(two.drawn for one, two in pairs if one.drawn != two.drawn)
    return what_is_drawn(larger)._replace(grown=grown)


def is_mistaken(found: Sequence[Draw], larger: Sequence[Draw], size: int) -> bool:
    """Whether `what_is_drawn` finds other axes, since some draw looks like another one grown."""
    every, grown = what_is_drawn(larger), what_grows(found, larger)
    return any(_axis(x.drawn, size, every) != _axis(x.drawn, size, grown) for x in found)


class Draw(NamedTuple):
    """One draw of a program from keys of the batch."""

    of: Shape
    """The shape of the array of keys that are drawn from."""
    drawn: Drawn
    """What each of them draws."""
    base: str
    """The generator that draws."""
    is_gamma: bool
    where: Frame | None
    """Its line in the user's program."""


def draws(jaxpr: jex.Jaxpr, caller: Frame | None = None) -> Iterator[Draw]:
    """The draws of a program, at any depth, in their order; `caller` is the line that all of them
    have."""
    for eqn in jaxpr.eqns:
        where = caller or frame_of(eqn)
        if (name := eqn.primitive.name) in ("random_bits", "random_gamma", "random_split"):
            of, shape = _type(eqn.invars[0]), _type(eqn.outvars[0]).shape
            if (base := base_of(of.dtype)) is not None:
                own = shape[len(of.shape) :]
                drawn = Drawn(name == "random_split", own)
                yield Draw(of.shape, drawn, base, name == "random_gamma", where)
        for sub in jex.jaxprs_in_params(eqn.params):
            # A jitted function of JAX's own remembers the line that called it first.
            yield from draws(sub, where if _is_jaxs_own(eqn) else caller)


def check_rules(jaxpr: jex.Jaxpr) -> None:
    """No rule of the user's for a derivative draws: what it draws is traced too late."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in WITH_RULES and any(map(_is_batch_key, map(_type, eqn.invars))):
            raise UndividedError(
                f"{_A_KEY}: at {frame_of(eqn)} the key is passed to a function with a custom_vjp "
                "or custom_jvp. The numbers that its rule draws cannot be divided among the "
                f"examples. {_OUTSIDE}"
            )
        for sub in jex.jaxprs_in_params(eqn.params):
            check_rules(sub)


def _is_jaxs_own(eqn: jex.JaxprEqn) -> bool:
    """Whether it calls a jitted function such as ``jax.random``'s ``_normal``."""
    return str(eqn.params.get("name", "")).startswith("_")


def _type(variable: Any) -> Any:
    return variable.aval


_HIDDEN = (
    "{where} is of a gamma distribution (gamma, beta, dirichlet, t, …). JAX splits its key again "
    "for each number, and does not show it. Pass a key to fun as jaxaccum.EXAMPLE_KEY, which gives "
    "each example its own, and draw from it under jax.vmap."
)
_OUTSIDE = "Draw outside of functions with a custom_vjp or custom_jvp, and pass the numbers in."
_TWICE = "for twice as many examples"
_INSTEAD = ", or make these keys by jax.random.fold_in(key, 0), jax.random.fold_in(key, 1), …"
_KEYS_OF_ROWS = (
    "Make one key per example by jax.random.split(key, len(x)), or pass the key to fun as "
    "jaxaccum.EXAMPLE_KEY, which makes them."
)
_NUMBERS_OF_ROWS = (
    "Draw before the axis of the examples is merged with another one. Or let the numbers depend on "
    "the partition: pass the key as jaxaccum.KEY, and leave this stream of an nnx model out, as in "
    'example_streams="dropout".'
)
_A_KEY = "a key of the batch (BATCH_KEY, and example_streams of nnx)"


def check(found: Sequence[Draw], larger: Sequence[Draw], size: int) -> None:
    """Every draw of a microbatch of `size` examples is shared, or one axis of it is the examples'.

    `larger` are the same draws of a microbatch of twice as many.
    """
    if len(found) != len(larger):
        raise UndividedError(
            f"{_A_KEY}: fun draws {len(found)} times for {size} examples and {len(larger)} times "
            f"for {2 * size}; draw as often for every size, all rows at once."
        )
    every = what_grows(found, larger)
    for draw in found:
        if draw.is_gamma and Drawn(True, (2 * size,)) in every.drawn:
            raise UndividedError(_HIDDEN.format(where=f"{_A_KEY}: the draw at {draw.where}"))
    for one, two in zip(found, larger, strict=True):
        _check_draw(one, two, size, every)


def _check_draw(one: Draw, two: Draw, size: int, larger: Larger) -> None:
    where, shape, other = f"{_A_KEY}: the draw at {one.where}", one.drawn.shape, two.drawn.shape
    sizes = f"for {size} examples and {list(other)} for {2 * size}"
    axis = _axis(one.drawn, size, larger)
    if one.of != two.of and (axis is None or shape != other):
        return _check_keys(one, two, where, shared=shape == other)
    if one.is_gamma and shape != other:
        raise UndividedError(_HIDDEN.format(where=where))
    if other == (shape if axis is None else _with(shape, axis, 2 * size)):
        return None
    if shape == other:
        raise UndividedError(
            f"{where} has shape {list(shape)} {sizes}: all examples share it. Another draw of "
            "this shape has one row per example, and the two cannot be told apart. Choose another "
            f"microbatch size{_INSTEAD if one.drawn.keys else ''}."
        )
    raise UndividedError(
        f"{where} has shape {list(shape)} {sizes}: no axis of it has one entry per example. "
        f"{_KEYS_OF_ROWS if one.drawn.keys else _NUMBERS_OF_ROWS}"
    )


def _check_keys(one: Draw, two: Draw, where: str, *, shared: bool) -> None:
    """A draw from one key for each example."""
    keys = f"{where} is from an array of keys, {list(one.of)} ({list(two.of)} {_TWICE})"
    if not shared:
        raise UndividedError(
            f"{keys}, and takes {list(one.drawn.shape)} ({list(two.drawn.shape)}) from each key: "
            "numbers for every pair of examples. From each key draw what its example needs."
        )
    if one.base != _THREEFRY and not one.drawn.keys:
        raise UndividedError(
            f"{keys}. Under jax.vmap the generator {one.base!r} draws for all keys at once, so the "
            "numbers depend on how many keys there are. Draw with jax.lax.map(draw, keys), or pass "
            'a key of another generator, jax.random.key(seed, impl="threefry2x32").'
        )


def _axis(drawn: Drawn, size: int, larger: Larger | None) -> int | None:
    """The axis of a draw that holds the examples, if one does."""
    for i, length in enumerate(drawn.shape if larger else ()):
        grown = drawn._replace(shape=_with(drawn.shape, i, 2 * size))
        if length == size and larger and grown in larger.grown:
            return i
    return None


def _with(shape: Shape, axis: int, size: int) -> Shape:
    """The shape of a draw for `size` examples."""
    return (*shape[:axis], size, *shape[axis + 1 :])
