"""`fun` as a function of flat arrays, which notes what came out at each size of microbatch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from jaxaccum._base.adapted import adapted
from jaxaccum._base.types import Array, Fun, PyTree
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._jaxpr.variables import Type
from jaxaccum._program import assignments, batch_keys, closures, named_outputs, output_parts
from jaxaccum._program.argument_slots import ArgumentTree, Role
from jaxaccum._program.batch_keys import Larger, Rows
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.named_outputs import Output
from jaxaccum._program.output_parts import Outputs, Part
from jaxaccum._program.reductions import Reduction


class Traced(NamedTuple):
    """`fun` traced at one size of microbatch."""

    trace: Trace
    original: Trace
    """As it was before anything was changed in it."""
    consts: list[Array]
    checked: bool
    """Whether JAX could follow in it which values vary over a mesh."""


class Returned(NamedTuple):
    """What came out at one size of microbatch."""

    outputs: Outputs
    types: list[Type]
    """Of the parts, and then of the outputs without a tag."""
    leaves: tuple[Output, ...]
    """What the audit judges; empty where nobody asks it."""


@dataclasses.dataclass
class FlatFunction:
    """`fun` as a function of flat arrays; notes what came out at each size."""

    fun: Fun
    tree: ArgumentTree
    partition: Partition
    loss: bool
    has_aux: bool
    padded: bool
    audited: bool
    num_shards: int = 1
    """Of the batch, of which the partition divides each alike."""
    larger: Larger | None = None
    """What twice as many examples draw from the keys of the batch, where these are divided."""
    constant: output_parts.Constant | None = None
    """Stops the gradient of an output that passes none."""
    returned: list[Returned] = dataclasses.field(default_factory=list)
    num_terms: int = 0

    def at(self, size: int) -> Callable[..., list[Array]]:
        tree = self.tree.drawing(self._rows(size), self.larger)

        def flat(*arrays: Array) -> list[Array]:
            args, kwargs = tree.build(list(arrays))
            output = self._output(args, kwargs, size)
            if self.loss:
                output = output_parts.split_loss(output, self.has_aux)
                self.num_terms = len(jax.tree.leaves(output[0], is_leaf=output_parts.is_tag))
            outputs, parts = output_parts.read(
                output, self._parts(output), size=size, carry=self.tree.carry,
                has_carry=self.tree.has_carry, padded=self.padded, constant=self.constant,
            )  # fmt: skip
            leaves, values = [], list(parts)
            for leaf, arrays_of_leaf in self._leaves(output):
                leaves.append(leaf)
                values += arrays_of_leaf
            types = list(map(jax.typeof, parts))
            self.returned.append(Returned(outputs, types, tuple(leaves)))
            return values

        return flat

    def traced(self, trace: Callable[[FlatFunction, int], Traced], size: int) -> Traced:
        """``trace(self, size)``.

        Where a key of the batch is drawn from, what twice as many examples draw tells which axis of
        a draw is theirs.
        """
        whole = size == self.partition.batch_size * self.num_shards
        if whole or not self.tree.positions(Role.BATCH_KEY):
            return trace(self, size)
        other = self.elsewhere()
        try:
            twice = trace(other, 2 * size)
        except Exception as error:  # of the user's function
            alone = trace(other, size)  # where this size fails too, its error is said
            if not any(batch_keys.draws(alone.trace.jaxpr)):
                return trace(self, size)  # nothing is drawn, and nothing to divide
            raise batch_keys.UndividedError(
                "for BATCH_KEY, and example_streams of nnx, what fun draws for "
                f"{size} examples is compared with what it draws for {2 * size}, and fun does not "
                f"run on {2 * size} ({error or type(error).__name__}); let it take any number of "
                "examples."
            ) from error
        larger = list(batch_keys.draws(twice.trace.jaxpr))
        self.larger = batch_keys.what_is_drawn(larger)
        found = trace(self, size)
        own = list(batch_keys.draws(found.trace.jaxpr))
        if batch_keys.is_mistaken(own, larger, size):
            self.larger = batch_keys.what_grows(own, larger)
            self.returned.pop()
            found = trace(self, size)
        batch_keys.check_rules(found.trace.jaxpr)
        batch_keys.check(own, larger, size)
        return found

    def _rows(self, size: int) -> Rows:
        """The examples of a microbatch: at another size than the loop's, those of a batch of it."""
        if all(group.size != size for group in self.partition.groups):
            return Rows.all(size)
        offsets = tuple(self.partition.offsets(size).tolist())
        return Rows(offsets, self.partition.batch_size * self.num_shards)

    def elsewhere(self) -> FlatFunction:
        """The same function, for sizes at which it will not run: this one notes nothing of them."""
        return dataclasses.replace(self, returned=[])

    def _output(self, args: tuple[PyTree, ...], kwargs: dict[str, PyTree], size: int) -> PyTree:
        slots = () if adapted(self.fun).draws_from_state else self.tree.slots
        explain = functools.partial(
            closures.explain,
            fun=self.fun,
            size=size,
            batch_size=self.partition.batch_size,
            keys=[slot.name for slot in slots if slot.role is Role.EXAMPLE_KEY],
            batch_keys=[slot.name for slot in slots if slot.role is Role.BATCH_KEY],
        )
        return batch_keys.returned(assignments.call(self.fun, args, kwargs, explain))

    def _leaves(self, output: PyTree) -> Iterator[tuple[Output, list[Array]]]:
        """The leaves of the output, as the audit names them."""
        if self.audited:
            for i, (name, part) in enumerate(self._parts(output)):
                yield from named_outputs.leaves(part, name, aux=i > 0)

    def _parts(self, output: PyTree) -> list[tuple[str, PyTree]]:
        """The parts of the output, and what errors call them."""
        if not self.loss:
            return [("output", output)]
        loss, aux = output
        names = adapted(self.fun).aux_names
        others = zip(names, aux, strict=True) if names else [("aux", aux)]
        return [("the loss", loss), *others]

    def check_sizes(self) -> None:
        """Outputs at both sizes have one structure, and what is summed has one shape."""
        if len(self.returned) < 2:
            return
        (first, types, _), (second, other_types, _) = self.returned
        large, small = self.partition.groups
        if first.treedef != second.treedef or _names(first) != _names(second):
            raise ValueError(
                f"fun returns other outputs for a microbatch of {large.size} examples than for one "
                f"of {small.size}: {_names(first)} and {_names(second)}; return one structure for "
                "every size."
            )
        count = len(first.parts)
        for i, one in enumerate(first.whole, start=count):
            x, y = types[i], other_types[i]
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                raise one.error(one.refusal)
        for i, part in enumerate(first.parts):
            x, y = types[i], other_types[i]
            if not _combines(part, x, y):
                raise ValueError(
                    f"{part.name} has shape {list(x.shape)} for a microbatch of {large.size} "
                    f"examples and {list(y.shape)} for one of {small.size}, so it has no "
                    f"{part.reduction.value} over microbatches; reduce it over the examples first, "
                    "or return it as Concat, one row per example."
                )


def _combines(part: Part, x: Type, y: Type) -> bool:
    """Whether arrays of these types, from microbatches of two sizes, combine as the part says."""
    drop = 1 if part.reduction is Reduction.CONCAT else 0
    return part.reduction is Reduction.LAST or (x.shape[drop:], x.dtype) == (
        y.shape[drop:],
        y.dtype,
    )


def _names(outputs: Outputs) -> list[str]:
    names = [f"{part.name} ({part.reduction.value})" for part in outputs.parts]
    for one in outputs.whole:
        names.append(one.name)
    return names
