"""Coupled programs: a loss with collectives over the loop's axis, exact at one microbatch's memory.

A `Program` whose trace has such collectives enters, and the same leaves as from `_loop`: the
combined parts of the output, and the gradients. `trace` opens the program, `cut` divides it into
stages, `schedule` chooses which boundaries to store, `execute` runs the stages, `gradient`
differentiates them, and `run` does all of it in order. It imports `_loop` and the rooms below. A
loss without collectives never comes here.
"""

from jaxaccum._coupled.run import run as run
from jaxaccum._coupled.run import run_with_gradient as run_with_gradient
from jaxaccum._coupled.run import schedule as schedule
