"""`fun` as a function of flat arrays, which notes what came out at each size of microbatch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxaccum._base.types import Fun, PyTree, WithStreams
from jaxaccum._program import assignments, closures, example_keys, named_outputs, output_parts
from jaxaccum._program.argument_slots import Layout, Role
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.named_outputs import Output
from jaxaccum._program.output_parts import Outputs
from jaxaccum._program.reductions import Reduction


@dataclasses.dataclass
class Call:
    """`fun` as a function of flat arrays; notes what came out at each size."""

    fun: Fun
    layout: Layout
    loss: bool
    has_aux: bool
    padded: bool
    audited: bool
    batch_size: int
    constant: output_parts.Constant | None = None
    """Stops the gradient of an output that passes none."""
    outputs: list[Outputs] = dataclasses.field(default_factory=list)
    returned: list[tuple[Output, ...]] = dataclasses.field(default_factory=list)
    shapes: list[list[Any]] = dataclasses.field(default_factory=list)
    num_terms: int = 0

    def at(self, size: int) -> Callable[..., list[Any]]:
        def flat(*arrays: Any) -> list[Any]:
            args, kwargs = self.layout.build(list(arrays))
            output = self._output(args, kwargs, size)
            if self.loss:
                output = output_parts.split_loss(output, self.has_aux)
                self.num_terms = len(jax.tree.leaves(output[0], is_leaf=output_parts.is_tag))
            outputs, parts = output_parts.read(
                output, size=size, carry=self.layout.carry, has_carry=self.layout.has_carry,
                padded=self.padded, constant=self.constant,
            )  # fmt: skip
            self.outputs.append(outputs)
            self.shapes.append([jax.typeof(x) for x in parts])
            returned = list(self._returned(output)) if self.audited else []
            self.returned.append(tuple(one for one, _ in returned))
            return [*parts, *(x for _, arrays in returned for x in arrays)]

        return flat

    def traced(self, trace: Callable[[Call, int], Any], size: int) -> Any:
        """``trace(self, size)``, whose first result is a trace.

        Of a model whose examples draw for themselves, what twice as many draw tells which axis of
        a draw is theirs.
        """
        fun = self.fun
        if not isinstance(fun, WithStreams) or fun.drawing is None:
            return trace(self, size)
        other = self.elsewhere()
        try:
            twice, *_ = trace(other, 2 * size)
        except Exception as error:  # of the user's function
            trace(other, size)  # where this size fails too, its error is said
            raise ValueError(
                f"example_streams compares what fun draws for {size} examples with what it draws "
                f"for {2 * size}, and fun does not run on {2 * size} ({error}); let it take any "
                "number of examples."
            ) from error
        larger = list(example_keys.draws(twice.jaxpr))
        self.fun = fun.compared(frozenset(draw.shape for draw in larger))
        one, *rest = trace(self, size)
        example_keys.check(list(example_keys.draws(one.jaxpr)), larger, size)
        return one, *rest

    def elsewhere(self) -> Call:
        """The same function, for sizes at which it will not run: this one notes nothing of them."""
        return dataclasses.replace(self, outputs=[], shapes=[], returned=[])

    def _output(self, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> PyTree:
        slots = () if isinstance(self.fun, WithStreams) else self.layout.slots
        explain = functools.partial(
            closures.explain,
            fun=self.fun,
            size=size,
            batch_size=self.batch_size,
            keys=[slot.name for slot in slots if slot.role is Role.EXAMPLE_KEY],
        )
        return assignments.call(self.fun, args, kwargs, explain)

    def _returned(self, output: PyTree) -> Iterator[tuple[Output, list[Any]]]:
        """The leaves of the output, as the audit names them."""
        if self.loss:
            yield from named_outputs.leaves(output[0], "the loss", aux=False)
            yield from named_outputs.leaves(output[1], "aux", aux=True)
        else:
            yield from named_outputs.leaves(output, "output", aux=False)

    def check_sizes(self, partition: Partition) -> None:
        """Outputs at both sizes have one structure, and what is summed has one shape."""
        if len(self.outputs) < 2:
            return
        (large, small), (first, second) = partition.groups, self.outputs
        if first.treedef != second.treedef or _names(first) != _names(second):
            raise ValueError(
                f"fun returns other outputs for a microbatch of {large.size} examples than for one "
                f"of {small.size}: {_names(first)} and {_names(second)}; return one structure for "
                "every size."
            )
        count = len(first.parts)
        for one, x, y in zip(first.whole, *(shapes[count:] for shapes in self.shapes), strict=True):
            if (x.shape, x.dtype) != (y.shape, y.dtype):
                raise TypeError(one.refusal)
        for part, x, y in zip(
            first.parts, *(shapes[:count] for shapes in self.shapes), strict=True
        ):
            drop = 1 if part.reduction is Reduction.CONCAT else 0
            if part.reduction is not Reduction.LAST and (x.shape[drop:], x.dtype) != (
                y.shape[drop:],
                y.dtype,
            ):
                raise ValueError(
                    f"{part.name} has shape {list(x.shape)} for a microbatch of {large.size} "
                    f"examples and {list(y.shape)} for one of {small.size}, so it has no "
                    f"{part.reduction.value} over microbatches; reduce it over the examples first, "
                    "or return it as Concat, one row per example."
                )


def _names(outputs: Outputs) -> list[str]:
    tagged = [f"{part.name} ({part.reduction.value})" for part in outputs.parts]
    return [*tagged, *(one.name for one in outputs.whole)]
