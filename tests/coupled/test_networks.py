"""Networks with BatchNorm over microbatches, in linen and nnx, are PyTorch's on the full batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import jaxaccum as ja
from tests.coupled.vision import (
    EPSILON,
    IMAGES,
    LABELS,
    MOMENTUM,
    cnn,
    cross_entropy,
    linen,
    nnx_model,
    resnet18,
)
from tests.support.helpers import EXACT, mean_of_means, normwise, parts_of

pytestmark = pytest.mark.filterwarnings("ignore:memory='min' takes")

BATCHES = {net: {"x": IMAGES[net], "y": LABELS} for net in (cnn, resnet18)}
AXES = (None, 0, None)


class _Torch:
    """The layers in PyTorch, which reads linen's parameters and moves running statistics of its
    own."""

    relu, pool = staticmethod(F.relu), staticmethod(lambda x: x.mean((2, 3)))

    def __init__(self, params):
        self.params = jax.tree.map(
            lambda x: torch.tensor(np.asarray(x), requires_grad=True), params
        )
        self.stats = {}

    def conv(self, name, x, features, stride, size=3):
        return F.conv2d(
            x, self.params[name]["kernel"].permute(3, 2, 0, 1), stride=stride, padding=size // 2
        )

    def norm(self, name, x):
        mean, var = torch.zeros(x.shape[1], dtype=x.dtype), torch.ones(x.shape[1], dtype=x.dtype)
        own = self.params[name]
        y = F.batch_norm(x, mean, var, own["scale"], own["bias"], True, 1 - MOMENTUM, EPSILON)
        self.stats[name] = {"mean": mean.numpy(), "var": var.numpy()}
        return y

    def dense(self, name, x, features):
        return x @ self.params[name]["kernel"] + self.params[name]["bias"]


def torch_full_batch(net, params):
    """Value, gradient and running statistics of one pass over the whole batch."""
    layers = _Torch(params)
    x = torch.tensor(np.asarray(IMAGES[net])).permute(0, 3, 1, 2)
    value = F.cross_entropy(net(layers, x), torch.tensor(np.asarray(LABELS)))
    value.backward()
    return value.item(), jax.tree.map(lambda p: p.grad.numpy(), layers.params), layers.stats


def ours(net, layer, **options):
    params, stats, loss = linen(net, layer)
    step = ja.value_and_grad(loss, has_aux=True, in_axes=AXES, **options)
    (value, new), grads = jax.jit(step)(params, BATCHES[net], stats)
    return params, (value, grads), new


@pytest.mark.parametrize(
    ("n", "memory"), [(2, None), (2, "min"), (2, "store"), (4, 4096), (8, None)]
)
def test_six_batch_norms_of_linen_unmodified(n, memory):
    params, actual, new = ours(cnn, nn.BatchNorm, num_microbatches=n, memory=memory)
    value, grads, stats = torch_full_batch(cnn, params)
    assert normwise(actual, (value, grads)) < EXACT
    means = {name: own["mean"] for name, own in stats.items()}
    assert normwise({name: own["mean"] for name, own in new.items()}, means) < EXACT


@pytest.mark.parametrize(("n", "memory"), [(2, "store"), (8, None)])
def test_resnet18_with_twenty_batch_norms(n, memory):
    params, actual, _ = ours(resnet18, nn.BatchNorm, num_microbatches=n, memory=memory)
    assert sum("norm" in name for name in params) == 20
    assert normwise(actual, torch_full_batch(resnet18, params)[:2]) < EXACT


@pytest.mark.parametrize("memory", [None, "min"])
def test_our_layer_has_the_running_statistics_of_torch_too(memory):
    layer = lambda **options: ja.linen.BatchNorm(statistics="torch", **options)
    params, actual, new = ours(cnn, layer, num_microbatches=4, memory=memory)
    value, grads, stats = torch_full_batch(cnn, params)
    assert normwise(actual, (value, grads)) < EXACT
    assert normwise(new, stats) < EXACT


@pytest.mark.parametrize("layer", [nnx.BatchNorm, ja.nnx.BatchNorm], ids=["flax", "ours"])
def test_nnx_updates_the_model_once_as_the_full_batch_does(layer):
    params, _, _ = linen(cnn)
    value, grads, stats = torch_full_batch(cnn, params)
    model = nnx_model(cnn, layer, params)
    fun = lambda model, batch: cross_entropy(model(batch["x"]), batch["y"])
    actual = nnx.jit(ja.nnx.value_and_grad(fun, num_microbatches=4))(model, BATCHES[cnn])
    grads_of_layers = nnx.to_pure_dict(actual[1])["layers"]
    assert normwise((actual[0], grads_of_layers), (value, grads)) < EXACT
    moved = {name: model.layers[name].mean.get_value() for name in stats}
    assert normwise(moved, {name: own["mean"] for name, own in stats.items()}) < EXACT


@pytest.mark.parametrize("net", [cnn, resnet18])
def test_naive_accumulation_is_far_off(net):
    params, stats, loss = linen(net)
    plain = jax.jit(lambda params, batch: ja.full_batch(loss, AXES)(params, batch, stats)[0])
    naive = mean_of_means(plain, params, parts_of(BATCHES[net], [4, 4]))
    assert normwise(naive, torch_full_batch(net, params)[1]) > 0.1
    assert jnp.isfinite(jax.tree.leaves(naive)[0]).all()
