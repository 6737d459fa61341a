"""The seed's notebook runs as it is and has its pictures, and each of its claims can fail."""

import pathlib
import re

import jax
import matplotlib
import numpy as np
import pytest

from experiments import toy
from tests.support.helpers import INEXACT

NOTEBOOK = pathlib.Path(__file__).parents[2] / "docs/notebooks/seed.py"


def cells():
    """The code cells of jupytext's percent format, each with the number of lines before it."""
    source = NOTEBOOK.read_text()
    marks = [*re.finditer(r"^# %%(.*)\n", source, flags=re.MULTILINE)]
    ends = [*(mark.start() for mark in marks[1:]), len(source)]
    for mark, end in zip(marks, ends, strict=True):
        if not mark[1].strip():
            yield source.count("\n", 0, mark.end()), source[mark.end() : end]


def execute(cell, names, before=0):
    """Run a cell in the file's own lines, so that what it prints names them."""
    exec(compile("\n" * before + cell, str(NOTEBOOK), "exec"), names)


def drawn():
    """The number of lines and bars in each picture of a cell; then they are closed."""
    pyplot = matplotlib.pyplot
    panels = [panel for number in pyplot.get_fignums() for panel in pyplot.figure(number).axes]
    pyplot.close("all")
    return [len(panel.lines) + len(panel.patches) for panel in panels]


@pytest.fixture(scope="module", autouse=True)
def _as_in_a_notebook():
    """JAX's own defaults, and no window for the pictures."""
    matplotlib.use("Agg")
    jax.config.update("jax_disable_most_optimizations", True)  # compilation is most of the time
    precision = jax.config.jax_default_matmul_precision
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
    jax.config.update("jax_default_matmul_precision", precision)
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def executed():
    """Every cell with the names before it, then the last names, and what the pictures show."""
    names, history, pictures = {"__name__": "notebook"}, [], []
    for before, cell in cells():
        history.append((cell, dict(names)))
        execute(cell, names, before)
        pictures += drawn()
    return history, names, pictures


def test_the_notebook_runs_and_has_its_pictures(executed):
    _, _, pictures = executed
    assert pictures == [2, 8, 6, 2]


def test_the_one_weight_model_has_the_bits_of_torch(executed):
    _, names, _ = executed
    in_torch = toy.torch_loop()[-1]
    for way in names["gradients"]:
        assert np.asarray(names["gradients"][way]).tobytes() == in_torch.grad.tobytes()
        assert np.asarray(names["stepped"][way]).tobytes() == in_torch.weight.tobytes()


WRONG = {
    "a loop that forgets to divide": ("(one_weight, x) / 2", "(one_weight, x)"),
    "a ratio without its weight": ("jaxaccum.Mean(total, weight)", "total / weight"),
    "a cause left on": ("trained(exact)", 'trained(loop({"keys"}))'),
    "statistics of microbatches": (
        'jaxaccum.grad(digit_loss("microbatch")',
        "jaxaccum.grad(digit_loss(None)",
    ),
}


@INEXACT
@pytest.mark.parametrize("name", WRONG)
def test_each_claim_can_fail(executed, name):
    history, _, _ = executed
    right, wrong = WRONG[name]
    ((cell, names),) = ((cell, names) for cell, names in history if right in cell)
    with pytest.raises(AssertionError):
        execute(cell.replace(right, wrong), dict(names))
