"""The small rules under all others: how rows are cut, how arrays combine, dtypes of sums."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxaccum._base import trees
from jaxaccum._program import microbatches, reductions
from jaxaccum._program.reductions import Reduction
from tests.support.covering import covering
from tests.support.helpers import data

PARTITIONS = {
    "contiguous": (microbatches.by_number(7, 3, "contiguous"), [[0, 1, 2], [3, 4], [5, 6]]),
    "equal": (microbatches.by_number(6, 3, "contiguous"), [[0, 1], [2, 3], [4, 5]]),
    "strided": (microbatches.by_number(6, 3, "strided"), [[0, 3], [1, 4], [2, 5]]),
    "one": (microbatches.by_number(4, 1, "strided"), [[0, 1, 2, 3]]),
    "single": (microbatches.by_number(3, 3, "contiguous"), [[0], [1], [2]]),
    "remainder": (microbatches.by_size(8, 3, "contiguous"), [[0, 1, 2], [3, 4, 5], [6, 7]]),
    "no remainder": (microbatches.by_size(4, 2, "contiguous"), [[0, 1], [2, 3]]),
    "blocks": (
        dataclasses.replace(microbatches.by_number(12, 3, "contiguous"), blocks=2),
        [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]],
    ),
    "beyond": (microbatches.by_size(2, 5, "contiguous"), [[0, 1]]),
}
"""Partitions, each with the examples of its microbatches, by hand."""
of_partitions = pytest.mark.parametrize("case", PARTITIONS.values(), ids=PARTITIONS)


def indices(group):
    return range(group.first, group.first + group.count)


@of_partitions
def test_the_examples_of_each_microbatch(case):
    partition, expected = case
    groups = [group for group in partition.groups for _ in indices(group)]
    found = [partition.examples(g, jnp.int32(i)) for i, g in enumerate(groups)]
    assert [x.tolist() for x in found] == expected
    assert all(x.dtype == jnp.int32 for x in found)
    first = [int(partition.first_example(g, jnp.int32(i))) for i, g in enumerate(groups)]
    assert first == [examples[0] for examples in expected]
    assert partition.num_microbatches == len(expected)
    assert sum(group.examples for group in partition.groups) == partition.batch_size


@pytest.mark.parametrize(("case", "axis"), covering(list(PARTITIONS.values()), [0, 1, 2]))
def test_rows_are_cut_along_their_axis_and_put_back(case, axis):
    """All axes differ in length, so that another axis in the place of this one is another shape."""
    partition, expected = case
    shape = [11, 17]
    shape.insert(axis, partition.batch_size)
    whole = np.arange(np.prod(shape)).reshape(shape)
    stacks = partition.split_rows(jnp.asarray(whole), axis)
    rows = [np.asarray(x) for stack in stacks for x in stack]
    assert [x.tolist() for x in rows] == [np.take(whole, i, axis).tolist() for i in expected]
    assert partition.merge_rows(stacks, axis).tolist() == whole.tolist()


def test_rows_are_put_back_along_the_first_axis_unless_one_is_named():
    partition = microbatches.by_size(5, 2, "contiguous")
    x = jnp.arange(15).reshape(5, 3)
    assert jnp.array_equal(partition.merge_rows(partition.split_rows(x, 0)), x)


def test_a_group_of_the_whole_batch_is_not_sliced():
    """A slice of all rows would be one more operation, on sharded rows one more collective."""
    cut = jax.make_jaxpr(lambda x: microbatches.by_number(6, 3, "contiguous").split_rows(x, 0))(
        data(6, 2)
    )
    merge = jax.make_jaxpr(microbatches.by_number(6, 3, "contiguous").merge_rows)([data(3, 2, 2)])
    used = {str(eqn.primitive) for jaxpr in (cut, merge) for eqn in jaxpr.eqns}
    assert not used & {"slice", "concatenate", "dynamic_slice"}
    parts = jax.make_jaxpr(lambda x: microbatches.by_number(5, 3, "contiguous").split_rows(x, 0))(
        data(5, 2)
    )
    assert [str(eqn.primitive) for eqn in parts.eqns].count("slice") == 2


DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int32",
    "float8_e4m3fn",
    "bfloat16",
    "float16",
    "float32",
    "float64",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_state_is_the_neutral_element(dtype):
    values = {"bool": [False, True]}.get(dtype, [0, 1, 100])
    if jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        values = [_extreme(jnp.dtype(dtype), min), *values, _extreme(jnp.dtype(dtype), max)]
    x = jnp.asarray(values, dtype)
    for reduction in (Reduction.MAX, Reduction.MIN):
        state = reductions.initial(reduction, jax.typeof(x))
        assert (state.shape, state.dtype) == (x.shape, x.dtype)
        assert jnp.array_equal(reductions.update(reduction, state, x), x)
    lowest = reductions.initial(Reduction.MAX, jax.ShapeDtypeStruct((), x.dtype))
    highest = reductions.initial(Reduction.MIN, jax.ShapeDtypeStruct((), x.dtype))
    assert lowest == _extreme(x.dtype, min)
    assert highest == _extreme(x.dtype, max)


def _extreme(dtype, which):
    """The smallest or largest value of a dtype, by numpy."""
    if dtype == np.bool_:
        return which(False, True)
    if np.issubdtype(dtype, np.integer):
        return which(np.iinfo(dtype).min, np.iinfo(dtype).max)
    if dtype == ml_dtypes.float8_e4m3fn:  # it has no infinities
        return which(-448, 448)
    return which(-np.inf, np.inf)


@pytest.mark.parametrize("reduction", [Reduction.SUM, Reduction.LAST, Reduction.CARRY])
def test_the_other_states_start_at_zero(reduction):
    state = reductions.initial(reduction, jax.ShapeDtypeStruct((2,), jnp.float32))
    assert state.tolist() == [0, 0]


def test_each_state_is_updated_by_its_rule():
    state, x = jnp.asarray([3.0, -2]), jnp.asarray([1.0, 5])
    kept = [reduction for reduction in Reduction if not reduction.stacked]
    updated = {reduction: reductions.update(reduction, state, x).tolist() for reduction in kept}
    assert updated.pop(Reduction.SUM) == [4, 3]
    assert updated.pop(Reduction.MAX) == [3, 5]
    assert updated.pop(Reduction.MIN) == [1, -2]
    assert set(map(tuple, updated.values())) == {(1, 5)}


def test_which_rules_stack_and_which_pass_a_cotangent():
    assert {x for x in Reduction if x.stacked} == {Reduction.CONCAT, Reduction.STACK}
    differentiable = {x for x in Reduction if x.differentiable}
    assert differentiable == {Reduction.SUM, Reduction.CONCAT, Reduction.STACK}


@pytest.mark.parametrize("checked", [True, False])
def test_each_rule_over_a_mesh(checked):
    """Shards of 3, 1 and 2: each rule against Python's own, and the device's own rows."""
    mesh = Mesh(jax.devices()[:3], "d")
    x = jnp.asarray([3.0, 1.0, 2.0])

    def combined(x):
        return {r.value: reductions.over_mesh(r, x, ("d",)) * jnp.ones_like(x) for r in Reduction}

    rows = PartitionSpec("d")
    mapped = jax.shard_map(combined, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=checked)
    found = {name: values.tolist() for name, values in jax.jit(mapped)(x).items()}
    assert found.pop("sum") == [6] * 3
    assert found.pop("max") == [3] * 3
    assert found.pop("min") == [1] * 3
    assert found.pop("last") == [2] * 3
    assert set(map(tuple, found.values())) == {(3, 1, 2)}


def test_without_a_mesh_each_value_is_its_own():
    assert all(reductions.over_mesh(reduction, 7, ()) == 7 for reduction in Reduction)


WIDER = {
    "bool": "int64",
    "int8": "int64",
    "int64": "int64",
    "uint8": "uint64",
    "bfloat16": "float32",
    "float16": "float32",
    "float8_e4m3fn": "float32",
    "float32": "float32",
    "float64": "float64",
    "complex64": "complex64",
    "complex128": "complex128",
}


@pytest.mark.parametrize("dtype", WIDER)
def test_the_dtype_of_sums(dtype):
    assert trees.widen(dtype) == jnp.dtype(WIDER[dtype])
    assert trees.widen(jnp.dtype(dtype)) == jnp.dtype(WIDER[dtype])


def test_the_gradient_of_an_integer_keeps_its_dtype():
    assert trees.widen(jax.dtypes.float0) == jax.dtypes.float0


def test_the_dtype_of_sums_of_integers_is_the_widest_that_jax_has():
    with jax.enable_x64(False):
        assert [trees.widen(x) for x in ("bool", "int16", "uint16")] == ["int32", "int32", "uint32"]


def test_what_is_an_array_and_what_can_be_differentiated():
    arrays = [jnp.ones(2), np.ones(2), np.float32(1), jax.random.key(0)]
    assert all(map(trees.is_array, arrays))
    assert not any(map(trees.is_array, [1.0, 2, True, "x", None, [jnp.ones(2)]]))
    inexact = [1.0, 1j, np.float16(1), jnp.ones(2, jnp.bfloat16), np.ones(2, ml_dtypes.float8_e5m2)]
    assert all(map(trees.is_inexact, [*inexact, jax.ShapeDtypeStruct((), jnp.complex64)]))
    assert not any(map(trees.is_inexact, [1, True, jnp.arange(2), jax.random.key(0)]))


def test_the_dtype_of_arrays_shapes_and_numbers():
    assert trees.dtype_of(np.int8(1)) == jnp.int8
    assert trees.dtype_of(jax.ShapeDtypeStruct((), jnp.float16)) == jnp.float16
    assert [trees.dtype_of(x) for x in (1.0, 1, True)] == [jnp.float64, jnp.int64, jnp.bool_]
    with jax.enable_x64(False):  # an array's own, and not the one that JAX would give it
        assert trees.dtype_of(np.ones(2)) == np.float64
        assert trees.dtype_of(1.0) == jnp.float32


def test_the_implementation_of_a_key():
    assert str(trees.key_impl(jax.random.key(0, impl="rbg"))) == "rbg"
    assert trees.key_impl(jax.random.PRNGKey(0)) is None
    assert trees.key_impl(1.0) is None


def test_leaves_have_the_names_that_errors_give_them():
    tree = {"x": [1, (2, None)], "y": {"z": 3}}
    names = {"a['x'][0]": 1, "a['x'][1][0]": 2, "a['y']['z']": 3}
    assert dict(trees.leaves_with_names(tree, "a")) == names
    pairs = trees.leaves_with_names(tree, "a", is_leaf=lambda x: isinstance(x, tuple))
    assert dict(pairs) == {"a['x'][0]": 1, "a['x'][1]": (2, None), "a['y']['z']": 3}


def test_dtypes_are_promoted_as_by_default_although_these_tests_are_strict():
    int_and_float = jnp.ones((), jnp.int32), jnp.ones((), jnp.float32)
    with pytest.raises(ValueError, match="promotion"):
        jnp.result_type(*int_and_float)
    assert trees.promote(*int_and_float) == jnp.float32
    narrow = jnp.ones((), jnp.float8_e4m3fn), jnp.ones((), jnp.bfloat16)
    assert trees.promote(*narrow) == jnp.float32
    kept = ("float8_e4m3fn", "float16", "complex64")
    assert [trees.floating(x) for x in kept] == [jnp.dtype(x) for x in kept]
    assert trees.floating("int8") == jnp.float64
    total = trees.total_of([jnp.int32(1), jnp.float32(2.5), jnp.bfloat16(4)])
    assert (total, total.dtype) == (7.5, jnp.float32)
    assert trees.total_of([jnp.float16(1.5)]).dtype == jnp.float16


def test_a_cast_is_of_exactly_the_dtype():
    cast = trees.cast(1.0, jnp.float32)
    assert (cast.dtype, cast.weak_type) == (jnp.float32, False)
    assert trees.cast(jnp.asarray(2.7), "int32") == 2


def test_a_ratio_of_nothing_is_zero_and_so_are_its_gradients():
    value, grads = jax.value_and_grad(trees.ratio, (0, 1))(jnp.float64(6), jnp.float64(4))
    assert (value, grads) == (1.5, (0.25, -0.375))
    empty, nothing = jax.value_and_grad(trees.ratio, (0, 1))(jnp.float64(6), jnp.float64(0))
    assert (empty, nothing) == (0, (0, 0))
    weighed = trees.ratio(jnp.asarray([1.0, 2]), jnp.asarray([0, 4]))
    assert (weighed.tolist(), weighed.dtype) == ([0, 0.5], jnp.float64)
