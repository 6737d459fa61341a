"""Can a loss be accumulated? Traced at two sizes and never run, it answers with the line that
prevents it.

A loss enters, with the shapes of its arguments and a partition of the batch. An `AuditReport`
leaves. The way through the room::

    at_call    a call of a transformation asks, and warns or raises by what it hears
    analysis   one report: which sizes are traced, which pairs are walked, what is tried again
    traces     the loss as two jaxprs, one at each size
    inputs     what each argument is before the first equation
    walk       equation by equation: a rule of `rules`, then the `checks` of every result
    judge      from the values of the outputs (`lattice`) and their tags (`claims`) to verdicts
    fixes      what to write instead
    report     how it is printed

It may import what is below: `_base`, `_jaxpr`, `_devices`, `_program`. It runs nothing and changes
no program.
"""

from jaxaccum._audit import at_call as at_call
from jaxaccum._audit import rules as rules
from jaxaccum._audit.report import AuditReport as AuditReport
from jaxaccum._audit.report import Finding as Finding
from jaxaccum._audit.report import InexactError as InexactError
from jaxaccum._audit.report import InexactWarning as InexactWarning
from jaxaccum._audit.report import Verdict as Verdict
