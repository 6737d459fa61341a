"""Which of the two engines runs a program: the loop, or the stages of a coupled loss. It is decided here alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from jaxaccum import _coupled, _loop
from jaxaccum._base.types import Array
from jaxaccum._devices import varying
from jaxaccum._devices.without_checks import typed, unchecked, untyped
from jaxaccum._loop import Gradient, Result
from jaxaccum._program.program import Program


def run(program: Program, arrays: Sequence[Array], *, checkpoint: bool = False) -> list[Array]:
    """The combined parts of the whole batch; with `checkpoint`, JAX may derive it and recomputes every pass."""
    if not program.checked:
        plain = _plain(program)
        with unchecked():
            parts = run(plain, untyped(list(arrays)), checkpoint=checkpoint)
        return typed(parts, program.axes)
    engine = _coupled if program.coupled else _loop
    return engine.run(program, arrays, checkpoint=checkpoint)


def run_with_gradient(program: Program, arrays: Sequence[Array], gradient: Gradient, seeds: Sequence[Array]) -> Result:
    """The combined parts, and the gradients of all microbatches, of one seed for each of the gradient's parts."""
    if not program.checked:
        plain = _plain(program)
        with unchecked():
            result = run_with_gradient(plain, untyped(list(arrays)), gradient, untyped(list(seeds)))
        return typed(result, program.axes)
    engine = _coupled if program.coupled else _loop
    return engine.run_with_gradient(program, arrays, gradient, seeds)


def _plain(program: Program) -> Program:
    """The program as it runs where JAX does not track which values vary."""
    shard = untyped(jnp.asarray(varying.shard_index(program.mesh_axes), jnp.int32))
    return dataclasses.replace(program, checked=True, axes=frozenset(), shard=shard)
