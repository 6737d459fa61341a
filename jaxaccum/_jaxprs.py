"""The parts of a program that the supported versions of JAX name differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.extend.core as jex

ClosedJaxpr: Any = getattr(jex, "ClosedJaxpr", jex.Jaxpr)
"""A jaxpr with its constants; since jax 0.12 another name of `Jaxpr`."""


def opened(jaxpr: Any) -> tuple[jex.Jaxpr, list[Any]]:
    """The jaxpr itself and its constants, whether it came closed or not."""
    return (jaxpr.jaxpr, list(jaxpr.consts)) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, [])


def scan_arity(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants a scan has, and how many values it carries."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # since jax 0.12: constants, carry and scanned operands, flat
    return len(list(consts)), len(list(carry))


def inlined(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a call of a compiled function, which vanishes where it is traced."""
    given: Any = params["inline"]
    early = True if isinstance(given, bool) else type(given).JAX_EARLY  # since jax 0.12 an enumeration
    return {**params, "inline": early}


def is_reference(aval: Any) -> bool:
    """Whether a variable holds a reference of ``jax.new_ref``: JAX exports no type of them."""
    return hasattr(aval, "inner_aval")


def is_reference_effect(effect: Any) -> bool:
    """Whether an effect is a read of a reference, or a write to it."""
    return type(effect).__name__ in ("ReadEffect", "WriteEffect", "AccumEffect", "RefEffect")
