"""Tables and parts of arrays that are others at another batch size are never called exact.

What is independent of the batch may still differ from example to example, once a reshape, a border
or an index of length n has made it a table over the batch. Each program here was called exact, and
the numbers of its microbatches do not average to the batch's.
"""

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxaccum
from jaxaccum.testing.bounds import normwise
from tests.support import jitted
from tests.support.helpers import EXACT, data

BATCH = data(12, 4, seed=1)
WIDE = data(12, 24, seed=2)
W, P, PAIR = data(4, seed=3), data(24, seed=4), data(2, 4, seed=5)


def in_squares(x, w):
    """Chunks of three examples, each with itself and its square."""
    chunk = lambda c: jnp.stack([c, 5 * c**2], 1).reshape(6)
    return lax.map(chunk, (x @ w).reshape(-1, 3)).reshape(-1)[: len(x)]


def padded(k, x):
    """A convolution whose border on the left is as wide as the batch is long."""
    kernel = k[:3].reshape(1, 1, 3)
    border = [(len(x), 14 - len(x))]
    return lax.conv_general_dilated(x[:, None, :], kernel, (1,), border)[:, :, :8]


def smoothed(w):
    """Four times one number, and a sum of neighbours: two at the ends, and three between."""
    return jnp.convolve(jnp.full(4, w[0]), jnp.ones(3), "same")


def chosen(w):
    return jnp.where(jnp.array([True, False, False, True, False]), w[0], w[1])


def first_places(p, x):
    """Ones for the first n of 24 parameters."""
    return p * jnp.concatenate([jnp.ones(len(x)), jnp.zeros(24 - len(x))])


PROGRAMS = {
    # a table that a reshape makes
    "repeated": (lambda w, x: jnp.mean((x @ w) * jnp.repeat(w[:2], len(x) // 2)), W, BATCH),
    "divided": (lambda p, x: jnp.mean(x[:, :1] * p.reshape(len(x), -1)), P, BATCH),
    "halves": (lambda w, x: jnp.mean((x @ w).reshape(2, -1) * w[:2, None]), W, BATCH),
    "two models": (
        lambda p, x: jnp.mean(jax.vmap(lambda p, c: jnp.tanh(c @ p))(p, x.reshape(2, -1, 4))),
        PAIR,
        BATCH,
    ),
    # a part as long as the batch, of what has another length
    "split": (lambda p, x: jnp.mean(x[:, 0] * jnp.split(p, [len(x)])[0]), P, BATCH),
    "joined": (lambda p, x: jnp.mean((x @ first_places(p, x)) ** 2), P, WIDE),
    "written": (lambda p, x: jnp.mean((x @ p.at[: len(x)].set(0.0)) ** 2), P, WIDE),
    "padded": (lambda k, x: jnp.mean(padded(k, x) ** 2), W, BATCH),
    # an index that is the length of the batch
    "last column": (lambda p, x: jnp.mean((x * p[None])[jnp.arange(len(x)), len(x) - 1]), P, WIDE),
    "taken": (lambda p, x: jnp.take(jnp.mean(x * p[None], 0), len(x) - 1), P, WIDE),
    "cut": (
        lambda p, x: jnp.sum(lax.dynamic_slice(x * p[None] / len(x), (0, len(x) - 1), (len(x), 3))),
        P,
        WIDE,
    ),
    "set": (lambda p, x: jnp.mean((x @ p.at[len(x) - 1].set(0.0)) ** 2), P, WIDE),
    # what was said to be one number
    "summed up": (
        lambda w, x: jnp.mean(
            (x @ w) * jnp.tile(jnp.cumsum(jnp.full(4, w[0])), len(x))[: len(x)]
        ),
        W,
        BATCH,
    ),
    "with borders": (
        lambda w, x: jnp.mean((x @ w) * jnp.tile(smoothed(w), len(x))[: len(x)]),
        W,
        BATCH,
    ),
    "chosen": (
        lambda w, x: jnp.mean((x @ w) * jnp.tile(chosen(w), len(x))[: len(x)]),
        W,
        BATCH,
    ),
    "two entries for each of a chunk": (lambda w, x: jnp.mean(in_squares(x, w)), W, BATCH),
}  # fmt: skip


def apart(loss, params, batch, n=2):
    """How far the mean of the microbatches' gradients is from the batch's."""
    parts = batch.reshape(n, -1, *batch.shape[1:])
    grads = [jax.jit(jax.grad(loss))(params, part) for part in parts]
    return normwise(sum(grads) / n, jax.jit(jax.grad(loss))(params, batch))


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_found_and_the_numbers_say_so(name):
    loss, params, batch = PROGRAMS[name]
    assert not jaxaccum.audit(loss, params, batch).exact
    assert apart(loss, params, batch) > 0.01  # the control: there is something to find


# -- microbatches of one example -------------------------------------------------------------------

OF_ONE = {
    "features squeezed to the front": lambda w, x: jnp.squeeze(x * w[None]).mean(0).sum(),
    "a sum over features": lambda w, x: jnp.sum(jnp.squeeze(x * w[None]).sum(0) * w) / len(x),
    "divided by the features": lambda w, x: (
        jnp.sum(jnp.squeeze(x * w[None]) ** 2) / len(jnp.squeeze(x))
    ),
    "half of the examples, rounded up": lambda w, x: jnp.sum((x @ w) ** 2) / ((len(x) + 1) // 2),
    "another factor for one": lambda w, x: jnp.mean((x @ w) ** 2 * (2.0 if len(x) == 1 else 3.0)),
    "another divisor, in an array": lambda w, x: jnp.sum(
        (x @ w)[:, None] ** 2 / jnp.full((1, 1), 1.0 * max(len(x), 4))
    ),
}


@pytest.mark.parametrize("name", OF_ONE)
def test_a_program_for_one_example_is_not_taken_for_another(name):
    assert not jaxaccum.audit(OF_ONE[name], W, BATCH, num_microbatches=12).exact
    assert apart(OF_ONE[name], W, BATCH, 12) > 0.01


# -- what looks alike and is exact -----------------------------------------------------------------

EXACT_ONES = {
    "repeated for each example": lambda w, x: jnp.mean(x * jnp.tile(w, len(x)).reshape(-1, 4)),
    "uniform, split in two axes": lambda w, x: jnp.mean(
        (x @ w).reshape(-1, 2) * jnp.broadcast_to(w[0], (len(x),)).reshape(-1, 2)
    ),
    "alternating in pairs": lambda w, x: jnp.mean(
        (x @ w) * jnp.broadcast_to(w[:2], (len(x) // 2, 2)).reshape(-1)
    ),
    "chunks of rows": lambda w, x: jnp.mean(
        lax.map(lambda c: jnp.tanh(c @ w), x.reshape(-1, 2, 4)).reshape(-1)
    ),
    "its own label": lambda w, x: jnp.mean(
        (x * w[None])[jnp.arange(len(x)), (x[:, 0] > 0).astype(int)]
    ),
    "one at a time": lambda w, x: jnp.mean(jnp.stack([x @ w, (x @ w) ** 2], 1)),
}


@pytest.mark.parametrize("n", [2, 3, 12])
@pytest.mark.parametrize("name", EXACT_ONES)
def test_what_only_looks_like_it_stays_exact(name, n):
    loss = EXACT_ONES[name]
    if 12 // n % 2:  # no whole pairs, or no equations for one example that are those of more
        n = 2
    assert jaxaccum.audit(loss, W, BATCH, num_microbatches=n).exact
    assert apart(loss, W, BATCH, n) <= EXACT


def test_an_inner_gradient_of_one_example_lacks_a_sum_over_one_example():
    """JAX sums a cotangent only along axes that were broadcast."""

    def penalized(params, x, over):
        own = lambda params: jnp.mean((x @ params["w"] + params["b"]) ** 2)
        grads = over(jax.grad(own)(params))
        return own(params) + jnp.sum(grads["b"] ** 2) + jnp.sum(grads["w"] ** 2)

    params = {"w": W[:, None], "b": jnp.ones((1, 1))}
    whole = lambda params, x: penalized(params, x, lambda g: g)
    loss = lambda params, x: penalized(params, x, lambda g: lax.pmean(g, "microbatch"))
    step = jaxaccum.grad(loss, num_microbatches=12, audit="raise")
    assert normwise(step(params, BATCH), jitted.grad(whole)(params, BATCH)) <= EXACT


def test_an_equation_without_operands_is_no_sum():
    loss = lambda w, x: jnp.sum((x @ (w * lax.iota(float, 4))) ** 2)
    assert not jaxaccum.audit(loss, W, BATCH, num_microbatches=12).exact
    mean = lambda w, x: jnp.mean(jnp.squeeze(x * (w * lax.iota(float, 4))[None]).sum(-1))
    assert apart(mean, W, BATCH, 12) <= EXACT
    jaxaccum.grad(mean, num_microbatches=12)(W, BATCH)


def test_a_rule_of_the_users_own_cancels_with_nothing():
    """Its value is that of its operand; its gradient is not."""

    @jax.custom_vjp
    def reversed_gradient(t):
        return t

    reversed_gradient.defvjp(lambda t: (t, None), lambda _, g: (-g,))

    def loss(w, x):
        s, t = jnp.sum((x @ w) ** 2), jnp.sum(jax.nn.softplus(x @ w))
        return jaxaccum.Sum(s / t * reversed_gradient(t))

    assert not jaxaccum.audit(loss, W, BATCH).exact
    plain = lambda w, x: jaxaccum.Sum(jnp.sum((x @ w) ** 2))
    assert jaxaccum.audit(plain, W, BATCH).exact


def test_a_strided_split_takes_no_adjacent_examples_together():
    loss = lambda w, x: jnp.mean((x @ w).reshape(-1, 3) * jnp.array([[1.0, 5.0, 9.0]]))
    options = {"num_microbatches": 2, "audit": "raise"}
    grads = jaxaccum.grad(loss, **options)(W, BATCH)
    assert normwise(grads, jitted.grad(loss)(W, BATCH)) <= EXACT
    with pytest.raises(jaxaccum.InexactError, match="divides the batch by place"):
        jaxaccum.grad(loss, split="strided", **options)(W, BATCH)


def test_a_nan_of_a_total_is_assumed_away_in_words():
    loss = lambda w, x: (lambda v: jnp.where(jnp.isnan(v), 0.0, v))(jnp.mean((x @ w) ** 2))
    report = jaxaccum.audit(loss, W, BATCH)
    assert report.exact
    assert "no value is NaN" in report.findings[0].note
    assert not jaxaccum.audit(loss, W, BATCH.at[0, 0].set(jnp.nan)).exact


def test_a_comparison_of_gathered_values_with_zero_is_no_comparison_of_places():
    def loss(w, x):
        h = x @ w
        everyone = lax.all_gather(h, "microbatch")
        mine = lax.broadcast_in_dim(h**3, everyone.shape, (1,))
        return jnp.mean(h**2) + jnp.mean(jnp.where(everyone < 0, mine, 0.0))

    assert not jaxaccum.audit(loss, W, BATCH).exact


def test_an_extremum_and_a_constant_are_an_extremum():
    fun = lambda x: jaxaccum.Max(jnp.maximum(jnp.max(x[:, 0], initial=-jnp.inf), 0.1))
    options = {"in_axes": (0,), "num_microbatches": 3, "audit": "raise"}
    for x in (BATCH, -jnp.abs(BATCH)):
        assert jaxaccum.microbatch(fun, **options)(x) == fun(x).x
    least = lambda x: jaxaccum.Max(jnp.minimum(jnp.max(x[:, 0]), 0.1))
    assert jaxaccum.microbatch(least, **options)(BATCH) == least(BATCH).x


# -- tables, drawn ---------------------------------------------------------------------------------

TABLES = {
    "full": lambda w, n: jnp.full((n,), w[0]),
    "rows": lambda w, n: jnp.broadcast_to(w, (n, 4)),
    "columns": lambda w, n: jnp.broadcast_to(w[:, None], (4, n)),
    "half rows": lambda w, n: jnp.broadcast_to(w[:2], (n // 2, 2)),
    "half columns": lambda w, n: jnp.broadcast_to(w[:2, None], (2, n // 2)),
    "square": lambda w, n: jnp.full((n, n), w[1]),
    "weights": lambda w, n: w,
}
CHANGES = {
    "flat": lambda a, n: a.reshape(-1),
    "in rows": lambda a, n: a.reshape(n, -1),
    "in columns": lambda a, n: a.reshape(-1, n),
    "in two": lambda a, n: a.reshape(2, -1),
    "in pairs": lambda a, n: a.reshape(-1, 2),
    "turned": lambda a, n: a.T,
    "sums so far": lambda a, n: jnp.cumsum(a, 0),
    "smoothed": lambda a, n: jnp.convolve(a.reshape(-1), jnp.ones(3), "same"),
    "windows": lambda a, n: lax.reduce_window(
        a, 0.0, lax.add, (3,) + (1,) * (a.ndim - 1), (1,) * a.ndim, "SAME"
    ),
    "first set": lambda a, n: a.at[0].set(5.0),
    "last added": lambda a, n: a.at[-1].add(5.0),
    "shifted": lambda a, n: jnp.pad(a, [(1, 1)] + [(0, 0)] * (a.ndim - 1))[2:],
    "joined": lambda a, n: jnp.concatenate([a, a + 1], 0),
    "first half": lambda a, n: a[: a.shape[0] // 2],
    "every other": lambda a, n: a[::2],
    "rolled": lambda a, n: jnp.roll(a, 1, 0),
    "tiled": lambda a, n: jnp.tile(a.reshape(-1), n),
    "repeated": lambda a, n: jnp.repeat(a, n, axis=0),
    "chosen": lambda a, n: jnp.where(jnp.cumsum(jnp.ones(a.shape[0])) < 3, a.T, 0.0).T,
    "masked": lambda a, n: jnp.where(jnp.array([True, False]), a.reshape(-1, 2), 2.0),
    "a loop": lambda a, n: lax.scan(lambda c, v: (c + 1.0, v * c), 1.0, a)[1],
}
SPENT = {
    "as rows": lambda a, n: a.reshape(n, -1).sum(1),
    "as columns": lambda a, n: a.reshape(-1, n)[0],
    "the first n": lambda a, n: a.reshape(-1)[:n],
    "one": lambda a, n: a.reshape(-1)[1],
}


def multiplied(table, changes, spent):
    """A mean of examples, each times its entry of a table that no example is in."""

    def loss(w, x):
        n = len(x)
        a = TABLES[table](w, n)
        for name in changes:
            a = CHANGES[name](a, n)
        return jnp.mean((x @ w) * SPENT[spent](a, n))

    return loss


def runs(loss, n):
    """Whether the shapes fit together, for the batch and for its microbatches."""
    try:
        for size in (12, 12 // n):
            jax.eval_shape(loss, W, BATCH[:size])
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return False
    return True


@given(
    st.sampled_from(sorted(TABLES)),
    st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=2),
    st.sampled_from(sorted(SPENT)),
    st.sampled_from([2, 3]),
)
def test_a_table_that_is_called_exact_is_so_in_numbers(table, changes, spent, n):
    loss = multiplied(table, changes, spent)
    hypothesis.assume(runs(loss, n))
    exact = jaxaccum.audit(loss, W, BATCH, num_microbatches=n).exact
    hypothesis.event("called exact" if exact else "found")
    assert not exact or apart(loss, W, BATCH, n) <= EXACT, (table, changes, spent)


@pytest.mark.parametrize(("table", "change"), [("half columns", "flat"), ("full", "sums so far")])
def test_a_table_of_places_is_found(table, change):
    """The control of the generator."""
    loss = multiplied(table, [change], "the first n")
    assert apart(loss, W, BATCH) > 0.01
    assert not jaxaccum.audit(loss, W, BATCH).exact
