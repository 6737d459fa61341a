"""`plan` finds the largest microbatch that fits into memory, by compiling and never by running."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxaccum._base.source_lines import is_ours
from jaxaccum._base.types import Fun, Gather, InAxes, Memory, Split, Unroll
from jaxaccum._program import entries_of_call, validate
from jaxaccum._program.axes_by_name import check_keywords
from jaxaccum._program.call import Options
from jaxaccum._program.microbatches import Partition
from jaxaccum._tools import lowering
from jaxaccum._tools.plan_table import Plan, Row
from jaxaccum._tools.progress import Progress, during
from jaxaccum._transforms.options import GradientOptions, LoopOptions
from jaxaccum._transforms.value_and_grad import value_and_grad
from jaxaccum.accumulators._record import AccumulatorLike

_SCHEDULES: tuple[Memory, ...] = ("min", None, "store")


def plan(
    fun: Fun,
    *args: Any,
    in_axes: InAxes = (None, 0),
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    memory_bytes: int | None = None,
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    split: Split = "contiguous",
    num_examples_argnum: int | None = None,
    axis_name: str = "microbatch",
    mesh_axes: str | Sequence[str] | None = None,
    memory: Memory = None,
    unroll: Unroll = 1,
    accumulator: AccumulatorLike | None = None,
    gather: Gather = "each",
    progress: Progress | None = None,
    **kwargs: Any,
) -> Plan:
    """The largest microbatch whose gradient fits into a device's memory; nothing is run.

    Memory is nearly affine in the microbatch's size m, ``bytes(m) ≈ a + b m``, so two programs are
    compiled, the others predicted, and the choice is compiled to confirm it; where it does not fit,
    the line is drawn anew. The whole batch as one microbatch needs no sums and may fit where no
    loop does: it is compiled too. It equals::

        for m in sizes:
            step = jax.jit(value_and_grad(fun, microbatch_size=m, …))
            rows.append(step.lower(*args).compile().memory_analysis())
        best = max(m for m, row in zip(sizes, rows) if total(row) <= memory_bytes)

    For a loss with collectives over microbatches, this is done for each schedule (``"min"``, None
    and ``"store"``), or only for the one that `memory` names. Each schedule has a largest
    microbatch that fits; of these, `best` is the one that takes the fewest operations. What a
    schedule stores may change with the size, so that both ends are compiled too and nothing is
    extrapolated.

    Args:
        fun: the loss of one microbatch, as for `value_and_grad`.
        *args: its arguments on the whole batch, arrays or ``jax.ShapeDtypeStruct``, with the
            shardings of the real run: the programs are compiled for the mesh that these name.
        in_axes: one entry per argument, as for `value_and_grad`.
        argnums: the arguments to differentiate.
        has_aux: whether `fun` returns ``(loss, aux)``.
        memory_bytes: the limit of one device for arguments, results and temporary memory; None is
            the device's own, and must be given where it has none, as on CPU. Subtract what else
            lives there, such as optimizer state.
        num_microbatches: restricts the candidates to this one.
        microbatch_size: restricts the candidates to this one.
        split: as for `value_and_grad`; strided candidates divide the batch, and hold whole rows of
            every shard.
        num_examples_argnum: the argument that counts the real examples.
        axis_name: the name of the loop's axis.
        mesh_axes: plan the call inside ``shard_map`` over the mesh of `args`, manual over these
            axes; the sizes are then those of one device's shard.
        memory: restricts the schedules of a coupled loss to this one.
        unroll: how many microbatches are written out per iteration, or ``"last"``. True, all,
            needs `num_microbatches` or `microbatch_size`.
        accumulator: how gradients add up.
        gather: when sharded parameters are gathered.
        progress: a function that is told of each program before it is compiled, such as ``print``.
            None shows this on a terminal, and nowhere else; in a notebook pass ``print``.
        **kwargs: the keyword arguments of `fun`.

    Returns:
        A `Plan`: `rows`, `best`, and a table as ``str``. Its sizes are those that `fun` accepts;
        the others are `refused`, as those that cut a group of examples in two.

    Raises:
        ValueError: if no limit is known, not even the smallest microbatch fits, or `fun` does not
            accept the size that was asked for.

    Example:
        >>> import jax, jax.numpy as jnp, jaxaccum
        >>> loss = lambda w, x: jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)
        >>> shaped = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        >>> plan = jaxaccum.plan(loss, shaped(64, 64), shaped(4096, 64), memory_bytes=1_800_000)
        >>> plan.best.fits, plan.best.microbatch_size < 4096
        (True, True)
    """
    check_keywords(kwargs, in_axes, "plan", fun)
    axes = entries_of_call.assigned(in_axes, args, kwargs, fun)
    numbers = validate.argnums(argnums, axes.positional)
    if validate.unroll(unroll) is True and num_microbatches is None and microbatch_size is None:
        raise ValueError(
            "plan(unroll=True) would compile every microbatch of every size that it tries, and "
            "without a loop memory need not fall with the size; pass num_microbatches or "
            "microbatch_size, or plan with unroll=1."
        )
    counted = num_examples_argnum
    if counted is not None:
        counted = validate.argnum(counted, len(args), f"num_examples_argnum={counted!r}")
    call = lowering.read(args, kwargs, axes, traced={*numbers, counted}, mesh_axes=mesh_axes)
    limit = _limit(memory_bytes, call)
    entries: Any = axes  # of this call; no user writes this form of in_axes
    shared: LoopOptions = {
        "in_axes": entries, "split": split, "num_examples_argnum": num_examples_argnum,
        "axis_name": axis_name, "mesh_axes": mesh_axes, "unroll": unroll, "audit": None,
    }  # fmt: skip
    loss = _Loss(fun, call, argnums, numbers, has_aux, shared)
    couples = functools.partial(loss.couples, memory)
    equal = split == "strided" or call.explicit
    asked = _asked(num_microbatches, microbatch_size)
    partition = validate.partition(
        call.batch_size, split=split, microbatch_size=microbatch_size,
        num_microbatches=num_microbatches if asked else 1,
    )  # fmt: skip
    every = candidates(call.batch_size, shards=call.shards, equal=equal)
    with during("plan: tracing the loss", progress):
        if not asked:
            sizes, refused, coupled = _accepted(couples, every, call.batch_size)
            if coupled:
                sizes = [size for size in sizes if call.batch_size % size == 0]
        else:
            sizes, refused, coupled = _as_asked(couples, asked, partition, every)
    schedules = _schedules(memory) if coupled else (None,)

    def measure(schedule: Memory, size: int) -> lowering.Cost:
        options: GradientOptions = {
            **shared, **(asked or of_size(size)), "memory": schedule,
            "accumulator": accumulator, "gather": gather,
        }  # fmt: skip
        among = f", memory={schedule!r}" if coupled else ""
        with during(f"plan: compiling microbatch_size={size}{among}", progress):
            return loss.compiled(options, compared=len(schedules) > 1)

    rows, needed = [], []
    for schedule in schedules:
        own = functools.partial(measure, schedule)
        search = _Search(own, sizes, call.batch_size, limit, num_microbatches, ends=coupled)
        choice = search.run()
        rows += [search.row(size, schedule) for size in sizes]
        needed.append((search.total(choice), choice))
    least, size = min(needed)
    _check_fits(least, size, limit)
    return Plan(tuple(sorted(rows, key=lambda row: row.microbatch_size)), limit, coupled, refused)


class _Loss(NamedTuple):
    """The loss and its call: what is traced and compiled at every size."""

    fun: Fun
    call: lowering.AbstractCall
    argnums: int | Sequence[int]
    numbers: Sequence[int]
    """The arguments to differentiate, by their positions."""
    has_aux: bool
    options: LoopOptions

    def couples(self, memory: Memory, cut: LoopOptions) -> bool:
        """Whether the loss has collectives over microbatches that are cut so."""
        sized: LoopOptions = {**self.options, **cut, "memory": memory}
        return self.call.couples(self.fun, Options(**sized), self.numbers, has_aux=self.has_aux)

    def compiled(self, options: GradientOptions, *, compared: bool) -> lowering.Cost:
        """The cost of the gradient; if `compared`, no warning says that a schedule is slow."""
        step = value_and_grad(self.fun, self.argnums, self.has_aux, **options)
        with warnings.catch_warnings():
            if compared:  # the table says which of them is slow
                warnings.filterwarnings("ignore", message="memory=")
            return self.call.compiled(step, self.numbers)


def _check_fits(needed: int, size: int, limit: int) -> None:
    if needed > limit:
        raise ValueError(
            f"memory_bytes={limit}, and the smallest microbatch, of {size} examples, "
            f"needs {needed} bytes on a device; raise the limit, shard the parameters, or "
            "divide the batch over more devices."
        )


def candidates(batch_size: int, *, shards: int = 1, equal: bool = False) -> list[int]:
    """The sizes to look at: divisors of the batch, and powers of two if sizes may be unequal."""
    sizes = {size for size in range(1, batch_size + 1) if batch_size % size == 0}
    if not equal:
        sizes |= {2**i for i in range(batch_size.bit_length()) if 2**i < batch_size}
    return sorted(size for size in sizes if size % shards == 0)


def _schedules(memory: Memory) -> tuple[Memory, ...]:
    """The schedules to compare, of a coupled loss."""
    return _SCHEDULES if memory is None else (memory,)


class _Sizes(NamedTuple):
    """The sizes that `fun` accepts and those that it does not, and whether it has collectives."""

    accepted: list[int]
    refused: tuple[int, ...]
    coupled: bool


def _asked(num_microbatches: int | None, microbatch_size: int | None) -> LoopOptions:
    """What the user says of the microbatches, if anything."""
    given: LoopOptions = {}
    if num_microbatches is not None:
        given["num_microbatches"] = num_microbatches
    if microbatch_size is not None:
        given["microbatch_size"] = microbatch_size
    return given


def of_size(size: int) -> LoopOptions:
    """Microbatches of a size."""
    return {"microbatch_size": size}


def _accepted(couples: Callable[[LoopOptions], bool], sizes: list[int], batch_size: int) -> _Sizes:
    """The sizes that `fun` accepts.

    A function of groups of examples does not accept a single example, and some accept no large
    number. Where the smallest size, and all that are compiled first, are accepted, the others are
    taken to be so too, and not traced.
    """
    found: dict[int, bool] = {}
    errors: dict[int, Exception] = {}
    first = {sizes[0], *_anchors(sizes, batch_size)}
    for size in sorted(sizes, key=lambda size: (size not in first, size != sizes[0], -size)):
        if size not in first and not errors:
            return _Sizes(sizes, (), found[sizes[-1]])
        try:
            found[size] = couples(of_size(size))
        except Exception as error:  # of the user's function
            errors[size] = error
    if not found:
        raise errors[sizes[-1]]
    return _Sizes(sorted(found), tuple(sorted(errors)), any(found.values()))


def _accepts(couples: Callable[[LoopOptions], bool], size: int) -> bool:
    try:
        couples(of_size(size))
    except Exception:  # of the user's function
        return False
    return True


def _as_asked(
    couples: Callable[[LoopOptions], bool],
    asked: LoopOptions,
    partition: Partition,
    others: list[int],
) -> _Sizes:
    """The one size that was asked for; an error where `fun` does not accept it."""
    sizes = [group.size for group in partition.groups]
    try:
        return _Sizes(sizes[:1], (), couples(asked))
    except Exception as error:  # of the user's function, or one of ours
        accepted = [other for other in others if _accepts(couples, other)]
        if is_ours(error) or not accepted:
            raise
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ValueError(
            f"fun does not accept microbatches of {' and '.join(map(str, sizes))} examples "
            f"({said}); pass a microbatch_size that it accepts: {', '.join(map(str, accepted))}."
        ) from error


def _limit(memory_bytes: int | None, call: lowering.AbstractCall) -> int:
    if memory_bytes is not None:
        return validate.size(memory_bytes, "memory_bytes")
    limit = call.device_limit()
    if limit is None:
        raise ValueError(
            f"memory_bytes is None, and the device ({call.device_kind}) reports no limit of its "
            "own; pass memory_bytes, the bytes of one device that the gradient may use."
        )
    return limit


def _anchors(sizes: list[int], batch_size: int) -> set[int]:
    """What is compiled first: the whole batch, a half, and about an eighth of it, since the
    compiler pads smaller ones."""
    loops = [size for size in sizes if 2 * size <= batch_size] or sizes
    small = min(loops, key=lambda size: abs(size - batch_size / 8))
    return {small, loops[-1], *({batch_size} & set(sizes))}


class _Search:
    """Two sizes are compiled, the others predicted from them, and the choice is compiled too.

    Where the choice does not fit, the line is drawn anew and another size is chosen. The whole
    batch as one microbatch has no loop and no sums, so that no line predicts it: it is always
    compiled.
    """

    def __init__(
        self,
        measure: Callable[[int], lowering.Cost],
        sizes: list[int],
        batch_size: int,
        limit: int,
        count: int | None = None,
        *,
        ends: bool,
    ) -> None:
        """`count`: the number of microbatches, where it was asked for."""
        self.measure, self.sizes, self.batch_size, self.limit = measure, sizes, batch_size, limit
        self.count = count
        self.ends = [sizes[0], sizes[-1]] if ends else []
        self.known: dict[int, lowering.Cost] = {}
        self.guesses: dict[int, int] = {}

    def run(self) -> int:
        """The largest size that fits, or the smallest of all where none does, compiled."""
        for size in sorted({*_anchors(self.sizes, self.batch_size), *self.ends}):
            self._compile(size)
        while True:
            fitting = [size for size in self.sizes if self.total(size) <= self.limit]
            choice = max(fitting, default=self.sizes[0])
            if choice in self.known:
                return choice
            self._compile(choice)

    def _compile(self, size: int) -> None:
        if len(self.known) > 1 and size != self.batch_size:
            self.guesses[size] = round(self._between(size, "temp_bytes"))
        self.known[size] = self.measure(size)

    def total(self, size: int) -> int:
        """The bytes of the program at a size, compiled or predicted."""
        if size in self.known:
            return self.known[size].total_bytes
        return round(self._between(size, "total_bytes"))

    def _between(self, size: int, name: str) -> float:
        """The line through the nearest compiled loops, on both sides where there are any."""
        known = lambda x: float(getattr(self.known[x], name))
        loops = [other for other in self.known if other != self.batch_size] or list(self.known)
        near = sorted(loops, key=lambda other: abs(other - size))
        below = [x for x in near if x < size]
        above = [x for x in near if x > size]
        first, *others = [below[0], above[0]] if below and above else near
        if not others:
            return known(first)
        slope = (known(others[0]) - known(first)) / (others[0] - first)
        return max(known(first) + slope * (size - first), 0.0)

    def row(self, size: int, memory: Memory) -> Row:
        """What is known of a size."""
        known, total = self.known.get(size), self.total(size)
        return Row(
            microbatch_size=size,
            num_microbatches=self.count or -(-self.batch_size // size),
            memory=memory,
            temp_bytes=known.temp_bytes if known else round(self._between(size, "temp_bytes")),
            total_bytes=total,
            flops=known.flops if known else self._between(size, "flops"),
            compiled=known is not None,
            predicted_temp_bytes=self.guesses.get(size),
            fits=total <= self.limit,
        )
