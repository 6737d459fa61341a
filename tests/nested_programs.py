"""Random nested programs: a drawn loss is a tree of steps whose text is Python, and runs exactly as it is printed.

Every step maps activations `h` of shape (rows, 3) to others. A step is a line of the tables in `nested_words`, or one
of JAX's own transformations and loops around steps of its own. Operands are drawn for each: parameters, the same one
again, values computed from parameters, constants, activations and integers, in any order.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax
from nested_words import COLLECTIVES, COMPUTED, CONDITIONS, LEAVES, LOSSES, PATHS, SCOPE

DEPTH = 3
_STEPS = (("nest", "nest", "leaf", "let"), ("nest", "leaf", "leaf", "let"), ("nest", "leaf", "leaf", "leaf"))
"""What a step is, by its depth: `let` names a computed value for the steps after it."""

HEADER = """\
psum = lambda x: lax.psum(x, "microbatch")
pmean = lambda x: lax.pmean(x, "microbatch")
pmax = lambda x: lax.pmax(x, "microbatch")
gather = lambda x: lax.all_gather(x, "microbatch", tiled=True)
"""

Choose = Callable[[Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: the name of its kind, the operands it reads, the steps inside it, and its lines of Python."""

    kind: str
    operands: tuple[str, ...]
    lines: tuple[str, ...]
    inner: tuple[Step, ...] = ()

    def walk(self, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Step]]:
        """Every step with the kinds that it stands in, outermost first."""
        yield above, self
        for step in self.inner:
            yield from step.walk((*above, self.kind))


@dataclasses.dataclass(frozen=True)
class Program:
    """A loss of `p`, a dict of parameters, and `batch`."""

    steps: tuple[Step, ...]
    loss: str
    coupled: bool = False

    def __repr__(self) -> str:
        body = ['h = batch["x"]', *_lines(self.steps), f"return {self.loss}"]
        text = "def loss(p, batch):\n" + textwrap.indent("\n".join(body), "    ")
        return (HEADER + text) if self.coupled else text

    def walk(self) -> Iterator[tuple[tuple[str, ...], Step]]:
        """Every step with the kinds that it stands in."""
        for step in self.steps:
            yield from step.walk()


def define(text: str, **names: Any) -> Callable[[Any, Any], Any]:
    """The loss that a text defines; `names` say what `Mean`, `Sum` and the collectives mean in it."""
    space: dict[str, Any] = {"jax": jax, "jnp": jnp, "lax": lax}
    exec(compile(text, "<program>", "exec"), space)
    space.update(names)
    return space["loss"]


@dataclasses.dataclass(frozen=True)
class Scope:
    """What a block may read: expressions by kind. Kinds are the letters of `nested_words`."""

    names: Mapping[str, tuple[str, ...]]
    depth: int = 0
    path: tuple[str, ...] = ()
    collectives: bool = False

    def having(self, kind: str, *names: str) -> Scope:
        """The same scope with more to read."""
        return dataclasses.replace(self, names={**self.names, kind: (*self.names.get(kind, ()), *names)})

    def inside(self, *, closed: bool = False, collectives: bool = True) -> Scope:
        """The scope of a block one deeper; a closed one sees nothing of what is outside."""
        return Scope(
            names={} if closed else self.names,
            depth=self.depth + 1,
            path=self.path[1:],
            collectives=self.collectives and collectives,
        )

    def fits(self, template: str) -> bool:
        """Whether there is something to read for every hole."""
        return all(self.names.get(kind) for kind in _HOLE.findall(template))


_HOLE = re.compile(r"\{(\w)\}")


class Writer:
    """Draws the parts of one program by `choose`, which picks one of the options that it is given."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.count = 0

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def fill(self, template: str, scope: Scope, *, computed: bool = True) -> tuple[str, tuple[str, ...]]:
        """A template with operands for its holes; every second time a hole is filled as the one before of its kind."""
        operands: list[str] = []
        last: dict[str, str] = {}

        def operand(match: re.Match[str]) -> str:
            kind = match[1]
            if kind not in last or self.choose((False, True)):
                last[kind] = self.operand(kind, scope, computed=computed)
            operands.append(last[kind])
            return _in_parentheses(last[kind])

        return _HOLE.sub(operand, template), tuple(operands)

    def operand(self, kind: str, scope: Scope, *, computed: bool = True) -> str:
        """An expression of a kind: something as it is, or computed from others that are as they are."""
        options = [template for template in COMPUTED.get(kind, ()) if scope.fits(template)]
        raw = scope.names.get(kind, ())
        if raw and not (options and computed and self.choose((False, False, True))):
            return self.choose(raw)
        return self.fill(self.choose(options), scope, computed=False)[0]

    def operands(self, scope: Scope, kinds: Sequence[str], most: int = 3) -> list[tuple[str, str]]:
        """A few operands with their kinds; after the first, every second one is one of those before, once more."""
        drawn: list[tuple[str, str]] = []
        for _ in range(self.choose(range(1, most + 1))):
            if drawn and self.choose((False, True)):
                drawn.append(self.choose(drawn))
            else:
                kind = self.choose([kind for kind in kinds if _readable(kind, scope)])
                drawn.append((kind, self.operand(kind, scope)))
        return drawn

    def block(self, scope: Scope, sizes: Sequence[int] = (1, 1, 2)) -> tuple[Step, ...]:
        """A few steps, one after the other; what one of them computes for later ones is in their scope."""
        steps: list[Step] = []
        for index in range(self.choose(sizes)):
            step, scope = self.step(scope, first=index == 0)
            steps.append(step)
        return tuple(steps)

    def step(self, scope: Scope, *, first: bool) -> tuple[Step, Scope]:
        """One step, and the scope after it."""
        if scope.depth < DEPTH:
            if first and scope.path:
                return NESTS[scope.path[0]](self, scope)
            match self.choose(_STEPS[scope.depth]):
                case "nest":
                    return NESTS[self.choose(_OFTEN)](self, dataclasses.replace(scope, path=()))
                case "let":
                    return self.let(scope)
        return self.leaf(scope), scope

    def let(self, scope: Scope) -> tuple[Step, Scope]:
        """A value computed once, and read by later steps as parameters are."""
        kind = self.choose([kind for kind in "mmsv" if _readable(kind, scope)])
        name = self.fresh("w")
        templates = [template for template in COMPUTED[kind] if scope.fits(template)]
        text, operands = self.fill(self.choose(templates), scope, computed=False)
        return Step("let", operands, (f"{name} = {text}",)), scope.having(kind, name, name)

    def leaf(self, scope: Scope) -> Step:
        """A step of one line, from the tables."""
        table = COLLECTIVES if scope.collectives and self.choose((False, False, True)) else LEAVES
        name = self.choose([name for name, template in table.items() if scope.fits(template)])
        text, operands = self.fill(table[name], scope)
        return Step(name, operands, tuple(text.split("\n")))


def _in_parentheses(text: str) -> str:
    """So that `0.5 * a` can be indexed: whatever is neither a name, nor a call, nor indexed already."""
    node = ast.parse(text, mode="eval").body
    return text if isinstance(node, ast.Name | ast.Call | ast.Subscript | ast.Attribute) else f"({text})"


def _readable(kind: str, scope: Scope) -> bool:
    return bool(scope.names.get(kind)) or any(scope.fits(template) for template in COMPUTED.get(kind, ()))


def _lines(steps: Sequence[Step]) -> list[str]:
    lines: list[str] = []
    for step in steps:
        lines.extend(step.lines)
    return lines


def _function(name: str, names: Sequence[str], steps: Sequence[Step], result: str = "h") -> list[str]:
    body = [f"    {line}" for line in [*_lines(steps), f"return {result}"]]
    return [f"def {name}({', '.join(names)}):", *body]


# -- functions of operands --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """Functions of some operands and `h`, each with its own steps, and how they are called.

    In `text`, `{functions}` are their names, `{args}` the operands, and `{m}` and others are holes.
    """

    kind: str
    text: tuple[str, ...]
    functions: int = 1
    closed: bool = False

    def __call__(self, writer: Writer, scope: Scope) -> tuple[Step, Scope]:
        drawn = writer.operands(scope, "mmmmmsvqkir")
        names = [writer.fresh(kind) for kind, _ in drawn]
        values = [value for _, value in drawn]
        place = writer.choose(range(len(drawn) + 1))
        within = scope.inside(closed=self.closed, collectives=self.kind in ("jit", "checkpoint"))
        for name, (kind, value) in zip(names, drawn, strict=True):
            within = within.having(kind, name, name, *(() if self.closed else (value,)))
        within = within.having("k", "h")
        names.insert(place, "h")
        args = ", ".join([*values[:place], "h", *values[place:]])
        functions, lines, inner = [], [], []
        for _ in range(self.functions):
            functions.append(writer.fresh("f"))
            steps = writer.block(within)
            inner.extend(steps)
            lines.extend(_function(functions[-1], names, steps))
        text = writer.choose(self.text).replace("{functions}", ", ".join(functions)).replace("{args}", args)
        if "{condition}" in text:
            options = [condition for condition in CONDITIONS if scope.fits(condition)]
            text = text.replace("{condition}", writer.choose(options))
        call, others = writer.fill(text, scope)
        step = Step(self.kind, (*values, *others), (*lines, *call.split("\n")), tuple(inner))
        return step, scope


_VJP = "g = jax.custom_vjp({functions})\ng.defvjp(lambda *xs: ({functions}(*xs), xs), lambda xs, ct: %s)\nh = g({args})"
_JVP = "g = jax.custom_jvp({functions})\ng.defjvp(lambda xs, ts: %s)\nh = g({args})"
CALLS = [
    Call("jit", ("h = jax.jit({functions})({args})",)),
    Call(
        "checkpoint",
        (
            "h = jax.checkpoint({functions})({args})",
            "h = jax.checkpoint({functions}, policy=jax.checkpoint_policies.dots_saveable)({args})",
            "h = jax.checkpoint({functions}, prevent_cse=False)({args})",
        ),
    ),
    Call(
        "custom_vjp",
        (_VJP % "jax.vjp({functions}, *xs)[1](ct)", _VJP % "jax.vjp({functions}, *xs)[1](0.5 * ct)"),
        closed=True,
    ),
    Call("custom_jvp", (_JVP % "jax.jvp({functions}, xs, ts)",), closed=True),
    Call("cond", ("h = lax.cond({condition}, {functions}, {args})",), functions=2),
    Call("switch", ("h = lax.switch({i} % 3, [{functions}], {args})",), functions=3),
]


# -- loops ------------------------------------------------------------------------------------------------------------

SLICES = {2: {"s": "m", "q": "v", "o": "i"}, 3: {"m": "v", "n": "i"}}
"""By the length of a loop: what may be scanned, and the kind of a slice of it."""


def _scanned(writer: Writer, scope: Scope) -> tuple[int, list[tuple[str, str]]]:
    """The length of a loop and its xs, of which one at least is no range of integers."""
    length = writer.choose((2, 2, 3)) if _readable("s", scope) else 3
    kinds = {2: "sssq", 3: "mmm"}[length]
    first = writer.operands(scope, kinds, most=2)
    if writer.choose((False, False, True)):
        first.insert(writer.choose(range(len(first) + 1)), ("on"[length - 2], f"jnp.arange({length})"))
    return length, first


def _with_slices(scope: Scope, names: Sequence[str], xs: Sequence[tuple[str, str]], length: int) -> Scope:
    """The scope of a loop's body: slices, and again what they are slices of."""
    for name, (kind, value) in zip(names, xs, strict=True):
        scope = scope.having(SLICES[length][kind], name, name, name)
        scope = scope.having(kind, value) if kind in "sqm" else scope
    return scope


def _tuple(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"


def scan(writer: Writer, scope: Scope) -> tuple[Step, Scope]:
    """Carries, xs and what is closed over, in any order; the last matrix of a carry is in the scope of later steps."""
    length, xs = _scanned(writer, scope)
    slices = [writer.fresh(SLICES[length][kind]) for kind, _ in xs]
    carried = writer.operands(scope, "mmvki", most=2) if writer.choose((False, True)) else []
    names = [writer.fresh(kind) for kind, _ in carried]
    place = writer.choose(range(len(carried) + 1))
    within = _with_slices(scope.inside(), slices, xs, length).having("k", "h")
    for name, (kind, value) in zip(names, carried, strict=True):
        within = within.having(kind, name, name, value)
    steps = writer.block(within)
    after = [_carried_on(writer, name, kind) for name, (kind, _) in zip(names, carried, strict=True)]
    values = [_as_carry(value, kind) for kind, value in carried]
    for parts, part in ((names, "h"), (values, "h"), (after, "h")):
        parts.insert(place, part)
    c, f, ys = writer.fresh("c"), writer.fresh("f"), writer.choose(("None", "None", "h"))
    unpacked = Step("unpack", (), (f"{_tuple(names)} = {c}", f"{_tuple(slices)} = {c}s"))
    body = _function(f, (c, f"{c}s"), (unpacked, *steps), f"{_tuple(after)}, {ys}")
    how = writer.choose(("", "", ", reverse=True", ", unroll=2"))
    lines = [*body, f"{c}, {c}s = lax.scan({f}, {_tuple(values)}, {_tuple([value for _, value in xs])}{how})"]
    lines.append(f"{_tuple(names)} = {c}")
    lines.extend([f"h = 0.7 * h + 0.3 * {c}s.mean(0)"] if ys == "h" else [])
    operands = tuple(value for _, value in [*carried, *xs])
    for name, (kind, _) in zip(names[:place] + names[place + 1 :], carried, strict=True):
        scope = scope.having(kind, name)
    return Step("scan", operands, tuple(lines), steps), scope


def _as_carry(value: str, kind: str) -> str:
    return f"jnp.int32({value})" if kind == "i" else value


def _carried_on(writer: Writer, name: str, kind: str) -> str:
    return f"{name} + 1" if kind == "i" else writer.choose((name, f"0.9 * {name}", f"jnp.tanh({name})"))


def fori(writer: Writer, scope: Scope) -> tuple[Step, Scope]:
    """A loop with an index whose operands are all closed over."""
    f, index = writer.fresh("f"), writer.fresh("i")
    steps = writer.block(scope.inside().having("i", index, index).having("k", "h"))
    body = _function(f, (index, "h"), steps)
    length = writer.choose((1, 2, 3))
    return Step("fori", (), (*body, f"h = lax.fori_loop(0, {length}, {f}, h)"), steps), scope


@dataclasses.dataclass(frozen=True)
class Spread:
    """A map over stacked operands: the results' mean."""

    kind: str
    text: str

    def __call__(self, writer: Writer, scope: Scope) -> tuple[Step, Scope]:
        length, xs = _scanned(writer, scope)
        names = [writer.fresh(SLICES[length][kind]) for kind, _ in xs]
        f = writer.fresh("f")
        within = _with_slices(scope.inside(collectives=False), names, xs, length).having("k", "h")
        steps = writer.block(within)
        unpacked = Step("unpack", (), (f"{_tuple(names)} = s",))
        body = _function(f, ("s", "h=h"), (unpacked, *steps))
        values = [value for _, value in xs]
        call = self.text.replace("{function}", f).replace("{xs}", _tuple(values))
        return Step(self.kind, tuple(values), (*body, f"h = {call}.mean(0)"), steps), scope


@dataclasses.dataclass(frozen=True)
class Rows:
    """A map over examples, each a batch of one row."""

    kind: str
    text: str

    def __call__(self, writer: Writer, scope: Scope) -> tuple[Step, Scope]:
        rows = [("k", "h"), *((kind, writer.choose(scope.names[kind])) for kind in "kr" if scope.names.get(kind))]
        names = ["h", *(writer.fresh(kind) for kind, _ in rows[1:])]
        within = scope.inside(collectives=False)
        within = dataclasses.replace(within, names={**within.names, "k": (), "r": ()})
        for name, (kind, _) in zip(names, rows, strict=True):
            within = within.having(kind, name)
        f, steps = writer.fresh("f"), ()
        steps = writer.block(within)
        unpacked = Step("unpack", (), (f"{', '.join(names)} = [x[None] for x in r]",))
        body = _function(f, ("r",), (unpacked, *steps), "h[0]")
        values = [value for _, value in rows]
        call = self.text.replace("{function}", f).replace("{xs}", f"({', '.join(values)},)")
        return Step(self.kind, tuple(values), (*body, f"h = {call}"), steps), scope


NESTS: dict[str, Callable[[Writer, Scope], tuple[Step, Scope]]] = {
    **{call.kind: call for call in CALLS},
    "scan": scan,
    "fori": fori,
    "map": Spread("map", "lax.map({function}, {xs})"),
    "vmap": Spread("vmap", "jax.vmap({function})({xs})"),
    "map_rows": Rows("map_rows", "lax.map({function}, {xs})"),
    "vmap_rows": Rows("vmap_rows", "jax.vmap({function})({xs})"),
}
_OFTEN = [*NESTS, "scan", "scan", "scan", "map", "jit", "checkpoint"]


# -- programs ---------------------------------------------------------------------------------------------------------


def compose(choose: Choose, *, coupled: bool = False) -> Program:
    """A program of one step or two at the top; a coupled one has a collective there at least."""
    writer = Writer(choose)
    scope = Scope(SCOPE, path=choose(PATHS), collectives=coupled)
    steps = list(writer.block(scope, (1, 2, 2)))
    if coupled:
        name = choose([*COLLECTIVES])
        text, operands = writer.fill(COLLECTIVES[name], scope)
        steps.insert(choose(range(len(steps) + 1)), Step(name, operands, tuple(text.split("\n"))))
    return Program(tuple(steps), writer.fill(choose(LOSSES), scope)[0], coupled)


@st.composite
def programs(draw: st.DrawFn, *, coupled: bool = False) -> Program:
    """Programs that JAX differentiates in reverse mode on the whole batch."""
    return compose(lambda options: draw(st.sampled_from(options)), coupled=coupled)
