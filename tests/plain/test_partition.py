"""The law of partitions: every example once, in order, sizes as the options say, whatever the
split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxaccum as ja
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, normwise, refused, sizes_of

CONTIGUOUS = st.integers(1, 40).flatmap(
    lambda b: st.tuples(
        st.just(b),
        st.one_of(
            st.builds(lambda n: {"num_microbatches": n}, st.integers(1, b)),
            st.builds(lambda m: {"microbatch_size": m}, st.integers(1, b + 3)),
        ),
    )
)


@given(CONTIGUOUS)
def test_sizes_and_order(case):
    batch_size, options = case
    rows = [x for (x,) in ja.partition(np.arange(batch_size), in_axes=(0,), **options)]
    assert [len(x) for x in rows] == sizes_of(batch_size, **options)
    assert np.concatenate(rows).tolist() == list(range(batch_size))
    sizes = [len(x) for x in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert "microbatch_size" in options or sizes[0] - sizes[-1] <= 1


@given(st.integers(1, 6), st.integers(1, 6))
def test_strided_microbatch_i_holds_every_nth_example(n, m):
    rows = [
        x
        for (x,) in ja.partition(
            np.arange(n * m), in_axes=(0,), num_microbatches=n, split="strided"
        )
    ]
    assert [x.tolist() for x in rows] == [list(range(i, n * m, n)) for i in range(n)]


@pytest.mark.parametrize(
    ("batch_size", "options", "axis"),
    [
        (1, {"num_microbatches": 1}, 0), (7, {"num_microbatches": 3}, 0),
        (7, {"microbatch_size": 3}, 1),
        (8, {"microbatch_size": 9}, -1), (8, {"num_microbatches": 5}, -1),
        (7, {"num_microbatches": 7}, 1),
    ],
)  # fmt: skip
def test_the_loop_sees_what_partition_says(batch_size, options, axis):
    """The loop's own cut, read back through Stack and Concat, against the host's."""
    x = jnp.moveaxis(jnp.arange(batch_size * 2).reshape(batch_size, 2), 0, axis)
    fun = ja.microbatch(lambda x: ja.Concat(jnp.moveaxis(x, axis, 0)), in_axes=(axis,), **options)
    assert jnp.array_equal(fun(x), jnp.arange(batch_size * 2).reshape(batch_size, 2))
    sums = ja.microbatch(lambda x: ja.Stack(jnp.sum(x)), in_axes=(axis,), **options)(x)
    host = [
        int(np.sum(rows)) for (rows,) in ja.partition(np.asarray(x), in_axes=(axis,), **options)
    ]
    assert sums.tolist() == host


CUTS = [{"num_microbatches": 3, "split": "strided"}, {"num_microbatches": 3}]
CUTS += [{"microbatch_size": 4}]


@pytest.mark.parametrize(("axis", "options"), covering([1, 0, 2, -1], CUTS))
def test_rows_return_to_their_places_along_any_axis(options, axis):
    """Rows of the output and gradients of the batch; all sizes differ, so that no axis is
    another."""
    batch = jnp.moveaxis(data(6, 2, 5), 0, axis)
    first = lambda x: jnp.moveaxis(x, axis, 0)
    loss = lambda w, x: jnp.mean(jnp.sin(first(x) @ w) ** 2)
    w, options = data(5, seed=1), {"in_axes": (None, axis), **options}
    expected = jax.grad(loss, argnums=1)(w, batch)
    actual = ja.grad(loss, argnums=1, **options)(w, batch)
    assert normwise(actual, expected) < EXACT
    through = jax.grad(lambda x: ja.microbatch(loss, **options)(w, x))(batch)
    assert normwise(through, expected) < EXACT
    rows = ja.microbatch(lambda w, x: ja.Concat(first(x) @ w), **options)
    assert normwise(rows(w, batch), first(batch) @ w) < EXACT
    weighted = lambda x: jnp.sum(rows(w, x) * data(6, 2, seed=2))
    plain = lambda x: jnp.sum((first(x) @ w) * data(6, 2, seed=2))
    assert normwise(jax.grad(weighted)(batch), jax.grad(plain)(batch)) < EXACT
    misplaced = jnp.take(expected, jnp.array([0, 3, 1, 4, 2, 5]), axis)
    assert normwise(misplaced, expected) > EXACT  # as the strided rows lie before they are put back


def test_partition_folds_keys_and_keeps_the_initial_state():
    key = jax.random.key(3)
    axes = (0, ja.KEY, ja.EXAMPLE_KEY, ja.CARRY, None)
    parts = ja.partition(np.arange(5), key, key, 7.0, "whole", in_axes=axes, microbatch_size=2)
    assert [part[3:] for part in parts] == [(7.0, "whole")] * 3
    for i, (rows, own, examples, *_) in enumerate(parts):
        assert own == jax.random.fold_in(key, i)
        assert all(
            k == jax.random.fold_in(key, int(e)) for k, e in zip(examples, rows, strict=True)
        )


def test_a_pytree_prefix_says_which_leaves_are_batched():
    batch = {"x": np.arange(6), "table": np.arange(3)}
    parts = ja.partition(batch, in_axes=({"x": 0, "table": None},), num_microbatches=3)
    assert [part["x"].tolist() for (part,) in parts] == [[0, 1], [2, 3], [4, 5]]
    assert all(part["table"].tolist() == [0, 1, 2] for (part,) in parts)


@given(st.integers(1, 5), st.integers(0, 4), st.sampled_from([0, 1]))
def test_pad_batch_fills_with_zeros_and_masks_them(count, extra, axis):
    x = np.ones((count, 3)) if axis == 0 else np.ones((3, count))
    padded, mask = ja.pad_batch({"x": x}, to=count + extra, batch_axis=axis)
    assert mask.tolist() == [True] * count + [False] * extra
    assert padded["x"].shape[axis] == count + extra
    assert float(padded["x"].sum()) == x.sum()


def test_pad_batch_refuses_a_batch_beyond_its_capacity():
    refused(lambda: ja.pad_batch(np.ones((6, 2)), to=3), "6 examples", "to=3")
    refused(lambda: ja.pad_batch(np.ones((6, 2)), to=0), "to", "at least 1", "0")
    refused(lambda: ja.pad_batch(np.ones((6, 2)), to=9, batch_axis=4), "no axis 4", "[6, 2]")
    refused(lambda: ja.pad_batch({"a": np.ones(2), "b": np.ones(3)}, to=9), "'a'", "'b'", "2", "3")
