"""Networks with BatchNorm, each written once as a function of its layers, and what builds them in
linen and nnx."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxaccum as ja
from tests.support.helpers import data

STANDARD = functools.partial(jax.numpy_dtype_promotion, "standard")  # Flax's own layers need it
EPSILON, MOMENTUM = 1e-5, 0.9


def cnn(layers, x):
    """Six convolutions with BatchNorm, the last two around a skip connection."""
    for i, (features, stride) in enumerate(((3, 1), (3, 1), (4, 2), (4, 1))):
        x = layers.relu(layers.norm(f"norm{i}", layers.conv(f"conv{i}", x, features, stride)))
    y = layers.relu(layers.norm("norm4", layers.conv("conv4", x, 4, 1)))
    x = layers.relu(x + layers.norm("norm5", layers.conv("conv5", y, 4, 1)))
    return layers.dense("head", layers.pool(x), 3)


def resnet18(layers, x):
    """The stem, four stages of two blocks, three projections: 20 BatchNorms; only its widths are
    small."""
    x = layers.relu(layers.norm("stem_norm", layers.conv("stem", x, 2, 1)))
    for stage, features in enumerate((2, 3, 4, 5)):
        for block in range(2):
            name, stride = f"stage{stage}_{block}", 2 if stage and not block else 1
            y = layers.relu(
                layers.norm(f"{name}_norm1", layers.conv(f"{name}_conv1", x, features, stride))
            )
            y = layers.norm(f"{name}_norm2", layers.conv(f"{name}_conv2", y, features, 1))
            if stride == 2:
                x = layers.norm(
                    f"{name}_norm3", layers.conv(f"{name}_conv3", x, features, stride, size=1)
                )
            x = layers.relu(x + y)
    return layers.dense("head", layers.pool(x), 3)


IMAGES = {cnn: data(8, 6, 6, 2, seed=5), resnet18: data(8, 8, 8, 2, seed=6)}
"""Examples of very different scales, so that the statistics of microbatches are far from the
batch's."""
IMAGES = {
    net: x * jnp.arange(1.0, 9.0)[:, None, None, None] / 4 + x[:1] for net, x in IMAGES.items()
}
LABELS = jnp.arange(8) % 3


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


class _Linen(nn.Module):
    net: object
    layer: type

    @nn.compact
    def __call__(self, x):
        return self.net(self, x)

    @nn.nowrap
    def conv(self, name, x, features, stride, size=3):
        pad = [(size // 2, size // 2)] * 2
        return nn.Conv(
            features, (size, size), stride, pad, use_bias=False, param_dtype=x.dtype, name=name
        )(x)

    @nn.nowrap
    def norm(self, name, x):
        options = {"use_running_average": False, "momentum": MOMENTUM, "epsilon": EPSILON}
        return self.layer(axis_name="microbatch", param_dtype=x.dtype, name=name, **options)(x)

    @nn.nowrap
    def dense(self, name, x, features):
        return nn.Dense(features, param_dtype=x.dtype, name=name)(x)

    relu, pool = staticmethod(nn.relu), staticmethod(lambda x: jnp.mean(x, (1, 2)))


def linen(net, layer=nn.BatchNorm):
    """Parameters, statistics, and ``loss(params, batch, stats) -> (loss, Last(new stats))``."""
    model = _Linen(net, layer)
    with STANDARD():
        variables = model.init(jax.random.key(0), IMAGES[net])
    leaves, treedef = jax.tree.flatten(variables["params"])
    params = treedef.unflatten([x + 0.2 * data(*x.shape, seed=i) for i, x in enumerate(leaves)])
    stats = jax.tree.map(lambda x: x.astype(jnp.float64), variables["batch_stats"])

    def loss(params, batch, stats):
        with STANDARD():
            logits, new = model.apply(
                {"params": params, "batch_stats": stats}, batch["x"], mutable=["batch_stats"]
            )
        return cross_entropy(logits, batch["y"]), ja.Last(new["batch_stats"])

    return params, stats, loss


class Nnx(nnx.Module):
    """The layers are made on a first pass, and found by name after."""

    def __init__(self, net, layer):
        self.net, self.layer, self.layers, self.rngs = net, layer, nnx.Dict({}), nnx.Rngs(0)
        self(IMAGES[net][:1])
        del self.rngs

    def __call__(self, x):
        with STANDARD():
            return self.net(self, x)

    def named(self, name, make, x):
        if name not in self.layers:
            self.layers[name] = make()
        return self.layers[name](x)

    def conv(self, name, x, features, stride, size=3):
        options = {"strides": stride, "padding": [(size // 2, size // 2)] * 2, "use_bias": False}
        make = lambda: nnx.Conv(
            x.shape[-1], features, (size, size), param_dtype=x.dtype, rngs=self.rngs, **options
        )
        return self.named(name, make, x)

    def norm(self, name, x):
        options = {
            "axis_name": "microbatch",
            "momentum": MOMENTUM,
            "epsilon": EPSILON,
            "param_dtype": x.dtype,
        }
        if name not in self.layers:
            self.layers[name] = self.layer(x.shape[-1], rngs=self.rngs, **options)
            for stat in (self.layers[name].mean, self.layers[name].var):
                stat.set_value(stat.get_value().astype(x.dtype))
            return x
        return self.layers[name](x)

    def dense(self, name, x, features):
        return self.named(
            name, lambda: nnx.Linear(x.shape[-1], features, param_dtype=x.dtype, rngs=self.rngs), x
        )

    relu, pool = staticmethod(nn.relu), staticmethod(lambda x: jnp.mean(x, (1, 2)))


def nnx_model(net, layer, params):
    """The nnx model that holds the parameters of linen's."""
    model = Nnx(net, layer)
    nnx.replace_by_pure_dict(state := nnx.state(model.layers, nnx.Param), params)
    nnx.update(model.layers, state)
    return model
