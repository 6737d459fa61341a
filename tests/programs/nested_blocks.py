"""The nested steps: JAX's transformations and loops, around steps of their own.

Each takes a writer and a scope, and returns its step and the scope of the steps after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tests.programs.nested_words import CONDITIONS
from tests.programs.nested_writer import (
    WHAT_IS_NEXT,
    Operand,
    Scope,
    Step,
    Writer,
    function,
    joined,
    tupled,
)

Nest = Callable[[Writer, Scope], tuple[Step, Scope]]


def block(writer: Writer, scope: Scope, sizes: Sequence[int] = (1, 1, 2)) -> tuple[Step, ...]:
    """A few steps, one after the other."""
    steps: list[Step] = []
    for _ in range(writer.choose(sizes)):
        step, scope = next_step(writer, scope)
        scope = dataclasses.replace(scope, path=())
        steps.append(step)
    return tuple(steps)


def next_step(writer: Writer, scope: Scope) -> tuple[Step, Scope]:
    """One step, and the scope of those after it."""
    if scope.path:
        return NESTS[scope.path[0]](writer, scope)
    match writer.choose(WHAT_IS_NEXT[scope.depth]):
        case "nest":
            return NESTS[writer.choose(OFTEN)](writer, scope)
        case "let":
            return writer.let(scope)
        case _:
            return writer.leaf(scope), scope


# -- functions -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """Functions of `h` and some operands in any order, and how they are called.

    In `texts`, FUNCTIONS are their names, ARGS the arguments, and CONDITION is one of the words;
    letters in braces are holes. A closed function reads nothing but its arguments.
    """

    kind: str
    texts: tuple[str, ...]
    functions: int = 1
    closed: bool = False
    collectives: bool = False

    def __call__(self, writer: Writer, scope: Scope) -> tuple[Step, Scope]:
        drawn = writer.operands(scope, "mmmmmsvqkir", most=3)
        names = [writer.fresh(operand.kind) for operand in drawn]
        within = scope.inside(closed=self.closed, collectives=self.collectives).having("k", "h")
        for name, operand in zip(names, drawn, strict=True):
            outside = () if self.closed else (operand.text,)
            within = within.having(operand.kind, *[name] * 4, *outside)
        values = [operand.text for operand in drawn]
        place = writer.choose(range(len(drawn) + 1))
        arguments = _with_h(names, place)
        functions = [writer.fresh("f") for _ in range(self.functions)]
        lines: list[str] = []
        inner: list[Step] = []
        for f in functions:
            steps = block(writer, within)
            lines.extend(function(f, arguments, [*joined(steps), "return h"]))
            inner.extend(steps)
        call, others = self._call(writer, scope, functions, _with_h(values, place))
        lines.extend(call.split("\n"))
        return Step(self.kind, (*values, *others), tuple(lines), tuple(inner)), scope

    def _call(
        self, writer: Writer, scope: Scope, functions: list[str], arguments: list[str]
    ) -> tuple[str, list[str]]:
        text = writer.choose(self.texts)
        if "CONDITION" in text:
            text = text.replace("CONDITION", writer.choose(list(filter(scope.fits, CONDITIONS))))
        text, others = writer.fill_freely(text, scope)
        text = text.replace("FUNCTIONS", ", ".join(functions))
        return text.replace("ARGS", ", ".join(arguments)), others


def _with_h(parts: Sequence[str], place: int) -> list[str]:
    """The parts with `h` at a place among them."""
    return [*parts[:place], "h", *parts[place:]]


_VJP = """\
g = jax.custom_vjp(FUNCTIONS)
g.defvjp(lambda *xs: (FUNCTIONS(*xs), xs), lambda xs, ct: jax.vjp(FUNCTIONS, *xs)[1](%s))
h = g(ARGS)"""
_JVP = """\
g = jax.custom_jvp(FUNCTIONS)
g.defjvp(lambda xs, ts: jax.jvp(FUNCTIONS, xs, ts))
h = g(ARGS)"""
_SAVEABLE = "policy=jax.checkpoint_policies.dots_saveable"
CALLS = [
    Call("jit", ("h = jax.jit(FUNCTIONS)(ARGS)",), collectives=True),
    Call(
        "checkpoint",
        (
            "h = jax.checkpoint(FUNCTIONS)(ARGS)",
            f"h = jax.checkpoint(FUNCTIONS, {_SAVEABLE})(ARGS)",
            "h = jax.checkpoint(FUNCTIONS, prevent_cse=False)(ARGS)",
        ),
        collectives=True,
    ),
    Call("custom_vjp", (_VJP % "ct", _VJP % "0.5 * ct"), closed=True),
    Call("custom_jvp", (_JVP,), closed=True),
    Call("cond", ("h = lax.cond(CONDITION, FUNCTIONS, ARGS)",), functions=2),
    Call("switch", ("h = lax.switch({i} % 3, [FUNCTIONS], ARGS)",), functions=3),
]


# -- loops -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Xs:
    """What a loop scans over, and the names of its slices."""

    operands: list[Operand]
    slices: list[Operand]

    @property
    def values(self) -> list[str]:
        """The expressions that are scanned."""
        return [x.text for x in self.operands]

    @property
    def names(self) -> list[str]:
        """The names of the slices."""
        return [x.text for x in self.slices]

    def within(self, scope: Scope) -> Scope:
        """The scope of the loop's body: its slices, and again what they are slices of."""
        scope = scope.having("k", "h")
        for x in self.slices:
            scope = scope.having(x.kind, *[x.text] * 4)
        for x in self.operands:
            scope = scope.having(x.kind, x.text) if x.kind != "o" else scope
        return scope


SLICES = {2: {"s": "m", "q": "v", "o": "i"}, 3: {"m": "v", "o": "i"}}
"""By the length of a loop, what is scanned and the kind of its slices; `o` is a range."""


def scanned(writer: Writer, scope: Scope) -> Xs:
    """One or two operands of a length, perhaps with a range of integers among them."""
    length = writer.choose((2, 2, 3))
    operands = writer.operands(scope, {2: "sssq", 3: "m"}[length], most=2)
    if writer.choose((False, False, True)):
        place = writer.choose(range(len(operands) + 1))
        operands.insert(place, Operand("o", f"jnp.arange({length})"))
    kinds = [SLICES[length][x.kind] for x in operands]
    return Xs(operands, [Operand(kind, writer.fresh(kind)) for kind in kinds])


def scan(writer: Writer, scope: Scope) -> tuple[Step, Scope]:
    """A loop with xs, a carry and outputs; the last values of its carry are read by later steps."""
    xs = scanned(writer, scope)
    carried = writer.operands(scope, "mmvki", most=2) if writer.choose((False, True)) else []
    names = [Operand(x.kind, writer.fresh(x.kind)) for x in carried]
    within = xs.within(scope.inside(collectives=True))
    for name, x in zip(names, carried, strict=True):
        within = within.having(x.kind, *[name.text] * 4, x.text)
        scope = scope.having(x.kind, name.text)
    steps = block(writer, within)

    place = writer.choose(range(len(carried) + 1))
    state = tupled(_with_h([x.text for x in names], place))
    first = tupled(_with_h([_first(x) for x in carried], place))
    last = tupled(_with_h([_next(writer, x) for x in names], place))
    f, c, x = writer.fresh("f"), writer.fresh("c"), writer.fresh("x")
    y = writer.choose(("None", "None", "h"))
    body = [f"{state} = {c}", f"{tupled(xs.names)} = {x}", *joined(steps), f"return {last}, {y}"]
    how = writer.choose(("", "", ", reverse=True", ", unroll=2"))
    call = f"{state}, {x} = lax.scan({f}, {first}, {tupled(xs.values)}{how})"
    read = [f"h = 0.7 * h + 0.3 * {x}.mean(0)"] if y == "h" else []
    operands = (*(x.text for x in carried), *xs.values)
    return Step("scan", operands, (*function(f, (c, x), body), call, *read), steps), scope


def _first(carried: Operand) -> str:
    """The value before the loop: integers keep one dtype."""
    return f"jnp.int32({carried.text})" if carried.kind == "i" else carried.text


def _next(writer: Writer, carried: Operand) -> str:
    """The value after a turn."""
    name = carried.text
    if carried.kind == "i":
        return f"{name} + 1"
    return writer.choose((name, f"0.9 * {name}", f"jnp.tanh({name})"))


def fori(writer: Writer, scope: Scope) -> tuple[Step, Scope]:
    """A loop with an index; all of its operands are closed over."""
    f, index = writer.fresh("f"), writer.fresh("i")
    within = scope.inside(collectives=True).having("i", index, index).having("k", "h")
    steps = block(writer, within)
    body = function(f, (index, "h"), [*joined(steps), "return h"])
    length = writer.choose((1, 2, 3))
    return Step("fori", (), (*body, f"h = lax.fori_loop(0, {length}, {f}, h)"), steps), scope


@dataclasses.dataclass(frozen=True)
class Over:
    """A map over stacked operands; the mean of its results."""

    kind: str
    text: str

    def __call__(self, writer: Writer, scope: Scope) -> tuple[Step, Scope]:
        xs = scanned(writer, scope)
        steps = block(writer, xs.within(scope.inside()))
        f = writer.fresh("f")
        body = function(f, ("x", "h=h"), [f"{tupled(xs.names)} = x", *joined(steps), "return h"])
        call = self.text.format(function=f, xs=tupled(xs.values))
        return Step(self.kind, tuple(xs.values), (*body, f"h = {call}.mean(0)"), steps), scope


@dataclasses.dataclass(frozen=True)
class OverRows:
    """A map over examples, each of them a batch of one row."""

    kind: str
    text: str

    def __call__(self, writer: Writer, scope: Scope) -> tuple[Step, Scope]:
        kinds = [kind for kind in "kr" if scope.names.get(kind)]
        rows = [Operand(kind, writer.choose(scope.names[kind])) for kind in kinds]
        names = [Operand(x.kind, writer.fresh(x.kind)) for x in rows]
        within = scope.inside().without("k", "r").having("k", "h")
        for name in names:
            within = within.having(name.kind, name.text)
        steps = block(writer, within)
        f = writer.fresh("f")
        values = ["h", *(x.text for x in rows)]
        unpacked = ", ".join(["h", *(x.text for x in names)])
        first = f"{unpacked} = [x[None] for x in row]"
        body = function(f, ("row",), [first, *joined(steps), "return h[0]"])
        call = self.text.format(function=f, xs=f"({', '.join(values)},)")
        return Step(self.kind, tuple(values), (*body, f"h = {call}"), steps), scope


NESTS: dict[str, Nest] = {
    **{call.kind: call for call in CALLS},
    "scan": scan,
    "fori": fori,
    "map": Over("map", "lax.map({function}, {xs})"),
    "vmap": Over("vmap", "jax.vmap({function})({xs})"),
    "map_rows": OverRows("map_rows", "lax.map({function}, {xs})"),
    "vmap_rows": OverRows("vmap_rows", "jax.vmap({function})({xs})"),
}
OFTEN = [*NESTS, "scan", "scan", "scan", "map", "jit", "checkpoint"]
"""Loops over parameters, and what layers are wrapped in, are drawn more often than the rest."""
