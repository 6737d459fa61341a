"""Floating-point operations of a traced program, every iteration of every loop counted.

XLA's own cost analysis counts the body of a loop once, however often it runs; a jaxpr says how
often.
"""

from __future__ import annotations

import math

import jax.extend.core as jex

from jaxaccum._jaxpr.compat import opened
from jaxaccum._jaxpr.variables import Atom

_FREE = {  # what moves, names or makes data, and computes nothing
    "broadcast_in_dim", "reshape", "transpose", "slice", "squeeze", "concatenate", "pad", "rev",
    "copy", "copy_p", "convert_element_type", "bitcast_convert_type", "dynamic_slice",
    "dynamic_update_slice", "gather", "iota", "stop_gradient", "pcast", "pvary", "get", "swap",
    "ref", "freeze", "empty_ref", "sharding_constraint", "reshard", "random_bits", "random_fold_in",
    "random_wrap", "random_unwrap", "axis_index", "select_n",
}  # fmt: skip


def flops(jaxpr: jex.Jaxpr, devices: int = 1) -> float:
    """The operations of one device: a multiply-add is two, any other elementwise operation one per
    element.

    Args:
        jaxpr: the traced program.
        devices: over how many devices the compiler divides it; the body of a ``shard_map`` is one
            device's already.
    """
    return sum(_equation(eqn, devices) for eqn in jaxpr.eqns)


def _equation(eqn: jex.JaxprEqn, devices: int) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"] * flops(params["jaxpr"].jaxpr, devices)
    if name == "cond":
        return max(flops(branch.jaxpr, devices) for branch in params["branches"])
    if name == "shard_map":
        manual = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        return flops(opened(params["jaxpr"])[0], max(devices // manual, 1))
    inner = list(jex.jaxprs_in_params(params))
    if inner and not name.startswith(("reduce", "scatter", "cum")):
        # A custom rule carries its derivative's jaxpr as a parameter; the first is the one that
        # runs.
        run = inner[:1] if name.startswith("custom_") else inner
        return sum(flops(sub, devices) for sub in run)
    return _operations(name, eqn) / devices


def _operations(name: str, eqn: jex.JaxprEqn) -> float:
    out = sum(map(_size, eqn.outvars))
    if name == "dot_general":
        (contracting, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * math.prod(_shape(eqn.invars[0])[axis] for axis in contracting)
    if name == "conv_general_dilated":
        features = _shape(eqn.invars[1])[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * out * _size(eqn.invars[1]) / features
    if name in _FREE:
        return 0.0
    if name.startswith(("reduce", "arg", "cum", "scatter", "addupdate")):
        return float(max(map(_size, eqn.invars)))
    return float(out)


def _shape(v: Atom) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def _size(v: Atom) -> int:
    return math.prod(_shape(v))
