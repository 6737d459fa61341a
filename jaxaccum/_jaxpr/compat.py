"""What is private, experimental or unstable in JAX, and what its versions name differently: all of
it, in one file.

Each name says why it is needed, and in which versions it was seen to work; the tests named with it
fail where a new version of JAX changes it. The rest of the library uses public names, and of the
jaxprs what ``jax.extend.core`` and ``jax.interpreters`` export.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._base.types import Array

# -- programs --------------------------------------------------------------------------------------

if TYPE_CHECKING:
    ClosedJaxpr = jex.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]
else:
    ClosedJaxpr = getattr(jex, "ClosedJaxpr", jex.Jaxpr)
"""A jaxpr with its constants; since jax 0.12 another name of `Jaxpr`."""


def opened(jaxpr: Any) -> tuple[jex.Jaxpr, list[Array]]:
    """The jaxpr itself and its constants, whether it came closed or not."""
    return (jaxpr.jaxpr, list(jaxpr.consts)) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, [])


def scan_arity(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants a scan has, and how many values it carries."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    # Since jax 0.12: constants, carry and scanned operands, flat.
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))


def inlined(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call of a compiled function, which vanishes where it is traced."""
    given: Any = params["inline"]
    # Since jax 0.12 an enumeration.
    early = True if isinstance(given, bool) else type(given).JAX_EARLY
    return {**params, "inline": early}


def anonymous(jaxpr: jex.Jaxpr) -> Any:
    """The debug information of a jaxpr with other arguments: JAX wants a name for each, or none."""
    return jaxpr.debug_info._replace(arg_names=None, result_paths=None)


def is_reference(aval: object) -> bool:
    """Whether a variable holds a reference of ``jax.new_ref``: JAX exports no type of them."""
    return hasattr(aval, "inner_aval")


def is_reference_effect(effect: object) -> bool:
    """Whether an effect is a read of a reference, or a write to it."""
    return type(effect).__name__ in ("ReadEffect", "WriteEffect", "AccumEffect", "RefEffect")


def is_axis_effect(effect: object) -> bool:
    """Whether an effect is the name of an axis, which JAX counts among them: it exports no type of
    them."""
    return type(effect).__name__ == "NamedAxisEffect"


def context_key(eqn: jex.JaxprEqn) -> Hashable:
    """Under which settings an equation was traced, and so is lowered: JAX keeps one object for
    equal ones, jax 0.10.2 to 0.12.

    Test: test_eager.
    """
    return eqn.ctx


def context_of(eqn: jex.JaxprEqn) -> AbstractContextManager[None]:
    """A context with the settings under which an equation was traced, jax 0.10.2 to 0.12.

    Test: test_derived_once.
    """
    return eqn.ctx.manager


# -- the compiler's errors -------------------------------------------------------------------------


def bytes_needed(error: Exception) -> int | None:
    """What a program needs that is too large for the device it is compiled for; None of any other
    error.

    That it is too large is the error's code, an attribute without documentation, jax 0.10.2 to
    0.12. How large it is, nothing but the text says, next to what the device has, in words that
    change: "Used 29.35G of 15.75G hbm", or in libtpu 0.0.42 "temporaries (36.52G) exceeds available
    HBM (15.75G)". So the largest amount counts, and a text without one means: more than any device
    has. Tests: test_plan, test_tpu.
    """
    if getattr(error, "error_code_string", None) != "RESOURCE_EXHAUSTED":
        return None
    amounts = re.findall(r"\b([\d.]+)([KMGT])\b", str(error))
    needed = [int(float(number) * 1024 ** " KMGT".index(unit)) for number, unit in amounts]
    return max(needed, default=sys.maxsize)


# -- private names ---------------------------------------------------------------------------------


def without_varying_checks() -> AbstractContextManager[None]:
    """A context in which JAX does not track which values vary over a mesh.

    ``jax.shard_map(check_vma=False)`` sets this state, and nothing public does without a
    `shard_map`. Private: ``jax._src.config._check_vma``, jax 0.10.2 to 0.12. Test:
    test_coupled_on_meshes.
    """
    from jax._src import config

    return config._check_vma(False)


def traced_once(arrays: Iterable[Array]) -> AbstractContextManager[None]:
    """A context in which a loop over `arrays` is traced once, in a rule that ``jax.grad`` calls.

    JAX runs the rule of a ``custom_jvp`` under a trace that parts what moves from what does not. It
    traces the body of each ``scan`` twice more for that, even where nothing in it moves. The
    context is the trace around that one. Private:
    ``jax._src.interpreters.partial_eval.JaxprTrace``, jax 0.10.2 to 0.12. Test: test_composition.
    """
    from jax._src.interpreters.partial_eval import JaxprTrace, JaxprTracer

    with jex.take_current_trace() as trace:
        pass
    if isinstance(trace, JaxprTrace) and not any(isinstance(x, JaxprTracer) for x in arrays):
        return jex.set_current_trace(trace.parent_trace)
    return nullcontext()


def mesh_axes_of_vmaps() -> frozenset[str]:
    """The mesh axes over which an outer ``jax.vmap(…, spmd_axis_name=…)`` divides what it maps.

    Private: ``jax._src.core.get_axis_env``, jax 0.10.2 to 0.12. Test: test_composition.
    """
    from jax._src import core

    return frozenset(core.get_axis_env().spmd_axis_names)


def checkify_rules() -> tuple[Any, dict[Any, Any]]:
    """The primitive of `checkify`'s checks, and its table of rules, to which no public function
    adds one.

    Private: ``jax._src.checkify``, jax 0.10.2 to 0.12. Test: test_multisteps_errors.
    """
    from jax._src.checkify import check_p, error_checks

    return check_p, error_checks


def variable_of(x: object) -> jex.Var | None:
    """The variable that a tracer was while its jaxpr was made; None of anything else.

    Private: the attribute ``val`` of a tracer, jax 0.10.2 to 0.12. Test: test_derivative_rules.
    """
    variable = getattr(x, "val", None) if isinstance(x, jax.core.Tracer) else None
    return variable if isinstance(variable, jex.Var) else None


def bound_axis(name: str, size: int) -> AbstractContextManager[None]:
    """A context in which a named axis has this size, as under ``jax.make_jaxpr(axis_env=…)``.

    Private: ``jax._src.core.extend_axis_env_nd``, jax 0.10.2 to 0.12. Test: test_derivative_rules.
    """
    from jax._src import core

    return core.extend_axis_env_nd([(name, size)])


def mapped_with_shared_outputs() -> dict[str, Any]:
    """The option of ``defvjp`` by which ``jax.vmap`` takes a function some of whose results are not
    mapped, such as a number of examples.

    Since jax 0.12: ``generic_batching``. Before, that is what JAX does. Test: test_user_rules.
    """
    known = inspect.signature(jax.custom_vjp.defvjp).parameters
    return {"generic_batching": True} if "generic_batching" in known else {}


# -- experimental names ----------------------------------------------------------------------------


def checkify() -> ModuleType:
    """The module ``jax.experimental.checkify``, jax 0.10.2 to 0.12. Test:
    test_multisteps_errors."""
    from jax.experimental import checkify

    return checkify


def key_implementation(**fields: Any) -> Any:
    """A generator of random numbers with keys of our own making.

    Experimental: ``jax.extend.random.define_prng_impl``, jax 0.10.2 to 0.12. Test:
    test_batch_keys.
    """
    from jax.extend.random import define_prng_impl

    return define_prng_impl(**fields)


def draws_by_place() -> bool:
    """Whether each number, and each key of a split, is a function of its place alone, and not of
    how many are drawn.

    A flag of JAX, which declares no types for its flags: ``jax_threefry_partitionable``. Test:
    test_batch_keys.
    """
    return jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]


def threefry_bits(key: Array, high: Array, low: Array, dtype: jnp.dtype) -> Array:
    """The entries of ``jax.random.bits`` at some places, which come in two halves of 32 bits.

    Experimental: ``jax.extend.random.threefry2x32_p``, jax 0.10.2 to 0.12, and how JAX makes its
    numbers of the two that it gives. Test: test_batch_keys.
    """
    from jax.extend.random import threefry2x32_p

    first, second = threefry2x32_p.bind(key[0], key[1], high, low)
    if dtype == jnp.uint64:
        return (first.astype(dtype) << 32) | second.astype(dtype)
    return (first ^ second).astype(dtype)


def is_jit_disabled() -> bool:
    """Whether the user runs JAX under ``jax.disable_jit``: the flag ``jax_disable_jit``. Test:
    test_eager."""
    return jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue]
