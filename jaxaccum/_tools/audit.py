"""`audit` says before training whether a loss accumulates exactly, and why or where it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxaccum._audit.analysis import report_on
from jaxaccum._audit.lattice import FaultKind
from jaxaccum._audit.report import AuditReport
from jaxaccum._audit.traces import Loss, read
from jaxaccum._base.types import Fun, InAxes
from jaxaccum._program import entries_of_call
from jaxaccum._program.axes_by_name import by_position, check_keywords
from jaxaccum._tools.probe import probe as run_probe


def audit(
    fun: Fun,
    *args: Any,
    in_axes: InAxes = (None, 0),
    num_microbatches: int = 2,
    has_aux: bool = False,
    axis_name: str = "microbatch",
    probe: bool = False,
    **kwargs: Any,
) -> AuditReport:
    """Whether the accumulated gradient of a loss is the full batch's, and why or where it is not.

    The loss is traced at the batch's size and at the microbatch's, and both programs are walked
    together; nothing is compiled or computed. It asks whether the loss L is additive over the
    examples i, up to one normalizer::

        SUM    L = Σᵢ f(xᵢ)         MEAN   L = Σᵢ f(xᵢ) / n        RATIO  L = Σᵢ f(xᵢ) / Σᵢ w(xᵢ)

    and whether that is what its tag says. It decides, for every loss, what this tests for one
    batch::

        def exact(fun, params, batch):
            expected = jax.grad(full_batch(fun))(params, batch)
            ours = lambda n: grad(fun, num_microbatches=n)(params, batch)
            return all(ours(n) == expected for n in range(1, len(batch) + 1))

    Args:
        fun: the loss, as `value_and_grad` takes it.
        *args: its arguments, the whole batch included; arrays, or ``jax.ShapeDtypeStruct``.
        in_axes: one entry per argument, as in `value_and_grad`.
        num_microbatches: how many there will be.
        has_aux: whether `fun` returns ``(loss, aux)``; aux is judged too, but for `Stack`, `Last`
            and `Carry`.
        axis_name: the name of the loop's axis.
        probe: whether to compare numerically as well, in float64 on an unequal split. What the loss
            itself casts to fewer digits may differ by their rounding.
        **kwargs: the keyword arguments of `fun`.

    Returns:
        An `AuditReport`: ``verdict``, ``exact``, ``random``, ``findings``; printable;
        ``raise_if_inexact()``.

    Guarantees:
        Never exact when unsure: a primitive without a rule, a program that differs between the
        sizes, and every other doubt end in ``UNKNOWN``. Derivative rules of the user's own are
        traced and walked; JAX's are trusted.

    Raises:
        ValueError, TypeError: as `value_and_grad` does for the same arguments.

    Example:
        >>> import jax.numpy as jnp, jaxaccum
        >>> def loss(w, batch):
        ...     return jnp.sqrt(jnp.mean((batch["x"] @ w - batch["y"]) ** 2))
        >>> report = jaxaccum.audit(loss, jnp.ones(3), {"x": jnp.ones((8, 3)), "y": jnp.ones(8)})
        >>> str(report.verdict), report.exact
        ('COUPLED', False)
    """
    check_keywords(kwargs, in_axes, "audit", fun)
    axes = entries_of_call.assigned(in_axes, args, kwargs, fun)
    arguments = read(args, kwargs, axes, num_microbatches)
    report = report_on(Loss(fun, arguments, axis_name, has_aux), arguments.partition, axis_name)
    if not probe:
        return report
    coupled = any(finding.kind == FaultKind.COLLECTIVE for finding in report.findings)
    equal = num_microbatches if coupled else None
    fun, args, own = by_position(fun, args, kwargs, axes)
    found = run_probe(fun, args, in_axes=own, has_aux=has_aux, axis_name=axis_name, equal=equal)
    return dataclasses.replace(report, probe=found)
