"""What a call costs one device, in bytes and operations, by compiling it and never running it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._base.trees import is_array, leaves_with_names
from jaxaccum._base.types import Array, Fun, PyTree
from jaxaccum._devices import varying
from jaxaccum._jaxpr import compat
from jaxaccum._jaxpr.flops import flops
from jaxaccum._program import argument_slots
from jaxaccum._program.argument_slots import Role, Slot
from jaxaccum._program.axes_by_name import ArgumentAxes
from jaxaccum._program.call import Call, Options
from jaxaccum._program.call import read as read_call
from jaxaccum._program.prepare import prepare
from jaxaccum._transforms import explicit_mesh


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device needs for one run."""

    temp_bytes: int
    total_bytes: int
    flops: float


@dataclasses.dataclass(frozen=True)
class AbstractCall:
    """Arguments as shapes with shardings; what is not an array is in `leaves` and never traced."""

    treedef: Any
    leaves: tuple[Any, ...]
    traced: tuple[int, ...]
    """Which leaves are arguments of the compiled program."""
    mesh: Any
    """The mesh that the arguments are laid out on, if any is."""
    mesh_axes: tuple[str, ...]
    """Its manual axes, over which the program is one device's."""
    batch_axes: frozenset[str] = frozenset()
    """The mesh axes, manual ones apart, that the rows of the batch are divided over."""
    batch_size: int = 0

    @property
    def shapes(self) -> list[Any]:
        """The arguments of the compiled program."""
        return [self.leaves[i] for i in self.traced]

    @property
    def shards(self) -> int:
        """Over how many devices, manual axes apart, the rows of the batch are divided."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @property
    def explicit(self) -> bool:
        """Whether explicit axes divide the batch; on these, microbatches have one size."""
        if self.mesh is None:
            return False
        return not self.batch_axes.isdisjoint(self.mesh.abstract_mesh.explicit_axes)

    @property
    def device_kind(self) -> str:
        """The name of the device that the program is compiled for."""
        return self._device().device_kind

    def device_limit(self) -> int | None:
        """The memory of one device, where it says so."""
        try:
            stats = self._device().memory_stats()
        except jax.errors.JaxRuntimeError:  # a device of a topology that is only described
            return None
        return (stats or {}).get("bytes_limit")

    def rows(self, axes: ArgumentAxes) -> tuple[list[Slot], int]:
        """The leaves with a batch axis, and its size on one device of the manual axes."""
        found: list[tuple[tuple[Slot, ...], int]] = []

        def note(*arrays: Array) -> None:
            tree, own = argument_slots.read(*self._build(arrays), axes)
            found.append((tree.slots, argument_slots.batch_size(tree.slots, own)))

        jax.eval_shape(self._shard_map(note, None) if self.mesh_axes else note, *self.shapes)
        slots, batch_size = found[-1]
        return [slot for slot in slots if slot.role is Role.ROWS], batch_size

    def couples(self, fun: Fun, options: Options, argnums: Sequence[int], *, has_aux: bool) -> bool:
        """Whether the loss has collectives over microbatches; the loss is traced once."""
        found: list[bool] = []

        def note(call: Call) -> None:
            program, _ = prepare(call, loss=True, has_aux=has_aux)
            found.append(program.coupled)

        def one(*arrays: Array) -> None:
            call = read_call(fun, options, *self._build(arrays), argnums)
            explicit_mesh.spread(note, dataclasses.replace(call, argnums=()))

        jax.eval_shape(self._shard_map(one, None) if self.mesh_axes else one, *self.shapes)
        return found[-1]

    def compiled(self, step: Fun, argnums: Sequence[int]) -> Cost:
        """Compile ``step(*args)``, a gradient with respect to the arguments `argnums`."""
        traced = jax.jit(self._over_mesh(step, argnums)).trace(*self.shapes)
        devices = self.mesh.size if self.mesh is not None else 1
        operations = flops(traced.jaxpr.jaxpr, devices)
        try:
            analysis = traced.lower().compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            needed = compat.bytes_needed(error)
            if needed is None:
                raise
            return Cost(needed, needed, operations)
        assert analysis is not None, "this backend does not report its memory"
        given, returned = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
        temporary, shared = analysis.temp_size_in_bytes, analysis.alias_size_in_bytes
        return Cost(temporary, given + returned - shared + temporary, operations)

    def _build(self, arrays: Sequence[PyTree]) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
        """The positional and the keyword arguments that hold `arrays`."""
        own = list(self.leaves)
        for i, x in zip(self.traced, arrays, strict=True):
            own[i] = x
        return self.treedef.unflatten(own)

    def _over_mesh(self, step: Fun, argnums: Sequence[int]) -> Fun:
        """`step` of flat arrays; inside ``shard_map`` where some axes are manual."""

        def call(*arrays: Array) -> PyTree:
            args, kwargs = self._build(arrays)
            return step(*args, **kwargs)

        if not self.mesh_axes:
            return call

        def one(*arrays: Array) -> tuple[PyTree, list[Array]]:
            head, grads = call(*arrays)
            return jax.tree.map(lambda x: x[None], head), jax.tree.leaves(grads)

        specs, _ = self._build(list(map(self._manual_spec, self.shapes)))
        differentiated = [specs[number] for number in argnums]
        outs = jax.tree.leaves(differentiated, is_leaf=lambda x: isinstance(x, P))
        return self._shard_map(one, (P(self.mesh_axes), outs))

    def _shard_map(self, fun: Fun, out_specs: PyTree) -> Fun:
        specs = tuple(map(self._manual_spec, self.shapes))
        return jax.shard_map(
            fun, mesh=self.mesh, in_specs=specs, out_specs=out_specs, axis_names=set(self.mesh_axes)
        )

    def _manual_spec(self, x: object) -> P:
        """The sharding over manual axes alone."""
        kept, spec = [], _spec(x)
        for dim in range(len(spec)):
            names = [name for name in varying.names(spec, dim) if name in self.mesh_axes]
            kept.append(tuple(names) or None)
        return P(*kept)

    def _device(self) -> Any:
        if self.mesh is not None:
            return self.mesh.devices.flat[0]
        for x in self.leaves:
            if isinstance(x, jax.Array):
                return next(iter(x.devices()))
        return jax.devices()[0]


def read(
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    axes: ArgumentAxes,
    *,
    traced: Collection[int | str | None],
    mesh_axes: str | Sequence[str] | None,
) -> AbstractCall:
    """The call; in the arguments `traced`, Python numbers are arguments of the program too."""
    names = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())
    leaves, positions = {}, []
    for number, called, arg in argument_slots.every(args, kwargs):
        for name, x in leaves_with_names(arg, called):
            if isinstance(x, jax.core.Tracer):
                raise TypeError(
                    f"{name} is traced, and a plan compiles programs of its own; call "
                    "jaxaccum.plan outside of jit and of other transformations, with arrays or "
                    "jax.ShapeDtypeStruct."
                )
            if is_array(x) or isinstance(x, jax.ShapeDtypeStruct) or number in traced:
                positions.append(len(leaves))
            leaves[name] = x
    mesh = _mesh_of(list(leaves.values()), names)
    structure = jax.tree.structure((args, kwargs))
    call = AbstractCall(structure, tuple(leaves.values()), tuple(positions), mesh, names)
    rows, batch_size = call.rows(axes)
    divided: set[str] = set()
    for slot in rows:
        divided.update(varying.names(_spec(leaves[slot.name]), slot.axis))
    batch_axes = frozenset(divided.difference(names))
    return dataclasses.replace(call, batch_axes=batch_axes, batch_size=batch_size)


def _mesh_of(leaves: Sequence[object], mesh_axes: tuple[str, ...]) -> Any:
    shardings = filter(None, map(_sharding, leaves))
    first = next(shardings, None)
    mesh = None if first is None else first.mesh
    for name in mesh_axes:
        if mesh is None or name not in mesh.axis_names:
            raise ValueError(
                f"mesh_axes names {name!r}, and no argument is laid out on a mesh with that "
                "axis; give the arguments the shardings of the real run, "
                "jax.sharding.NamedSharding(mesh, spec)."
            )
    return mesh


def _sharding(x: object) -> NamedSharding | None:
    """How `x` is laid out on a mesh, if it is."""
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _spec(x: object) -> P:
    sharding = _sharding(x)
    return P() if sharding is None else sharding.spec
