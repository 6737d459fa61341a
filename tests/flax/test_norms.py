"""BatchNorm over microbatches: Flax's layer where Flax is right, and the whole batch's statistics
where it is not."""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxaccum.linen
import jaxaccum.nnx
from jaxaccum._flax import batch_moments
from tests.support.covering import covering
from tests.support.helpers import EXACT, data, normwise, refused

STANDARD = functools.partial(jax.numpy_dtype_promotion, "standard")  # Flax's own layers need it
X = 3 * data(12, 4, 3) + 1  # rows, positions, features
MASK = (
    np.arange(12)[:, None, None] * 7 + np.arange(4)[None, :, None] * 5
) % 3 > 0  # unequal in every microbatch
MASK[8:10] = False


def linen(layer=jaxaccum.linen.BatchNorm, **options):
    """A layer of linen as ``(parameters, statistics), fn(parameters, statistics, x, mask) -> (y,
    statistics)``."""
    options = {"use_running_average": False, "momentum": 0.9, "param_dtype": jnp.float64} | options
    model = layer(**options)
    with STANDARD():
        variables = jax.jit(model.init)(jax.random.key(0), X)
    params = jax.tree.map(lambda x: x + data(*x.shape, seed=1, dtype=x.dtype), variables["params"])

    def fn(params, stats, x, mask=None):
        y, new = model.apply(
            {"params": params, "batch_stats": stats}, x, mask=mask, mutable=["batch_stats"]
        )
        return y, new["batch_stats"]

    return (params, variables["batch_stats"]), fn


def of_nnx(layer=jaxaccum.nnx.BatchNorm, **options):
    """The same of a layer of nnx."""
    options = {"momentum": 0.9, "param_dtype": jnp.float64} | options
    graphdef, params, stats = nnx.split(
        layer(3, rngs=nnx.Rngs(0), **options), nnx.Param, nnx.BatchStat
    )
    params = {
        name: x + data(3, seed=1, dtype=x.dtype) for name, x in nnx.to_pure_dict(params).items()
    }

    def fn(params, stats, x, mask=None):
        state = nnx.State({name: nnx.Param(x) for name, x in params.items()})
        model = nnx.merge(
            graphdef, state, nnx.State({name: nnx.BatchStat(x) for name, x in stats.items()})
        )
        return model(x, mask=mask), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return (params, nnx.to_pure_dict(stats)), fn


BOTH = [linen, of_nnx]
LAYERS = pytest.mark.parametrize("layer", BOTH, ids=["linen", "nnx"])
OPTIONS = [{}, {"use_scale": False, "epsilon": 1e-3}, {"use_bias": False, "momentum": 0.5}]


def cut(x, n):
    return x.reshape(n, -1, *x.shape[1:])


def over_microbatches(fn, n):
    """`fn` of the whole batch, run as n microbatches that know each other by collectives."""

    def whole(params, stats, x, mask):
        one = jax.vmap(fn, in_axes=(None, None, 0, 0), out_axes=(0, None), axis_name="microbatch")
        y, stats = one(params, stats, cut(x, n), cut(mask, n))
        return y.reshape(x.shape), stats

    return jax.jit(whole)


def whole_batch(params, stats, x, mask, *, momentum=0.9, epsilon=1e-5, unbiased=False):
    """The definition, written with the rows that are kept."""
    mask = np.broadcast_to(mask, x.shape)[..., 0]
    kept = x[mask]
    mean, var = kept.mean(0), kept.var(0)
    y = normalized(x, mean, var + epsilon, params)
    running = var * len(kept) / (len(kept) - 1) if unbiased else var
    moved = [
        momentum * old + (1 - momentum) * new
        for old, new in ((stats["mean"], mean), (stats["var"], running))
    ]
    return y, {"mean": moved[0], "var": moved[1]}


def normalized(x, mean, var, params):
    mean, var, scale, bias = (a[None, None] for a in (mean, var, params["scale"], params["bias"]))
    return (x - mean) / jnp.sqrt(var) * scale + bias


def value_and_gradients(fn, params, stats, x, mask):
    """Output, new statistics, and the gradient of a loss of the entries that are kept."""
    cotangent = jnp.where(mask, data(*x.shape, seed=2), 0.0)

    def both(params, x):
        loss = lambda params, x: jnp.sum(fn(params, stats, x, mask)[0] * cotangent)
        return fn(params, stats, x, mask), jax.grad(loss, argnums=(0, 1))(params, x)

    return jax.jit(both)(params, x)


@pytest.mark.parametrize(("n", "layer"), covering([2, 3, 12], BOTH))
def test_masked_microbatches_have_the_statistics_of_the_whole_batch(layer, n):
    (params, stats), fn = layer()
    arguments = params, stats, X, jnp.asarray(MASK)
    actual = value_and_gradients(over_microbatches(fn, n), *arguments)
    assert normwise(actual, value_and_gradients(whole_batch, *arguments)) < EXACT


@pytest.mark.parametrize(
    ("layer", "flax"), [(linen, nn.BatchNorm), (of_nnx, nnx.BatchNorm)], ids=["linen", "nnx"]
)
def test_flax_averages_means_of_shards_and_is_wrong(layer, flax):
    (params, stats), fn = layer(flax, axis_name="microbatch", use_fast_variance=False)
    mask = jnp.asarray(
        MASK.any(axis=(1, 2))[:, None, None] & MASK | (np.arange(12) % 4 == 0)[:, None, None]
    )
    stats = jax.tree.map(lambda x: x.astype(jnp.float64), stats)
    with STANDARD():
        y, _ = over_microbatches(fn, 3)(params, stats, X, mask)
    assert normwise(y, whole_batch(params, stats, X, mask)[0]) > 1e-2


@LAYERS
@pytest.mark.parametrize(("options", "n"), covering(OPTIONS, [1, 4]), ids=str)
def test_without_a_mask_it_is_flax_on_the_whole_batch(layer, options, n):
    flax = nn.BatchNorm if layer is linen else nnx.BatchNorm
    (params, stats), ours = layer(**options)
    (_, expected_stats), theirs = layer(flax, use_fast_variance=False, **options)
    assert jax.tree.map(jnp.shape, stats) == jax.tree.map(jnp.shape, expected_stats)
    with STANDARD():
        expected = jax.jit(theirs)(
            params, jax.tree.map(lambda x: x.astype(jnp.float64), expected_stats), X
        )
    one = jax.vmap(ours, in_axes=(None, None, 0), out_axes=(0, None), axis_name="microbatch")
    y, new = jax.jit(one)(params, stats, cut(X, n))
    assert normwise((y.reshape(X.shape), new), expected) < EXACT


def test_variables_have_the_names_shapes_and_first_values_of_flax():
    x = X.astype(jnp.float32)
    for options in (
        {},
        {"axis": 1},
        {"axis": (1, 2)},
        {"use_bias": False, "scale_init": nn.initializers.normal()},
    ):
        ours, theirs = (
            jax.jit(L(use_running_average=False, **options).init)(jax.random.key(0), x)
            for L in LINEN
        )
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        assert all(
            jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), ours, theirs))
        )
    ours, theirs = (
        nnx.state(L(3, rngs=nnx.Rngs(0))) for L in (jaxaccum.nnx.BatchNorm, nnx.BatchNorm)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert jaxaccum.linen.BatchNorm(True, -1, 0.5).momentum == 0.5  # in Flax's order


LINEN = (jaxaccum.linen.BatchNorm, nn.BatchNorm)


def test_a_model_names_it_as_it_names_flax():
    class Model(nn.Module):
        norm: type

        @nn.compact
        def __call__(self, x):
            return self.norm(use_running_average=False)(nn.Dense(2)(x))

    ours, theirs = (
        jax.eval_shape(Model(norm).init, jax.random.key(0), jnp.ones((2, 3), jnp.float32))
        for norm in LINEN
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)


@LAYERS
def test_features_may_lie_along_any_axis(layer):
    x = jnp.moveaxis(X, -1, 1)
    (params, stats), last = layer()
    _, second = layer(axis=1) if layer is of_nnx else ((), _linen_at(1, x))
    expected, actual = jax.jit(last)(params, stats, X), jax.jit(second)(params, stats, x)
    assert normwise((jnp.moveaxis(actual[0], 1, -1), actual[1]), expected) < EXACT


def _linen_at(axis, x):
    model = jaxaccum.linen.BatchNorm(
        use_running_average=False, momentum=0.9, axis=axis, param_dtype=jnp.float64
    )

    def fn(params, stats, x):
        y, new = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return fn


@LAYERS
def test_running_statistics_normalize_where_asked_and_stay(layer):
    (params, _), fn = layer(use_running_average=True)
    stats = {"mean": data(3, seed=3), "var": jnp.exp(data(3, seed=4))}
    y, new = jax.jit(fn)(params, stats, X)
    expected = normalized(X, stats["mean"], stats["var"] + 1e-5, params)
    assert normwise((y, new), (expected, stats)) < EXACT
    assert "all_gather" not in str(
        jax.make_jaxpr(fn, axis_env=[("microbatch", 4)])(params, stats, X)
    )


@LAYERS
def test_one_gather_a_layer_so_one_cut(layer):
    (params, stats), fn = layer()
    jaxpr = str(jax.make_jaxpr(fn, axis_env=[("microbatch", 4)])(params, stats, X))
    assert jaxpr.count("all_gather[") == 3  # count, mean and squares, together
    assert "psum" not in jaxpr


@pytest.mark.parametrize(("layer", "n"), covering(BOTH, [1, 4]))
def test_the_variance_does_not_cancel_far_from_zero(layer, n):
    """Within eps · |mean| / deviation, the rounding of the mean itself; Flax subtracts squares, and
    keeps no digit."""
    far = jnp.asarray(1e4 + data(12, 4, 3), jnp.float32)
    expected, bound = np.asarray(far, np.float64).var((0, 1)), 1e4 * jnp.finfo(jnp.float32).eps
    for flax, holds in ((None, True), (nn.BatchNorm if layer is linen else nnx.BatchNorm, False)):
        options = {"param_dtype": jnp.float32, "momentum": 0.0}
        options |= {"axis_name": "microbatch"} if flax else {}
        (params, stats), fn = layer(*[flax] if flax else [], **options)
        with STANDARD():
            one = jax.vmap(fn, in_axes=(None, None, 0), axis_name="microbatch")
            _, new = jax.jit(one)(params, stats, cut(far, n))
        assert bool(np.max(np.abs(np.asarray(new["var"][0]) / expected - 1)) < bound) is holds


def test_the_rounding_of_the_mean_leaves_the_variance():
    """2²⁴ + 7 is no float32: about the next one the mean square of these eight is 22, and their
    variance 21."""
    x = jnp.asarray(2.0**24 + 2 * np.arange(8), jnp.float32)
    whole = lambda x: batch_moments.moments(x, (0,)).variance
    parts = jax.vmap(
        lambda x: batch_moments.over_axes(batch_moments.moments(x, (0,)), ("parts",)).variance,
        axis_name="parts",
    )
    assert float(jax.jit(whole)(x)) == 21
    assert jax.jit(parts)(cut(x, 4)).tolist() == [21] * 4
    assert float(jnp.mean((x - jnp.mean(x)) ** 2)) == 22


@pytest.mark.parametrize(("dtype", "layer"), covering([jnp.bfloat16, jnp.float16], BOTH))
def test_statistics_of_low_precision_are_float32(layer, dtype):
    (params, stats), fn = layer(dtype=dtype, param_dtype=jnp.float32)
    x = X.astype(dtype)
    y, new = jax.jit(fn)(params, stats, x)
    assert y.dtype == dtype
    wide = whole_batch(params, stats, x.astype(jnp.float32), np.ones((12, 4, 1), bool))
    assert {k: v.dtype for k, v in new.items()} == {"mean": jnp.float32, "var": jnp.float32}
    assert normwise(new, wide[1]) < 16 * jnp.finfo(jnp.float32).eps
    assert normwise(y.astype(jnp.float32), wide[0]) < 4 * jnp.finfo(dtype).eps


@LAYERS
def test_what_is_masked_leaves_no_trace(layer):
    (params, stats), fn = layer()
    poisoned = jnp.where(jnp.asarray(MASK), X, jnp.nan)
    over = over_microbatches(fn, 3)
    clean, dirty = (over(params, stats, x, jnp.asarray(MASK)) for x in (X, poisoned))
    assert normwise(jnp.where(MASK, dirty[0], 0.0), jnp.where(MASK, clean[0], 0.0)) == 0
    assert normwise(dirty[1], clean[1]) == 0


@LAYERS
def test_an_empty_batch_moves_nothing_and_has_gradient_zero(layer):
    (params, stats), fn = layer()
    (y, new), grads = value_and_gradients(
        over_microbatches(fn, 3), params, stats, X, jnp.zeros_like(MASK)
    )
    assert np.isfinite(y).all()
    assert normwise(new, stats) == 0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


@LAYERS
def test_running_statistics_of_torch_are_unbiased(layer):
    (params, stats), fn = layer(statistics="torch")
    _, actual = over_microbatches(fn, 3)(params, stats, X, jnp.asarray(MASK))
    _, expected = whole_batch(params, stats, X, MASK, unbiased=True)
    assert normwise(actual, expected) < EXACT
    assert normwise(actual, whole_batch(params, stats, X, MASK)[1]) > 1e-3


@LAYERS
def test_across_devices_and_time_at_once(layer):
    """A mesh axis beside the loop's: one set of statistics, which the mesh knows to be one."""
    (params, stats), fn = layer(axis_name=("data", "microbatch"))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": (P("data"), P())}
    # Unchecked, because jax cannot check a gather over an axis of vmap that stands inside
    # shard_map.
    sharded = jax.jit(jax.shard_map(over_microbatches(fn, 3), mesh=mesh, check_vma=False, **specs))
    x, mask = jnp.concatenate([X, 2 * X]), jnp.asarray(np.concatenate([MASK, MASK[::-1]]))
    assert normwise(sharded(params, stats, x, mask), whole_batch(params, stats, x, mask)) < EXACT


@LAYERS
def test_an_unknown_rule_is_refused(layer):
    refused(lambda: layer(statistics="pytorch"), "statistics", '"torch"', "'pytorch'")


def test_nnx_asks_which_statistics_to_use():
    model = jaxaccum.nnx.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    refused(lambda: model(X), "use_running_average")


class Twice(nn.Module):
    """Two layers of Flax's own, one of them under remat, which name no axis, or that of devices."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        for layer in (nn.BatchNorm, nn.remat(nn.BatchNorm, static_argnums=(2,))):
            x = nn.Dense(3, param_dtype=x.dtype)(x)
            x = layer(axis_name=self.axis_name, param_dtype=x.dtype)(x, not train)
            x = jnp.tanh(x)
        return x


@STANDARD()
def twice(around, axis_name=None):
    model = Twice(axis_name)
    x = data(8, 3, seed=1)
    variables = model.init(jax.random.key(0), x, False)
    params, stats = variables["params"], variables["batch_stats"]

    def loss(params, stats, x):
        with around(), STANDARD():
            given = {"params": params, "batch_stats": stats}
            y, new = model.apply(given, x, True, mutable=["batch_stats"])
        return jnp.mean(y**3), jaxaccum.Last(new["batch_stats"])

    return loss, (params, stats, x)


def test_every_layer_of_a_model_is_over_the_batch_in_a_context():
    loss, arguments = twice(jaxaccum.linen.batch_norm_over)
    alone, _ = twice(contextlib.nullcontext)
    options = {"in_axes": (None, None, 0), "has_aux": True}
    whole = jax.value_and_grad(lambda *a: resolved(alone(*a)), has_aux=True)(*arguments)
    step = lambda loss: jax.jit(
        jaxaccum.value_and_grad(loss, num_microbatches=4, audit=None, **options)
    )
    decorated = jaxaccum.linen.batch_norm_over("microbatch")(alone)
    assert normwise(step(loss)(*arguments), whole) < EXACT
    assert normwise(step(decorated)(*arguments), whole) < EXACT
    assert normwise(step(alone)(*arguments), whole) > 1e6 * EXACT
    assert jaxaccum.audit(loss, *arguments, num_microbatches=4, **options).exact
    assert not jaxaccum.audit(alone, *arguments, num_microbatches=4, **options).exact


def resolved(returned):
    loss, aux = returned
    return loss, aux.x


def test_the_context_adds_to_the_axes_of_a_layer():
    loss, arguments = twice(jaxaccum.linen.batch_norm_over, axis_name="devices")
    axes = {"axis_env": [("devices", 2), ("microbatch", 4)]}
    within = str(jax.make_jaxpr(loss, **axes)(*arguments))
    assert "axes=('devices', 'microbatch')" in within
    alone, _ = twice(contextlib.nullcontext, axis_name="devices")
    after = str(jax.make_jaxpr(alone, **axes)(*arguments))
    assert "devices" in after
    assert "microbatch" not in after


@STANDARD()
def test_a_bound_layer_has_its_own_axes_after_the_context():
    x = data(4, 3, seed=1)
    layer = nn.BatchNorm(use_running_average=True, param_dtype=x.dtype)
    bound = layer.bind(layer.init(jax.random.key(0), x))
    with jaxaccum.linen.batch_norm_over():
        within = bound(x)
    assert bound.axis_name is None
    assert normwise(bound(x), within) == 0


class Block(nn.Module):
    """A layer of a scan over layers."""

    @nn.compact
    def __call__(self, h, _):
        h = nn.Dense(3, param_dtype=jnp.float64)(h)
        return jaxaccum.linen.BatchNorm(use_running_average=False, param_dtype=jnp.float64)(h), None


class Scanned(nn.Module):
    """Two of them, by `nn.scan`."""

    @nn.compact
    def __call__(self, h):
        axes = {"params": 0, "batch_stats": 0}
        layers = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
        return layers()(h, None)[0]


def test_our_layer_in_a_scan_over_layers_is_known_to_be_exact():
    x = X[:, 0]

    def loss(params, x, stats):
        h, new = Scanned().apply(
            {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
        )
        return jnp.mean(jnp.tanh(h) ** 2), new["batch_stats"]

    with STANDARD():
        variables = jax.jit(Scanned().init)(jax.random.key(0), x)
        args = variables["params"], x, variables["batch_stats"]
        options = {"has_aux": True, "in_axes": (None, 0, None)}
        step = jaxaccum.value_and_grad(loss, num_microbatches=4, audit="raise", **options)
        expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(*args)
        assert normwise(jax.jit(step)(*args), expected) < EXACT
        wrong = jax.jit(jax.grad(lambda *args: loss(*args)[0]))(args[0], x[:3], args[2])
        assert normwise(wrong, expected[1]) > 0.01
