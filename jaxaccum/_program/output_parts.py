"""What `fun` returned: every output read as a tag, checked, taken apart into arrays, and put
together again.

`read` runs inside the trace of one microbatch and returns the arrays that the loop combines, each
with its `Reduction`; `Outputs.finalize` turns the combined arrays into the structure that the user
sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.trees import (
    cast,
    dtype_of,
    floating,
    is_array,
    is_inexact,
    key_impl,
    leaves_with_names,
    promote,
    ratio,
    total_of,
    widen,
)
from jaxaccum._base.types import Array, PyTree
from jaxaccum._program.output_checks import (
    check_array,
    check_carries,
    check_combines_keys,
    check_rows,
    described,
    padding_refused,
    untagged_refused,
)
from jaxaccum._program.reductions import Reduction
from jaxaccum._program.tags import Carry, Concat, Mean, Sum, Tag, Unvaried, is_tag


@dataclasses.dataclass(frozen=True)
class Part:
    """One array that the loop combines."""

    name: str
    reduction: Reduction
    once: bool = False
    """Whether it is a carried state that is updated once, from the state before the first
    microbatch."""
    has_tag: bool = True
    """Whether it was returned in a tag."""

    @property
    def tag(self) -> str | None:
        """The name of the tag, if it has one, under which it was returned and passes no
        gradient."""
        if not self.has_tag:
            return None
        return "Carry" if self.once else self.reduction.value.capitalize()


Constant = Callable[[Part, Array], Array]
"""Makes the value of a part a constant to every derivative."""


@dataclasses.dataclass(frozen=True)
class Untagged:
    """An output without a tag, which must depend on whole arguments alone; and what is said where
    it does not."""

    name: str
    refusal: str
    error: type[Exception] = TypeError
    of_model: bool = False
    """Whether it is a parameter that a model assigns to."""
    at_all_sizes: bool = False
    """Whether microbatches of two sizes were seen to compute it alike."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the finalized output: the part it comes from, its denominator if it is a mean,
    and its dtype."""

    part: int
    weight: int | None
    dtype: Any
    shape: tuple[int, ...]
    key: Any = None
    """Of a typed key, which the loop combines as the integers it is made of: its implementation."""
    whole: bool = False
    """Whether it is no part of the loop but, at the place `part`, an output without a tag."""

    def moved(self, places: Mapping[int, tuple[bool, int]]) -> Leaf:
        """The leaf, whose part and weight are at other places; and whether they are whole there."""
        whole, part = places[self.part]
        weight = None if self.weight is None else places[self.weight][1]
        return dataclasses.replace(self, part=part, weight=weight, whole=whole)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The structure of what `fun` returned, and the parts that carry its values through the
    loop."""

    treedef: Any
    leaves: tuple[Leaf, ...]
    parts: tuple[Part, ...]
    whole: tuple[Untagged, ...] = ()

    def updated_once(self) -> Outputs:
        """The same outputs, where the carried state is not threaded: every microbatch computes the
        one new state."""
        parts = list(self.parts)
        for i in self.positions(Reduction.CARRY):
            parts[i] = dataclasses.replace(parts[i], reduction=Reduction.LAST, once=True)
        return dataclasses.replace(self, parts=tuple(parts))

    def beside_loop(self, chosen: Collection[int]) -> Outputs:
        """These outputs, where the `chosen` parts follow those without a tag, and no loop computes
        them."""
        parts = {i: part for i, part in enumerate(self.parts) if i not in chosen}
        places = {old: (False, new) for new, old in enumerate(parts)}
        whole = list(self.whole)
        for i in sorted(chosen):
            places[i] = (True, len(whole))
            name = self.parts[i].name
            says = f"{name} changes in another way in microbatches of another size."
            whole.append(Untagged(name, says, ValueError, at_all_sizes=True))
        leaves = [leaf if leaf.whole else leaf.moved(places) for leaf in self.leaves]
        return Outputs(self.treedef, tuple(leaves), tuple(parts.values()), tuple(whole))

    def with_last(self, chosen: Collection[int]) -> Outputs:
        """These outputs, where the `chosen` ones without a tag become parts of the loop, which
        keeps the last microbatch's."""
        whole = {i: one for i, one in enumerate(self.whole) if i not in chosen}
        places = {old: (True, new) for new, old in enumerate(whole)}
        parts = list(self.parts)
        for i in sorted(chosen):
            places[i] = (False, len(parts))
            parts.append(Part(self.whole[i].name, Reduction.LAST, has_tag=False))
        leaves = [leaf.moved(places) if leaf.whole else leaf for leaf in self.leaves]
        return Outputs(self.treedef, tuple(leaves), tuple(parts), tuple(whole.values()))

    def positions(self, reduction: Reduction) -> list[int]:
        """The parts that combine so."""
        return [i for i, part in enumerate(self.parts) if part.reduction is reduction]

    def finalize(self, values: list[Any], whole: list[Any]) -> PyTree:
        """The output over the whole batch, `fun`'s structure with every tag resolved.

        It is made of the combined parts, and of the outputs that depend on whole arguments alone.
        """
        return self.treedef.unflatten(
            [_finalize(x, whole if x.whole else values) for x in self.leaves]
        )


@dataclasses.dataclass
class _Reader:
    """Collects parts and leaves while outputs are read, in the order in which they stand."""

    size: int
    constant: Constant
    parts: list[Part] = dataclasses.field(default_factory=list)
    values: list[Any] = dataclasses.field(default_factory=list)
    leaves: list[Leaf] = dataclasses.field(default_factory=list)
    untagged: list[Untagged] = dataclasses.field(default_factory=list)
    whole: list[Any] = dataclasses.field(default_factory=list)

    def part(self, name: str, reduction: Reduction, x: Any) -> int:
        dtype = widen(dtype_of(x)) if reduction is Reduction.SUM else dtype_of(x)
        x = cast(x, dtype)
        part = Part(name, reduction)
        self.parts.append(part)
        self.values.append(
            x if reduction.differentiable or not is_inexact(x) else self.constant(part, x)
        )
        return len(self.parts) - 1

    def without_tag(self, untagged: Untagged, x: Any) -> None:
        """An output that has to depend on whole arguments alone."""
        key, dtype = key_impl(x), dtype_of(x)
        self.untagged.append(untagged)
        self.whole.append(jax.random.key_data(x) if key is not None else cast(x, dtype))
        self.leaves.append(Leaf(len(self.whole) - 1, None, dtype, jnp.shape(x), key, whole=True))

    def weight(self, name: str, x: Any) -> int:
        """A denominator: integers are counted in floating point, which no count overflows."""
        return self.part(name, Reduction.SUM, cast(x, floating(dtype_of(x))))

    def leaf(self, part: int, weight: int | None, dtype: Any, key: Any = None) -> None:
        self.leaves.append(Leaf(part, weight, jnp.dtype(dtype), jnp.shape(self.values[part]), key))


def read(
    output: PyTree,
    parts: Sequence[tuple[str, PyTree]],
    *,
    size: int,
    carry: PyTree,
    has_carry: bool,
    padded: bool,
    constant: Constant | None = None,
) -> tuple[Outputs, list[Any]]:
    """The outputs of one microbatch of `size` examples, checked; their parts as arrays, then those
    without a tag.

    The output's `parts` come in its own order, each with what errors call it. `constant` stops the
    gradient of a part that passes none.
    """
    reader, finalized = _Reader(size, constant or _stopped), []
    named = []
    for name, part in parts:
        named += leaves_with_names(part, name, is_leaf=is_tag)
    check_carries([tag for _, tag in named if isinstance(tag, Carry)], carry, has_carry)
    for name, x in named:
        finalized.append(_read_tag(reader, name, x, padded=padded))
    outer = jax.tree.structure(output, is_leaf=is_tag)
    treedef = jax.tree.structure(outer.unflatten(finalized))
    summed, untagged = tuple(reader.parts), tuple(reader.untagged)
    arrays = [*reader.values, *reader.whole]
    return Outputs(treedef, tuple(reader.leaves), summed, untagged), arrays


def _stopped(part: Part, x: Array) -> Array:
    del part
    return lax.stop_gradient(x)


def _read_tag(reader: _Reader, name: str, x: Any, *, padded: bool) -> PyTree:
    """Read one tag or untagged leaf; returns the structure that stands in its place once
    finalized."""
    if not isinstance(x, Tag):
        check_array(name, x)
        is_mean = jnp.shape(x) == () and jnp.issubdtype(dtype_of(x), jnp.floating)
        if padded or not is_mean:
            says = untagged_refused(name, x, reader.size)
            says = padding_refused(name) if padded and is_mean else says
            reader.without_tag(Untagged(name, says), x)
            return x
        # A mean over the microbatch's examples is its total over them, divided once, by the whole
        # batch's number.
        total = reader.part(name, Reduction.SUM, cast(x, widen(dtype_of(x))) * reader.size)
        weight = reader.weight(name, reader.size)
        reader.leaf(total, weight, dtype_of(x))
        return x
    if isinstance(x, Mean):
        return _read_mean(reader, name, x)
    if isinstance(x, Unvaried):
        reader.without_tag(Untagged(name, x.refusal, ValueError, of_model=True), x.x)
        return x.x
    for leaf_name, leaf in leaves_with_names(
        x.content, f"{name}.{type(x).__name__}", is_leaf=is_tag
    ):
        check_array(leaf_name, leaf)
        if isinstance(x, Concat):
            check_rows(leaf_name, leaf, reader.size)
        if (key := key_impl(leaf)) is not None:
            check_combines_keys(leaf_name, x)
            leaf = jax.random.key_data(leaf)
        part = reader.part(leaf_name, x.reduction, leaf)
        # A sum of integers has the dtype of `jnp.sum`: its own would overflow.
        counts = isinstance(x, Sum) and not is_inexact(leaf)
        reader.leaf(part, None, widen(dtype_of(leaf)) if counts else dtype_of(leaf), key)
    return x.content


def _read_mean(reader: _Reader, name: str, mean: Mean) -> PyTree:
    totals = leaves_with_names(mean.total, f"{name}.Mean.total", is_leaf=is_tag)
    weights = leaves_with_names(mean.weight, f"{name}.Mean.weight", is_leaf=is_tag)
    for leaf_name, leaf in [*totals, *weights]:
        check_array(leaf_name, leaf)
        if key_impl(leaf) is not None:
            check_combines_keys(leaf_name, mean)
    shared = (
        jax.tree_util.treedef_is_leaf(jax.tree.structure(mean.weight))
        and jnp.shape(mean.weight) == ()
    )
    if not shared and jax.tree.structure(mean.total) != jax.tree.structure(mean.weight):
        raise ValueError(
            f"{name}: the weight of a Mean is one scalar or has the structure of its total; total "
            f"is {jax.tree.structure(mean.total)} and weight is {jax.tree.structure(mean.weight)}."
        )
    for (total_name, total), (_, weight) in zip(
        totals, weights * len(totals) if shared else weights, strict=True
    ):
        if jnp.shape(weight) not in ((), jnp.shape(total)):
            raise ValueError(
                f"{total_name} has shape {list(jnp.shape(total))} and its weight "
                f"{list(jnp.shape(weight))}; pass the weight as a scalar or with the shape of the "
                "total."
            )
        if jnp.issubdtype(dtype_of(weight), jnp.complexfloating):
            raise TypeError(f"{total_name}: the weight of a Mean is real; got {dtype_of(weight)}.")
    parts = [reader.weight(leaf_name, leaf) for leaf_name, leaf in weights]
    for i, (leaf_name, leaf) in enumerate(totals):
        weight = weights[0 if shared else i][1]
        result = floating(promote(leaf, weight))
        total = leaf if is_inexact(leaf) else cast(leaf, widen(result))
        reader.leaf(reader.part(leaf_name, Reduction.SUM, total), parts[0 if shared else i], result)
    return mean.total


def _finalize(leaf: Leaf, values: list[Any]) -> Any:
    value = values[leaf.part]
    if leaf.key is not None:
        return jax.random.wrap_key_data(value, impl=leaf.key)
    if leaf.weight is not None:
        # The widest of the two parts holds the quotient, so that a float64 weight is not rounded
        # first.
        value = ratio(cast(value, promote(value.dtype, leaf.dtype)), values[leaf.weight])
    return cast(value, leaf.dtype) if value.dtype != leaf.dtype else value


# -- the loss --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a loss: ``Σ total / Σ weight``, or ``Σ total`` where it has no denominator."""

    total: int
    weight: int | None


def split_loss(output: PyTree, has_aux: bool) -> tuple[PyTree, PyTree]:
    """The loss and the aux of what a loss function returned, checked before either is read."""
    output, aux = loss_and_aux(output, has_aux)
    terms = output if isinstance(output, dict) else {"": output}
    if not terms:
        raise TypeError("the loss is an empty dict; return at least one term.")
    for name, term in terms.items():
        _check_term(f"loss[{name!r}]" if isinstance(output, dict) else "the loss", term)
    return output, aux


def loss_and_aux(output: PyTree, has_aux: bool) -> tuple[PyTree, PyTree]:
    """The two parts of what a loss function returned, or the error that says which it lacks."""
    if has_aux:
        if not isinstance(output, tuple) or len(output) != 2:
            raise TypeError(
                f"has_aux=True, and fun returned {described(output)}; return the pair (loss, aux)."
            )
        return output
    if isinstance(output, tuple | list):
        raise TypeError(
            f"the loss is {described(output)}; a loss is a scalar, a Mean, a Sum, or a dict of "
            "them. If fun returns (loss, aux), pass has_aux=True."
        )
    return output, None


def terms(outputs: Outputs, count: int) -> tuple[Term, ...]:
    """The terms of the loss, which are the first `count` leaves of the output ``(loss, aux)``."""
    for leaf in outputs.leaves[:count]:
        if leaf.whole:
            raise TypeError(outputs.whole[leaf.part].refusal)
    return tuple(Term(leaf.part, leaf.weight) for leaf in outputs.leaves[:count])


def value(loss: PyTree) -> Any:
    """The value of a finalized loss: the sum of its terms."""
    return total_of(jax.tree.leaves(loss))


def _check_term(name: str, term: Any) -> None:
    if is_tag(term) and not isinstance(term, Mean | Sum):
        raise TypeError(
            f"{name} is tagged {type(term).__name__}; a loss is a scalar, a Mean, a Sum, or a dict "
            "of them."
        )
    if isinstance(term, tuple | list | dict):
        raise TypeError(
            f"{name} is {described(term)}; a loss is a scalar, a Mean, a Sum, or a flat dict of "
            "them. Auxiliary values go into aux, with has_aux=True."
        )
    content: Any = term.content if is_tag(term) else term
    if not is_array(content) and not isinstance(content, bool | int | float | complex):
        raise TypeError(f"{name} holds {described(content)}; a term of a loss is one scalar.")
    if jnp.shape(content) != ():
        raise TypeError(
            f"{name} has shape {list(jnp.shape(content))}, and a loss is a scalar. Reduce it: "
            "Mean(jnp.sum(x), x.size) for a mean over all examples, Sum(jnp.sum(x)) for a sum."
        )
    if not jnp.issubdtype(dtype_of(content), jnp.floating):
        raise TypeError(
            f"{name} has dtype {dtype_of(content)}; a loss is real and floating, or it has no "
            "gradient."
        )
