"""Calls, branches and whatever has no rule of its own."""

from __future__ import annotations

import functools

import jax
import jax.core
import jax.extend.core as jex

from jaxaccum._audit import fixes
from jaxaccum._audit.cut_by_place import are_alike, told_apart
from jaxaccum._audit.lattice import (
    IRREGULAR,
    UNIT,
    FaultKind,
    Kind,
    Layout,
    Value,
    any_params,
    faults_of,
    fixed,
    origin_of,
    statistic,
)
from jaxaccum._audit.registry import rule
from jaxaccum._audit.rules.collectives import whole_batch_moments
from jaxaccum._audit.rules.elementwise import text_of
from jaxaccum._audit.rules.operands import (
    Faults,
    all_fixed,
    all_numbered,
    all_scalar,
    all_unscaled,
    all_with_faults,
    any_place,
    avals_of,
    both,
    common_scale,
    faulty,
    layouts_of,
    nonzero,
    once,
    params_at_both,
    terms_of,
    with_faults,
)
from jaxaccum._audit.walk import Op, Walk
from jaxaccum._base.types import Array
from jaxaccum._flax import batch_norm
from jaxaccum._jaxpr.compat import ClosedJaxpr, opened
from jaxaccum._jaxpr.equations import body_of, is_body
from jaxaccum._program import batch_keys


@rule(
    """
        jit pjit closed_call core_call core_closed_call remat remat2 checkpoint custom_lin
        run_state_inlined composite custom_vmap_call
    """,
    complete=True,
)
def call(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A function applied: its body, in place."""
    key = body_of(op.eqn)
    if key is None:
        return all_numbered(walk, unfollowed(walk, op, ins))
    body = op.params[key]
    if _is_whole_batch_moments(body):
        return whole_batch_moments(walk, op, body, ins)
    if _is_key_of_batch(body):
        return [fixed(faults=faults_of(ins), number=walk.fresh())]
    return walk.body(op, params_at_both(op, key), ins, cached=op.name in ("jit", "pjit"))


def _is_whole_batch_moments(body: jex.Jaxpr) -> bool:
    """Whether a call is that of our BatchNorm, whose algebra no rule could follow."""
    debug = opened(body)[0].debug_info
    return debug.func_name == "whole_batch_moments" and debug.func_filename == batch_norm.__file__


def _is_key_of_batch(body: jex.Jaxpr) -> bool:
    """Whether a call reads the key of the whole batch in one that knows a microbatch's rows."""
    debug = opened(body)[0].debug_info
    return debug.func_name == "key_of_batch" and debug.func_filename == batch_keys.__file__


@rule("call_hi_primitive", complete=True)
def composed(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """What jax 0.12 defines by simpler primitives: these, in place. A user's own has no rule."""
    if not all(both(op, _is_jaxs_own)):
        return all_numbered(walk, unfollowed(walk, op, ins))
    return walk.body(op, both(op, _expanded), ins, cached=False)


def _is_jaxs_own(eqn: jex.JaxprEqn) -> bool:
    return type(eqn.params["_prim"]).__module__.startswith("jax.")


def _expanded(eqn: jex.JaxprEqn) -> ClosedJaxpr:
    """The simpler primitives that define one."""
    prim = eqn.params["_prim"]
    return jax.make_jaxpr(prim.expand)(*prim.in_avals)


@rule("*")
def no_rule(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """A primitive without a rule: unknown, unless nothing that enters depends on the batch."""
    return unfollowed(walk, op, ins)


def unfollowed(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The results of an equation whose meaning is not known."""
    if op.num_outs == 0:
        return []
    if all_fixed(ins) and "callback" not in op.name and not op.eqn.effects:
        same = all_unscaled(ins) and _same_params(op)
        value = fixed(UNIT if same else IRREGULAR)
    elif ins and all(map(_is_wrong_already, ins)):
        value = statistic(ins[0].origin)
    else:
        value = walk.unknown(op, f"{_described(op)} has no rule")
    return [value] * op.num_outs


def _is_wrong_already(x: Value) -> bool:
    return x.kind is Kind.STATISTIC and bool(x.faults)


def _described(op: Op) -> str:
    """The name of a primitive, with that of what it calls."""
    given = op.params.get
    name = given("name") or given("target_name") or given("call_target_name")
    return f"{op.name} ({name})" if isinstance(name, str) else op.name


def _same_params(op: Op) -> bool:
    """Whether the parameters are the same at both sizes."""
    mine, other = both(op, _params_as_text)
    try:
        return bool(mine == other)
    except ValueError:  # arrays among them
        return False


def _params_as_text(eqn: jex.JaxprEqn) -> dict[str, object]:
    """The parameters, and of a body what it does."""
    return {k: text_of(v) if is_body(v) else v for k, v in eqn.params.items()}


# -- branches --------------------------------------------------------------------------------------


def join(walk: Walk, op: Op, x: Value, y: Value) -> Value:
    """What is true of a value that may be either."""
    if x == y:
        return x
    either = [x, y]
    joined = Value(
        faults=faults_of(either),
        params=any_params(either),
        origin=origin_of(either),
        scalar=all_scalar(either),
        by_order=any(v.by_order for v in either),
        own_place=all(v.own_place for v in either),
        number=x.number if x.number == y.number else walk.fresh(),
        known=x.known if x.known == y.known else None,
    )
    if all_fixed(either):
        return _joined_fixed(walk, op, joined, x, y)
    if not are_alike(either):
        faults = joined.faults | {told_apart(walk, op)}
        return joined.like(kind=Kind.STATISTIC, faults=faults, scalar=False)
    kinds, layouts, places = {x.kind, y.kind}, layouts_of(either), any_place(either)
    if kinds <= {Kind.FIXED, Kind.ROWS} and len(layouts) == 1 and not places:
        return joined.like(kind=Kind.ROWS, layout=layouts.pop(), terms=terms_of(either))
    if kinds <= {Kind.FIXED, Kind.TOTAL} and not places:
        own = [once(v) if v.fixed else v.terms for v in nonzero(either)]
        return joined.like(kind=Kind.TOTAL, terms=frozenset().union(*own))
    note = "values that depend on the batch in different ways meet"
    faults = joined.faults | faulty(walk, op, FaultKind.UNKNOWN, note)
    return joined.like(kind=Kind.STATISTIC, faults=faults, scalar=False)


def _joined_fixed(walk: Walk, op: Op, joined: Value, x: Value, y: Value) -> Value:
    """What is true of either of two values that are independent of the batch."""
    joined = joined.like(terms=fixed(common_scale([x, y])).terms)
    if (x.index, x.layout, x.columns) == (y.index, y.layout, y.columns):
        return joined.like(index=x.index, layout=x.layout, columns=x.columns)
    if any_place([x, y]):
        return with_faults(
            joined, faulty(walk, op, FaultKind.POSITION, "a position of an example enters")
        )
    return joined


@rule("cond", complete=True)
def cond(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """One of several bodies."""
    which, *operands = ins
    bodies = list(zip(*params_at_both(op, "branches"), strict=True))
    if which.known is not None:
        return walk.body(op, bodies[min(max(int(which.known), 0), len(bodies) - 1)], operands)
    branches = [walk.body(op, body, operands) for body in bodies]
    either = functools.partial(join, walk, op)
    outs = [functools.reduce(either, values) for values in zip(*branches, strict=True)]
    faults = which.faults | _chosen_by(walk, op, which)
    return all_numbered(walk, all_with_faults(outs, faults, params=which.params))


def _chosen_by(walk: Walk, op: Op, which: Value) -> Faults:
    """What is wrong with a branch that this value chooses."""
    faults: Faults = frozenset()
    if not which.fixed:
        kind = FaultKind.UNKNOWN if which.rows else FaultKind.COUPLING
        note = "a branch is chosen by the data of the batch"
        faults |= walk.couple(op, [which], kind=kind, note=note).faults
    if which.index is not None:
        note = "a branch is chosen by the position of an example"
        faults |= faulty(walk, op, FaultKind.POSITION, note)
    if which.fixed and not which.scale.trivial:
        note = "a branch is chosen by the batch size"
        faults |= faulty(walk, op, FaultKind.BATCH_SIZE, note)
    return faults


@rule("custom_linear_solve", complete=True)
def linear_solve(walk: Walk, op: Op, ins: list[Value]) -> list[Value]:
    """The solution of a linear system, by the solver that it comes with.

    Its gradient is by the others: the system itself, its transpose, and the solver of that. The
    cotangent of a solution that all examples share is a sum over them, so that the solver must be
    linear in it: an iteration that stops early is not.
    """
    counts, solution = op.params["const_lengths"], []
    faults: Faults = frozenset()
    for name in ("solve", "matvec", "vecmat", "transpose_solve"):
        bodies = both(op, lambda eqn, name=name: getattr(eqn.params["jaxprs"], name))
        if bodies[0] is None:
            continue
        before = sum(counts[: counts._fields.index(name)])
        consts = ins[before : before + getattr(counts, name)]
        outs = walk.body(op, bodies, [*consts, *(solution or ins[sum(counts) :])])
        solution = solution or outs
        faults |= faults_of(outs)
        if list(map(_place_of, outs)) != list(map(_place_of, solution)):
            note = f"the {name} of a custom_linear_solve mixes examples"
            faults |= faulty(walk, op, FaultKind.UNKNOWN, note)
    if all_fixed(solution) and any_params(ins) and not _is_solved_linearly(op):
        note = "the backward pass of a solver is linear in the cotangent only where it converges"
        faults |= {walk.fault(op, FaultKind.UNKNOWN, note, fix=fixes.DIRECT)}
    return all_with_faults(solution, faults)


def _is_solved_linearly(op: Op) -> bool:
    """Whether JAX can transpose the solver of the transposed system; True where there is none."""
    solver = op.params["jaxprs"].transpose_solve
    if solver is None:
        return True
    program, own = opened(solver)
    count, avals = op.params["const_lengths"].transpose_solve, avals_of(program.invars)
    solve = functools.partial(jax.core.eval_jaxpr, program, own)

    def transposed(*arrays: Array) -> object:
        consts, right = arrays[:count], arrays[count:]
        back = jax.linear_transpose(functools.partial(solve, *consts), *right)
        return back(solve(*arrays))

    jax.eval_shape(solve, *avals)  # what fails here is no matter of linearity
    try:
        jax.eval_shape(transposed, *avals)
    except Exception:  # JAX has no one error for what is not linear
        return False
    return True


def _place_of(x: Value) -> tuple[Kind, Layout | None]:
    """How a value depends on the batch, and where its examples lie."""
    return x.kind, x.layout
