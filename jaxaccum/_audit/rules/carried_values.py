"""What the body of a scan does with a carried value: adds to it, writes to it, counts with it, or
anything else."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._jaxpr.compat import scan_arity


@dataclasses.dataclass(frozen=True)
class Scan:
    """The parameters of a scan, in the words of either version of JAX."""

    eqn: Any

    @property
    def counts(self) -> tuple[int, int]:
        """How many constants and how many carried values it has."""
        return scan_arity(self.eqn.params)

    @property
    def body(self) -> Any:
        body = self.eqn.params["jaxpr"]
        return getattr(body, "jaxpr", body)

    @property
    def length(self) -> int:
        return self.eqn.params["length"]


@dataclasses.dataclass(frozen=True)
class Role:
    """A carried value that the body only adds to, only writes to, or only counts with: `what` goes
    in at each step."""

    name: str
    what: Any


def roles_of(scan: Scan) -> dict[int, Role]:
    """The carried values that are no state, each with what goes into it."""
    consts, carried = scan.counts
    body = scan.body
    users: dict[Any, list[Any]] = {}
    for eqn in body.eqns:
        for v in eqn.invars:
            if not isinstance(v, jex.Literal):
                users.setdefault(v, []).append(eqn)
    given = [v for v in body.outvars if not isinstance(v, jex.Literal)]
    found = {
        i: _role(users, given, body.invars[consts + i], body.outvars[i]) for i in range(carried)
    }
    return {i: role for i, role in found.items() if role is not None}


def _role(users: dict[Any, list[Any]], given: list[Any], v: Any, out: Any) -> Role | None:
    """What becomes of a carried value on its way from the body's operand to its result."""
    if _counts(users.get(v, []), out) and given.count(out) == 1:
        return Role("count", None)
    role = None
    while v is not out:
        uses = users.get(v, [])
        if len(uses) != 1 or v in given or uses[0].invars.count(v) != 1:
            return None
        (eqn,) = uses
        if eqn.primitive.name == "convert_element_type" and _same_class(eqn):
            pass
        elif role is None and (
            eqn.primitive.name in ("add", "add_any")
            or (eqn.primitive.name == "sub" and eqn.invars[0] is v)
        ):
            role = Role("sum", next(w for w in eqn.invars if w is not v))
        elif (
            role is None
            and eqn.primitive.name in ("dynamic_update_slice", "scatter")
            and eqn.invars[0] is v
        ):
            role = Role("write", None)
        else:
            return None
        (v,) = eqn.outvars
    return role if given.count(out) == 1 and not users.get(out) else None


def _counts(uses: list[Any], out: Any) -> bool:
    """Whether a value is a counter: read anywhere, and one more at the next step."""
    return len(uses) > 1 and any(
        e.primitive.name == "add" and _is_one(e.invars[1]) and e.outvars[0] is out for e in uses
    )


def _same_class(eqn: Any) -> bool:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    return jnp.issubdtype(old, jnp.inexact) == jnp.issubdtype(new, jnp.inexact)


def _is_one(v: Any) -> bool:
    return isinstance(v, jex.Literal) and v.val == 1
