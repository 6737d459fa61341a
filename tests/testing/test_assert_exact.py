"""`assert_exact` passes what is exact, and of what is not names the leaf, the partition, the error
and the cause."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import jaxaccum
from jaxaccum.testing import assert_exact, partitions
from jaxaccum.testing.exactness import default_sizes

PARAMS = {"w": jnp.array([0.5, -1.0], jnp.float32), "b": jnp.array(0.25, jnp.float32)}


def a_batch(size=5):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(size, 2)), rng.normal(size=size)
    return {"x": np.float32(x), "y": np.float32(y), "weight": np.float32([0, 1, 2, 0.5, 3])[:size]}


def errors(params, batch):
    return (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2


def weighted_mean(params, batch):
    return jaxaccum.Mean(jnp.sum(errors(params, batch) * batch["weight"]), jnp.sum(batch["weight"]))


def several_terms(params, batch):
    return {
        "data": weighted_mean(params, batch),
        "size": jaxaccum.Sum(1e-2 * jnp.sum(errors(params, batch))),
    }


def with_aux(params, batch):
    each = errors(params, batch)
    aux = {
        "errors": jaxaccum.Concat(each),
        "worst": jaxaccum.Max(jnp.max(each)),
        "last": jaxaccum.Last(each[-1]),
        "means": jaxaccum.Stack(jnp.mean(each)),
    }
    return jnp.mean(each), aux


@given(partitions(5))
def test_a_users_loss(options):
    """What a user writes about their own loss."""
    assert_exact(weighted_mean, PARAMS, a_batch(), partitions=[options])


@pytest.mark.parametrize("fun", [weighted_mean, several_terms], ids=lambda fun: fun.__name__)
def test_exact_losses_pass(fun):
    assert_exact(fun, PARAMS, a_batch())


def test_aux_is_compared_but_for_what_depends_on_the_partition():
    assert_exact(with_aux, PARAMS, a_batch(), has_aux=True)


def test_a_carried_state_is_threaded():
    def fun(params, state, batch):
        return jnp.mean(errors(params, batch)), jaxaccum.Carry(state + jnp.sum(batch["y"]))

    assert_exact(
        fun, PARAMS, jnp.float32(0), a_batch(), in_axes=(None, jaxaccum.CARRY, 0), has_aux=True
    )


def noisy(params, key, batch):
    """Dropout of half the examples' errors, by one key per example or by one for all."""
    keys = key if key.ndim else jax.random.split(key, len(batch["y"]))
    keep = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.mean(jnp.where(keep, errors(params, batch), 0))


def test_a_key_for_each_example_is_exact():
    assert_exact(
        noisy, PARAMS, jax.random.key(0), a_batch(), in_axes=(None, jaxaccum.EXAMPLE_KEY, 0)
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_other_dtypes_pass_within_their_own_rounding(dtype):
    params, batch = (
        jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree) for tree in (PARAMS, a_batch())
    )
    assert_exact(weighted_mean, params, batch, partitions=[2])


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float32], ids=lambda dtype: dtype.__name__)
def test_a_loss_passes_within_the_rounding_of_what_it_computes(narrow):
    """In float64, and of float32 parameters, it computes in fewer digits all the same."""
    cast = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, narrow), tree)
    right = lambda params, batch: jnp.mean(errors(cast(params), cast(batch)))
    wrong = lambda params, batch: jnp.sqrt(right(params, batch))
    for dtype in (jnp.float32, jnp.float64):
        params = jax.tree.map(lambda leaf, dtype=dtype: jnp.asarray(leaf, dtype), PARAMS)
        assert_exact(right, params, a_batch(), partitions=[2])
        with pytest.raises(AssertionError, match="not the full batch's"):
            assert_exact(wrong, params, a_batch(), partitions=[2])


def untagged_ratio(params, batch):
    return jnp.sum(errors(params, batch) * batch["weight"]) / jnp.sum(batch["weight"] + 1e-3)


def untagged_sum(params, batch):
    return jnp.sum(errors(params, batch))


def sum_of_means(params, batch):
    return jaxaccum.Sum(jnp.mean(errors(params, batch)))


def mean_of_means(params, batch):
    return jaxaccum.Mean(weighted := untagged_ratio(params, batch), jnp.ones_like(weighted))


def normalized(params, batch):
    return jnp.mean(
        errors(params, batch | {"x": batch["x"] - jnp.mean(batch["x"], axis=0, keepdims=True)})
    )


def with_its_own_key(params, batch):
    noise = jax.random.normal(jax.random.key(0), batch["y"].shape, batch["y"].dtype)
    return jnp.mean(errors(params, batch | {"y": batch["y"] + noise}))


def divided_again(params, batch):
    return jnp.mean(errors(params, batch)) / jax.lax.axis_size("microbatch")


def growing(params, batch):
    """Later microbatches count for more."""
    return jnp.mean(errors(params, batch)) * jnp.float32(1 + jax.lax.axis_index("microbatch"))


CAUSES = {
    growing: "none of the known wrong rules",
    untagged_ratio: "normalizer is not the number of examples",
    normalized: "examples are coupled",
    untagged_sum: "return jaxaccum.Sum",
    sum_of_means: "a factor of the number of microbatches",
    mean_of_means: "mean of the microbatches' means",
    with_its_own_key: "a key of its own",
    divided_again: "value and gradient are 0.333333 times the full batch's, over 3 microbatches",
}


@pytest.mark.parametrize("fun", CAUSES, ids=lambda fun: fun.__name__)
def test_a_failure_names_its_cause(fun):
    with pytest.raises(AssertionError, match=re.escape(CAUSES[fun])):
        assert_exact(fun, PARAMS, a_batch(), partitions=[2])


def test_a_key_for_each_microbatch_is_named():
    with pytest.raises(AssertionError, match="use BATCH_KEY"):
        assert_exact(
            noisy,
            PARAMS,
            jax.random.key(0),
            a_batch(),
            in_axes=(None, jaxaccum.KEY, 0),
            partitions=[2],
        )


def test_a_failure_names_leaf_partition_error_and_bound():
    with pytest.raises(AssertionError) as caught:
        assert_exact(untagged_ratio, PARAMS, a_batch(), partitions=[5, {"num_microbatches": 2}])
    message = str(caught.value)
    assert "value_and_grad(fun, num_microbatches=2) is not the full batch's" in message
    assert re.search(r"leaf +(value|gradient\['[wb]'\])\n", message)
    assert "num_microbatches=2 of 5 examples" in message
    assert re.search(r"error +\d[\d.e+-]+ of the largest entry\n +bound +\d[\d.e+-]+\n", message)


def test_wrong_aux_is_named():
    def fun(params, batch):
        return jnp.mean(errors(params, batch)), {
            "count": jaxaccum.Max(jnp.float32(len(batch["y"])))
        }

    with pytest.raises(AssertionError, match=r"aux\['count'\]"):
        assert_exact(fun, PARAMS, a_batch(), has_aux=True, partitions=[2])


def test_keys_in_aux_are_compared_by_their_numbers():
    def fun(params, batch, keys):
        return jnp.mean(errors(params, batch)), jaxaccum.Concat(keys)

    key, axes = jax.random.key(0), (None, 0, jaxaccum.EXAMPLE_KEY)
    sizes = [np.int64(2)]
    assert_exact(fun, PARAMS, a_batch(), key, in_axes=axes, has_aux=True, partitions=sizes)
    mean = lambda params, batch, keys: (fun(params, batch, keys)[0], jaxaccum.Max(
        jax.random.key_data(keys)[0]
    ))  # fmt: skip
    with pytest.raises(AssertionError, match="aux"):
        assert_exact(mean, PARAMS, a_batch(), key, in_axes=axes, has_aux=True, partitions=sizes)


def test_wrong_aux_is_not_hidden_by_larger_aux_beside_it():
    def fun(params, batch):
        wrong = errors(params, batch)
        ids = jaxaccum.Concat(50_000.0 + jnp.arange(1.0 * len(wrong)) * 0)
        return jnp.mean(wrong), {"ids": ids, "accuracy": jaxaccum.Sum(jnp.mean(wrong > 0.5))}

    with pytest.raises(AssertionError, match=r"aux\['accuracy'\]\n(.*\n)+.*Mean\(total, weight\)"):
        assert_exact(fun, PARAMS, a_batch(), has_aux=True, partitions=[2])


def test_batch_norm_without_its_axis_is_caught():
    model = nn.BatchNorm(use_running_average=False)
    batch = a_batch()["x"]
    variables = model.init(jax.random.key(0), batch)

    def fun(params, rows):
        outputs, _ = model.apply(variables | {"params": params}, rows, mutable=["batch_stats"])
        return jnp.mean(outputs**3)

    params = {"scale": jnp.ones(2, jnp.float32), "bias": jnp.ones(2, jnp.float32)}
    with pytest.raises(AssertionError, match="BatchNorm needs axis_name='microbatch'"):
        assert_exact(fun, params, batch, partitions=[2])


def test_no_partition_is_refused():
    with pytest.raises(ValueError, match="partitions is empty"):
        assert_exact(weighted_mean, PARAMS, a_batch(), partitions=[])


def test_what_has_no_gradient_is_refused():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), a_batch())
    with pytest.raises(ValueError, match="shapes without values; pass arrays"):
        assert_exact(weighted_mean, PARAMS, shapes)
    with pytest.raises(ValueError, match="the first argument of fun holds no array"):
        assert_exact(lambda params, batch: jnp.mean(batch["x"]), {}, a_batch())


def test_the_audit_reads_the_loss_first():
    """It refuses a loss by its line; without it numbers do, and of one microbatch nothing does."""

    def ratio(params, batch):
        return jnp.sum(errors(params, batch) * batch["weight"]) / jnp.sum(batch["weight"])

    with pytest.raises(jaxaccum.InexactError, match=r"jaxaccum\.audit"):
        assert_exact(ratio, PARAMS, a_batch(), partitions=[5], audit=True)
    with pytest.raises(AssertionError, match="not the full batch's"):
        assert_exact(ratio, PARAMS, a_batch(), partitions=[2])
    assert_exact(ratio, PARAMS, a_batch(), partitions=[5])
    assert_exact(weighted_mean, PARAMS, a_batch(), audit=True)


@pytest.mark.parametrize(("size", "expected"), [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 7, 8])])
def test_default_sizes(size, expected):
    assert default_sizes(size) == expected


# -- options of the partitions ---------------------------------------------------------------------

OPTIONS = {
    "unrolled": {"unroll": True},
    "strided": {"split": "strided"},
    "another sum": {"accumulator": jaxaccum.accumulators.tree()},
    "with a report": {"accumulator": jaxaccum.accumulators.noise_scale()},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_partition_may_have_any_option_that_leaves_the_loss_as_it_is(name):
    partitions = [{"num_microbatches": 2, **OPTIONS[name]}]
    w, x = jnp.ones(3), jnp.arange(12.0).reshape(4, 3)
    assert_exact(lambda w, x: jnp.mean((x @ w) ** 2), w, x, partitions=partitions)
    with pytest.raises(AssertionError, match="averaged over examples"):
        assert_exact(lambda w, x: jnp.sqrt(jnp.mean((x @ w) ** 2)), w, x, partitions=partitions)


def test_the_axis_of_the_loop_has_any_name():
    def loss(w, x, axis="batch"):
        return jnp.mean((x @ w - jax.lax.pmean(jnp.mean(x @ w), axis)) ** 2)

    w, x = jnp.ones(3), jnp.arange(12.0).reshape(4, 3)
    assert_exact(loss, w, x, axis_name="batch", partitions=[1, 2], audit=True)
    with pytest.raises(NameError, match="batch"):
        assert_exact(loss, w, x, partitions=[1, 2])


@pytest.mark.parametrize(
    ("option", "says"),
    [({"axis_name": "batch"}, "axis_name to assert_exact"), ({"argnums": 1}, "the first argument")],
    ids=str,
)
def test_an_option_that_concerns_all_partitions_is_refused(option, says):
    loss = lambda w, x: jnp.mean(x @ w)
    with pytest.raises(ValueError, match=says):
        assert_exact(loss, jnp.ones(3), jnp.ones((4, 3)), partitions=[option])
