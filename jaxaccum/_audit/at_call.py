"""The audit at the call: while a transformation is traced, it says whether its function accumulates
exactly.

The call has traced the function at the size of a microbatch. One more trace, for the whole batch,
is all that the audit needs; nothing is computed.
"""

from __future__ import annotations

import dataclasses
import inspect
import linecache
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from jaxaccum._audit import fixes
from jaxaccum._audit.analysis import report_on
from jaxaccum._audit.folding import LARGEST, is_numeric
from jaxaccum._audit.nans import any_nan
from jaxaccum._audit.report import AuditReport, Finding, InexactError, InexactWarning, Verdict
from jaxaccum._audit.traces import Traced
from jaxaccum._base.source_lines import Frame, callers_depth
from jaxaccum._base.types import Array, Fun, WithStreams
from jaxaccum._jaxpr import structure
from jaxaccum._jaxpr.equations import mentions
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.program import Options, Program


def check(
    fun: Fun,
    options: Options,
    program: Program,
    arrays: Sequence[Array],
    argnums: Sequence[int] | None = None,
) -> None:
    """Warn or raise, as the options say, if the function does not accumulate exactly.

    `argnums` are the arguments that are differentiated; None says that any may be.
    """
    if options.audit is None or _is_whole(program):
        return
    fun = fun.fun if isinstance(fun, WithStreams) else fun
    report = _report(_Call(fun, program, arrays, argnums), options.axis_name)
    if not report.causes:
        return
    said = message(fun, report, program.slots)
    if options.audit == "raise":
        raise InexactError(f"{said}\n{report}")
    warnings.warn(said, InexactWarning, stacklevel=callers_depth())


def _is_whole(program: Program) -> bool:
    """Whether there is nothing to combine: one microbatch, on one device or of a loss that itself
    spans the devices.

    With one microbatch on each device, a BatchNorm over the devices has the whole batch's
    statistics.
    """
    return program.partition.num_microbatches == 1 and (
        not program.mesh_axes or _spans_devices(program)
    )


def _spans_devices(program: Program) -> bool:
    eqns = [
        eqn
        for one in program.traces
        for axis in program.mesh_axes
        for eqn in mentions(one.jaxpr, axis)
    ]
    return any(eqn.primitive.name not in _ON_ONE_DEVICE for eqn in eqns)


_ON_ONE_DEVICE = ("pvary", "pcast", "pbroadcast", "axis_index")
"""Primitives that name an axis of devices, and exchange nothing along it."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a transformation, as the audit's subject."""

    fun: Fun
    program: Program
    arrays: Sequence[Array]
    argnums: Sequence[int] | None

    @property
    def given(self) -> Sequence[Array]:
        return self.arrays[: self.program.num_arguments]

    @property
    def slots(self) -> Sequence[Slot]:
        return self.program.slots[: self.program.num_arguments]

    def differentiates(self, argnum: int | str | None) -> bool:
        return self.argnums is None or argnum in self.argnums

    def keeps_groups(self, size: int) -> bool:
        return self.program.partition.keeps_groups(size)

    def trace(self, size: int, count: int) -> Traced:
        """The program for one of `count` microbatches of `size` examples; the call's own is at
        hand."""
        own = count == self.program.partition.num_microbatches
        seen = self.program.observed.get(size) if own else None
        if seen is None:
            assert self.program.observe is not None
            seen = self.program.observe(size, count)
        return Traced(seen.trace.closed(seen.consts), seen.outputs, indexed=True)


# -- one report for a function and its shapes ------------------------------------------------------

_REPORTS: weakref.WeakKeyDictionary[Fun, dict[Any, AuditReport]] = weakref.WeakKeyDictionary()


def _report(call: _Call, axis_name: str) -> AuditReport:
    """The report, made once for a function, the shapes of its arguments and the program that it
    traced to."""
    key = (
        axis_name,
        call.program.mesh_axes,
        call.program.partition,
        call.argnums,
        _signature(call),
    )
    try:
        reports = _REPORTS.setdefault(call.fun, {})
        report = reports.get(key)
    # a callable without a hash or weak references, or a program that holds something without a hash
    except TypeError:
        return _made(call, axis_name)
    if report is None or (_assumes_no_nan(report) and any_nan(call.given)):
        if len(reports) >= _KEPT:
            reports.clear()
        report = reports[key] = _made(call, axis_name)
    return report


_KEPT = 64
"""How many reports are kept for one function."""


def _assumes_no_nan(report: AuditReport) -> bool:
    return any(finding.kind == "assumption" for finding in report.findings)


def _made(call: _Call, axis_name: str) -> AuditReport:
    """A new report. A fault of the audit does not stop a call that would run."""
    partition, mesh_axes = call.program.partition, call.program.mesh_axes
    try:
        return report_on(call, partition, axis_name, mesh_axes=mesh_axes, whole_runs=False)
    except Exception as error:  # of a rule of the audit, in any way
        said = f"the audit failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        finding = Finding(
            "unknown", None, None, "compare numerically: jaxaccum.testing.assert_exact", note=said
        )
        return AuditReport(Verdict.UNKNOWN, False, False, (finding,), causes=(finding,))


def _signature(call: _Call) -> Any:
    """What tells two traces of one function apart: its arguments, and its program with all that it
    holds."""
    seen = tuple(call.program.observed.values())
    types = tuple(map(jax.typeof, call.arrays))
    roles = tuple((slot.name, slot.role, slot.axis) for slot in call.slots)
    programs = tuple(structure.key_of(one.trace.jaxpr) for one in seen)
    numbers = tuple(_content(x) for one in seen for x in one.consts)
    return types, roles, programs, numbers, tuple(one.outputs for one in seen)


def _content(constant: Any) -> Any:
    """The numbers of a small constant, which the audit may look at; of any other its type."""
    aval = jax.typeof(constant)
    if isinstance(constant, jax.core.Tracer) or not is_numeric(constant) or aval.size > LARGEST:
        return aval
    return aval, np.asarray(constant).tobytes()


# -- what is said ----------------------------------------------------------------------------------


def message(fun: Fun, report: AuditReport, slots: Sequence[Slot] = ()) -> str:
    """Three lines: what is inexact, where, and what to write. Of several outputs the first; the
    others are named."""
    finding = report.causes[0]
    may = "may not be" if finding.kind == "unknown" else "is not"
    named = "" if finding.output == "the loss" else f"{finding.output} of "
    where = _line_of(finding) or _definition(fun)
    fix = finding.fix or "see jaxaccum.audit"
    if finding.kind in ("position", "random") and any(slot.role is Role.KEY for slot in slots):
        fix += "; " + fixes.KEY_DRAWS
    return (
        f"{named}{_name(fun)} {may} exact over microbatches: {finding.note}{_others(report)}\n"
        f"  at {where}\n"
        f"  fix: {fix} [audit=None silences this]"
    )


def _others(report: AuditReport) -> str:
    """The other outputs that are not exact."""
    first, *rest = dict.fromkeys(cause.output for cause in report.causes)
    names = [name for name in rest if name != first]
    verb = "is" if len(names) == 1 else "are"
    return (
        f" ({', '.join(names)} {verb} not exact either; jaxaccum.audit says why)" if names else ""
    )


def _name(fun: Fun) -> str:
    return getattr(inspect.unwrap(fun), "__name__", type(fun).__name__)


def _line_of(finding: Finding) -> str | None:
    """The line that a finding speaks of, with its text."""
    frames = [
        frame for frame in (finding.origin, finding.use, *finding.fix_lines) if frame is not None
    ]
    return _with_text(frames[0]) if frames else None


def _with_text(frame: Frame) -> str:
    text = linecache.getline(frame.file, frame.line).strip()
    return f"{frame}: {text}" if text else str(frame)


def _definition(fun: Fun) -> str:
    """Where a function is defined."""
    code = getattr(inspect.unwrap(fun), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(fun)
