"""Random nested programs: a drawn loss is a tree of steps, printed as the Python that it runs.

Every step maps activations `h` of shape (rows, 3) to others. A step is a line of the tables of
`nested_words`, or one of JAX's transformations and loops around steps of its own (`nested_blocks`).
Its operands are parameters, the same one again, values computed from parameters, constants,
activations and integers, in any order.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

from tests.programs.nested_blocks import block
from tests.programs.nested_words import COLLECTIVES, LOSSES, PATHS, SCOPE
from tests.programs.nested_writer import Choose, Scope, Step, Writer, joined

CONSTANT = jnp.cos(jnp.arange(9.0)).reshape(3, 3) / 2
COUPLED = """\
psum = lambda x: lax.psum(x, "microbatch")
pmean = lambda x: lax.pmean(x, "microbatch")
pmax = lambda x: lax.pmax(x, "microbatch")
gather = lambda x: lax.all_gather(x, "microbatch", tiled=True)
"""


@dataclasses.dataclass(frozen=True)
class Program:
    """A loss of `p`, a dict of parameters, and `batch`, a dict of `x`, `ids` and `weight`."""

    steps: tuple[Step, ...]
    loss: str
    coupled: bool

    def __repr__(self) -> str:
        lines = ['h = batch["x"]', *joined(self.steps), f"return {self.loss}"]
        loss = "def loss(p, batch):\n" + textwrap.indent("\n".join(lines), "    ")
        return COUPLED + loss if self.coupled else loss

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Hypothesis prints a failing program in this way."""
        del cycle
        printer.text(repr(self))

    def walk(self) -> Iterator[tuple[tuple[str, ...], Step]]:
        """Every step with the kinds of the steps around it."""
        for step in self.steps:
            yield from step.walk()


def define(text: str, **names: Any) -> Callable[[Any, Any], Any]:
    """The loss that a text defines; `names` say what `Mean` and `psum`, say, mean in it."""
    space: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": lax, "CONSTANT": CONSTANT}
    exec(compile(text, "<program>", "exec"), space)
    space.update(names)
    return space["loss"]


def compose(choose: Choose, *, coupled: bool = False) -> Program:
    """A program of one step or two; a coupled one has a collective beside them."""
    writer = Writer(choose)
    scope = Scope(SCOPE, path=choose(PATHS), collectives=coupled)
    steps = block(writer, scope, (1, 2, 2))
    if coupled:
        place = choose(range(len(steps) + 1))
        steps = (*steps[:place], writer.word(COLLECTIVES, scope), *steps[place:])
    return Program(steps, writer.fill_freely(choose(LOSSES), scope)[0], coupled)


@st.composite
def programs(draw: st.DrawFn, *, coupled: bool = False) -> Program:
    """Programs that JAX differentiates in reverse mode on the whole batch."""
    return compose(lambda options: draw(st.sampled_from(options)), coupled=coupled)
