"""A batch laid out on an explicit mesh: the loop runs device by device and sums over devices once,
after it.

In an explicit mesh an array's type says over which mesh axes its rows are divided. The loop then
runs under ``shard_map`` over these axes, each device with its own rows, so that no gradient is
summed inside it. Every shard is cut in place: a contiguous microbatch takes consecutive rows of
each shard, so that groups of adjacent examples stay together; a strided one takes the examples i, i
+ n, … of the batch.

A call that cannot run so runs on the global arrays, cut into the same microbatches, and JAX sums at
every microbatch: a carried state, which sees whole microbatches; a coupled loss, unless its
collectives name the batch's mesh axes too; and a `fun` that closes over arrays of the mesh or names
its axes in shardings.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._base.source_lines import is_ours
from jaxaccum._base.types import Array, Fun, WithStreams
from jaxaccum._devices import varying
from jaxaccum._devices.without_checks import mapped_mesh_axes
from jaxaccum._program import argument_slots, prepare, validate
from jaxaccum._program.argument_slots import Layout, Role
from jaxaccum._program.program import NeedsGlobalArraysError, Options
from jaxaccum._transforms.eager import once

_NEEDS_GLOBAL_ARRAYS = (
    "Closing over inputs to shard_map",
    "should match the aval mesh",
    "of type Auto or Manual",
    "manual_axis_type",
)
"""What JAX says of a `fun` that closes over arrays of the mesh, or that names an axis which is
manual in the loop."""

Call = Callable[[Fun, Options, tuple[Any, ...], dict[str, Any]], Any]
"""The plain path; with `argnums`, it returns a pair whose second entry holds the gradients of these
arguments."""


def spread(
    call: Call,
    fun: Fun,
    options: Options,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    argnums: Sequence[int] = (),
    gather: str = "each",
) -> Any:
    """``call(fun, options, args, kwargs)``, over the devices of an explicit mesh if the batch is
    laid out on one."""
    validate.gather(gather)
    try:
        return _spread(call, fun, options, args, kwargs, argnums=argnums, gather=gather)
    except ValueError as error:
        mapped = mapped_mesh_axes()
        if not mapped or is_ours(error):
            raise
        raise ValueError(
            "the call is inside jax.shard_map, under a jax.vmap with "
            f"spmd_axis_name={_quoted(sorted(mapped))}, where JAX cannot follow which values of a "
            "loop vary over the mesh; pass check_vma=False to jax.shard_map."
        ) from error


def _spread(
    call: Call,
    fun: Fun,
    options: Options,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    argnums: Sequence[int],
    gather: str,
) -> Any:
    layout, arrays, _ = prepare.read(options, args, kwargs, argnums)
    if any(map(varying.is_summed, arrays)):
        return _of_plain_types(call, fun, options, layout, arrays, argnums=argnums, gather=gather)
    axes = _batch_axes(layout, arrays)
    if not axes:
        return call(fun, options, args, kwargs)
    found = _Spread(call, fun, options, layout, arrays, axes, tuple(argnums), gather)
    found.check()
    if any(slot.role is Role.CARRY for slot in layout.slots):
        return found.globally()
    try:
        return found.by_device()
    except NeedsGlobalArraysError:
        return found.globally()
    except (NotImplementedError, ValueError) as error:
        if not any(says in str(error) for says in _NEEDS_GLOBAL_ARRAYS):
            raise
        return found.globally()


def _of_plain_types(
    call: Call,
    fun: Fun,
    options: Options,
    layout: Layout,
    arrays: list[Array],
    *,
    argnums: Sequence[int],
    gather: str,
) -> Any:
    """The call with sums over devices taken that JAX would leave to be taken; its gradients come
    back as JAX's do."""
    args, kwargs = layout.build([varying.plain(x) for x in arrays])
    result = _spread(call, fun, options, args, kwargs, argnums=argnums, gather=gather)
    if not argnums:
        return result
    head, grads = result
    leaves, treedef = jax.tree.flatten(grads)
    own = [arrays[i] for i in _differentiated(layout, argnums)]
    return head, treedef.unflatten(map(varying.as_cotangent, leaves, own))


def _differentiated(layout: Layout, argnums: Sequence[int]) -> list[int]:
    """The slots of the gradients, in the order in which they are returned."""
    return [i for number in argnums for i, slot in enumerate(layout.slots) if slot.argnum == number]


@dataclasses.dataclass(frozen=True)
class _Spread:
    call: Call
    fun: Fun
    options: Options
    layout: Layout
    arrays: list[Array]
    axes: tuple[str, ...]
    """The mesh axes over which the rows of the batch are divided."""
    argnums: tuple[int, ...]
    gather: str

    @property
    def mesh(self) -> Any:
        pairs = zip(self.layout.slots, self.arrays, strict=True)
        return next(varying.of(x) for slot, x in pairs if slot.role is Role.ROWS)

    @property
    def shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def specs(self) -> list[P]:
        """How each array is divided over the batch's mesh axes."""
        return [_only(varying.spec(x), self.axes) for x in self.arrays]

    @property
    def sharded(self) -> dict[int, P]:
        """The parameters that are divided over the batch's mesh axes."""
        pairs = enumerate(zip(self.layout.slots, self.specs, strict=True))
        return {i: spec for i, (slot, spec) in pairs if slot.role is Role.WHOLE and any(spec)}

    def check(self) -> None:
        """Every microbatch holds as many rows of one shard as of another."""
        whole = argument_slots.batch_size(self.layout.slots, self.arrays)
        name = "num_microbatches" if self.options.microbatch_size is None else "microbatch_size"
        partition = validate.partition(
            whole,
            num_microbatches=self.options.num_microbatches,
            microbatch_size=self.options.microbatch_size,
            split="contiguous",
        )
        size = partition.groups[0].size
        if len(partition.groups) > 1 or size % self.shards:
            raise ValueError(
                f"{name}={getattr(self.options, name)} divides the {whole} examples of the batch "
                "into microbatches of "
                f"{' and '.join(str(group.size) for group in partition.groups)}, and the batch is "
                f"laid out over {self.shards} shards of an explicit mesh ({_quoted(self.axes)}): a "
                "microbatch takes equally many rows of each. Pass a num_microbatches that divides "
                f"the {whole // self.shards} rows of a shard, or a microbatch_size that is "
                f"{self.shards} times such a divisor."
            )

    def globally(self) -> Any:
        """The loop over global arrays, whose microbatches are divided as the batch is."""
        options = dataclasses.replace(self.options, blocks=self.shards)
        head, grads = _in_mesh(self.mesh, lambda arrays: self._pair(options, arrays))(
            self._kept(self.arrays)
        )
        leaves, treedef = jax.tree.flatten(grads)
        shardings = [jax.typeof(self.arrays[i]).sharding for i in self._differentiated()]
        flat = [  # the gradient of what lies on no mesh stays whole on every device
            g if own.mesh.empty else jax.sharding.reshard(g, own)
            for g, own in zip(leaves, shardings, strict=True)
        ]
        return (head, treedef.unflatten(flat)) if self.argnums else head

    def by_device(self) -> Any:
        """The loop over each device's own rows; totals and gradients summed once, after it."""
        found: list[Any] = []
        specs, sharded = self.specs, self.sharded

        def one(*arrays: Array) -> tuple[list[Array], list[Array], list[Array]]:
            own = list(arrays)
            if self.gather == "once":
                for i, spec in sharded.items():
                    own[i] = gathered(own[i], spec)
            each = self.gather == "each" and sharded
            fun = self._that_gathers() if each else self.fun
            result = self.call(fun, self._own_options(), *self.layout.build(own))
            head, grads = result if self.argnums else (result, ())
            leaves, treedef = jax.tree.flatten(head)
            rows = [bool(varying.varying_axes(x) & set(self.axes)) for x in leaves]
            flat, grads_def = jax.tree.flatten(grads)
            if self.gather == "once":
                flat = [
                    self._scattered(i, g) for i, g in zip(self._differentiated(), flat, strict=True)
                ]
            found.append((treedef, grads_def, rows))
            pairs = list(zip(leaves, rows, strict=True))
            return [x for x, row in pairs if row], [x for x, row in pairs if not row], flat

        outs = (P(self.axes), P(), [specs[i] for i in self._differentiated()])
        over = jax.shard_map(
            one, mesh=self.mesh, in_specs=tuple(specs), out_specs=outs, axis_names=set(self.axes)
        )
        rows, same, flat = once(over, *self.arrays)
        treedef, grads_def, divided = found[-1]
        rest = (iter(same), iter(rows))
        head = treedef.unflatten([next(rest[row]) for row in divided])
        return (head, grads_def.unflatten(flat)) if self.argnums else head

    def _that_gathers(self) -> Fun:
        """The function, which gathers its parameters at every microbatch."""
        sharded, row = self._leaves_of(self.sharded), self._a_row()
        change = lambda fun: _gathering(fun, sharded, row)
        return self.fun.mapped(change) if isinstance(self.fun, WithStreams) else change(self.fun)

    def _pair(self, options: Options, arrays: Sequence[Array]) -> tuple[Any, Any]:
        result = self.call(self.fun, options, *self.layout.build(list(arrays)))
        return result if self.argnums else (result, ())

    def _kept(self, arrays: Sequence[Array]) -> list[Array]:
        """Global arrays, with the parameters that are to be gathered once gathered."""
        if self.gather == "each":
            return list(arrays)
        whole = NamedSharding(self.mesh, P())
        return [
            jax.sharding.reshard(x, whole) if i in self.sharded else x for i, x in enumerate(arrays)
        ]

    def _own_options(self) -> Options:
        """The options of one device's call: its share of each microbatch."""
        given = self.options.mesh_axes
        outer = () if given is None else (given,) if isinstance(given, str) else tuple(given)
        size = self.options.microbatch_size
        whole = argument_slots.batch_size(self.layout.slots, self.arrays)
        return dataclasses.replace(
            self.options,
            mesh_axes=(*outer, *self.axes),
            device_axes=self.axes,
            microbatch_size=None if size is None else min(size, whole) // self.shards,
        )

    def _differentiated(self) -> list[int]:
        return _differentiated(self.layout, self.argnums)

    def _leaves_of(self, sharded: dict[int, P]) -> dict[int, P]:
        """By position among all leaves of the arguments, of which slots are those that are
        arrays."""
        positions = [
            i for i in range(self.layout.treedef.num_leaves) if i not in self.layout.statics
        ]
        return {positions[i]: spec for i, spec in sharded.items()}

    def _a_row(self) -> int:
        """The position of one leaf that changes from microbatch to microbatch."""
        roles = [slot.role for slot in self.layout.slots]
        return next(iter(self._leaves_of({roles.index(Role.ROWS): P()})))

    def _scattered(self, i: int, grad: Array) -> Array:
        """This device's share of the gradient of a parameter that was gathered before the loop."""
        if i in self.sharded:
            for dim, names in _divided(self.sharded[i]):
                grad = lax.psum_scatter(grad, names, scatter_dimension=dim, tiled=True)
        return grad


def gathered(x: Array, spec: P) -> Array:
    """The whole array, of which this device holds a share; its cotangent is summed over devices and
    scattered."""
    for dim, names in _divided(spec):
        x = lax.all_gather(x, names, axis=dim, tiled=True)
    return x


def _gathering(fun: Fun, sharded: dict[int, P], row: int) -> Fun:
    """`fun` of shares of its parameters, which it gathers at every microbatch.

    The barrier ties them to the microbatch: else the compiler, which sees that they never change,
    gathers them before the loop and keeps them.
    """

    @functools.wraps(fun)
    def whole(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        own = [
            gathered(_tied(x, leaves[row]), sharded[i]) if i in sharded else x
            for i, x in enumerate(leaves)
        ]
        args, kwargs = treedef.unflatten(own)
        return fun(*args, **kwargs)

    return whole


@jax.custom_vjp
def _tied(x: Array, row: Array) -> Array:
    """`x`, which the compiler must take to depend on `row`; its cotangent passes as it is.

    A rule of its own, because in jax 0.12 a barrier's transpose cannot add into references.
    """
    return lax.optimization_barrier((x, row))[0]


_tied.defvjp(lambda x, row: (_tied(x, row), None), lambda _, cotangent: (cotangent, None))


def _batch_axes(layout: Layout, arrays: Sequence[Array]) -> tuple[str, ...]:
    """The explicit mesh axes over which all batch axes are divided alike."""
    pairs = [
        (slot, x) for slot, x in zip(layout.slots, arrays, strict=True) if slot.role is Role.ROWS
    ]
    found = [(slot.name, _explicit_names(x, slot.axis)) for slot, x in pairs]
    if not found:
        return ()
    first_name, first = found[0]
    for name, other in found[1:]:
        if other != first:
            raise ValueError(
                f"the batch axis of {first_name} is laid out over {_quoted(first)} of the mesh and "
                f"that of {name} over {_quoted(other)}; lay all rows of the batch out alike, with "
                "jax.sharding.reshard or jax.device_put."
            )
    return first


def _explicit_names(x: Array, axis: int) -> tuple[str, ...]:
    mesh = varying.of(x)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = varying.names(varying.spec(x), axis)
    return tuple(name for name in names if kinds.get(name) is AxisType.Explicit)


def _only(spec: P, axes: Sequence[str]) -> P:
    """The part of a sharding that is over the given mesh axes."""
    kept = [
        tuple(name for name in varying.names(spec, i) if name in axes) for i in range(len(spec))
    ]
    return P(*(names or None for names in kept))


def _divided(spec: P) -> list[tuple[int, tuple[str, ...]]]:
    """The divided dimensions, each with its mesh axes."""
    return [(dim, varying.names(spec, dim)) for dim in range(len(spec)) if varying.names(spec, dim)]


def _in_mesh(mesh: Any, fun: Callable[[list[Array]], Any]) -> Callable[[list[Array]], Any]:
    """`fun` where new arrays belong to the mesh, as those that they meet in the loop do."""
    if jax.sharding.get_abstract_mesh().axis_names:
        return fun

    def inside(arrays: list[Array]) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return fun(arrays)

    return jax.jit(inside)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "no axis"
