"""Which variables of an nnx model a function assigns to, wherever in its program they went.

A variable that goes through ``nnx.remat``, ``nnx.jit`` or ``nnx.scan`` comes out as another array
with the same value. So the program is asked, not the array: an output counts as unchanged if it is
an argument that every equation on the way hands on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from jaxaccum._base.adapted import adapted
from jaxaccum._base.entries import entries, with_entries
from jaxaccum._base.trees import is_array, leaf_name, safe_map
from jaxaccum._base.types import Array, Fun, KeyPath, PyTree, TreeDef
from jaxaccum._jaxpr.compat import opened, scan_arity
from jaxaccum._jaxpr.variables import Atom, Var

Places = list[int | None]
"""For each output, the place of the argument that it is, or None."""


def unchanged(fn: Callable[..., list[Array]], arrays: Sequence[Array]) -> list[bool]:
    """Of a function that returns what its arguments became: which of them are what they were."""
    jaxpr = jax.make_jaxpr(fn)(*arrays).jaxpr
    return [place == i for i, place in enumerate(handed_on(jaxpr))]


def call(
    fun: Fun,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    explain: Callable[[Exception], None],
) -> PyTree:
    """``fun(*args, **kwargs)``; an error if it assigns to a variable of a model, which would be
    lost.

    `explain` adds a note to an error of the function itself.
    """
    before, treedef = jax.tree.flatten((args, kwargs))
    try:
        output = fun(*args, **kwargs)
    except Exception as error:  # of the user's function
        explain(error)
        raise
    if adapted(fun).returns_state or not _holds((args, kwargs), "Variable"):
        return output
    if same_objects(before, jax.tree.leaves((args, kwargs))):
        return output
    if (name := _assigned(fun, before, treedef)) is not None:
        fun_name = getattr(fun, "__name__", "fun")
        raise ValueError(
            f"{fun_name} assigns to argument {name}, a variable of an nnx model, and here the "
            "model is a copy, so the assignment would be lost. Write "
            f"jaxaccum.nnx.value_and_grad({fun_name}, …)(model, batch), which updates the "
            f"model.{_statistics(args)} model.eval() stops the assignment too, but it changes what "
            "the model computes."
        )
    return output


def _statistics(args: tuple[PyTree, ...]) -> str:
    """What else a model with a BatchNorm of its own microbatch needs."""
    nnx = sys.modules["flax.nnx"]
    for model in _parts(args, "Pytree"):
        for _, layer in nnx.iter_graph(model):
            if isinstance(layer, nnx.BatchNorm) and layer.axis_name is None:
                return _NAME_THE_AXIS
    return ""


_NAME_THE_AXIS = (
    ' Give each BatchNorm axis_name="microbatch" too: it then has the full batch\'s statistics.'
)


def _assigned(fun: Fun, leaves: list[Any], treedef: TreeDef) -> str | None:
    """The name of a leaf of the arguments of `fun` that is another one after a call."""
    places = [i for i, x in enumerate(leaves) if is_array(x)]
    names: list[str] = []

    def run(*arrays: Array) -> list[Array]:
        args, kwargs = jax.tree.unflatten(treedef, with_entries(leaves, places, arrays))
        fun(*args, **kwargs)
        after = _named((args, kwargs))
        names.extend(after)
        return list(after.values())

    kept = unchanged(run, entries(leaves, places))
    before = _named(jax.tree.unflatten(treedef, leaves))
    appeared = [name for name in names if name not in before]
    changed = [name for name, same in zip(names, kept, strict=True) if not same]
    return next(iter([*appeared, *changed]), None)


def _named(tree: PyTree) -> dict[str, Array]:
    """The arrays of ``(args, kwargs)`` by name: ``0.norm.mean`` of the first argument."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path): x for path, x in leaves if is_array(x)}


def _name(path: KeyPath) -> str:
    return leaf_name("", path[1:2]).strip("[]'") + leaf_name("", path[2:]).removesuffix(".value")


def library_of(tree: PyTree) -> str | None:
    """Whose modules a tree holds: those of nnx, of Equinox, or none."""
    if _parts(tree, "Pytree"):
        return "nnx"
    return "equinox" if _parts(tree, "Module", "equinox") else None


def _holds(tree: PyTree, kind: str) -> bool:
    """Whether any part of the tree is of the class of nnx."""
    return bool(_parts(tree, kind))


def _parts(tree: PyTree, kind: str, library: str = "flax.nnx") -> list[Any]:
    """The parts of the tree that are of a library's class. It need not have been imported."""
    module = sys.modules.get(library)
    if module is None:
        return []
    found = lambda x: isinstance(x, getattr(module, kind))
    return list(filter(found, jax.tree.leaves(tree, is_leaf=found)))


def same_objects(old: Sequence[Any], new: Sequence[Any]) -> bool:
    """Whether two lists hold the same arrays, and not only equal ones."""
    return len(old) == len(new) and all(x is y for x, y in zip(old, new, strict=True))


def handed_on(jaxpr: jex.Jaxpr) -> Places:
    """For each output of a jaxpr, the argument that it is."""
    place_of: dict[Var, int | None] = {v: i for i, v in enumerate(jaxpr.invars)}

    def place(v: Atom) -> int | None:
        return None if isinstance(v, jex.Literal) else place_of.get(v)

    for eqn in jaxpr.eqns:
        for v, i in zip(eqn.outvars, _through(eqn), strict=True):
            place_of[v] = None if i is None else place(eqn.invars[i])
    return list(map(place, jaxpr.outvars))


def _through(eqn: jex.JaxprEqn) -> Places:
    """For each result of an equation, the operand that it is."""
    rule = _RULES.get(eqn.primitive.name)
    return [None] * len(eqn.outvars) if rule is None else rule(eqn)


def _same(eqn: jex.JaxprEqn) -> Places:
    return list(range(len(eqn.outvars)))


def _call(eqn: jex.JaxprEqn) -> Places:
    jaxpr, _ = opened(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
    return handed_on(jaxpr)


def _shard_map(eqn: jex.JaxprEqn) -> Places:
    """Only what comes out divided as it went in is the same array."""
    ins, outs = eqn.params["in_specs"], eqn.params["out_specs"]
    places = _call(eqn)
    for k, i in enumerate(places):
        if i is not None and ins[i] != outs[k]:
            places[k] = None
    return places


def _scan(eqn: jex.JaxprEqn) -> Places:
    """A carry that each step hands on, and scanned slices that are written as they were read."""
    consts, carried = scan_arity(eqn.params)
    places = handed_on(opened(eqn.params["jaxpr"])[0])
    carry = [i if i == consts + k else None for k, i in enumerate(places[:carried])]
    written = [i if i is not None and i >= consts + carried else None for i in places[carried:]]
    return [*carry, *written]


def _while(eqn: jex.JaxprEqn) -> Places:
    consts, before = eqn.params["body_nconsts"], eqn.params["cond_nconsts"]
    places = handed_on(opened(eqn.params["body_jaxpr"])[0])
    return [before + i if i == consts + k else None for k, i in enumerate(places)]


def _cond(eqn: jex.JaxprEqn) -> Places:
    branches = [handed_on(opened(branch)[0]) for branch in eqn.params["branches"]]

    def agreed(*places: int | None) -> int | None:
        """The operand that it is in every branch; the first operand is the index of the branch."""
        first = places[0]
        return None if first is None or len(set(places)) > 1 else first + 1

    return safe_map(agreed, *branches)


_RULES: dict[str, Callable[[jex.JaxprEqn], Places]] = {
    **dict.fromkeys(["copy", "copy_p", "optimization_barrier", "sharding_constraint"], _same),
    **dict.fromkeys(["stop_gradient", "random_wrap", "random_unwrap"], _same),
    **dict.fromkeys(["jit", "pjit", "closed_call", "core_call", "eval_jaxpr"], _call),
    **dict.fromkeys(["checkpoint", "remat", "remat2"], _call),
    **dict.fromkeys(["custom_jvp_call", "custom_vjp_call"], _call),
    "shard_map": _shard_map, "scan": _scan, "while": _while, "cond": _cond,
}  # fmt: skip
