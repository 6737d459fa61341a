"""A pytest plugin that puts jaxaccum in the place of `jax.value_and_grad` and `jax.grad`.

The tests are not ours (tests/peers/foreign_suites.py runs them), so their losses have no batch.
Each gets one: an argument of n rows that the loss does not read. Every microbatch then computes the
same value, and the mean of equal values is that value. `jax.grad` calls `jax.value_and_grad`, so
one function is replaced. `optax.microbatching.microbatch` is replaced by `jaxaccum.microbatch`, and
`jax.test_util.check_grads`, which takes no `jax.grad`, compares our gradient with JAX's.

What became of the gradients of each test is written to a file, one line of JSON a test.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import operator
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import jaxaccum
from jaxaccum.testing.bounds import normwise

APPLIED = "applied"
BOTH_RAISE = "JAX raises too"
NOT_TRACED = "JAX raises too where the loss is under jax.jit"
UNCOMPARED = "not compared: under another transformation"
ROUNDINGS = 100  # two programs of one loss differ by a few roundings, a wrong rule by far more


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run replaces gradients; the environment carries it into the process of pytest."""

    microbatches: int
    compare: bool
    log: pathlib.Path
    only: pathlib.Path | None

    def environment(self) -> dict[str, str]:
        """The settings as variables."""
        values = dataclasses.asdict(self)
        return {"FOREIGN_" + name.upper(): str(value or "") for name, value in values.items()}

    @classmethod
    def read(cls) -> Settings:
        """The settings of this process."""
        variables = {
            field.name: os.environ["FOREIGN_" + field.name.upper()]
            for field in dataclasses.fields(cls)
        }
        return cls(
            microbatches=int(variables["microbatches"] or 0),
            compare=bool(variables["compare"]),
            log=pathlib.Path(variables["log"]),
            only=pathlib.Path(variables["only"]) if variables["only"] else None,
        )


@dataclasses.dataclass
class Calls:
    """What became of the gradients that one test took."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    refused: list[str] = dataclasses.field(default_factory=list)
    different: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Replacement:
    """What stands in the place of JAX's and optax's functions; it counts its calls."""

    settings: Settings
    own: Callable[..., Any]
    own_microbatch: Callable[..., Any]
    own_check_grads: Callable[..., Any]
    calls: Calls = dataclasses.field(default_factory=Calls)

    def value_and_grad(
        self,
        fun: Any,
        argnums: Any = 0,
        has_aux: Any = False,
        holomorphic: Any = False,
        allow_int: Any = False,
        reduce_axes: Any = (),
    ) -> Callable[..., Any]:
        """In the place of `jax.value_and_grad`: its signature, its errors."""
        own = self.own(fun, argnums, has_aux, holomorphic, allow_int, reduce_axes)
        reason = "holomorphic=True" if holomorphic else None
        reason = "allow_int=True" if allow_int else reason

        @functools.wraps(own)
        def gradient(*args: Any, **kwargs: Any) -> Any:
            accumulated = functools.partial(self.accumulated, fun, argnums, has_aux)
            jitted = self.own(_jitted(fun), argnums, has_aux)
            return self.call(accumulated, own, jitted, reason, args, kwargs)

        return gradient

    def accumulated(self, fun: Any, argnums: Any, has_aux: bool, *args: Any, **kwargs: Any) -> Any:
        """The gradient over n microbatches, each of one row that the loss does not read."""

        def loss(*args_and_row: Any, **kwargs: Any) -> Any:
            output = fun(*args_and_row[:-1], **kwargs)
            if not has_aux:
                return output
            value, aux = output
            return value, jax.tree.map(_same, aux)

        count = self.settings.microbatches
        function = jaxaccum.value_and_grad(
            loss,
            _positive(argnums, len(args)),
            has_aux,
            num_microbatches=count,
            in_axes=(*(None for _ in args), 0),
        )
        return function(*args, np.zeros(count, np.float32), **kwargs)

    def microbatch(
        self,
        fun: Any,
        argnums: Any,
        microbatch_size: int | None,
        accumulator: Any = None,
        *,
        argnames: Any = (),
        in_axes: Any = 0,
        num_real_microbatches: Any = None,
    ) -> Callable[..., Any]:
        """In the place of `optax.microbatching.microbatch`, which splits a batch by strides."""
        if microbatch_size is None:
            return fun
        import optax.microbatching as microbatching

        accumulator = accumulator or microbatching.AccumulationType.SUM
        argnums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
        argnames = (argnames,) if isinstance(argnames, str) else tuple(argnames)
        axes = (in_axes,) * (len(argnums) + len(argnames)) if isinstance(in_axes, int) else in_axes
        own = self.own_microbatch(
            fun,
            argnums,
            microbatch_size,
            accumulator,
            argnames=argnames,
            in_axes=axes,
            num_real_microbatches=num_real_microbatches,
        )
        reason = None if num_real_microbatches is None else "num_real_microbatches"

        def divided(*args: Any, **kwargs: Any) -> Any:
            named = [kwargs.pop(name) for name in argnames]
            whole: list[Any] = [None] * len(args)
            for number, axis in zip(argnums, axes, strict=False):
                whole[number] = axis

            def tagged(*everything: Any) -> Any:
                given, rows = everything[: len(args)], everything[len(args) :]
                output = fun(*given, **dict(zip(argnames, rows, strict=True)), **kwargs)
                return jax.tree.map(_tag, accumulator, output)

            function = jaxaccum.microbatch(
                tagged,
                microbatch_size=microbatch_size,
                in_axes=(*whole, *axes[len(argnums) :]),
                split="strided",
            )
            return function(*args, *named)

        @functools.wraps(fun)
        def microbatched(*args: Any, **kwargs: Any) -> Any:
            return self.call(divided, own, own, reason, args, kwargs)

        return microbatched

    def check_grads(
        self,
        f: Any,
        args: Any,
        order: int,
        modes: Any = ("fwd", "rev"),
        *tolerances: Any,
        **named: Any,
    ) -> None:
        """In the place of `jax.test_util.check_grads`: our gradient against JAX's.

        JAX's own check, of its gradients against differences, runs in the run with JAX's gradients.
        """
        if not self.settings.microbatches:
            self.own_check_grads(f, args, order, modes, *tolerances, **named)
        numbers = tuple(i for i, x in enumerate(args) if _differentiable(x))
        if "rev" not in modes or not numbers:
            return
        loss = functools.partial(_projected, f)
        ours, own = (g(loss, numbers)(*args) for g in (self.value_and_grad, self.own))
        if difference := _difference(ours, own):
            raise AssertionError(f"the gradient differs from JAX's: {difference}")

    def call(
        self,
        ours: Callable[..., Any],
        own: Callable[..., Any],
        jitted: Callable[..., Any],
        reason: str | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Ours, where it applies. Where both raise, the error is JAX's, as the test expects."""
        if reason or not self.settings.microbatches:
            self.calls.counts[reason or APPLIED] += 1
            return own(*args, **kwargs)
        try:
            result = ours(*args, **kwargs)
        except Exception as error:
            failure = error
        else:
            self.calls.counts[APPLIED] += 1
            if self.settings.compare:
                self.compare(result, own, args, kwargs)
            return result
        try:
            result = own(*args, **kwargs)
        except Exception:
            self.calls.counts[BOTH_RAISE] += 1
            raise
        try:
            jitted(*args, **kwargs)
        except Exception as error:
            if type(error) is type(failure):
                self.calls.counts[NOT_TRACED] += 1
                return result
        self.calls.counts[APPLIED] += 1
        self.calls.refused.append(f"{type(failure).__name__}: {_first_line(failure)}")
        raise failure

    def compare(
        self, result: Any, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note where our value, gradient or types differ from JAX's."""
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(result)):
            self.calls.counts[UNCOMPARED] += 1
            return
        if difference := _difference(result, own(*args, **kwargs)):
            self.calls.different.append(difference)


def _positive(argnums: Any, count: int) -> Any:
    """The same of `count` arguments, where one more follows them."""
    if isinstance(argnums, Sequence):
        return tuple(_positive(number, count) for number in argnums)
    return range(count)[operator.index(argnums)]


def _same(x: Any) -> Any:
    """The tag of what is the same in every microbatch: a mean where it can have a gradient."""
    inexact = jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return jaxaccum.Mean(x, 1) if inexact else jaxaccum.Last(x)


def _jitted(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A function under `jax.jit`, of arguments that need not be arrays."""

    @functools.wraps(fun)
    def jitted(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        numbers = jax.Array | np.ndarray | np.generic | float | complex
        places = [i for i, x in enumerate(leaves) if isinstance(x, numbers)]

        def traced(*arrays: Any) -> Any:
            given = dict(zip(places, arrays, strict=True))
            every = [given.get(i, x) for i, x in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(structure, every)
            return fun(*args, **kwargs)

        return jax.jit(traced)(*(leaves[i] for i in places))

    return jitted


def _tag(accumulation: Any, output: Any) -> Any:
    tags = {
        "SUM": jaxaccum.Sum,
        "MEAN": lambda x: jaxaccum.Mean(x, 1),
        "RUNNING_MEAN": lambda x: jaxaccum.Mean(x, 1),
        "CONCAT": jaxaccum.Concat,
    }
    return tags[accumulation.name](output)


def _differentiable(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and len(_inexact(tree)) == len(leaves)


def _projected(f: Callable[..., Any], *args: Any) -> Any:
    """A number that depends on every output of `f`: the sum of all, each times a number of its
    own."""
    parts = []
    for x in _inexact(f(*args)):
        weights = jnp.cos(jnp.arange(jnp.size(x), dtype=jnp.float32)).reshape(jnp.shape(x))
        parts.append(jnp.sum(jnp.real(x * weights.astype(jnp.result_type(x))).astype(jnp.float32)))
    return sum(parts[1:], parts[0])


def _difference(result: Any, expected: Any) -> str | None:
    """How a result differs from JAX's: in structure, types or numbers; None where it does not."""
    if jax.tree.structure(result) != jax.tree.structure(expected):
        return f"structure {jax.tree.structure(result)} for {jax.tree.structure(expected)}"
    ours, theirs = (
        [jax.typeof(x).str_short() for x in jax.tree.leaves(y)] for y in (result, expected)
    )
    if ours != theirs:
        return f"types {ours} for {theirs}"
    ours, theirs = (_inexact(x) for x in (result, expected))
    roundings = ROUNDINGS * max((float(jnp.finfo(x.dtype).eps) for x in theirs), default=0.0)
    error = normwise(ours, theirs)
    return f"normwise {error:.1e}" if error > roundings else None


def _inexact(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


replacement: Replacement | None = None


def pytest_configure() -> None:
    """Replace the functions before any test file is imported, which may take them by name."""
    global replacement
    import jax._src.api as api
    import jax._src.test_util as internal
    import jax.test_util as public
    import optax.microbatching._microbatching as microbatching

    own = api.value_and_grad, microbatching.microbatch, public.check_grads
    replacement = Replacement(Settings.read(), *own)
    jax.value_and_grad = api.value_and_grad = replacement.value_and_grad
    microbatching.microbatch = replacement.microbatch
    for module in (public, internal):
        vars(module)["check_grads"] = replacement.check_grads


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that the file of node ids names."""
    assert replacement is not None
    if replacement.settings.only is None:
        return
    wanted = set(replacement.settings.only.read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    items[:] = [item for item in items if item.nodeid in wanted]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """One line for each test that ran, with its outcome and what became of its gradients."""
    assert replacement is not None
    report = yield
    if call.when == "setup":
        replacement.calls = Calls()
    if call.when == "call" or (call.when == "setup" and not report.passed):
        message = (
            ""
            if call.excinfo is None
            else f"{call.excinfo.typename}: {_first_line(call.excinfo.value)}"
        )
        line = {"test": item.nodeid, "outcome": report.outcome, "message": message}
        with replacement.settings.log.open("a") as log:
            log.write(json.dumps(line | vars(replacement.calls)) + "\n")
    return report
