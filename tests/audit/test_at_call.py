"""The audit at the call: what is inexact is said when it is traced, with the line and what to
write."""

import functools
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum
import jaxaccum.linen
import jaxaccum.nnx
from jaxaccum import CARRY, EXAMPLE_KEY, KEY, Carry, Concat, InexactError, InexactWarning, Mean, Sum
from jaxaccum._audit import at_call
from tests.support import jitted
from tests.support.helpers import EXACT, data, normwise

W, X = data(3), data(8, 3, seed=1)
MASK = jnp.asarray([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
BATCH = {"x": X, "mask": MASK}


def line(text, file=__file__):
    """The line of a file, of this one if none is named, that holds the text."""
    lines = pathlib.Path(file).read_text(encoding="utf-8").splitlines()
    return next(i for i, own in enumerate(lines, 1) if text in own)


# -- losses as they are written for one batch, and as the warning says -----------------------------


def root_mean_square(w, b):
    return jnp.sqrt(jnp.mean((b["x"] @ w) ** 2))  # the root


def root_mean_square_mended(w, b):
    return jnp.sqrt(jax.lax.pmean(jnp.mean((b["x"] @ w) ** 2), "microbatch"))


def token_mean(w, b):
    return jnp.sum((b["x"] @ w) ** 2 * b["mask"]) / jnp.sum(b["mask"])  # the token mean


def token_mean_mended(w, b):
    return Mean(jnp.sum((b["x"] @ w) ** 2 * b["mask"]), jnp.sum(b["mask"]))


def advantages(w, b):
    a = b["mask"] - b["mask"].mean()  # the advantages
    return jnp.mean(a * jnp.exp(b["x"] @ w))


def advantages_mended(w, b):
    a = b["mask"] - jax.lax.pmean(b["mask"].mean(), "microbatch")
    return jnp.mean(a * jnp.exp(b["x"] @ w))


def total(w, b):
    return jnp.sum((b["x"] @ w) ** 2)  # the sum


def total_mended(w, b):
    return Sum(jnp.sum((b["x"] @ w) ** 2))


LOSSES = {
    # the loss: (as it is, mended, its line, what the warning says to write)
    "root": (
        root_mean_square,
        root_mean_square_mended,
        "# the root",
        r"jax\.lax\.pmean\(mean, .microbatch.\)",
    ),
    "token mean": (
        token_mean,
        token_mean_mended,
        "# the token mean",
        r"return jaxaccum\.Mean\(total, weight\)",
    ),
    "advantages": (
        advantages,
        advantages_mended,
        "# the advantages",
        r"compute it once on the full batch",
    ),
    "sum": (total, total_mended, "# the sum", r"return jaxaccum\.Sum\(x\)"),
}
CALLS = {
    "value_and_grad": lambda f, **o: lambda *args: jaxaccum.value_and_grad(f, **o)(*args)[1],
    "grad": lambda f, **o: jaxaccum.grad(f, **o),
    "microbatch": lambda f, **o: jax.grad(jaxaccum.microbatch(f, **o)),
    "jit": lambda f, **o: jax.jit(jaxaccum.grad(f, **o)),
    "scan": lambda f, **o: (
        lambda w, b: jax.lax.scan(lambda c, _: (c, jaxaccum.grad(f, **o)(w, b)), 0, None, length=1)[
            1
        ][0]
    ),
    "vmap": lambda f, **o: lambda w, b: jax.vmap(lambda w: jaxaccum.grad(f, **o)(w, b))(w[None])[0],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", LOSSES)
def test_an_inexact_loss_is_warned_of_with_its_line(name, call):
    loss, mended, mark, write = LOSSES[name]
    expected = jitted.grad(loss)(W, BATCH)
    with pytest.warns(InexactWarning) as caught:
        actual = CALLS[call](loss, num_microbatches=4)(W, BATCH)
    assert normwise(actual, expected) > EXACT
    what, where, fix = str(caught[0].message).splitlines()
    assert re.search(rf"{loss.__name__} is not exact over microbatches: .+", what)
    assert f"{__file__}:{line(mark)} in {loss.__name__}" in where
    assert re.search(rf"fix: .*{write}", fix)
    assert normwise(CALLS[call](mended, num_microbatches=4)(W, BATCH), expected) <= EXACT


def warnings_of(call):
    """The warnings of inexact losses that a call gives."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in seen if one.category is InexactWarning]


def test_the_warning_points_at_the_call():
    with pytest.warns(InexactWarning) as caught:
        jaxaccum.grad(total, num_microbatches=2)(W, BATCH)  # this line
    assert (caught[0].filename, caught[0].lineno) == (__file__, line("# this line"))


@pytest.mark.parametrize("call", CALLS)
def test_the_call_raises_or_is_silent_as_it_is_told(call):
    with pytest.raises(InexactError, match="token_mean is not exact over microbatches"):
        CALLS[call](token_mean, num_microbatches=4, audit="raise")(W, BATCH)
    CALLS[call](token_mean, num_microbatches=4, audit=None)(W, BATCH)
    CALLS[call](token_mean_mended, num_microbatches=4, audit="raise")(W, BATCH)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match='audit must be "warn", "raise" or None; got True'):
        jaxaccum.grad(total, num_microbatches=2, audit=True)(W, BATCH)  # pyright: ignore


def test_one_microbatch_is_the_full_batch():
    jaxaccum.grad(total, num_microbatches=1, audit="raise")(W, BATCH)


def test_unequal_microbatches():
    with pytest.warns(InexactWarning, match="token_mean is not exact"):
        jaxaccum.grad(token_mean, num_microbatches=3)(W, BATCH)
    jaxaccum.grad(token_mean_mended, num_microbatches=3, audit="raise")(W, BATCH)


def test_a_loss_is_traced_once_more():
    sizes = []

    def loss(w, x):
        sizes.append(len(x))
        return jnp.mean((x @ w) ** 2)

    step = jax.jit(jaxaccum.grad(loss, num_microbatches=4))
    step(W, X)
    assert sizes == [2, 8]
    sizes.clear()
    jaxaccum.grad(loss, num_microbatches=4)(W, X)  # known by its shapes and its operations
    assert sizes == [2]
    jaxaccum.grad(loss, num_microbatches=4, audit=None)(W, X)
    assert sizes == [2, 2]


def test_a_loss_that_changes_its_mind_is_looked_at_again():
    """The same function and the same shapes, and another program."""
    rooted = False

    def loss(w, x):
        mean = jnp.mean((x @ w) ** 2)
        return jnp.sqrt(mean) if rooted else mean

    jaxaccum.grad(loss, num_microbatches=4, audit="raise")(W, X)
    rooted = True
    with pytest.warns(InexactWarning, match="loss is not exact"):
        jaxaccum.grad(loss, num_microbatches=4)(W, X)


class Softmax:
    """A loss with a setting that is no argument: its program has the same operations for either
    axis."""

    axis = -1

    def __call__(self, w, x):
        return jnp.mean(jax.nn.softmax(x * w[None], axis=self.axis) ** 2)


def test_a_setting_inside_an_operation_is_looked_at_again():
    loss = Softmax()
    said = lambda: warnings_of(lambda: jaxaccum.grad(loss, num_microbatches=4)(W, X))
    assert not said()
    loss.axis = 0
    assert said()
    loss.axis = -1
    assert not said()


def test_a_number_of_the_closure_is_looked_at_again():
    size = jnp.asarray(8.0)
    by_size = lambda w, x: jnp.sum((x @ w) ** 2) / (size if fixed else len(x))
    fixed = False
    assert not warnings_of(lambda: jaxaccum.grad(by_size, num_microbatches=4)(W, X))
    fixed = True
    assert warnings_of(lambda: jaxaccum.grad(by_size, num_microbatches=4)(W, X))


def test_numbers_that_are_nan_are_looked_at_again():
    """A guard of the loss is exact where nothing is NaN, which the report of a first call cannot
    promise for the next."""
    guarded = lambda value: jnp.where(jnp.isnan(value), 0.0, value)
    loss = lambda w, b: guarded(jnp.mean((b["x"] @ w) ** 2 + 0 * b["mask"]))
    assert not warnings_of(lambda: jaxaccum.grad(loss, num_microbatches=4)(W, BATCH))
    holed = {"x": X, "mask": jnp.where(jnp.arange(8) == 3, jnp.nan, MASK)}
    assert warnings_of(lambda: jaxaccum.grad(loss, num_microbatches=4)(W, holed))


def test_an_effect_without_a_result_is_no_fault_of_the_audit(capfd):
    def loss(w, x):
        jax.debug.print("{}", 1.0, ordered=True)
        return jnp.mean((x @ w) ** 2)

    assert not warnings_of(lambda: jaxaccum.grad(loss, num_microbatches=4)(W, X))
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["1.0"] * 4


def test_the_fix_names_the_axis_of_the_call():
    loss = lambda w, x: jnp.sqrt(jnp.mean((x @ w) ** 2))
    (said,) = warnings_of(
        lambda: jaxaccum.grad(loss, num_microbatches=4, axis_name="accumulate")(W, X)
    )
    assert 'jax.lax.pmean(mean, "accumulate")' in said


def test_a_loss_written_for_one_size_alone_may_be_inexact():
    loss = lambda w, x: jnp.mean((x.reshape(2, 3) @ w) ** 2)
    with pytest.warns(
        InexactWarning,
        match="may not be exact over microbatches: it cannot be traced with 8 examples",
    ):
        jaxaccum.grad(loss, num_microbatches=4)(W, X)


def test_a_fault_of_the_audit_does_not_stop_the_call(monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("a rule")

    monkeypatch.setattr(at_call, "report_on", broken)
    loss = lambda w, x: jnp.mean((x @ w) ** 2)
    with pytest.warns(
        InexactWarning, match="may not be exact .* the audit failed \\(KeyError: 'a rule'\\)"
    ):
        actual = jaxaccum.grad(loss, num_microbatches=4)(W, X)
    assert normwise(actual, jitted.grad(loss)(W, X)) <= EXACT


# -- aux, keys and state ---------------------------------------------------------------------------


def test_aux_is_warned_of_by_its_name():
    """A row's share of a loss that is divided by the microbatch's own weight."""

    def loss(w, b):
        each = (b["x"] @ w) ** 2 * b["mask"]
        return Mean(jnp.sum(each), jnp.sum(b["mask"])), {"rows": Concat(each / jnp.sum(b["mask"]))}

    with pytest.warns(InexactWarning, match=r"aux\['rows'\] of loss is not exact"):
        jaxaccum.value_and_grad(loss, has_aux=True, num_microbatches=4)(W, BATCH)


def dropped(w, x, key):
    keep = jax.random.bernoulli(key, 0.5, x.shape)  # the draw
    return jnp.mean(jnp.where(keep, x, 0.0) @ w)


def dropped_by_example(w, x, keys):
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, x.shape[1:]))(keys)
    return jnp.mean(jnp.where(keep, x, 0.0) @ w)


def test_a_key_that_every_microbatch_shares_is_warned_of():
    key = jax.random.key(3)
    closed = lambda w, x: dropped(w, x, key)
    with pytest.warns(
        InexactWarning,
        match="closes over the key `key`, so every microbatch draws the same numbers",
    ):
        jaxaccum.grad(closed, num_microbatches=4)(W, X)
    with pytest.warns(InexactWarning, match="one key draws for the whole microbatch") as caught:
        jaxaccum.grad(dropped, num_microbatches=4, in_axes=(None, 0, None))(W, X, key)
    assert f":{line('# the draw')} in dropped" in str(caught[0].message)


def test_a_key_that_the_call_declares_is_no_news():
    key = jax.random.key(3)
    options = {"num_microbatches": 4, "audit": "raise"}
    jaxaccum.grad(dropped, in_axes=(None, 0, KEY), **options)(W, X, key)
    jaxaccum.grad(dropped_by_example, in_axes=(None, 0, EXAMPLE_KEY), **options)(W, X, key)


def test_a_carried_key_is_a_random_stream_and_a_carried_number_is_not():
    def noisy(w, x, key):
        key, own = jax.random.split(key)
        return dropped(w, x, own), Carry(key)

    def scaled(w, x, scale):
        return jnp.mean(x @ w) * scale, Carry(scale / 2)

    options = {"has_aux": True, "num_microbatches": 4, "in_axes": (None, 0, CARRY)}
    jaxaccum.grad(noisy, audit="raise", **options)(W, X, jax.random.key(0))
    with pytest.warns(InexactWarning, match="argument 2 changes from microbatch to microbatch"):
        jaxaccum.grad(scaled, **options)(W, X, 1.0)


# -- closures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_array_of_the_closure_is_named_where_it_does_not_fit(size):
    """Of the batch's length: a microbatch of one example is repeated, a larger one cannot be
    traced."""
    loss = lambda w, x: Mean(jnp.sum((x @ w) ** 2 * MASK), jnp.sum(MASK))
    grad = jaxaccum.grad(loss, microbatch_size=size)
    if size == 1:
        with pytest.warns(
            InexactWarning, match=r"closes over MASK, float64\[8\].*\n.*\n.*make MASK an argument"
        ):
            grad(W, X)
    else:
        with pytest.raises(TypeError) as caught:
            grad(W, X)
        notes = "\n".join(caught.value.__notes__)
        assert re.search(r"closes over MASK, float64\[8\]", notes)
        assert "make MASK an argument" in notes


# -- silence ---------------------------------------------------------------------------------------


def safe(w, b):
    return Mean(jnp.sum((b["x"] @ w) * b["mask"]) / 1.0, jnp.sum(b["mask"]))


SILENT = {
    "mean": lambda w, b: jnp.mean((b["x"] @ w) ** 2),
    "mean and penalty": lambda w, b: jnp.mean((b["x"] @ w) ** 2) + 0.1 * jnp.sum(w**2),
    "dict": lambda w, b: {
        "a": Mean(jnp.sum(b["x"] @ w * b["mask"]), jnp.sum(b["mask"])),
        "b": Sum(jnp.sum(w @ w)),
    },
    "maximum of a count": lambda w, b: jnp.sum(b["x"] @ w) / jnp.maximum(len(b["x"]), 1),
    "divide_no_nan": lambda w, b: (lambda n: jnp.where(n > 0, jnp.sum(b["x"] @ w) / n, 0.0))(
        len(b["x"])
    ),
    "norm": lambda w, b: jnp.linalg.norm(b["x"] @ w) ** 2 / len(b["x"]),
    "einsum": lambda w, b: jnp.einsum("bi,i->", b["x"], w) / len(b["x"]),
    "optax": lambda w, b: jnp.mean(
        optax.losses.sigmoid_binary_cross_entropy(b["x"] @ w, b["mask"])
    ),
    "safe": safe,
    "coupled": lambda w, b: jnp.sqrt(jax.lax.pmean(jnp.mean((b["x"] @ w) ** 2), "microbatch")),
    "partial": functools.partial(lambda scale, w, b: scale * jnp.mean(b["x"] @ w), 2.0),
}


@pytest.mark.parametrize("call", ["value_and_grad", "microbatch"])
@pytest.mark.parametrize("name", SILENT)
def test_exact_losses_are_silent(name, call):
    loss = SILENT[name]
    if name == "dict":
        loss = lambda w, b: {"a": SILENT["dict"](w, b)["a"]}
        jaxaccum.value_and_grad(loss, num_microbatches=4, audit="raise")(W, BATCH)
    else:
        CALLS[call](loss, num_microbatches=4, audit="raise")(W, BATCH)


def test_padding_is_no_news():
    def loss(w, b, count):
        mask = b["index"] < count
        return Mean(jnp.sum(jnp.where(mask, b["x"] @ w, 0.0)), jnp.sum(mask))

    batch = {"x": X, "index": np.arange(8, dtype=np.int32)}
    grad = jaxaccum.grad(
        loss, num_microbatches=4, in_axes=(None, 0, None), num_examples_argnum=2, audit="raise"
    )
    grad(W, batch, jnp.int32(5))
