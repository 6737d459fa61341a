"""Can a loss be accumulated? Traced at two sizes and never run, it answers with the line that
prevents it."""

from jaxaccum._audit import at_call as at_call
from jaxaccum._audit import rules as rules
from jaxaccum._audit.report import AuditReport as AuditReport
from jaxaccum._audit.report import Finding as Finding
from jaxaccum._audit.report import InexactError as InexactError
from jaxaccum._audit.report import InexactWarning as InexactWarning
from jaxaccum._audit.report import Verdict as Verdict
