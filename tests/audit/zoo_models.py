"""The zoo's models, in linen and in nnx: normalization, dropout, convolutions, attention and
recurrence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.audit.zoo import CASES, LABELLED, TOKENS, C, Case, D, H, N, T, cross_entropy, f, i


def initialized(model, *inputs, **keys):
    names = {"params": jax.random.key(0)} | {name: jax.random.key(n) for name, n in keys.items()}
    return jax.eval_shape(model.init, names, *inputs)


class Perceptron(nn.Module):
    """Two layers with something between them."""

    between: Callable[..., Any] = nn.relu

    @nn.compact
    def __call__(self, x):
        return nn.Dense(C)(nn.relu(self.between(nn.Dense(H)(x))))  # <<between


def linen_case(model, x, *, mutable=False, **keys):
    variables = initialized(model, x, **keys)
    state = {
        name: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), v)
        for name, v in variables.items()
        if name != "params"
    }
    names = {name: jax.random.key(n) for name, n in keys.items()}

    def loss(params, batch):
        out = model.apply(
            {"params": params, **state},
            batch["x"],
            rngs=names,
            mutable=["batch_stats"] if mutable else False,
        )
        return cross_entropy(out[0] if mutable else out, batch["y"]).mean()

    return loss, variables["params"], {"x": x, "y": i(N)}


class Trained(nn.Module):
    """BatchNorm as it is written in a model."""

    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train)(nn.Dense(H)(x))  # <<batch_norm
        return nn.Dense(C)(nn.relu(x))


class Convolutions(nn.Module):
    """A small residual network with pooling."""

    group: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        norm = nn.GroupNorm(4) if self.group else nn.BatchNorm(use_running_average=False)
        x = norm(x)  # <<first_norm
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        y = nn.Conv(8, (3, 3))(x)
        norm = nn.GroupNorm(4) if self.group else nn.BatchNorm(use_running_average=False)
        y = norm(y)  # <<second_norm
        return nn.Dense(C)(nn.avg_pool(x + y, (2, 2), (2, 2)).reshape(len(x), -1))


class Block(nn.Module):
    """A transformer's block."""

    @nn.compact
    def __call__(self, x, mask):
        x += nn.MultiHeadDotProductAttention(4)(
            nn.LayerNorm()(x), mask=nn.make_attention_mask(mask, mask)
        )
        return x + nn.Dense(H)(nn.gelu(nn.Dense(2 * H)(nn.LayerNorm()(x))))


class Encoder(nn.Module):
    """Two blocks, rematerialized."""

    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(11, H)(tokens) + nn.Embed(T, H)(jnp.arange(T))[None]
        for _ in range(2):
            x = nn.remat(Block)()(x, mask)
        return nn.Dense(11)(x)


class Nnx(nnx.Module):
    """The same perceptron in nnx."""

    def __init__(self, norm, rate, rngs):
        self.first, self.norm = nnx.Linear(D, H, rngs=rngs), norm(H, rngs=rngs)
        self.drop, self.last = nnx.Dropout(rate, rngs=rngs), nnx.Linear(H, C, rngs=rngs)

    def __call__(self, x):
        h = self.norm(self.first(x))  # <<nnx_norm
        h = self.drop(h)  # <<nnx_drop
        return self.last(nnx.relu(h))


def nnx_case(norm, rate=0.0):
    model = Nnx(norm, rate, nnx.Rngs(0))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda p, b: cross_entropy(nnx.merge(graph, p, rest, copy=True)(b["x"]), b["y"]).mean()
    return loss, params, LABELLED


def masked_language(model):
    def loss(p, b):
        ce = cross_entropy(model.apply(p, b["tokens"], b["mask"]), b["targets"])
        return jnp.sum(ce * b["mask"]) / (jnp.sum(b["mask"]) + 1e-8)

    return loss, initialized(model, TOKENS["tokens"], TOKENS["mask"]), TOKENS


def recurrent(model):
    params = initialized(model, f(N, T, D))
    return (
        lambda p, b: jnp.mean((model.apply(p, b["x"])[..., 0] - b["y"]) ** 2),
        params,
        {"x": f(N, T, D), "y": f(N, T)},
    )


IMAGES, CELL = f(N, 8, 8, 3), nn.LSTMCell(H, param_dtype=jnp.float64)
CASES.update({
    "linen perceptron": Case(lambda: linen_case(Perceptron(), f(N, D)), "MEAN", ()),
    "linen BatchNorm": Case(
        lambda: linen_case(Trained(True), f(N, D), mutable=True), "COUPLED", ("batch_norm",),
    ),
    "linen BatchNorm, evaluated": Case(lambda: linen_case(Trained(False), f(N, D)), "MEAN", ()),
    "linen dropout": Case(
        lambda: linen_case(Perceptron(nn.Dropout(0.5, deterministic=False)), f(N, D), dropout=1),
        "MEAN", ("between",), random=True,
    ),
    "nnx BatchNorm": Case(lambda: nnx_case(nnx.BatchNorm), "COUPLED", ("nnx_norm",)),
    "nnx LayerNorm": Case(lambda: nnx_case(nnx.LayerNorm), "MEAN", ()),
    "nnx GroupNorm": Case(lambda: nnx_case(partial(nnx.GroupNorm, num_groups=4)), "MEAN", ()),
    "nnx dropout": Case(lambda: nnx_case(nnx.LayerNorm, 0.3), "MEAN", ("nnx_drop",), random=True),
    "convolutions, BatchNorm": Case(
        lambda: linen_case(Convolutions(False), IMAGES, mutable=True), "COUPLED",
        ("first_norm", "second_norm"),
    ),
    "convolutions, GroupNorm": Case(lambda: linen_case(Convolutions(True), IMAGES), "MEAN", ()),
    "encoder": Case(lambda: masked_language(Encoder()), "RATIO", ()),
    "linen LSTM": Case(lambda: recurrent(nn.Sequential([nn.RNN(CELL), nn.Dense(1)])), "MEAN", ()),
})  # fmt: skip
