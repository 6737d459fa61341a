"""The audit at the call: while a transformation is traced, it says whether its function accumulates
exactly.

The call has traced the function at the size of a microbatch. One more trace, for the whole batch,
is all that the audit needs; nothing is computed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import linecache
import warnings
import weakref
from collections.abc import Hashable, Sequence

import jax
import jax.core
import jax.extend.core as jex
import numpy as np

from jaxaccum._audit import fixes
from jaxaccum._audit.analysis import report_on
from jaxaccum._audit.folding import Constant, is_numeric
from jaxaccum._audit.lattice import FaultKind
from jaxaccum._audit.nans import are_finite
from jaxaccum._audit.report import AuditReport, Finding, InexactError, InexactWarning, Verdict
from jaxaccum._audit.traces import Traced
from jaxaccum._base.adapted import adapted
from jaxaccum._base.source_lines import Frame, callers_depth
from jaxaccum._base.types import Array, Fun
from jaxaccum._devices import varying
from jaxaccum._jaxpr import structure
from jaxaccum._jaxpr.derivative_rules import with_rules_of_users
from jaxaccum._jaxpr.equations import mentions
from jaxaccum._jaxpr.traces import Trace
from jaxaccum._jaxpr.variables import taken_by
from jaxaccum._program import closures
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.call import Call
from jaxaccum._program.program import Observed, Program


def check(call: Call, program: Program, arrays: Sequence[Array]) -> None:
    """Warn or raise, as the options say, if the function does not accumulate exactly.

    `program` and `arrays` are those that the call was prepared to.
    """
    fun, options = call.fun, call.options
    whole = _is_whole(program)
    if options.audit is None or (whole and not _gathers_untyped(program)):
        return
    known = adapted(fun)
    fun = known.fun
    subject = _Call(fun, program, arrays, call.argnums, known.draws_declared)
    report = _report(subject, options.axis_name)
    if whole:
        report = _of_gathers(report)
    unread = _reads_another_batch(subject)
    if not report.causes:
        if unread:
            warnings.warn(unread, UserWarning, stacklevel=callers_depth())
        return
    said = unread or message(fun, report, program.slots)
    if options.audit == "raise":
        raise InexactError(f"{said}\n{report}")
    warnings.warn(said, InexactWarning, stacklevel=callers_depth())


def _is_whole(program: Program) -> bool:
    """Whether there is nothing to combine: one microbatch, on one device or of a loss that itself
    spans the devices.

    With one microbatch on each device, a BatchNorm over the devices has the whole batch's
    statistics.
    """
    if program.partition.num_microbatches > 1:
        return False
    return not program.mesh_axes or _spans_devices(program)


def _spans_devices(program: Program) -> bool:
    """Whether the loss itself exchanges something between the devices."""
    for one in program.traces:
        for axis in program.mesh_axes:
            if any(map(_is_exchange, mentions(one.jaxpr, axis))):
                return True
    return False


def _is_exchange(eqn: jex.JaxprEqn) -> bool:
    return eqn.primitive.name not in _ON_ONE_DEVICE


def _gathers_untyped(program: Program) -> bool:
    """Whether the loss gathers over devices where JAX does not track what differs between them:
    rows, which is right, or a parameter, which is not."""
    axes = program.mesh_axes
    if not axes or varying.checked(axes):
        return False
    found = [mentions(one.jaxpr, axis) for one in program.traces for axis in axes]
    return any(eqn.primitive.name == "all_gather" for eqn in itertools.chain(*found))


def _of_gathers(report: AuditReport) -> AuditReport:
    """What a report says of gathered parameters alone, the one thing that is wrong with one
    microbatch too."""
    gathered = [finding for finding in report.findings if finding.kind == FaultKind.GATHERED]
    return dataclasses.replace(report, causes=tuple(gathered))


_ON_ONE_DEVICE = ("pvary", "pcast", "pbroadcast", "axis_index")
"""Primitives that name an axis of devices, and exchange nothing along it."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a transformation, as the audit's subject."""

    fun: Fun
    program: Program
    arrays: Sequence[Array]
    argnums: Sequence[int]
    """Those that are differentiated; where there are none, any may be."""
    draws_declared: bool

    @property
    def given(self) -> Sequence[Array]:
        return self.arrays[: self.program.num_arguments]

    @property
    def slots(self) -> Sequence[Slot]:
        return self.program.slots[: self.program.num_arguments]

    def differentiates(self, argnum: int | str | None) -> bool:
        return not self.argnums or argnum in self.argnums

    def keeps_groups(self, size: int) -> bool:
        return self.program.partition.keeps_groups(size)

    @property
    def keeps_order(self) -> bool:
        return self.program.partition.keeps_order

    def trace(self, size: int, count: int) -> Traced:
        """The program for one of `count` microbatches of `size` examples; the call's own is at
        hand."""
        own = count == self.program.partition.num_microbatches
        seen = self.program.observed.get(size) if own else None
        if seen is None:
            assert self.program.observe is not None
            seen = self.program.observe(size, count)
        return Traced(seen.trace.closed(seen.consts), seen.outputs, indexed=True)


# -- a batch that the loss closes over -------------------------------------------------------------


def _reads_another_batch(call: _Call) -> str:
    """What to say of a function that reads no argument that is cut, and closes over as many rows;
    "" of any other."""
    rows = [i for i, slot in enumerate(call.slots) if slot.role is Role.ROWS]
    size = call.program.partition.batch_size
    if not rows or any(_reads(seen.trace, rows) for seen in call.program.observed.values()):
        return ""
    names = [name for name, _ in closures.of_length(call.fun, size)]
    if not names:
        return ""
    roots = closures.roots_of(names)
    return (
        f"{_name(call.fun)} reads no argument that is cut into microbatches. It closes over "
        f"{' and '.join(names)}, {size} rows: every microbatch computes all of them, so no memory "
        f"is saved, and a Sum counts them once per microbatch\n"
        f"  at {_definition(call.fun)}\n"
        f"  fix: {closures.ROWS_ARGUMENT.format(name=' and '.join(roots))} "
        "[audit=None silences this]"
    )


def _reads(trace: Trace, places: Sequence[int]) -> bool:
    """Whether a program reads one of its arguments at these places."""
    arguments = trace.jaxpr.invars[1 + trace.num_consts :]
    read = set(taken_by(trace.jaxpr.eqns, trace.jaxpr.outvars))
    return any(arguments[i] in read for i in places)


# -- one report for a function and its shapes ------------------------------------------------------

_REPORTS: weakref.WeakKeyDictionary[Fun, dict[Hashable, AuditReport]]
_REPORTS = weakref.WeakKeyDictionary()


def _report(call: _Call, axis_name: str) -> AuditReport:
    """The report, made once for a function, the shapes of its arguments and the program that it
    traced to."""
    program = call.program
    if _has_rules_of_users(program):
        return _made(call, axis_name)
    options = axis_name, program.mesh_axes, program.partition, call.argnums, call.draws_declared
    key = (*options, _signature(call))
    try:
        reports = _REPORTS.setdefault(call.fun, {})
        report = reports.get(key)
    # a callable without a hash or weak references, or a program that holds something without a hash
    except TypeError:
        return _made(call, axis_name)
    if report is None or (_assumes_no_nan(report) and not are_finite(call.given)):
        if len(reports) >= _KEPT:
            reports.clear()
        report = reports[key] = _made(call, axis_name)
    return report


def _has_rules_of_users(program: Program) -> bool:
    """Whether a derivative rule is a user's own: it may read what is no part of the program."""
    return any(any(with_rules_of_users(seen.trace.jaxpr)) for seen in program.observed.values())


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
        fix = "compare numerically: jaxaccum.testing.assert_exact"
        finding = Finding("unknown", None, None, fix, note=said)
        return AuditReport(Verdict.UNKNOWN, False, False, (finding,), causes=(finding,))


def _signature(call: _Call) -> Hashable:
    """What tells two traces of one function apart: its arguments, and its program with all that it
    holds."""
    types = tuple(map(jax.typeof, call.arrays))
    roles = tuple((slot.name, slot.role, slot.axis) for slot in call.slots)
    return types, roles, tuple(map(_program_key, call.program.observed.values()))


def _program_key(seen: Observed) -> Hashable:
    """The program at one size, with its constants and its outputs."""
    return structure.key_of(seen.trace.jaxpr), tuple(map(_content, seen.consts)), seen.outputs


def _content(constant: Constant) -> Hashable:
    """What tells the numbers of a constant from others, since the audit may look at them."""
    aval = jax.typeof(constant)
    if isinstance(constant, jax.core.Tracer) or not is_numeric(constant):
        return aval
    return aval, _digest(constant)


_DIGESTS: dict[int, tuple[weakref.ref[jax.Array], bytes]] = {}
"""Those of JAX's arrays that are alive, which never change: a loss may close over a model."""


def _digest(constant: Constant) -> bytes:
    """A hash of the numbers."""
    key = id(constant)
    if key in _DIGESTS and _DIGESTS[key][0]() is constant:
        return _DIGESTS[key][1]
    digest = hashlib.sha256(np.asarray(constant).tobytes()).digest()
    if isinstance(constant, jax.Array):
        _DIGESTS[key] = weakref.ref(constant, lambda _: _DIGESTS.pop(key, None)), digest
    return digest


# -- what is said ----------------------------------------------------------------------------------


def message(fun: Fun, report: AuditReport, slots: Sequence[Slot] = ()) -> str:
    """Three lines: what is inexact, where, and what to write. Of several outputs the first; the
    others are named."""
    finding = report.causes[0]
    may = "may not be" if finding.kind in ("unknown", "gathered") else "is not"
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
    _, *names = dict.fromkeys(cause.output for cause in report.causes)
    if not names:
        return ""
    verb = "is" if len(names) == 1 else "are"
    return f" ({', '.join(names)} {verb} not exact either; jaxaccum.audit says why)"


def _name(fun: Fun) -> str:
    return getattr(inspect.unwrap(fun), "__name__", type(fun).__name__)


def _line_of(finding: Finding) -> str | None:
    """The line that a finding speaks of, with its text."""
    frame = next(filter(None, (finding.origin, finding.use, *finding.fix_lines)), None)
    return _with_text(frame) if frame is not None else None


def _with_text(frame: Frame) -> str:
    text = linecache.getline(frame.file, frame.line).strip()
    return f"{frame}: {text}" if text else str(frame)


def _definition(fun: Fun) -> str:
    """Where a function is defined."""
    code = getattr(inspect.unwrap(fun), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else repr(fun)
