"""Which of the two engines runs a program: the loop, or the stages of a coupled loss. It is decided
here alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxaccum import _coupled, _loop
from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._devices.without_checks import typed, unchecked, untyped
from jaxaccum._loop import Gradient, Result
from jaxaccum._program.program import Program
from jaxaccum._transforms.eager import once


def run(program: Program, arrays: Sequence[Array], *, checkpoint: bool = False) -> list[Array]:
    """The combined parts of the whole batch; with `checkpoint`, JAX may derive it and recomputes
    every pass."""
    with _explained():
        return once(functools.partial(_run, program, checkpoint), list(arrays))


def run_with_gradient(
    program: Program, arrays: Sequence[Array], gradient: Gradient, seeds: Sequence[Array]
) -> Result:
    """The combined parts, and the gradients of all microbatches, of one seed for each of the
    gradient's parts."""
    run = functools.partial(_run_with_gradient, program, gradient)
    with _explained():
        return once(run, list(arrays), list(seeds))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Add to an error about leaked tracers what to pass as an argument."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        error.add_note(
            "A custom_jvp or custom_vjp that is defined inside the loss must not read the batch, "
            "nor what the loss computes, where a loop or a branch reads lax.axis_index of the "
            "microbatches, or the loss closes over what is differentiated: pass these values to "
            "it as arguments."
        )
        raise


def _run(program: Program, checkpoint: bool, arrays: list[Array]) -> list[Array]:
    if not program.checked:
        plain = _plain(program)
        with unchecked():
            parts = _run(plain, checkpoint, untyped(arrays))
        return typed(parts, program.axes)
    engine = _coupled if program.coupled else _loop
    return engine.run(program, arrays, checkpoint=checkpoint)


def _run_with_gradient(
    program: Program, gradient: Gradient, arrays: list[Array], seeds: list[Array]
) -> Result:
    if not program.checked:
        plain = _plain(program)
        with unchecked():
            result = _run_with_gradient(plain, gradient, untyped(arrays), untyped(seeds))
        return typed(result, program.axes)
    engine = _coupled if program.coupled else _loop
    return engine.run_with_gradient(program, arrays, gradient, seeds)


def _plain(program: Program) -> Program:
    """The program as it runs where JAX does not track which values vary."""
    shard = untyped(jnp.asarray(varying.shard_index(program.mesh_axes), jnp.int32))
    return dataclasses.replace(program, checked=True, axes=frozenset(), shard=shard)
