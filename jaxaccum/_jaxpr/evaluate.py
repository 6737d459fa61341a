"""The one evaluator of jaxprs: equation by equation, with a rule for those that run in another way.

The rule says what an equation returns, of the values of its operands; or None, and JAX runs the
equation as it is. Three modules have a rule: `microbatch_index` gives ``axis_index`` a value,
`_coupled.trace` opens what holds a collective, `_coupled.collectives` resolves collectives.

    y = psum x      a rule for psum       y = x.sum(axis=0)
    z = sin y       none                  z = sin y

`running_sums` has an evaluator of its own. It runs all equations between two readers of a parameter
as one program, so that `derived_once` can derive equal ones together, and it passes more than
values from equation to equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.core
import jax.extend.core as jex

from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import ClosedJaxpr, anonymous
from jaxaccum._jaxpr.equations import constants_first
from jaxaccum._jaxpr.variables import Env, bound, read

Rule = Callable[[jex.JaxprEqn, list[Array]], Sequence[Array] | None]
"""``rule(equation, operands) -> results``, or None where the equation runs as it is."""


def evaluate(jaxpr: jex.Jaxpr, values: Sequence[Array], rule: Rule) -> list[Array]:
    """The outputs of a jaxpr without constants."""
    env: Env = bound(jaxpr.invars, values)
    for eqn in jaxpr.eqns:
        operands = read(env, eqn.invars)
        results = rule(eqn, operands)
        if results is None:
            results = unchanged(eqn, operands, jaxpr)
        env |= bound(eqn.outvars, results)
    return read(env, jaxpr.outvars)


def as_function(jaxpr: jex.Jaxpr | ClosedJaxpr, rule: Rule) -> Callable[..., list[Array]]:
    """A jaxpr inside of an equation, closed or not, as a function of its arguments."""
    program, consts = constants_first(jaxpr)
    return lambda *args: evaluate(program, [*consts, *args], rule)


def unchanged(eqn: jex.JaxprEqn, values: Sequence[Array], whole: jex.Jaxpr) -> list[Array]:
    """Evaluate one equation of `whole` as JAX does, by way of a jaxpr that holds it alone."""
    given: Env = {}
    for v, x in zip(eqn.invars, values, strict=True):
        if not isinstance(v, jex.Literal):
            given[v] = x
    single = whole.replace(
        constvars=[],
        invars=list(given),
        outvars=list(eqn.outvars),
        eqns=[eqn],
        debug_info=anonymous(whole),
    )
    return jax.core.eval_jaxpr(single, [], *given.values())
