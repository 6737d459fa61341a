"""What the body of a scan does with a carried value: adds, writes, counts, or anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._audit.rules.elementwise import holds
from jaxaccum._base.types import PyTree
from jaxaccum._jaxpr.compat import opened, scan_arity
from jaxaccum._jaxpr.variables import is_variable

Users = dict[jex.Var, list[jex.JaxprEqn]]
"""The equations that read each variable."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """The parameters of a scan, in the words of either version of JAX."""

    eqn: jex.JaxprEqn

    @property
    def counts(self) -> tuple[int, int]:
        """How many constants and how many carried values it has."""
        return scan_arity(self.eqn.params)

    @property
    def body(self) -> jex.Jaxpr:
        """The program of a step. A body that is one call (``jax.checkpoint``) is what it calls."""
        return _called(opened(self.eqn.params["jaxpr"])[0])

    @property
    def closed_over(self) -> Sequence[PyTree]:
        """The arrays that the body holds itself."""
        return opened(self.eqn.params["jaxpr"])[1]

    @property
    def length(self) -> int:
        return self.eqn.params["length"]


_CALLS = ("jit", "pjit", "remat", "remat2", "checkpoint")


def _called(body: jex.Jaxpr) -> jex.Jaxpr:
    """The program of the one call that a body is; else the body itself."""
    if len(body.eqns) != 1 or body.eqns[0].primitive.name not in _CALLS:
        return body
    (call,) = body.eqns
    inner, consts = opened(call.params["jaxpr"])
    given = list(filter(is_variable, call.invars))
    if consts or inner.constvars or len(set(given)) < len(call.invars):
        return body
    names = dict(zip([*given, *call.outvars], [*inner.invars, *inner.outvars], strict=True))
    renamed = lambda v: names.get(v, v) if is_variable(v) else v
    invars, outvars = list(map(renamed, body.invars)), list(map(renamed, body.outvars))
    return _called(body.replace(eqns=inner.eqns, invars=invars, outvars=outvars))


RoleName = Literal["state", "count", "sum", "write"]


@dataclasses.dataclass(frozen=True)
class Role:
    """What the body does with a carried value: it only adds, writes or counts, or anything else."""

    name: RoleName = "state"
    added: jex.Var | jex.Literal | None = None
    """What a sum adds at each step."""


def roles_of(scan: Scan) -> list[Role]:
    """The role of each carried value."""
    consts, carried = scan.counts
    body = scan.body
    users, results = _users(body), list(filter(is_variable, body.outvars))
    role = lambda v, out: _role(users, results, v, out)
    return list(map(role, body.invars[consts : consts + carried], body.outvars))


def role_of(body: jex.Jaxpr, v: jex.Var, out: jex.Var) -> Role:
    """The role of one value that goes into a program and comes out changed."""
    return _role(_users(body), list(filter(is_variable, body.outvars)), v, out)


def _users(body: jex.Jaxpr) -> Users:
    users: Users = {}
    for eqn in body.eqns:
        for v in filter(is_variable, eqn.invars):
            users.setdefault(v, []).append(eqn)
    return users


def _role(users: Users, results: list[jex.Var], v: jex.Var, out: jex.Var) -> Role:
    """What becomes of a carried value on its way from the body's operand to its result."""
    if results.count(out) != 1:
        return Role()
    if _counts(users.get(v, []), out):
        return Role("count")
    role = Role()
    while v is not out:
        uses = users.get(v, [])
        if len(uses) != 1 or v in results or uses[0].invars.count(v) != 1:
            return Role()
        (eqn,) = uses
        if not _changes_dtype(eqn):
            if role.name != "state" or (step := _step(eqn, v)).name == "state":
                return Role()
            role = step
        (v,) = eqn.outvars
    return Role() if users.get(out) else role


def _step(eqn: jex.JaxprEqn, v: jex.Var) -> Role:
    """What one equation does with a carried value that it alone reads."""
    name, first = eqn.primitive.name, eqn.invars[0] is v
    unsigned = jnp.issubdtype(getattr(v.aval, "dtype", float), jnp.unsignedinteger)
    if name in ("add", "add_any") or (name == "sub" and first and not unsigned):
        return Role("sum", eqn.invars[1 if first else 0])
    if name in ("dynamic_update_slice", "scatter") and first:
        return Role("write")
    return Role()


def _counts(uses: list[jex.JaxprEqn], out: jex.Var) -> bool:
    """Whether a value is a counter: read anywhere, and one more at the next step."""
    return len(uses) > 1 and any(_adds_one(eqn) and eqn.outvars[0] is out for eqn in uses)


def _adds_one(eqn: jex.JaxprEqn) -> bool:
    if eqn.primitive.name != "add":
        return False
    added = eqn.invars[1]
    return isinstance(added, jex.Literal) and added.val == 1


def _changes_dtype(eqn: jex.JaxprEqn) -> bool:
    """Whether an equation changes a dtype alone: not from inexact to integer, nor back, and not to
    one that may not hold the numbers."""
    if eqn.primitive.name != "convert_element_type":
        return False
    dtype = lambda v: v.aval.dtype
    old, new = dtype(eqn.invars[0]), dtype(eqn.outvars[0])
    inexact = lambda kind: jnp.issubdtype(kind, jnp.inexact)
    return inexact(old) == inexact(new) and holds(new, old)
