"""The law of the plain path: value and gradient of the full batch, for any partition, weights and
number of terms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxaccum as ja
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, mean_of_means, normwise, parts_of, same, sizes_of

PARAMS = {"w": data(4, 3), "b": data(3, seed=1)}
BATCH = {
    "x": data(7, 4, seed=2),
    "y": data(7, 3, seed=3),
    "m": jnp.array([1.0, 0.0, 2.0, 0.0, 0.0, 0.5, 1.0]),
}
OPTIONS = [{"num_microbatches": n} for n in (1, 3, 7)] + [{"microbatch_size": m} for m in (3, 9)]
OPTIONS += [{"num_microbatches": 7, "split": "strided"}]


def errors(params, batch):
    return jnp.sum((batch["x"] @ params["w"] + params["b"][None] - batch["y"]) ** 2, axis=-1)


def mean_loss(params, batch):
    return jnp.mean(errors(params, batch))


def token_loss(params, batch):
    return ja.Mean(jnp.sum(errors(params, batch) * batch["m"]), jnp.sum(batch["m"]))


def sum_loss(params, batch):
    return 0.5 * ja.Sum(jnp.sum(errors(params, batch)))


def terms_loss(params, batch):
    e = errors(params, batch)
    balance = ja.Mean(
        jnp.sum(e**2), jnp.sum(jnp.abs(e) + 1)
    )  # its denominator depends on parameters
    return {
        "token": token_loss(params, batch),
        "mean": jnp.mean(e),
        "sum": sum_loss(params, batch),
        "balance": balance,
    }


def full(loss):
    """The same loss in one pass, by formulas of this file: no tag is finalized by the library."""

    def of(params, batch):
        e, m = errors(params, batch), batch["m"]
        token, balance = jnp.sum(e * m) / jnp.sum(m), jnp.sum(e**2) / jnp.sum(jnp.abs(e) + 1)
        terms = {"mean_loss": jnp.mean(e), "token_loss": token, "sum_loss": 0.5 * jnp.sum(e)}
        return terms.get(loss.__name__, sum(terms.values()) + balance)

    return of


@functools.cache
def expected_of(loss):
    return jax.jit(jax.value_and_grad(full(loss)))(PARAMS, BATCH)


LOSSES = [mean_loss, token_loss, sum_loss, terms_loss]
EACH = [*covering([terms_loss], OPTIONS), *covering(LOSSES[:3], OPTIONS)]
"""All terms in every partition, and the losses of one term."""


@pytest.mark.parametrize(("loss", "options"), EACH)
def test_equals_the_full_batch(loss, options):
    actual = jax.jit(ja.value_and_grad(loss, **options))(PARAMS, BATCH)
    assert normwise(actual, expected_of(loss)) < EXACT


@pytest.mark.parametrize("loss", LOSSES)
def test_the_sum_without_references_equals_the_full_batch(loss):
    actual = jax.jit(
        ja.value_and_grad(loss, accumulator=ja.accumulators.tree(), microbatch_size=3)
    )(PARAMS, BATCH)
    assert normwise(actual, expected_of(loss)) < EXACT


def test_the_function_of_the_full_batch_equals_the_formula():
    assert (
        normwise(ja.full_batch(token_loss)(PARAMS, BATCH), full(token_loss)(PARAMS, BATCH)) < EXACT
    )


@pytest.mark.parametrize("options", [{"num_microbatches": 3}, {"microbatch_size": 3}], ids=str)
def test_the_mean_of_means_fails_the_same_assertion(options):
    batches = parts_of(BATCH, sizes_of(7, **options))
    kept = [batch for batch in batches if float(batch["m"].sum())]
    expected = jax.grad(full(token_loss))(PARAMS, BATCH)
    assert normwise(mean_of_means(full(token_loss), PARAMS, kept), expected) > 0.01
    assert (
        normwise(
            mean_of_means(full(mean_loss), PARAMS, batches),
            jax.grad(full(mean_loss))(PARAMS, BATCH),
        )
        > 0.001
    )
    assert normwise(jax.grad(full(token_loss))(PARAMS, kept[-1]), expected) > 0.01


@functools.cache
def dyadic(microbatch_size):
    """The seed's loss, accumulated or in one pass."""
    loss = lambda w, x: jnp.mean((w * x - 2 * x) ** 2)
    return jax.jit(
        jax.value_and_grad(loss)
        if microbatch_size is None
        else ja.value_and_grad(loss, microbatch_size=microbatch_size)
    )


@given(
    st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 4.0]), min_size=1, max_size=8),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([np.float32, np.float64]),
)
def test_dyadic_data_is_bitwise_the_full_batch(xs, microbatch_size, dtype):
    """Where every partial sum is representable, the order of additions cannot matter; the batch is
    a power of 2."""
    size = 1 << (len(xs) - 1).bit_length()
    x = jnp.asarray(np.resize(xs, size), dtype)
    w = jnp.asarray(1.0, dtype)
    assert same(dyadic(microbatch_size)(w, x), dyadic(None)(w, x))


def test_the_seed_in_both_batches_and_strictly_the_same_in_one():
    loss = lambda w, x: jnp.mean((2 * x - w * x) ** 2)
    first = ja.grad(loss, num_microbatches=1)(1.0, jnp.array([4.0])) / 2
    both = ja.grad(loss, num_microbatches=2)(1.0, jnp.array([4.0, 2.0]))
    assert (float(first), float(both)) == (-16.0, -20.0)
    assert float(1.0 - 0.01 * both) == 1.2


def test_argnums_name_parameters_and_the_batch():
    value, grads = jax.jit(ja.value_and_grad(terms_loss, argnums=(1, 0), microbatch_size=3))(
        PARAMS, BATCH
    )
    expected = jax.value_and_grad(full(terms_loss), argnums=(1, 0))(PARAMS, BATCH)
    assert normwise((value, grads), expected) < EXACT
    strided = ja.grad(terms_loss, argnums=-1, num_microbatches=7, split="strided")(PARAMS, BATCH)
    assert normwise(strided, expected[1][0]) < EXACT


def test_a_batch_axis_other_than_0_and_leaves_passed_whole():
    axes = (None, {"x": 1, "y": 0, "m": None})

    def loss(params, batch):
        e = errors(params, {"x": batch["x"].T, "y": batch["y"]})
        return ja.Mean(jnp.sum(e) * jnp.sum(batch["m"]), len(e))

    turned = BATCH | {"x": BATCH["x"].T}
    expected = jax.grad(
        lambda p, b: jnp.mean(errors(p, {"x": b["x"].T, "y": b["y"]})) * jnp.sum(b["m"]),
        argnums=(0, 1),
    )(PARAMS, turned)
    assert (
        normwise(
            ja.grad(loss, argnums=(0, 1), in_axes=axes, microbatch_size=3)(PARAMS, turned), expected
        )
        < EXACT
    )


def test_aux_is_combined_by_its_tags():
    def loss(params, batch):
        e = errors(params, batch)
        return token_loss(params, batch), {
            "rows": ja.Concat(e),
            "worst": ja.Max(jnp.max(e)),
            "mean": jnp.mean(e),
        }

    (value, aux), grads = ja.value_and_grad(loss, has_aux=True, microbatch_size=3)(PARAMS, BATCH)
    e = errors(PARAMS, BATCH)
    assert normwise(aux, {"rows": e, "worst": jnp.max(e), "mean": jnp.mean(e)}) < EXACT
    assert normwise((value, grads), jax.value_and_grad(full(token_loss))(PARAMS, BATCH)) < EXACT
    grads, aux = ja.grad(loss, has_aux=True, microbatch_size=3)(PARAMS, BATCH)
    assert normwise(aux["rows"], e) < EXACT


WIDTHS = [
    (jnp.bfloat16, None, jnp.bfloat16), (jnp.float16, None, jnp.float16),
    (jnp.float32, None, jnp.float32), (jnp.float64, None, jnp.float64),
    (jnp.complex64, None, jnp.complex64), (jnp.complex128, None, jnp.complex128),
    (jnp.bfloat16, jnp.float64, jnp.float64), (jnp.float32, jnp.bfloat16, jnp.bfloat16),
    (jnp.complex64, jnp.float32, jnp.complex64),
]  # fmt: skip
"""The dtypes of a parameter, of its sums where one is asked for, and of the gradient."""


@pytest.mark.parametrize(
    ("dtypes", "sums"), covering(WIDTHS, [ja.accumulators.in_place, ja.accumulators.tree])
)
def test_gradients_have_the_dtype_asked_for_or_the_parameters(dtypes, sums):
    parameter, dtype, result = dtypes
    loss = lambda w, x: jnp.mean(jnp.abs(w * x.astype(parameter)).astype(jnp.float32) ** 2)
    grad = ja.grad(loss, num_microbatches=3, accumulator=sums(dtype))(parameter(2), jnp.arange(5.0))
    assert grad.dtype == result
    assert (
        jax.grad(ja.microbatch(loss, num_microbatches=3))(parameter(2), jnp.arange(5.0)).dtype
        == parameter
    )


def test_bfloat16_parameters_are_accumulated_in_float32():
    """512 microbatches: the float32 sum rounds once at a time, a bfloat16 accumulator loses
    digits."""
    loss = lambda w, x: jnp.mean(w * x).astype(jnp.float32)
    x, w = jnp.abs(data(512, dtype=jnp.bfloat16)), jnp.bfloat16(1)
    exact = np.mean(np.asarray(x, np.float64))
    error = lambda dtype: (
        abs(
            float(
                ja.grad(loss, microbatch_size=1, accumulator=ja.accumulators.in_place(dtype))(w, x)
            )
            - exact
        )
        / exact
    )
    assert error(jnp.float32) < 512 * jnp.finfo(jnp.float32).eps
    assert error(jnp.bfloat16) > 4 * jnp.finfo(jnp.bfloat16).eps


def test_complex_parameters_have_the_full_batchs_gradient():
    loss = lambda z, x: jnp.mean(jnp.abs(jnp.sum(x.astype(z.dtype) * z[None], axis=-1)) ** 2)
    z, x = jax.lax.complex(data(4), data(4, seed=5)), data(7, 4)
    assert (
        normwise(ja.value_and_grad(loss, num_microbatches=3)(z, x), jax.value_and_grad(loss)(z, x))
        < EXACT
    )


@pytest.mark.parametrize(
    ("options", "traces"), [({"num_microbatches": 7}, 1), ({"microbatch_size": 3}, 2)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_fun_is_traced_once_a_size(loss, options, traces):
    calls = []

    def counted(params, batch):
        calls.append(len(batch["x"]))
        return loss(params, batch)

    options = {**options, "audit": None}  # which traces it once more
    jax.jit(ja.value_and_grad(counted, **options)).lower(PARAMS, BATCH)
    assert len(calls) == len(set(calls)) == traces
    calls.clear()
    jax.jit(
        jax.grad(lambda p: sum(jax.tree.leaves(ja.microbatch(counted, **options)(p, BATCH))))
    ).lower(PARAMS)
    assert len(calls) == traces


@pytest.mark.parametrize("loss", [token_loss, terms_loss])
def test_side_effects_happen_once_a_microbatch(loss):
    seen = []

    def noisy(params, batch):
        jax.debug.callback(lambda s: seen.append(float(s)), jnp.sum(batch["x"]))
        return loss(params, batch)

    actual = jax.jit(ja.value_and_grad(noisy, microbatch_size=3))(PARAMS, BATCH)
    jax.effects_barrier()
    assert normwise(actual, jax.value_and_grad(full(loss))(PARAMS, BATCH)) < EXACT
    assert len(seen) == 3


def test_flags_and_functions_pass_through_as_they_are():
    def loss(params, batch, activation, *, train, scale):
        assert train is True
        return jnp.mean(activation(batch["x"] @ params["w"])) * scale

    axes = (None, 0, None)
    actual = ja.value_and_grad(loss, microbatch_size=3, in_axes=axes)(
        PARAMS, BATCH, jnp.tanh, train=True, scale=jnp.float64(2)
    )
    expected = jax.value_and_grad(lambda p: 2 * jnp.mean(jnp.tanh(BATCH["x"] @ p["w"])))(PARAMS)
    assert normwise(actual, expected) < EXACT


def test_the_compiled_program_does_not_grow_with_the_number_of_microbatches():
    x = {name: jnp.concatenate([leaf] * 8) for name, leaf in BATCH.items()}
    size = lambda n: len(
        jax.jit(ja.value_and_grad(token_loss, num_microbatches=n)).lower(PARAMS, x).as_text()
    )
    assert size(28) <= 1.01 * size(4)


def test_padding_is_skipped_at_run_time_and_compiles_once():
    ran, traces = [], []

    def loss(params, batch, count):
        del count
        traces.append(1)
        jax.debug.callback(lambda: ran.append(1))
        e = errors(params, batch)
        return ja.Mean(jnp.sum(jnp.where(batch["mask"], e, 0.0)), jnp.sum(batch["mask"]))

    options = {"in_axes": (None, 0, None), "microbatch_size": 3, "num_examples_argnum": 2}
    step = jax.jit(ja.value_and_grad(loss, audit=None, **options))
    oracle = jax.jit(jax.value_and_grad(lambda p, b: jnp.mean(errors(p, b))))
    for count in (1, 3, 4, 7):
        real = jax.tree.map(lambda x, count=count: x[:count], {"x": BATCH["x"], "y": BATCH["y"]})
        padded, mask = ja.pad_batch(real, to=12)
        ran.clear()
        actual = step(PARAMS, padded | {"mask": mask}, count)
        jax.effects_barrier()
        assert normwise(actual, oracle(PARAMS, real)) < EXACT
        assert len(ran) == -(-count // 3)
    assert len(traces) == 1
