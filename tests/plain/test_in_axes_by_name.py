"""Batches passed by keyword: `in_axes` as a dict of entries by the names of arguments."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
import jaxaccum.nnx
from jaxaccum.testing import assert_exact
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, mean_of_means, normwise, parts_of, refused

W, V = data(3), data(2, seed=5)
BATCH = {"x": data(7, 3, seed=1), "y": data(7, seed=2), "mask": (jnp.arange(7.0) + 1) % 3}
KEY = jax.random.key(0)


def terms(w, batch):
    """The weighted errors and the weights: of a microbatch, or of the whole batch."""
    errors = (batch["x"] @ w - batch["y"]) ** 2
    return jnp.sum(errors * batch["mask"]), jnp.sum(batch["mask"])


def loss(params, batch, scale=1.0, *, train=True):
    assert train in (True, "yes")
    total, weight = terms(params, batch)
    return ja.Mean(scale * total, weight)


def full(params, batch, scale=1.0):
    """The oracle: JAX alone, on the whole batch."""
    total, weight = terms(params, batch)
    return scale * total / weight


def positional_only(params, batch, /):
    return loss(params, batch)


def keyword_only(params, *, batch):
    return loss(params, batch)


def any_keywords(params, **kwargs):
    return loss(params, kwargs["batch"])


class Trainer:
    def loss(self, params, batch):
        return loss(params, batch)


CALLS = {
    "by keyword": (loss, lambda f: f(W, batch=BATCH)),
    "by position": (loss, lambda f: f(W, BATCH)),
    "the default of another": (loss, lambda f: f(W, batch=BATCH, train="yes")),
    "both": (loss, lambda f: f(W, BATCH, scale=1.0)),
    "positional only": (positional_only, lambda f: f(W, BATCH)),
    "keyword only": (keyword_only, lambda f: f(W, batch=BATCH)),
    "any keywords": (any_keywords, lambda f: f(W, batch=BATCH)),
    "a method": (Trainer().loss, lambda f: f(W, batch=BATCH)),
    "a partial": (functools.partial(loss, train="yes"), lambda f: f(W, batch=BATCH)),
    "compiled": (jax.jit(loss, static_argnames="train"), lambda f: f(W, batch=BATCH)),
}
TRANSFORMATIONS = {
    "value_and_grad": lambda fun, **o: ja.value_and_grad(fun, **o),
    "grad": lambda fun, **o: lambda *a, **k: (full(W, BATCH), ja.grad(fun, **o)(*a, **k)),
    "microbatch": lambda fun, **o: jax.value_and_grad(ja.microbatch(fun, **o)),
    "full_batch": lambda fun, in_axes, **o: jax.value_and_grad(ja.full_batch(fun, in_axes)),
}


@pytest.mark.parametrize(("call", "transformation"), covering(list(CALLS), list(TRANSFORMATIONS)))
def test_an_entry_by_name_holds_wherever_the_argument_stands(call, transformation):
    fun, called = CALLS[call]
    ours = TRANSFORMATIONS[transformation](fun, in_axes={"batch": 0}, num_microbatches=3)
    assert normwise(called(ours), jax.value_and_grad(full)(W, BATCH)) < EXACT


def test_the_classic_wrong_answer_is_another_one():
    own = lambda w, batch: full(w, batch)
    wrong = mean_of_means(own, W, parts_of(BATCH, [3, 2, 2]))
    assert normwise(wrong, jax.grad(full)(W, BATCH)) > 0.01


def test_the_rest_of_the_arguments_have_one_entry():
    def fun(params, *rows):
        x, y, mask = rows
        return loss(params, {"x": x, "y": y, "mask": mask})

    ours = ja.value_and_grad(fun, in_axes={"rows": 0}, microbatch_size=2)
    actual = ours(W, BATCH["x"], BATCH["y"], BATCH["mask"])
    assert normwise(actual, jax.value_and_grad(full)(W, BATCH)) < EXACT


def test_an_entry_may_be_a_prefix_of_its_argument():
    batch = {"rows": BATCH, "columns": BATCH["x"].T, "offset": W}
    fun = lambda w, *, batch: (
        loss(w + batch["offset"], batch["rows"]),
        ja.Concat(batch["columns"].T),
    )
    axes = {"batch": {"rows": 0, "columns": 1, "offset": None}}
    (value, rows), grad = ja.value_and_grad(fun, has_aux=True, in_axes=axes, num_microbatches=3)(
        W, batch=batch
    )
    assert normwise((value, grad), jax.value_and_grad(full)(2 * W, BATCH)) < EXACT
    assert (rows == BATCH["x"]).all()


def test_argnums_are_positions_and_may_name_the_batch():
    ours = ja.value_and_grad(loss, argnums=(0, 1), in_axes={"batch": 0}, num_microbatches=3)
    truth = jax.value_and_grad(full, argnums=(0, 1))(W, BATCH)
    assert normwise(ours(W, BATCH), truth) < EXACT
    assert normwise(ours(W, BATCH, scale=jnp.float64(1.0)), truth) < EXACT


def noisy(w, *, x, keys, key, state):
    """Noise of each example, a draw of the microbatch, and a state that counts examples."""
    noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)
    seen = {"drawn": ja.Stack(jax.random.uniform(key)), "state": ja.Carry(state + len(x))}
    return jnp.mean(((x + noise) @ w) ** 2), seen


def test_keys_and_a_state_by_name():
    axes = {"x": 0, "keys": ja.EXAMPLE_KEY, "key": ja.KEY, "state": ja.CARRY}
    step = ja.value_and_grad(noisy, has_aux=True, in_axes=axes, num_microbatches=3)
    (value, seen), grad = step(W, x=BATCH["x"], keys=KEY, key=KEY, state=0)
    noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(jax.random.split(KEY, 7))
    truth = jax.value_and_grad(lambda w: jnp.mean(((BATCH["x"] + noise) @ w) ** 2))(W)
    assert normwise((value, grad), truth) < EXACT
    assert seen["state"] == 7
    assert seen["drawn"].tolist() == [
        jax.random.uniform(jax.random.fold_in(KEY, i)) for i in range(3)
    ]


def test_a_count_of_examples_stays_a_position():
    padded, _ = ja.pad_batch(BATCH, to=12)
    fun = lambda w, n, *, batch: loss(w, batch)
    options = {"in_axes": {"batch": 0}, "num_examples_argnum": 1, "microbatch_size": 3}
    actual = ja.value_and_grad(fun, **options)(W, 7, batch=padded)
    assert normwise(actual, jax.value_and_grad(full)(W, BATCH)) < EXACT


# -- the tools, whose own options stand among the arguments ------------------------------------


def test_microbatches_of_keyword_arguments():
    pairs = ja.partition(W, batch=BATCH, in_axes={"batch": 0}, microbatch_size=3)
    assert [len(kwargs["batch"]["x"]) for _, kwargs in pairs] == [3, 3, 1]
    totals, weights = zip(*(terms(*args, **kwargs) for args, kwargs in pairs), strict=True)
    assert normwise(sum(totals) / sum(weights), full(W, BATCH)) < EXACT


def test_the_audit_reads_keyword_arguments():
    report = ja.audit(loss, W, batch=BATCH, train="yes", in_axes={"batch": 0}, probe=True)
    assert (str(report.verdict), report.exact, report.probe.exact) == ("RATIO", True, True)
    wrong = ja.audit(lambda w, batch: full(w, batch), W, batch=BATCH, in_axes={"batch": 0})
    assert not wrong.exact


def test_a_plan_of_keyword_arguments():
    plans = [
        ja.plan(loss, W, in_axes={"batch": 0}, memory_bytes=10**6, batch=BATCH),
        ja.plan(loss, W, BATCH, in_axes=(None, 0), memory_bytes=10**6),
    ]
    assert [row.microbatch_size for row in plans[0].rows] == [1, 2, 4, 7]
    assert plans[0] == plans[1]


def test_assert_exact_of_keyword_arguments():
    assert_exact(loss, W, batch=BATCH, in_axes={"batch": 0}, audit=True)
    wrong = lambda w, *, batch: full(w, batch)
    with pytest.raises(AssertionError, match="Mean"):
        assert_exact(wrong, W, batch=BATCH, in_axes={"batch": 0}, partitions=[2])


# -- models and devices ------------------------------------------------------------------------


def test_a_model_and_its_batch_by_keyword():
    model = lambda: nnx.Linear(3, 1, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    own = lambda model, batch: loss(model.kernel[...][:, 0], batch)
    for transformed in (
        ja.nnx.value_and_grad(own, in_axes={"batch": 0}, num_microbatches=3),
        lambda model, batch: (
            None,
            ja.nnx.grad(own, in_axes={"batch": 0}, num_microbatches=3)(model, batch=batch),
        ),
    ):
        _, grads = transformed(model(), batch=BATCH)
        truth = nnx.grad(lambda model: full(model.kernel[...][:, 0], BATCH))(model())
        assert normwise(jax.tree.leaves(grads), jax.tree.leaves(truth)) < EXACT
    step = ja.nnx.value_and_grad(own, in_axes={"batch": ja.CARRY}, num_microbatches=3)
    refused(lambda: step(model(), batch=BATCH), "CARRY", "nnx.Variable")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["shard_map", "explicit"])
def test_devices(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x, x])[:16], BATCH)
    inside = kind is AxisType.Auto
    step = ja.value_and_grad(
        loss, in_axes={"batch": 0}, num_microbatches=2, mesh_axes="data" if inside else None
    )
    call = lambda w, batch: step(w, batch=batch)
    if inside:
        call = jax.shard_map(call, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    actual = jax.jit(call)(put(W), put(batch, "data"))
    assert normwise(jax.device_get(actual), jax.value_and_grad(full)(W, batch)) < EXACT


# -- errors ------------------------------------------------------------------------------------


def step(**options):
    return ja.value_and_grad(loss, num_microbatches=2, **options)


ERRORS = {
    "an unknown name": (
        lambda: step(in_axes={"bacth": 0})(W, batch=BATCH),
        ["'bacth'", "loss", "params, batch, scale, train"],
    ),
    "an unknown keyword": (
        lambda: ja.value_and_grad(
            any_keywords, num_microbatches=2, in_axes={"batch": 0, "labels": 0}
        )(W, batch=BATCH),
        ["'labels'", "any_keywords", "params, batch"],
    ),
    "no name": (lambda: step(in_axes={0: None, 1: 0})(W, BATCH), ["0, 1", "params, batch"]),
    "the default": (
        lambda: step()(W, batch=BATCH),
        ["2 entries", "1 positional", 'in_axes={"batch": 0}'],
    ),
    "a tuple": (
        lambda: step(in_axes=(None,))(W, batch=BATCH),
        ["no argument", "axis", 'in_axes={"batch": 0}'],
    ),
    "a list of candidates": (
        lambda: step(in_axes=(None,))(W, batch=BATCH, scale=jnp.ones(6), train=jnp.ones(())),
        ['in_axes={"batch": 0, "scale": 0}', "leave out the others"],
    ),
    "an axis": (
        lambda: step(in_axes={"batch": 3})(W, batch=BATCH),
        ["keyword argument batch['mask']", "axis 3", "[7]"],
    ),
    "rows": (
        lambda: step(in_axes={"batch": 0})(W, batch=BATCH | {"y": W}),
        ["keyword argument batch['mask'] holds 7", "keyword argument batch['y'] holds 3"],
    ),
    "two states": (
        lambda: step(in_axes={"scale": ja.CARRY, "params": ja.CARRY, "batch": 0})(
            W, BATCH, scale=1.0
        ),
        ["CARRY twice"],
    ),
    "argnums": (
        lambda: step(in_axes={"batch": 0})(params=W, batch=BATCH),
        ["argnums=0", "0 positional"],
    ),
    "a carried state": (
        lambda: step(in_axes={"params": ja.CARRY, "batch": 0})(W, batch=BATCH),
        ["argnums=0", "argument 0", "CARRY"],
    ),
    "a name of partition's": (
        lambda: ja.partition(W, BATCH, in_axes={"batch": 0}, num_microbatches=2),
        ["'batch'", "keyword argument"],
    ),
    "an option of partition": (
        lambda: ja.partition(W, BATCH, num_microbatches=2, spilt="strided"),
        ["no option 'spilt'", "in_axes"],
    ),
    "an option of audit": (
        lambda: ja.audit(loss, W, BATCH, num_microbatch=2),
        ["audit", "no option 'num_microbatch'"],
    ),
    "an option of plan": (
        lambda: ja.plan(loss, W, BATCH, memory_byte=9),
        ["plan", "no option 'memory_byte'"],
    ),
    "an option of assert_exact": (
        lambda: assert_exact(any_keywords, W, batch=BATCH, in_axes={"batch": 0}, partition=[1]),
        ["assert_exact", "no option 'partition'"],
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_is_refused(name):
    call, says = ERRORS[name]
    refused(call, *says)


def test_a_function_without_a_signature_has_names_of_keywords_alone():
    class Opaque:
        __signature__ = "none"

        def __call__(self, params, batch):
            return loss(params, batch)

    ours = ja.value_and_grad(Opaque(), in_axes={"batch": 0}, num_microbatches=3)
    assert normwise(ours(W, batch=BATCH), jax.value_and_grad(full)(W, BATCH)) < EXACT
    refused(lambda: ours(W, BATCH), "'batch'", "none")


def test_keyword_arguments_stay_whole_under_a_tuple():
    fun = lambda w, x, *, offset: jnp.mean((x @ w + offset[0]) ** 2)
    actual = ja.value_and_grad(fun, num_microbatches=3)(W, BATCH["x"], offset=V)
    assert normwise(actual, jax.value_and_grad(fun)(W, BATCH["x"], offset=V)) < EXACT
