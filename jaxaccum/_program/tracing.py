"""`fun` traced once per size of microbatch, with the types that its arguments have in the loop.

Its own axis is bound to the number of microbatches, so that a collective over it shows up as an
equation. JAX also tracks which values vary over a mesh, and refuses an axis that is not the mesh's.
A function with such a collective is traced once more without these checks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from jaxaccum._base.adapted import adapted
from jaxaccum._base.entries import places_of
from jaxaccum._base.types import Array, Fun
from jaxaccum._devices import varying
from jaxaccum._devices.without_checks import unchecked, untyped_shard_index, with_exchanges
from jaxaccum._jaxpr.equations import axes_of
from jaxaccum._jaxpr.reversible import equations_inside
from jaxaccum._jaxpr.traces import Trace, trace
from jaxaccum._jaxpr.variables import Type, taken_by, types_of
from jaxaccum._program import batch_keys, microbatches, other_sizes, validate
from jaxaccum._program.argument_slots import ArgumentTree, Role, Slot
from jaxaccum._program.call import Options
from jaxaccum._program.example_keys import example_keys
from jaxaccum._program.flat_function import FlatFunction, Traced
from jaxaccum._program.microbatches import Partition
from jaxaccum._program.output_parts import Outputs
from jaxaccum._program.program import NeedsGlobalArraysError, Observed
from jaxaccum._program.reductions import Reduction


class OnMesh(NamedTuple):
    """Arrays as the loop reads them, and over which mesh axes they vary."""

    arrays: list[Array]
    """Cast to vary over `axes`."""
    given_axes: list[frozenset[str]]
    """Over which each varied as the caller gave it."""
    axes: frozenset[str]
    """Those over which anything in the loop varies."""
    mesh_axes: tuple[str, ...]
    """Those over which the caller asks to sum."""

    def followed_by(self, arrays: Sequence[Array]) -> OnMesh:
        """The same, and further arrays as they are."""
        given_axes = [*self.given_axes, *map(varying.varying_axes, arrays)]
        return self._replace(arrays=[*self.arrays, *arrays], given_axes=given_axes)


class Group(NamedTuple):
    """`fun` traced for the microbatches of one size."""

    size: int
    trace: Trace
    """What the loop runs."""
    observed: Observed
    """What the audit sees."""
    checked: bool
    """Whether JAX could follow which values vary over a mesh."""

    def rearranged(self, order: Sequence[int]) -> Group:
        """The group whose loop has the same outputs in another order."""
        return self._replace(trace=self.trace.rearranged(order))


@dataclasses.dataclass(frozen=True)
class Tracing:
    """How `fun` is traced for one call: with which arguments, under which axes."""

    flat: FlatFunction
    options: Options
    partition: Partition
    arguments: OnMesh

    def group(self, group: microbatches.Group) -> Group:
        """`fun` at the size of one group of microbatches."""
        number = self.partition.num_microbatches
        at = lambda flat, size: self._at(flat, size, number)
        one, original, consts, checked = self.flat.traced(at, group.size)
        outputs, types, leaves = self.flat.returned[-1]
        one, seen = one.split(len(types))[0], original.split(len(types))[1]
        observed = Observed(seen, consts, leaves)
        self._check_of_one_device(original, consts)
        if one.coupling is not None:
            self._check_coupled(one.coupling, checked)
            one = self._with_streams_apart(one, outputs, checked)
        return Group(group.size, one, observed, checked)

    def at_another_size(self, groups: Sequence[Group]) -> other_sizes.Traced | None:
        """`fun` for the whole batch as one microbatch, and what it closes over; None where it does
        not run there. Of several devices, for twice the examples of one.

        Without an audit `fun` is called once a size, and a group of another size has to do.
        """
        if len(groups) > 1 and not self.flat.audited:
            return groups[1].trace, groups[1].observed.consts
        size = self.partition.batch_size * (2 if self.flat.num_shards > 1 else 1)

        def whole() -> other_sizes.Traced:
            found = self._at(self.flat.elsewhere(), size, 1)
            return found.trace, found.consts

        return other_sizes.traced_if_possible(whole)

    def observe(self, size: int, count: int) -> Observed:
        """For the audit: `fun` traced for one of `count` microbatches of `size` examples."""
        other = self.flat.elsewhere()
        _, original, consts, _ = self._at(other, size, count)
        _, types, leaves = other.returned[0]
        return Observed(original.split(len(types))[1], consts, leaves)

    def _at(self, flat: FlatFunction, size: int, count: int) -> Traced:
        arrays, mesh_axes = self.arguments.arrays, self.arguments.mesh_axes
        types = types_in_loop(flat.tree, arrays, size, mesh_axes)
        return traced(flat.at(size), types, (self.options.axis_name, count))

    def _check_of_one_device(self, one: Trace, consts: Sequence[Array]) -> None:
        """A function that runs device by device does not see beyond its device.

        One that closes over arrays that are divided as the batch is, or that has a ``shard_map`` of
        its own over the batch's axes, does. JAX may find out when it compiles, which is too late.
        """
        axes = set(self.options.device_axes)
        if not axes:
            return
        specs = list(map(varying.spec, consts))
        for eqn in equations_inside(one.jaxpr):
            if eqn.primitive.name == "shard_map":
                specs += [*eqn.params["in_specs"], *eqn.params["out_specs"]]
        if any(axes & varying.every_name(spec) for spec in specs):
            raise NeedsGlobalArraysError

    def _check_coupled(self, coupling: jex.JaxprEqn, checked: bool) -> None:
        name = self.options.axis_name
        if not set(self.options.device_axes) <= set(axes_of(coupling)):
            raise NeedsGlobalArraysError
        validate.coupled(coupling, name, self.partition, shadows=validate.is_bound(name))
        if not checked:
            names = [slot.name for slot in self.flat.tree.slots]
            given = list(zip(names, self.arguments.given_axes, strict=True))
            validate.undivided(given, self.arguments.axes)

    def _with_streams_apart(self, one: Trace, outputs: Outputs, checked: bool) -> Trace:
        """The trace, in which each microbatch draws from streams of its own, if `fun` is a model
        that draws."""
        mesh_axes = self.arguments.mesh_axes
        alone = self.partition.num_microbatches == 1 and not mesh_axes
        if alone or not adapted(self.flat.fun).draws_from_state:
            return one
        slots = self.flat.tree.slots
        with contextlib.nullcontext() if checked else unchecked():
            return _with_own_streams(one, outputs, slots, self.partition, mesh_axes)


def traced(fun: Fun, types: list[Type], axis: tuple[str, int]) -> Traced:
    """`fun` traced with JAX's checks of what varies over a mesh, or without where they refuse a
    collective over the loop's axis."""
    try:
        one, consts = trace(fun, types, axis)
        return Traced(one, one, consts, checked=True)
    except (AssertionError, ValueError) as error:
        # JAX says so of a collective over an axis that is not the mesh's.
        if not any(map(varying.varying_axes, types)):
            raise
        with unchecked():
            plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in types]
            try:
                one, consts = trace(fun, plain, axis)
            except Exception:  # of the user's function: what JAX said first is about the program
                raise error from None
        if one.coupling is None:
            _explain_index(one, axis[0], error)
            raise
        changed = one.with_jaxpr(with_exchanges(one.jaxpr, axis[0]))
        return Traced(changed, one, consts, checked=False)


def _explain_index(one: Trace, axis_name: str, error: Exception) -> None:
    """An error for a loss on a mesh that reads its place in the loop, and has no collectives."""
    if one.jaxpr.invars[0] in taken_by(one.jaxpr.eqns, one.jaxpr.outvars):
        raise NotImplementedError(
            f"fun reads lax.axis_index({axis_name!r}), and JAX, which tracks here what varies over "
            "the mesh, knows no axis of a loop. For a key of each microbatch's own declare the key "
            "jaxaccum.KEY in in_axes; for another use pass the place with the batch, a row for "
            "each example, or check_vma=False to jax.shard_map."
        ) from error


def types_in_loop(
    tree: ArgumentTree, arrays: list[Array], size: int, mesh_axes: tuple[str, ...]
) -> list[Type]:
    """The types of the arguments for `size` examples: shapes alone would lose how a mesh divides
    them."""

    def cut(arrays: list[Array]) -> list[Array]:
        own, index = list(arrays), varying.vary(jnp.int32(0), frozenset(mesh_axes))
        for i, slot in enumerate(tree.slots):
            x = own[i]
            if slot.role is Role.ROWS:
                if size > x.shape[slot.axis]:  # the audit may ask for more than there are
                    x = jnp.concatenate([x, x], axis=slot.axis)
                x = jax.lax.slice_in_dim(x, 0, size, axis=slot.axis)
            elif slot.role is Role.KEY:
                x = jax.random.fold_in(x, index)
            elif slot.role is Role.EXAMPLE_KEY:
                x = example_keys(x, index + jnp.arange(size, dtype=jnp.int32))
            elif slot.role is Role.BATCH_KEY:
                x = batch_keys.moved(x, index)
            own[i] = x
        return own

    return types_of(jax.make_jaxpr(cut)(arrays).jaxpr.outvars)


def _with_own_streams(
    one: Trace,
    outputs: Outputs,
    slots: Sequence[Slot],
    partition: Partition,
    mesh_axes: tuple[str, ...],
) -> Trace:
    """A coupled trace of a model, in which every carried key is folded with the microbatch's index.

    A coupled program updates its state once, so that all microbatches would draw the same numbers.
    What follows from the old state alone is made of the keys as they came: the next keys, and
    whatever is not drawn from a key.
    """
    keys, own, carried = {}, set(), []
    for place, slot in enumerate(slots, start=one.num_consts):
        if slot.role is Role.CARRY:
            carried.append(slot)
            if slot.key is not None:
                keys[place] = slot.key
        elif slot.role is not Role.WHOLE:
            own.add(place)
    kept: set[int] = set()
    for i, slot in zip(outputs.positions(Reduction.CARRY), carried, strict=True):
        needed = set(places_of(one.needs([i])))
        if not needed & (own if slot.key is not None else own | keys.keys()):
            kept.add(i)

    def folded(index: Array, arrays: list[Array]) -> list[Array]:
        place = index + untyped_shard_index(mesh_axes) * partition.num_microbatches
        for i, impl in keys.items():
            given = jax.random.wrap_key_data(arrays[i], impl=impl)
            drawn_from = jax.vmap(jax.random.fold_in, (0, None))(given.reshape(-1), place)
            arrays[i] = jax.random.key_data(drawn_from.reshape(given.shape))
        return arrays

    return one.before(folded, keep=kept) if keys else one
