"""A batch laid out on an explicit mesh: the loop runs device by device and sums over devices once,
after it.

In an explicit mesh an array's type says over which mesh axes its rows are divided. The loop then
runs under ``shard_map`` over these axes, each device with its own rows, so that no gradient is
summed inside it. Every shard is cut in place: a contiguous microbatch takes consecutive rows of
each shard, so that groups of adjacent examples stay together; a strided one takes the examples i, i
+ n, … of the batch.

Three kinds of call cannot run device by device: those with a carried state, which sees whole
microbatches; coupled losses, unless their collectives name the batch's mesh axes too; and a `fun`
that JAX refuses on one device's rows, since it closes over arrays of the mesh or names its axes in
shardings. They run on the global arrays, cut into the same microbatches, and JAX sums gradients at
every microbatch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._base.adapted import changed
from jaxaccum._base.entries import entries
from jaxaccum._base.source_lines import is_jaxs, is_ours
from jaxaccum._base.trees import safe_map
from jaxaccum._base.types import Array, PyTree, TreeDef
from jaxaccum._devices import varying
from jaxaccum._devices.without_checks import mapped_mesh_axes
from jaxaccum._program import validate
from jaxaccum._program.argument_slots import ArgumentTree, Role
from jaxaccum._program.call import Call, Options
from jaxaccum._program.program import NeedsGlobalArraysError
from jaxaccum._transforms.eager import once
from jaxaccum._transforms.gathers import divided, gathered, gathering

Run = Callable[[Call], PyTree]
"""What a transformation does with a call. Where arguments are differentiated, it returns a pair
whose second entry holds their gradients."""


def spread(run: Run, call: Call, *, gather: str = "each") -> PyTree:
    """``run(call)``, over the devices of an explicit mesh if the batch is laid out on one."""
    validate.gather(gather)
    try:
        return _spread(run, call, gather)
    except ValueError as error:
        mapped = mapped_mesh_axes()
        if not mapped or is_ours(error):
            raise
        raise ValueError(
            "the call is inside jax.shard_map, under a jax.vmap with "
            f"spmd_axis_name={_quoted(sorted(mapped))}, where JAX cannot follow which values of a "
            "loop vary over the mesh; pass check_vma=False to jax.shard_map."
        ) from error


def _spread(run: Run, call: Call, gather: str) -> PyTree:
    if any(map(varying.is_summed, call.arrays)):
        return _of_plain_types(run, call, gather)
    axes = _batch_axes(call.tree, call.arrays)
    if not axes:
        return run(call)
    found = _Spread(run, call, axes, gather)
    found.check()
    if call.tree.positions(Role.CARRY):
        return found.globally()
    try:
        return found.by_device()
    except NeedsGlobalArraysError:
        pass
    except (NotImplementedError, TypeError, ValueError) as error:
        if not is_jaxs(error):
            raise
    # An error that `fun` itself makes comes up once more, in the shapes of the user's own arrays.
    return found.globally()


def _of_plain_types(run: Run, call: Call, gather: str) -> PyTree:
    """Run the call after the sums over devices that JAX has left pending. Gradients come back with
    the types that JAX would give them."""
    result = _spread(run, call.of_arrays(map(varying.plain, call.arrays)), gather)
    if not call.argnums:
        return result
    head, grads = result
    leaves, treedef = jax.tree.flatten(grads)
    own = entries(call.arrays, call.differentiated)
    return head, treedef.unflatten(safe_map(varying.as_cotangent, leaves, own))


class _Shared(NamedTuple):
    """What one device's call returns, apart: what differs between devices, what does not, and how
    both are put together."""

    treedef: TreeDef
    grads: TreeDef
    are_rows: list[bool]
    """For each leaf of the head, whether it differs between devices."""

    def together(self, rows: Sequence[Array], same: Sequence[Array]) -> PyTree:
        """The head, of the leaves that differ and of those that do not."""
        rest = {True: iter(rows), False: iter(same)}
        return self.treedef.unflatten([next(rest[is_row]) for is_row in self.are_rows])


@dataclasses.dataclass(frozen=True)
class _Spread:
    """A call whose batch is divided over the devices of a mesh."""

    run: Run
    call: Call
    axes: tuple[str, ...]
    """The mesh axes over which the rows of the batch are divided."""
    gather: str

    @property
    def tree(self) -> ArgumentTree:
        return self.call.tree

    @property
    def arrays(self) -> list[Array]:
        return self.call.arrays

    @property
    def options(self) -> Options:
        return self.call.options

    @property
    def mesh(self) -> AbstractMesh:
        rows = self.tree.positions(Role.ROWS)
        return varying.of(self.arrays[rows[0]])

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
        specs = self.specs
        return {i: specs[i] for i in self.tree.positions(Role.WHOLE) if any(specs[i])}

    def check(self) -> None:
        """Every microbatch holds as many rows of one shard as of another."""
        whole = self.call.batch_size
        name = "num_microbatches" if self.options.microbatch_size is None else "microbatch_size"
        partition = validate.partition(
            whole,
            num_microbatches=self.options.num_microbatches,
            microbatch_size=self.options.microbatch_size,
            split="contiguous",
        )
        size = partition.groups[0].size
        if len(partition.groups) > 1 or size % self.shards:
            sizes = [str(group.size) for group in partition.groups]
            raise ValueError(
                f"{name}={getattr(self.options, name)} divides the {whole} examples of the batch "
                "into microbatches of "
                f"{' and '.join(sizes)}, and the batch is "
                f"laid out over {self.shards} shards of an explicit mesh ({_quoted(self.axes)}): a "
                "microbatch takes equally many rows of each. Pass a num_microbatches that divides "
                f"the {whole // self.shards} rows of a shard, or a microbatch_size that is "
                f"{self.shards} times such a divisor."
            )

    def globally(self) -> PyTree:
        """The loop over global arrays, whose microbatches are divided as the batch is."""
        options = dataclasses.replace(self.options, blocks=self.shards)
        call = dataclasses.replace(self.call, options=options)
        run = _in_mesh(self.mesh, lambda arrays: self._pair(call.of_arrays(arrays)))
        head, grads = run(self._kept())
        if not self.call.argnums:
            return head
        leaves, treedef = jax.tree.flatten(grads)
        own = entries(self.arrays, self.call.differentiated)
        return head, treedef.unflatten(safe_map(_laid_out_as, leaves, own))

    def by_device(self) -> PyTree:
        """The loop over each device's own rows; totals and gradients summed once, after it."""
        found: list[_Shared] = []
        specs, sharded, mine = self.specs, self.sharded, self._of_one_device()

        def one(*arrays: Array) -> tuple[list[Array], list[Array], list[Array]]:
            own = list(arrays)
            if self.gather == "once":
                for i, spec in sharded.items():
                    own[i] = gathered(own[i], spec)
            head, grads = self._pair(mine.of_arrays(own))
            leaves, treedef = jax.tree.flatten(head)
            are_rows = [bool(varying.varying_axes(x) & set(self.axes)) for x in leaves]
            flat, grads_def = jax.tree.flatten(grads)
            if self.gather == "once":
                flat = safe_map(self._scattered, self.call.differentiated, flat)
            found.append(_Shared(treedef, grads_def, are_rows))
            same = itertools.compress(leaves, map(operator.not_, are_rows))
            return list(itertools.compress(leaves, are_rows)), list(same), flat

        outs = (P(self.axes), P(), entries(specs, self.call.differentiated))
        over = jax.shard_map(
            one, mesh=self.mesh, in_specs=tuple(specs), out_specs=outs, axis_names=set(self.axes)
        )
        rows, same, flat = once(over, *self.arrays)
        shared = found[-1]
        head = shared.together(rows, same)
        return (head, shared.grads.unflatten(flat)) if self.call.argnums else head

    def _of_one_device(self) -> Call:
        """One device's call: its share of each microbatch. With ``gather="each"`` the function
        gathers its parameters."""
        fun, sharded, row = self.call.fun, self._leaves_of(self.sharded), self._a_row()
        if self.gather == "each" and sharded:
            fun = changed(fun, lambda fun: gathering(fun, sharded, row))
        return dataclasses.replace(self.call, fun=fun, options=self._own_options())

    def _pair(self, call: Call) -> tuple[PyTree, PyTree]:
        """The result as a pair: the head, and the gradients, if there are any."""
        result = self.run(call)
        return result if call.argnums else (result, ())

    def _kept(self) -> list[Array]:
        """Global arrays, with the parameters that are to be gathered once gathered."""
        arrays = list(self.arrays)
        if self.gather == "once":
            whole = NamedSharding(self.mesh, P())
            for i in self.sharded:
                arrays[i] = jax.sharding.reshard(arrays[i], whole)
        return arrays

    def _own_options(self) -> Options:
        """The options of one device's call: its share of each microbatch."""
        outer = validate.axis_names(self.options.mesh_axes)
        size = self.options.microbatch_size
        whole = self.call.batch_size
        return dataclasses.replace(
            self.options,
            mesh_axes=(*outer, *self.axes),
            device_axes=self.axes,
            microbatch_size=None if size is None else min(size, whole) // self.shards,
        )

    def _leaves_of(self, sharded: dict[int, P]) -> dict[int, P]:
        """The same, by position among all leaves of the arguments."""
        leaves = self.tree.leaves
        return {leaves[i]: spec for i, spec in sharded.items()}

    def _a_row(self) -> int:
        """The position of one leaf that changes from microbatch to microbatch."""
        rows = self.tree.positions(Role.ROWS)
        return self.tree.leaves[rows[0]]

    def _scattered(self, i: int, grad: Array) -> Array:
        """This device's share of the gradient of a parameter that was gathered before the loop."""
        if i in self.sharded:
            for dim, names in divided(self.sharded[i]):
                grad = lax.psum_scatter(grad, names, scatter_dimension=dim, tiled=True)
        return grad


def _batch_axes(tree: ArgumentTree, arrays: Sequence[Array]) -> tuple[str, ...]:
    """The explicit mesh axes over which all batch axes are divided alike."""
    rows = tree.positions(Role.ROWS)
    if not rows:
        return ()

    def names(i: int) -> tuple[str, ...]:
        return _explicit_names(arrays[i], tree.slots[i].axis)

    first = names(rows[0])
    for i in rows[1:]:
        if (other := names(i)) != first:
            raise ValueError(
                f"the batch axis of {tree.slots[rows[0]].name} is laid out over {_quoted(first)} "
                f"of the mesh and that of {tree.slots[i].name} over {_quoted(other)}; lay all "
                "rows of the batch out alike, with jax.sharding.reshard or jax.device_put."
            )
    return first


def _explicit_names(x: Array, axis: int) -> tuple[str, ...]:
    mesh = varying.of(x)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = varying.names(varying.spec(x), axis)
    return tuple(name for name in names if kinds.get(name) is AxisType.Explicit)


def _only(spec: P, axes: Sequence[str]) -> P:
    """The part of a sharding that is over the given mesh axes."""
    kept = []
    for dim in range(len(spec)):
        names = tuple(name for name in varying.names(spec, dim) if name in axes)
        kept.append(names or None)
    return P(*kept)


def _laid_out_as(grad: Array, x: Array) -> Array:
    """The gradient of what lies on a mesh lies as that does; any other is whole on every device."""
    own = jax.typeof(x).sharding
    return grad if own.mesh.empty else jax.sharding.reshard(grad, own)


def _in_mesh(
    mesh: AbstractMesh, fun: Callable[[list[Array]], PyTree]
) -> Callable[[list[Array]], PyTree]:
    """`fun` where new arrays belong to the mesh, as those that they meet in the loop do."""
    if jax.sharding.get_abstract_mesh().axis_names:
        return fun

    def inside(arrays: list[Array]) -> PyTree:
        with jax.sharding.use_abstract_mesh(mesh):
            return fun(arrays)

    return jax.jit(inside)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "no axis"
