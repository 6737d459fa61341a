"""Convolutions in the one layout for which XLA has a fast kernel on CPU.

The problem. XLA for CPU computes a convolution fast if the batch is the first axis and the features
the last, and in the kernel the input's features come before the output's. Outside of loops it
brings every convolution into this form; inside of a ``while`` it does not, and falls back to plain
loops. The derivatives of a convolution have other layouts, so that a CNN in a loop over
microbatches was 20 to 60 times slower than without.

The idea. On CPU alone each convolution of the loop's body is written in that form, between
transposes.

    conv(x, g): f01b, i01o -> 01bf
      = transpose(conv(transpose(x), transpose(g)): b01f, 01io -> b01f)

Groups of the batch, which come up where a grouped convolution is derived by its kernel, become
groups of features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from jaxaccum._base.types import Array
from jaxaccum._jaxpr.compat import inlined, opened
from jaxaccum._jaxpr.equations import changed, equations_inside
from jaxaccum._jaxpr.structure import params_key
from jaxaccum._jaxpr.variables import Type, type_of, types_of

_FAST = ("float32", "float16", "bfloat16")
"""The dtypes of the fast kernel; others have none in any layout."""


def has_convolutions(jaxpr: jex.Jaxpr) -> bool:
    """Whether there is a convolution that the fast kernel could compute, at any depth."""
    return any(map(_may_be_fast, equations_inside(jaxpr)))


def fast_on_cpu(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, with its convolutions in the layout that is fast on CPU."""

    def body(*args: Any) -> Any:
        arrays, treedef = jax.tree.flatten(args)
        types = list(map(jax.typeof, arrays))
        flat = lambda *arrays: fun(*treedef.unflatten(arrays))
        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*types)
        jaxpr, consts = opened(closed)
        outs = jax.core.eval_jaxpr(changed(jaxpr, _as_call), consts, *arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return body


def _may_be_fast(eqn: jex.JaxprEqn) -> bool:
    if eqn.primitive is not lax.conv_general_dilated_p:
        return False
    spatial = len(eqn.params["window_strides"])
    operand = type_of(eqn.invars[0])
    grouped_twice = eqn.params["feature_group_count"] > 1 and eqn.params["batch_group_count"] > 1
    return 1 <= spatial <= 3 and operand.dtype.name in _FAST and not grouped_twice


def _as_call(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    """A convolution as a call of a function that holds both of its forms; any other equation as it
    is."""
    if not _may_be_fast(eqn):
        return eqn
    convolution = _Convolution(params_key(eqn.params), eqn.params)
    call = _call(convolution, tuple(types_of(eqn.invars)))
    return eqn.replace(primitive=call.primitive, params=call.params)


class _Convolution:
    """The parameters of a convolution, which are compared by their key."""

    def __init__(self, key: Hashable, params: Mapping[str, Any]):
        self.key, self.params = key, params

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Convolution) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.lru_cache(maxsize=1024)
def _call(convolution: _Convolution, types: tuple[Type, ...]) -> jex.JaxprEqn:
    as_it_is = functools.partial(lax.conv_general_dilated_p.bind, **convolution.params)
    canonical = functools.partial(_canonical, convolution.params)

    def convolve(x: Array, kernel: Array) -> Array:
        return lax.platform_dependent(x, kernel, cpu=canonical, default=as_it_is)

    (call,) = jax.make_jaxpr(jax.jit(convolve))(*types).jaxpr.eqns
    return call.replace(params=inlined(call.params))


def _canonical(params: Mapping[str, Any], x: Array, kernel: Array) -> Array:
    """The convolution between transposes: batch first, features last; in the kernel the output's
    features last."""
    numbers, groups = params["dimension_numbers"], params["batch_group_count"]
    batch, features, *space = numbers.lhs_spec
    x = jnp.transpose(x, (batch, *space, features))
    out_features, in_features, *space = numbers.rhs_spec
    kernel = jnp.transpose(kernel, (*space, in_features, out_features))
    if groups > 1:
        x = _batch_groups_as_feature_groups(x, groups)
    n = len(space)
    rows = (0, n + 1, *range(1, n + 1))
    y = lax.conv_general_dilated(
        x,
        kernel,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        lax.ConvDimensionNumbers(rows, (n + 1, n, *range(n)), rows),
        feature_group_count=max(groups, params["feature_group_count"]),
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    return jnp.transpose(y, _places(numbers.out_spec))


def _batch_groups_as_feature_groups(x: Array, groups: int) -> Array:
    """(groups · n, …, c) as (n, …, groups · c): each group's examples meet the group's own
    kernels."""
    n, *space, c = x.shape
    apart = jnp.moveaxis(x.reshape(groups, n // groups, *space, c), 0, -2)
    return apart.reshape(n // groups, *space, math.prod((groups, c)))


def _places(spec: Sequence[int]) -> list[int]:
    """The transpose from batch first, features last, to the axes that `spec` names in that
    order."""
    batch, features, *space = spec
    rows = [batch, *space, features]
    return list(map(rows.index, range(len(spec))))
