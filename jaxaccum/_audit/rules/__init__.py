"""The rules, by family of primitives; importing this fills the table."""

from jaxaccum._audit.registry import RULES as RULES
from jaxaccum._audit.rules import arithmetic as arithmetic
from jaxaccum._audit.rules import collectives as collectives
from jaxaccum._audit.rules import contractions as contractions
from jaxaccum._audit.rules import control as control
from jaxaccum._audit.rules import derivatives as derivatives
from jaxaccum._audit.rules import elementwise as elementwise
from jaxaccum._audit.rules import indexing as indexing
from jaxaccum._audit.rules import loops as loops
from jaxaccum._audit.rules import meshes as meshes
from jaxaccum._audit.rules import parts as parts
from jaxaccum._audit.rules import randomness as randomness
from jaxaccum._audit.rules import reductions as reductions
from jaxaccum._audit.rules import scatters as scatters
from jaxaccum._audit.rules import shapes as shapes
