"""Wrong calls: a type checker reports each marked line, by the rule that the comment names."""

from typing import assert_type

import optax

import jaxaccum
import jaxaccum.nnx
import jaxaccum.testing


def mistakes(loss, w, batch) -> None:
    """Not to be run."""
    jaxaccum.value_and_grad(loss, num_microbatches="4")  # error: reportArgumentType
    jaxaccum.value_and_grad(loss, split="diagonal", num_microbatches=4)  # error: reportArgumentType
    jaxaccum.grad(loss, audit="loud", num_microbatches=4)  # error: reportArgumentType
    jaxaccum.grad(loss, microbatches=4)  # error: reportCallIssue
    jaxaccum.grad(loss, accumulator="tree", num_microbatches=4)  # error: reportArgumentType
    jaxaccum.nnx.grad(loss, microbatches=4)  # error: reportCallIssue
    jaxaccum.nnx.value_and_grad(loss, gather="never")  # error: reportArgumentType
    jaxaccum.Mean(total=1.0)  # error: reportCallIssue
    jaxaccum.mean(1.0, 2.0)  # error: reportAttributeAccessIssue
    jaxaccum.MultiSteps(optax.sgd(0.1))  # error: reportCallIssue
    print(jaxaccum.plan(loss, w, batch).best.size)  # error: reportAttributeAccessIssue
    jaxaccum.plan(loss, w, batch, progress=True)  # error: reportArgumentType
    assert_type(jaxaccum.audit(loss, w, batch).exact, str)  # error: reportAssertTypeFailure
    jaxaccum.testing.assert_equal(loss, w, batch)  # error: reportAttributeAccessIssue
