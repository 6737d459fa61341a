"""Streams of a model from which each example draws as in the whole batch, under every partition."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
from jaxaccum._base.adapted import Adapted, changed
from tests.flax.streaming import state, step
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, normwise, refused, same

WIDE = {"param_dtype": jnp.float64}
X, Y = data(8, 3), data(8, 2, seed=1)
BATCH = {"x": X, "y": Y}
OPTIONS = [{"num_microbatches": n} for n in (1, 4, 8)] + [
    {"microbatch_size": 3},
    {"num_microbatches": 2, "split": "strided"},
]
EQUAL = [options for options in OPTIONS if "microbatch_size" not in options]
COUPLED = [options | {"memory": memory} for options, memory in covering(EQUAL, ["min", "store"])]


class Net(nnx.Module):
    """A perceptron with dropout, and perhaps the whole batch's statistics, over axes `norm`."""

    def __init__(self, norm=None, impl="threefry2x32"):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, rngs=rngs, **WIDE)
        self.last = nnx.Linear(4, 2, rngs=rngs, **WIDE)
        self.norm = ja.nnx.BatchNorm(4, axis_name=norm, rngs=rngs, **WIDE) if norm else None
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=jax.random.key(1, impl=impl)))

    def __call__(self, x):
        x = self.first(x)
        x = x if self.norm is None else self.norm(x)
        return self.last(self.dropout(self.dropout(jnp.tanh(x))))


def loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


@functools.cache
def compiled(**options):
    """The step of all tests with these options, whose programs are compiled once."""
    return nnx.jit(step(loss, **options))


def keeps(model, size, width):
    """What the two dropouts keep in the whole batch."""
    stream = model.dropout.rngs
    key, count = stream.key.get_value(), int(stream.count.get_value())
    draw = lambda n: jax.random.bernoulli(jax.random.fold_in(key, count + n), 0.5, (size, width))
    return [draw(0), draw(1)]


def by_hand(model):
    """Value and gradient of `loss` on the whole batch, without nnx."""
    masks = keeps(model, len(X), 4)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def whole(params):
        x = X @ params["first"]["kernel"] + params["first"]["bias"][None]
        if "norm" in params:
            x = (x - jnp.mean(x, 0)[None]) / jnp.sqrt(jnp.var(x, 0) + model.norm.epsilon)[None]
            x = x * params["norm"]["scale"][None] + params["norm"]["bias"][None]
        x = jnp.tanh(x)
        for keep in masks:
            x = jnp.where(keep, 2 * x, 0.0)
        return jnp.mean((x @ params["last"]["kernel"] + params["last"]["bias"][None] - Y) ** 2)

    return jax.jit(jax.value_and_grad(whole))(params)


def pure(result):
    value, grads = result
    return value, nnx.to_pure_dict(grads)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_example_has_its_mask_of_the_whole_batch(options):
    model = Net()
    for count in (2, 4):  # the second call draws other masks
        expected = by_hand(model)
        assert normwise(pure(compiled(**options)(model, BATCH)), expected) < EXACT
        assert model.dropout.rngs.count.get_value() == count


def test_without_nnx_jit_too():
    model = Net()
    for count in (2, 4):
        expected = by_hand(model)
        assert normwise(pure(step(loss, num_microbatches=4)(model, BATCH)), expected) < EXACT
        assert model.dropout.rngs.count.get_value() == count


@pytest.mark.parametrize("options", COUPLED, ids=str)
def test_a_coupled_model_is_exact_with_its_masks(options):
    model = Net("microbatch")
    expected = by_hand(model)
    assert normwise(pure(compiled(**options)(model, BATCH)), expected) < EXACT


@pytest.mark.parametrize(
    ("norm", "options"), [(None, {"microbatch_size": 3}), ("microbatch", EQUAL[1])], ids=str
)
def test_masks_of_each_microbatchs_own_are_others(norm, options):
    """The negative control: a stream that runs through the microbatches."""
    threaded = step(loss, **options, example_streams=False, audit=None)
    assert normwise(pure(threaded(Net(norm), BATCH)), by_hand(Net(norm))) > 1e-2


CASES = [(None, options) for options in OPTIONS] + [("microbatch", options) for options in COUPLED]


@pytest.mark.parametrize(("norm", "options"), CASES, ids=str)
def test_the_state_afterwards_is_that_of_the_full_batch(norm, options):
    """The streams advance once, by as many draws as the model makes, and hold ordinary keys."""
    model, whole = Net(norm), Net(norm)
    structure, key = jax.tree.structure(nnx.state(model)), model.dropout.rngs.key.get_value()
    compiled(**options)(model, BATCH)
    loss(whole, BATCH)
    assert normwise(state(model)["dropout"], state(whole)["dropout"]) == 0
    assert normwise(state(model), state(whole)) < EXACT
    assert jax.tree.structure(nnx.state(model)) == structure
    assert model.dropout.rngs.key.get_value().dtype == key.dtype
    assert model.dropout.rngs.count.get_value() == 2
    assert model.dropout.rngs.count.get_value().dtype == jnp.uint32


@pytest.mark.parametrize(("norm", "options"), covering([None, "microbatch"], EQUAL[1:3]), ids=str)
def test_other_generators_draw_the_masks_of_the_whole_batch(norm, options):
    model = Net(norm, impl="rbg")
    expected = by_hand(model)
    assert normwise(pure(step(loss, **options)(model, BATCH)), expected) < EXACT


# -- devices ----------


MESH = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
EXPLICIT = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))


NORM = ("data", "microbatch")


@pytest.mark.parametrize(("norm", "check_vma"), [(None, True), (NORM, True), (NORM, False)])
def test_devices_and_microbatches_draw_the_masks_of_the_full_batch(norm, check_vma):
    model = Net(norm)
    expected = by_hand(model)
    graphdef, variables = nnx.split(model)

    def own(variables, batch, *, n=2, **options):
        model = nnx.merge(graphdef, variables, copy=True)
        result = step(loss, num_microbatches=n, mesh_axes="data", **options)(model, batch)
        return pure(result), state(model)["dropout"]

    specs = {"mesh": MESH, "in_specs": (P(), P("data")), "out_specs": P(), "check_vma": check_vma}
    actual, streams = jax.jit(jax.shard_map(own, **specs))(variables, BATCH)
    assert normwise(actual, expected) < EXACT
    loss(whole := Net(), BATCH)
    assert normwise(streams, state(whole)["dropout"]) == 0
    # Without statistics of all devices, a state that is carried is refused on a mesh.
    if norm and check_vma:
        threaded = lambda variables, batch: own(variables, batch, n=1, example_streams=False)
        actual, _ = jax.jit(jax.shard_map(threaded, **specs))(variables, BATCH)
        assert normwise(actual, expected) > 1e-2


@pytest.mark.parametrize(("norm", "n"), [(None, 1), (None, 2), ("microbatch", 2)])
def test_an_explicit_mesh_draws_the_masks_of_the_full_batch(norm, n):
    model, batch = Net(norm), jax.device_put(BATCH, NamedSharding(EXPLICIT, P("data")))
    expected = by_hand(model)
    with jax.set_mesh(EXPLICIT):
        assert normwise(pure(step(loss, num_microbatches=n)(model, batch)), expected) < EXACT


def test_gathered_parameters_keep_the_streams_of_the_examples():
    model, batch = Net(), jax.device_put(BATCH, NamedSharding(EXPLICIT, P("data")))
    expected = by_hand(model)
    model.first.kernel.set_value(
        jax.device_put(model.first.kernel[...], NamedSharding(EXPLICIT, P(None, "data")))
    )
    with jax.set_mesh(EXPLICIT):
        actual = step(loss, num_microbatches=2, audit=None)(model, batch)
    assert normwise(jax.device_get(pure(actual)), expected) < EXACT


# -- what surrounds them ----------


def test_keys_pass_the_check_for_keys_used_twice():
    with jax.debug_key_reuse(True):
        step(loss, **OPTIONS[3])(Net(), BATCH)
        step(loss, **OPTIONS[1])(Net("microbatch"), BATCH)


def test_padding_that_is_skipped_leaves_the_streams_as_they_were():
    def fun(model, batch, count):
        mask = batch["i"] < count
        error = jnp.sum((model(batch["x"]) - batch["y"]) ** 2, 1)
        return ja.Mean(jnp.sum(jnp.where(mask, error, 0.0)), jnp.sum(mask))

    batch = BATCH | {"i": jnp.arange(8)}
    options = {"in_axes": (None, 0, None), "num_examples_argnum": 2}
    cut, uncut = (nnx.jit(step(fun, num_microbatches=n, **options)) for n in (4, 1))
    for count in (8, 5, 0):
        model, whole = Net(), Net()
        assert normwise(cut(model, batch, count), uncut(whole, batch, count)) < EXACT
        assert normwise(state(model), state(whole)) == 0
        assert model.dropout.rngs.count.get_value() == (2 if count else 0)
        assert same(state(model)["dropout"]["rngs"]["key"], state(Net())["dropout"]["rngs"]["key"])


def test_streams_are_left_where_every_microbatch_is_skipped():
    model, batch = Net(), {"x": X * jnp.nan, "y": Y}
    skip = ja.accumulators.skip_nonfinite()
    step(loss, num_microbatches=4, accumulator=skip)(model, batch)
    assert normwise(state(model), state(Net())) == 0


def mean_of_the_batch(model, batch):
    return jnp.mean((model(batch["x"]) - jnp.mean(batch["x"])) ** 2)


def mean_of_the_noise(model, batch):
    noise = jax.random.normal(model.dropout.rngs(), batch["x"].shape, jnp.float64)
    return jnp.mean(model(batch["x"])) * jnp.mean(noise)


@pytest.mark.parametrize("fun", [mean_of_the_batch, mean_of_the_noise])
def test_the_audit_still_finds_examples_that_meet(fun):
    with pytest.raises(ja.InexactError, match="not exact over microbatches"):
        step(fun, num_microbatches=2, audit="raise")(Net(), BATCH)


# -- what cannot be divided among the examples ----------


def test_draws_that_belong_to_no_example_are_refused():
    def call(draw, size=4):
        def fun(model, batch):
            drawn = draw(model.dropout.rngs(), batch["x"]).astype(jnp.float64)
            return jnp.mean(model(batch["x"])) * jnp.mean(drawn)

        return lambda: step(fun, microbatch_size=size, audit=None, example_streams=True)(
            Net(), BATCH
        )

    merged = lambda key, x: jax.random.bits(key, (3 * len(x),))
    says = "draw at", __file__, "[12] for 4 examples", "[24] for 8", 'example_streams="dropout"'
    refused(call(merged), *says)
    pairs = lambda key, x: jax.random.bits(key, (len(x), len(x)))
    refused(call(pairs), "[4, 4] for 4", "[8, 8] for 8", "no axis")
    split = lambda draw: lambda key, x: jax.vmap(draw)(jax.random.split(key, len(x)))
    call(split(lambda key: jax.random.bits(key, (3,))))()
    own = lambda key, x: split(lambda key: jax.random.bits(key, (len(x),)))(key, x)
    refused(call(own), "an array of keys, [4]", "[8]", "numbers for every pair")
    refused(call(lambda key, x: jax.random.gamma(key, 1.0, x.shape)), "gamma", "EXAMPLE_KEY")
    uniform = lambda key, i, shape: jax.random.uniform(jax.random.fold_in(key, i), shape)
    both = lambda key, x: jnp.mean(uniform(key, 0, (4, 3))) * uniform(key, 1, x.shape)
    refused(call(both), "cannot be told apart", "another microbatch size")
    call(both, size=2)()
    often = lambda key, x: sum(
        jax.random.bits(jax.random.fold_in(key, i), (3,)) for i in range(len(x))
    )
    refused(call(often), "6 times for 4 examples and 10 times for 8")


def test_a_fun_of_one_size_is_refused_and_other_errors_are_its_own():
    def fixed(model, batch):
        return loss(model, batch) * jnp.mean(batch["x"] + jnp.ones((4, 3)))

    refused(
        lambda: step(fixed, num_microbatches=2, audit="raise")(Net(), BATCH),
        "for 4 examples",
        "does not run on 8",
    )
    broken = lambda model, batch: loss(model, batch) + batch["z"]
    with pytest.raises(KeyError, match="z"):
        step(broken, num_microbatches=2)(Net(), BATCH)
    refused(
        lambda: step(lambda m, b: loss(m, b)[None], num_microbatches=2)(Net(), BATCH),
        "scalar",
        error=TypeError,
    )


def test_a_stream_keeps_its_kind():
    def replacing(model, batch):
        model.dropout.rngs.key.set_value(jax.random.key(5))
        return loss(model, batch)

    refused(
        lambda: step(replacing, num_microbatches=2, example_streams=True)(Net(), BATCH),
        "another key into",
        "dropout",
        "before the call",
    )

    def growing(model, batch):
        stream = model.dropout.rngs
        stream.count.set_value(jnp.zeros((2,), jnp.uint32))
        return jnp.mean(model.first(batch["x"]))

    refused(
        lambda: step(growing, num_microbatches=2, example_streams=True)(Net(), BATCH),
        "count",
        "uint32[]",
        "uint32[2]",
    )


def test_a_changed_function_is_known_for_what_it_was():
    """As where a mesh gathers parameters around it."""
    fun, around = lambda x: x, lambda fun: lambda x: 2 * fun(x)
    known = changed(Adapted(fun, draws_from_state=True, aux_names=("loss",)), around)
    assert (known.draws_from_state, known.aux_names) == (True, ("loss",))
    assert known(3) == 6
    assert changed(fun, around)(3) == 6
