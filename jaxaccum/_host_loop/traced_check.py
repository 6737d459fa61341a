"""A check of a traced value that `checkify` sees, and that costs nothing elsewhere.

``checkify.debug_check`` has an effect, and `jax.jit` dispatches a program with an effect from
Python: a call with 400 arrays takes 8 ms in place of 0.8. The primitive here is an identity without
effects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxaccum._base.types import Array, PyTree
from jaxaccum._jaxpr import compat

_checked = Primitive("checked")
_check, _rules = compat.checkify_rules()
_checkify = compat.checkify()


def checked(x: Array, valid: Callable[[Array], Array], message: str) -> Array:
    """`x`, which is an error under `checkify` where ``valid(x)`` is not true.

    Args:
        x: the value. The caller uses the one that is returned, since JAX drops what nobody reads.
        valid: a function of a module and not a closure, as it is a part of the program's identity.
        message: what the error says; ``{x}`` is the value.
    """
    return _checked.bind(x, valid=valid, message=message)


def _jvp(
    primals: Sequence[Array], tangents: Sequence[Array], **params: object
) -> tuple[Array, Array]:
    return _checked.bind(*primals, **params), tangents[0]


def _batched(
    args: Sequence[Array], axes: Sequence[int | None], **params: object
) -> tuple[Array, int | None]:
    return _checked.bind(*args, **params), axes[0]


def _checkified(*given: Any, valid: Callable[[Array], Array], message: str) -> tuple[PyTree, Array]:
    """The rule of `checkify` for our check: `given` is what `checkify` hands to a rule, and `x`."""
    *context, value = given
    x = jnp.asarray(value)
    new, _ = _checkify.checkify(lambda: _checkify.check(jnp.all(valid(x)), message, x=x))()
    leaves, tree = jax.tree.flatten(new)
    error, _ = _rules[_check](*context, *leaves, err_tree=tree, debug=True)
    return error, x


_checked.def_impl(lambda x, **_: x)
_checked.def_abstract_eval(lambda x, **_: x)
ad.primitive_jvps[_checked] = _jvp
batching.primitive_batchers[_checked] = _batched
mlir.register_lowering(_checked, lambda _, x, **__: [x])
_rules[_checked] = _checkified
