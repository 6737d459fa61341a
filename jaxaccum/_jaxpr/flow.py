"""What flows from the arguments of a program into its results, followed forward in one pass.

Each value has a set of marks, an int whose bits they are. A result has the marks of what it is made
of:

    y = sin x       x: 0b01           y: 0b01
    z = y + w       w: 0b10           z: 0b11

Calls are followed equation by equation, and a scan until what it carries has no new marks. Of any
other equation with a program inside (a loop of unknown length, a branch, a custom rule) every
result has the marks of all operands. What differs between analyses is a rule for single equations.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import jax.extend.core as jex

from jaxaccum._jaxpr.compat import opened, scan_arity
from jaxaccum._jaxpr.equations import called
from jaxaccum._jaxpr.variables import bound

Marks = int
"""A set of marks: bit i is mark i."""
Rule = Callable[[jex.JaxprEqn, Marks], Marks]
"""``rule(equation, marks of all its operands) -> marks of each result``."""


def marks(jaxpr: jex.Jaxpr, arguments: Sequence[Marks], rule: Rule) -> list[Marks]:
    """The marks of the results; constants have none."""
    found = bound(jaxpr.invars, arguments)
    read = lambda v: 0 if isinstance(v, jex.Literal) else found.get(v, 0)
    for eqn in jaxpr.eqns:
        found |= bound(eqn.outvars, _of_results(eqn, list(map(read, eqn.invars)), rule))
    return list(map(read, jaxpr.outvars))


def _of_results(eqn: jex.JaxprEqn, operands: list[Marks], rule: Rule) -> list[Marks]:
    if (program := called(eqn)) is not None:
        return marks(opened(program)[0], operands, rule)
    if eqn.primitive.name == "scan":
        return _of_scan(eqn, operands, rule)
    together = functools.reduce(operator.or_, operands, 0)
    return [rule(eqn, together)] * len(eqn.outvars)


def _of_scan(eqn: jex.JaxprEqn, operands: list[Marks], rule: Rule) -> list[Marks]:
    """What a scan carries has new marks from the step on in which it gets them."""
    body, (n, k) = opened(eqn.params["jaxpr"])[0], scan_arity(eqn.params)
    consts, carry, xs = operands[:n], operands[n : n + k], operands[n + k :]
    while True:
        results = marks(body, [*consts, *carry, *xs], rule)
        further = list(map(operator.or_, carry, results[:k]))
        if further == carry:
            return [*carry, *results[k:]]
        carry = further
