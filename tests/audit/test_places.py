"""The place of an example, however it is carried, is found wherever a program makes a number of it.

A microbatch counts its examples from 0, so a number made of a place is another one in each
partition. Programs are drawn as a source of places, what carries them, and what spends them. The
truth is the value of the loss on 6 examples, and on microbatches of 4 and 2.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxaccum
from tests.audit.truth import APART, accumulated
from tests.support.covering import covering
from tests.support.helpers import data, parts_of

SOURCES = {
    "column": lambda b: jnp.arange(_size(b))[:, None],
    "constant": lambda b: jnp.asarray(np.arange(_size(b)))[:, None],
    "table": lambda b: _beside(jnp.arange(_size(b)), jnp.zeros(_size(b), int)),
    "labelled": lambda b: _beside(jnp.arange(_size(b)), b["y"]),
    "entries": lambda b: jnp.arange(2 * _size(b)).reshape(-1, 2),
    "labelled entries": lambda b: _beside(jnp.arange(2 * _size(b)), jnp.repeat(b["y"], 2))[1::2],
    "counted by a loop": lambda b: lax.scan(lambda i, y: (i + 1, i), 0, b["y"])[1][:, None],
}


def _size(batch):
    return len(batch["y"])


def _beside(*columns):
    """A table of indices."""
    return jnp.concatenate([x[:, None] for x in columns], axis=1)


def _none_negative(table):
    """As JAX writes indices."""
    return jnp.where(table < 0, table + 9, table)


CARRIERS = {
    "none is negative": lambda t, b: _none_negative(t),
    "reshaped": lambda t, b: t.reshape(len(t), 1, -1).reshape(len(t), -1),
    "transposed": lambda t, b: t.T.T,
    "called": lambda t, b: jax.jit(lambda t: t)(t),
    "recomputed": lambda t, b: jax.checkpoint(lambda t: 1 * t)(t),
    "in a branch": lambda t, b: lax.cond(b["w"][0] > 0, lambda: t, lambda: jnp.zeros_like(t)),
    "in each branch": lambda t, b: lax.cond(b["w"][0] > 0, lambda: t, lambda: t),
    "chosen": lambda t, b: jnp.where(b["w"][0] > 0, t, jnp.zeros_like(t)),
    "carried": lambda t, b: lax.scan(lambda t, _: (t, None), t, None, length=2)[0],
    "beside a state": lambda t, b: lax.fori_loop(
        0, 2, lambda i, s: (_none_negative(s[0]), jnp.sin(s[1]) * b["w"]), (t, jnp.ones(3))
    )[0],
    "counted on": lambda t, b: lax.fori_loop(0, 2, lambda i, t: t + 1, t),
    "until": lambda t, b: lax.while_loop(lambda s: s[1] < 2, lambda s: (s[0], s[1] + 1), (t, 0))[0],
    "at each step": lambda t, b: lax.scan(lambda s, _: (s, t), 0, None, length=2)[1][0],
    "over steps": lambda t, b: lax.scan(lambda s, t: (s, t), 0, t[None])[1][0],
    "of each example": lambda t, b: lax.map(lambda row: 1 * row, t),
    "mapped": lambda t, b: jax.vmap(lambda row: 1 * row)(t),
    "twice": lambda t, b: jnp.concatenate([t, t], axis=1),
    "stacked": lambda t, b: jnp.stack([t, t], axis=1).reshape(len(t), -1),
    "written": lambda t, b: jnp.zeros_like(t).at[jnp.arange(len(t))].set(t),
    "written to columns": lambda t, b: jnp.zeros_like(t).at[:, jnp.arange(t.shape[1])].set(t),
    "updated": lambda t, b: lax.dynamic_update_slice(jnp.zeros_like(t), t, (0, 0)),
    "read": lambda t, b: t[jnp.arange(len(t))],
    "picked": lambda t, b: jnp.take_along_axis(t, b["y"][:, None] % t.shape[1], axis=1),
    "first": lambda t, b: t[:, :1],
    "a window": lambda t, b: lax.dynamic_slice(t, (0, 0), (len(t), 1)),
    "sorted": lambda t, b: jnp.sort(t, axis=1),
    "padded": lambda t, b: jnp.pad(t, ((0, 0), (0, 1))),
}
SPENDERS = {
    "summed": lambda t, b: jnp.sum(t, axis=1),
    "largest": lambda t, b: jnp.max(t, axis=1),
    "multiplied": lambda t, b: t @ jnp.ones(t.shape[1], int),
    "compared": lambda t, b: jnp.any(t > 1, axis=1),
    "of a table": lambda t, b: jnp.sum(jnp.cos(jnp.arange(99.0))[t], axis=1),
    "of a table with columns": lambda t, b: jnp.ones((99, 2)).cumsum(0)[t[:, 0], b["y"] % 2],
    "of its own row": lambda t, b: b["x"][jnp.arange(len(t)), t[:, -1] % 3],
    "of others' rows": lambda t, b: b["x"][t[:, 0] // 2, b["y"]],
    "one hot": lambda t, b: jax.nn.one_hot(t[:, 0], 9)[:, 1],
}
READERS = {
    "rows": lambda b: b["x"][jnp.arange(_size(b))],
    "labels": lambda b: b["x"][jnp.arange(_size(b)), b["y"]],
    "labels by a table": lambda b: jax.vmap(lambda row, y: row[y])(b["x"], b["y"]),
    "entries": lambda b: _flat(b)[jnp.arange(2 * _size(b))],
    "labels of entries": lambda b: _flat(b)[jnp.arange(2 * _size(b)), jnp.repeat(b["y"], 2)],
    "constant entries": lambda b: _flat(b)[np.arange(2 * _size(b)), jnp.repeat(b["y"], 2)],
    "written entries": lambda b: (
        _flat(b) * jnp.zeros_like(_flat(b)).at[jnp.arange(2 * _size(b)), 1].set(2.0)
    ),
}


def _flat(batch):
    """Two rows for each example, as tokens are flattened."""
    return jnp.stack([batch["x"], batch["x"] ** 2], axis=1).reshape(-1, 3)


WEIGHTS = data(3, seed=1) + 1.0
BATCH = {"x": data(6, 3, seed=2), "y": jnp.asarray([0, 2, 1, 1, 0, 2])}
PARTS = parts_of(BATCH, [4, 2])


def spent(source, carriers, spender):
    """A loss whose rows count by a number that is made of places."""

    def loss(w, batch):
        b = {**batch, "w": w}
        table = SOURCES[source](b)
        for name in carriers:
            table = CARRIERS[name](table, b)
        return jnp.mean((b["x"] @ w) * SPENDERS[spender](table, b).astype(float))

    return loss


def error_of(loss):
    """How far the values of the microbatches are from the batch's."""
    whole, parts = accumulated(loss, [BATCH])(WEIGHTS), accumulated(loss, PARTS)(WEIGHTS)
    return abs(float(whole - parts))


def is_exact(loss):
    return jaxaccum.audit(loss, WEIGHTS, BATCH).exact


@given(
    st.sampled_from(sorted(SOURCES)),
    st.lists(st.sampled_from(sorted(CARRIERS)), max_size=3),
    st.sampled_from(sorted(SPENDERS)),
)
def test_a_number_made_of_places_is_never_called_exact_against_the_numbers(
    source, carriers, spender
):
    loss = spent(source, carriers, spender)
    exact = is_exact(loss)
    hypothesis.event("called exact" if exact else "found")
    assert not exact or error_of(jax.jit(loss)) < APART, (source, carriers, spender)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_nothing_hides_a_place_that_it_carries(carrier):
    assert not any(is_exact(spent(source, [carrier], "summed")) for source in SOURCES)


@pytest.mark.parametrize("collective", [lax.psum, lax.pmax, lax.pmean])
@pytest.mark.parametrize("source", SOURCES)
def test_no_collective_hides_a_place(collective, source):
    """It gives the places of a microbatch as it gives any number that all of them share."""

    def loss(w, batch):
        table = collective(SOURCES[source](batch), "microbatch")
        return jnp.mean((batch["x"] @ w) * jnp.sum(table, axis=1).astype(float))

    assert not is_exact(loss)


@pytest.mark.parametrize("spender", SPENDERS)
def test_nothing_hides_a_place_that_it_spends(spender):
    assert not any(is_exact(spent(source, [], spender)) for source in SOURCES)


def test_these_programs_depend_on_the_partition():
    """The control: what the audit must find is there, but where a spender reads other columns."""
    pairs = covering(list(SPENDERS), list(SOURCES))
    errors = [error_of(spent(source, [], spender)) for spender, source in pairs]
    assert sum(error > 1e-3 for error in errors) >= 0.9 * len(errors)


def test_entries_in_another_order_are_those_of_other_examples():
    """The places of two entries for each example, one example after the other, pick from rows that
    lie one entry after the other."""

    def loss(w, b):
        places = jnp.arange(2 * _size(b)).reshape(-1, 2).T.reshape(-1)
        rows = jnp.concatenate([b["x"], b["x"] ** 2])
        return jnp.mean(rows[places] * jnp.concatenate([b["x"], b["x"]]) * w[0])

    assert not is_exact(loss)
    assert error_of(loss) > 1e-3


@pytest.mark.parametrize("reader", READERS)
def test_an_example_that_reads_its_own_entries_is_exact(reader):
    loss = lambda w, b: jnp.mean(jnp.sin(READERS[reader](b)) * w[0])
    assert is_exact(loss)
    assert error_of(loss) < APART
