"""A zoo of losses as people write them, each with its verdict; lines marked ``# <<…`` are those to
report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

N, D, H, C, T = 8, 6, 16, 5, 7
CASES: dict[str, Case] = {}
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss with its arguments, its verdict, and the marks of the lines to report."""

    make: Callable[[], tuple[Any, ...]]
    verdict: str
    marks: tuple[str, ...]
    axes: Any = 0
    random: bool = False


def case(verdict, *marks, **options):
    return lambda make: CASES.setdefault(make.__name__, Case(make, verdict, marks, **options))


def f(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float64)


def i(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int64)


XY = {"x": f(N, D), "y": f(N)}
LABELLED = {"x": f(N, D), "y": i(N)}
PAIRS = {"a": f(N, D), "b": f(N, D)}
TOKENS = {"tokens": i(N, T), "targets": i(N, T), "mask": f(N, T)}
LANGUAGE = {"table": f(11, H), "w": f(H, H)}
GATES = {"gate": f(D, 4), "experts": f(4, H)}


def loss_of(params, batch, *arguments):
    """A case from one expression."""
    return lambda loss: (loss, params, batch, *arguments)


def one_liners(table):
    for name, (verdict, loss, params, batch, *axes) in table.items():
        made = (loss, params, batch)
        CASES[name] = Case(lambda made=made: made, verdict, (), axes=axes[0] if axes else 0)


def token_losses(p, b):
    return cross_entropy(jnp.tanh(p["table"][b["tokens"]] @ p["w"]) @ p["table"].T, b["targets"])


def residual(p, b):
    return b["x"] @ p - b["y"]


def balance(p, b):
    ce, mask = token_losses(p, b), b["mask"]
    return jnp.where(
        mask.mean() > 0, (ce * mask).mean() / mask.mean(), 0.0
    ) + 0.1 * optax.tree.norm(p, squared=True)


def two_masks(p, b):
    ce, one, two = token_losses(p, b), b["mask"], jnp.where(b["targets"] > 3, 1.0, 0.0)
    return (ce * one).sum() / one.sum() + (ce * two).sum() / two.sum()


def flat_weights(p, b):
    flat = b["mask"].reshape(-1)
    return jnp.sum(token_losses(p, b).reshape(-1) * (flat / jnp.maximum(flat.sum(), 1.0)))


def by_class(p, b):
    return jnp.average(
        cross_entropy(b["x"] @ p, b["y"]), weights=jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])[b["y"]]
    )


def views(p, b):
    z = jnp.tanh(jnp.concatenate([b["a"], b["b"]]) @ p)
    n = len(b["a"])
    return -jnp.mean(jnp.sum(z[:n] * z[n:], -1))


def variational(p, b):
    mean, log_var = jnp.split(b["x"] @ p["encoder"], 2, -1)
    z = mean + jnp.exp(log_var / 2) * b["noise"]
    error = optax.sigmoid_binary_cross_entropy(z @ p["decoder"], b["x"]).sum(-1)
    return jnp.mean(error - 0.5 * jnp.sum(1 + log_var - mean**2 - jnp.exp(log_var), -1))


def routed(p, b):
    gates = jax.nn.softmax(b["x"] @ p["gate"])
    values, best = lax.top_k(gates, 2)
    weights = jnp.zeros_like(gates).at[jnp.arange(len(gates))[:, None], best].set(values)
    return jnp.mean((weights @ p["experts"] - b["y"]) ** 2)


def layer_norm(p, b):
    h = b["x"] @ p
    return jnp.mean(
        ((h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)) ** 3
    )


def two_axes(p, b):
    r = b["x"] @ p * b["t"] - b["y"].T
    return jnp.mean(jnp.abs(r)) + jnp.mean(optax.huber_loss(r))


def merged(p, x):
    t, n, d = x.shape
    return jnp.mean(jnp.tanh(x.reshape(t * n, d) @ p).reshape(t, n, -1).sum(0) ** 2)


def solved(p, b):
    matrices = jnp.einsum("bi,bj->bij", b["x"], b["x"]) + jnp.eye(D) * jnp.exp(p["s"])
    return jnp.mean(jnp.linalg.solve(matrices, (b["x"] * p["w"])[..., None]) ** 2)


def unused_statistic(p, b):
    h = b["x"] @ p
    jnp.sqrt(jnp.mean(h))
    return jnp.mean(h**2)


def each(p, b):
    return jax.vmap(lambda x, y: jnp.sum((x @ p - y) ** 2))(b["x"], b["y"])


def added_up(p, b):
    add = lambda total, xy: (total + jnp.square(jnp.tanh(xy[0] @ p) - xy[1]), None)
    return lax.scan(add, 0.0, (b["x"], b["y"]))[0]


def rotary_attention(p, b):
    x = p["table"][b["tokens"]]
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    angle = (jnp.arange(x.shape[1])[:, None] * jnp.array([1.0, 0.1]))[:, None]
    halves = lambda u: (u[..., :2], u[..., 2:])
    turn = lambda s, c: jnp.concatenate(
        [s * jnp.cos(angle) - c * jnp.sin(angle), c * jnp.cos(angle) + s * jnp.sin(angle)], -1
    )
    out = jax.nn.dot_product_attention(turn(*halves(q)), turn(*halves(k)), v, is_causal=True)
    logits = out.reshape(*out.shape[:2], -1) @ p["o"]
    return cross_entropy(logits[:, :-1], b["tokens"][:, 1:]).mean()


def connectionist(p, b):
    logits = b["x"] @ p
    return optax.ctc_loss(
        logits, jnp.zeros(logits.shape[:2]), b["y"], jnp.zeros(b["y"].shape)
    ).mean()


def per_sequence(p, b):
    return jnp.mean((token_losses(p, b) * b["mask"]).sum(-1) / (b["mask"].sum(-1) + 1.0))


def penalized_logits(p, b):
    ce, mask = token_losses(p, b), b["mask"]
    return (ce * mask).sum() / mask.sum() + 1e-4 * (ce**2 * mask).sum() / mask.sum()


def masked_by_key(p, b):
    one = lambda x, key: jnp.where(
        jax.random.bernoulli(jax.random.wrap_key_data(key), 0.5, x.shape), x * p, 0.0
    )
    return jnp.mean(jax.vmap(one)(b["x"], b["keys"]).sum(-1) ** 2)


ATTENTION = {"table": f(11, H), "o": f(16, 11)} | {name: f(H, 4, 4) for name in "qkv"}
ROWS_AND_COLUMNS = {"x": 0, "y": 1, "t": None}

one_liners({
    "squared error": (
        "MEAN", lambda p, b: jnp.mean((residual(p["w"], b) + p["b"]) ** 2),
        {"w": f(D), "b": f()}, XY,
    ),
    "dot of residuals": (
        "SUM", lambda p, b: 0.5 * jnp.vdot(residual(p, b), residual(p, b)), f(D), XY,
    ),
    "cross entropy by index": (
        "MEAN",
        lambda p, b: -jax.nn.log_softmax(b["x"] @ p)[jnp.arange(len(b["x"])), b["y"]].mean(),
        f(D, C), LABELLED,
    ),
    "masked tokens": (
        "RATIO", lambda p, b: (token_losses(p, b) * b["mask"]).sum() / b["mask"].sum(),
        LANGUAGE, TOKENS,
    ),
    "masked tokens, flat and guarded": ("RATIO", flat_weights, LANGUAGE, TOKENS),
    "masked tokens, chosen, with decay": ("RATIO", balance, LANGUAGE, TOKENS),
    "mean where": (
        "RATIO", lambda p, b: jnp.mean(token_losses(p, b), where=b["mask"] > 0), LANGUAGE, TOKENS,
    ),
    "masked mean of each sequence": ("MEAN", per_sequence, LANGUAGE, TOKENS),
    "layer norm by hand": ("MEAN", layer_norm, f(D, H), XY),
    "keys of the examples": (
        "MEAN", masked_by_key, f(D),
        {"x": f(N, D), "keys": jax.ShapeDtypeStruct((N, 2), jnp.uint32)},
    ),
    "two views": ("MEAN", views, f(D, H), PAIRS),
    "rotary attention": ("MEAN", rotary_attention, ATTENTION, {"tokens": i(N, T)}),
    "mean and decay": (
        "MEAN", lambda p, b: jnp.mean(residual(p, b) ** 2) + 0.1 * jnp.sum(p**2), f(D), XY,
    ),
    "sum and decay": (
        "MIS_SCALED", lambda p, b: jnp.sum(residual(p, b) ** 2) + 0.1 * jnp.sum(p**2), f(D), XY,
    ),
    "sum and mean": (
        "MIS_SCALED", lambda p, b: jnp.sum(residual(p, b) ** 2) + jnp.mean(jnp.abs(residual(p, b))),
        f(D), XY,
    ),
    "two masks": ("MIS_SCALED", two_masks, LANGUAGE, TOKENS),
    "one mask twice": ("RATIO", penalized_logits, LANGUAGE, TOKENS),
    "unbiased": (
        "MIS_SCALED", lambda p, b: jnp.sum(residual(p, b) ** 2) / (len(b["y"]) - 1), f(D), XY,
    ),
    "each example": ("PER_EXAMPLE", each, f(D), XY),
    "each example's mean": ("MEAN", lambda p, b: each(p, b).mean(), f(D), XY),
    "second axis": (
        "MEAN", lambda p, x: jnp.mean(jnp.tanh(x @ p).sum(0) ** 2), f(D, H), f(T, N, D), 1,
    ),
    "second axis, merged": ("MEAN", merged, f(D, H), f(T, N, D), 1),
    "two batch axes": (
        "MEAN", two_axes, f(D, C), {"x": f(N, D), "y": f(C, N), "t": f()}, ROWS_AND_COLUMNS,
    ),
    "scan over examples": ("SUM", added_up, f(D), XY),
    "map over examples": (
        "MEAN", lambda p, b: lax.map(lambda xy: (xy[0] @ p - xy[1]) ** 2, (b["x"], b["y"])).mean(),
        f(D), XY,
    ),
    "a statistic for the log": ("MEAN", unused_statistic, f(D), XY),
    "routed experts": ("MEAN", routed, GATES, {"x": f(N, D), "y": f(N, H)}),
    "variational": (
        "MEAN", variational, {"encoder": f(D, 8), "decoder": f(4, D)},
        {"x": f(N, D), "noise": f(N, 4)},
    ),
    "ctc": ("MEAN", connectionist, f(D, C), {"x": f(N, T, D), "y": i(N, 3)}),
    "solved systems": ("MEAN", solved, {"s": f(), "w": f(D)}, {"x": f(N, D)}),
    "class weights": ("RATIO", by_class, f(D, C), LABELLED),
})  # fmt: skip


# -- with lines ------------------------------------------------------------------------------------


def by_hand(p, b):
    a = jax.nn.relu(b["x"] @ p["in"])
    harmless = jnp.var(b["x"] @ p["in"], axis=-1)  # the same jitted function, along another axis
    mean = a.mean(0)  # <<hand_mean
    var = jnp.var(a, axis=0)  # <<hand_var
    return jnp.mean(((a - mean) * lax.rsqrt(var + 1e-5) @ p["out"]) ** 2) + harmless.mean()


def cached(p, b):
    a = b["x"] @ p
    jnp.var(a, axis=0)  # unused, and JAX keeps its frames for the next
    var = jnp.var(a, axis=0)  # <<cached
    return jnp.mean((a / jnp.sqrt(var + 1.0)) ** 3)


def split_keys(p, b):
    one = lambda x, key: jnp.sum(
        jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x * p, 0.0) ** 2
    )
    keys = jax.random.split(jax.random.key(0), len(b["x"]))  # <<split_keys
    return jax.vmap(one)(b["x"], keys).mean()


def clip(p, b):
    image, text = (
        u / jnp.linalg.norm(u, axis=-1, keepdims=True) for u in (b["a"] @ p["a"], b["b"] @ p["b"])
    )
    logits = image @ text.T * jnp.exp(p["s"])  # <<clip
    own = jnp.arange(len(logits))
    return (cross_entropy(logits, own).mean() + cross_entropy(logits.T, own).mean()) / 2


def simclr(p, b):
    z = jnp.concatenate([b["a"] @ p, b["b"] @ p])
    z /= jnp.linalg.norm(z, axis=1, keepdims=True)
    near = jnp.exp(z @ z.T / 0.5)  # <<simclr
    n = len(b["a"])
    positive = jnp.sum(z[:n] * z[n:], -1)
    return -jnp.mean(jnp.concatenate([positive, positive]) / 0.5 - jnp.log(near.sum(1)))


def attends_to_others(p, b):
    h = b["x"] @ p
    weights = jax.nn.softmax(h @ h.T)  # <<attends
    return jnp.mean((weights @ h - b["x"][:, :1]) ** 2)


def load_balance(p, b):
    gates = jax.nn.softmax(b["x"] @ p["gate"])
    best = jax.nn.one_hot(jnp.argmax(gates, -1), 4)
    share = best.mean(0)  # <<share
    return jnp.mean((gates * best @ p["experts"] - b["y"]) ** 2) + 0.04 * jnp.sum(
        share * gates.mean(0)
    )


def root_mean_square(p, b):
    return jnp.sqrt(jnp.mean(residual(p, b) ** 2))  # <<rms


def time_loop(p, b, centered):
    def step(h, x):
        h = x @ p["x"] + h @ p["h"]
        h = jnp.tanh(h - h.mean(0) if centered else h)  # <<recurrent_mean
        return h, h

    _, hs = lax.scan(step, jnp.zeros((len(b["x"]), H)), b["x"].swapaxes(0, 1))
    return jnp.mean((hs @ p["o"] - b["y"].T) ** 2)


def largest(p, b):
    h = b["x"] @ p
    h = h / jnp.max(jnp.abs(h))  # <<largest
    return jnp.mean(h**2)


def standardized(p, b):
    x = b["x"] - b["x"].mean(0)  # <<standardized
    return jnp.mean((x @ p - b["y"]) ** 2)


def centered_on_axis_1(p, x):
    h = jnp.einsum("tbd,dh->tbh", x, p)
    h = h - h.mean(1, keepdims=True)  # <<axis_1
    return jnp.mean(h**2)


def moving_average(p, b):
    step = lambda average, x: (0.9 * average + x @ p, None)
    return lax.scan(step, 0.0, b["x"])[0]  # <<moving


def mixup(p, b):
    order = jax.random.permutation(jax.random.key(0), len(b["x"]))
    x = 0.7 * b["x"] + 0.3 * b["x"][order]  # <<mixup
    return jnp.mean((x @ p) ** 2)


def capacity(p, b):
    gates = jax.nn.softmax(b["x"] @ p["gate"])
    best = jax.nn.one_hot(jnp.argmax(gates, -1), 4)
    place = jnp.cumsum(best, 0) * best  # <<capacity
    return jnp.mean((gates * best * (place <= 2) @ p["experts"] - b["y"]) ** 2)


def advantages(p, b):
    advantage = (b["r"] - b["r"].mean()) / (b["r"].std() + 1e-8)  # <<advantage
    chosen = jnp.take_along_axis(jax.nn.log_softmax(b["x"] @ p), b["y"][:, None], 1)[:, 0]
    return -jnp.mean(chosen * advantage)


def ghosts(p, b):
    h = b["x"] @ p
    h = h.reshape(2, -1, h.shape[-1])  # <<ghosts
    h = h - h.mean(1, keepdims=True)
    return jnp.mean(h**2)


def own_derivative(backward):
    function = jax.custom_vjp(lambda x: jnp.sin(x))
    function.defvjp(lambda x: (jnp.sin(x), x), backward)
    return lambda p, b: jnp.mean(function(b["x"] @ p) ** 2)


def mixing(x, g):  # <<backward
    return (g / jnp.linalg.norm(g),)


def twice(p, b, block):
    return jnp.mean(block(p["b"], block(p["a"], b["x"])) ** 2)


@jax.jit
def block(w, x):
    return jnp.tanh(x @ w)


@jax.jit
def coupled_block(w, x):
    h = x @ w
    return h / jnp.sum(jnp.exp(h), 0)  # <<block


def softmax_over_examples(p, b):
    weights = jax.nn.softmax(b["x"] @ p, axis=0)  # <<softmax
    return -jnp.sum(weights * b["y"])


RECURRENT = ({"x": f(D, H), "h": f(H, H), "o": f(H)}, {"x": f(N, T, D), "y": f(N, T)})
SQUARE = ({"a": f(D, D), "b": f(D, D)}, {"x": f(N, D)})
LINED = {
    "BatchNorm by hand": (
        "COUPLED",
        ("hand_mean", "hand_var"),
        by_hand,
        {"in": f(D, H), "out": f(H, C)},
        XY,
    ),
    "frames of the cache": ("COUPLED", ("cached",), cached, f(D, H), XY),
    "clip": ("COUPLED", ("clip",), clip, {"a": f(D, H), "b": f(D, H), "s": f()}, PAIRS),
    "simclr": ("COUPLED", ("simclr",), simclr, f(D, H), PAIRS),
    "attention between examples": ("COUPLED", ("attends",), attends_to_others, f(D, H), XY),
    "load balance": ("COUPLED", ("share",), load_balance, GATES, {"x": f(N, D), "y": f(N, H)}),
    "root mean square": ("COUPLED", ("rms",), root_mean_square, f(D), XY),
    "recurrent": ("MEAN", (), partial(time_loop, centered=False), *RECURRENT),
    "recurrent, centered": (
        "COUPLED",
        ("recurrent_mean",),
        partial(time_loop, centered=True),
        *RECURRENT,
    ),
    "largest": ("COUPLED", ("largest",), largest, f(D, H), XY),
    "standardized inputs": ("COUPLED", ("standardized",), standardized, f(D), XY),
    "moving average": ("COUPLED", ("moving",), moving_average, f(D), XY),
    "expert capacity": ("COUPLED", ("capacity",), capacity, GATES, {"x": f(N, D), "y": f(N, H)}),
    "advantages": (
        "COUPLED",
        ("advantage",),
        advantages,
        f(D, C),
        {"x": f(N, D), "y": i(N), "r": f(N)},
    ),
    "ghosts": ("COUPLED", ("ghosts",), ghosts, f(D, H), XY),
    "own derivative": ("MEAN", (), own_derivative(lambda x, g: (g * jnp.cos(x),)), f(D), XY),
    "own derivative, mixing": ("COUPLED", ("backward",), own_derivative(mixing), f(D), XY),
    "one block twice": ("MEAN", (), partial(twice, block=block), *SQUARE),
    "coupled block twice": ("COUPLED", ("block",), partial(twice, block=coupled_block), *SQUARE),
    "softmax over examples": ("COUPLED", ("softmax",), softmax_over_examples, f(D), XY),
}
for _name, (_verdict, _marks, *_made) in LINED.items():
    CASES[_name] = Case(lambda made=_made: tuple(made), _verdict, _marks)
CASES["axis 1, centered"] = Case(
    lambda: (centered_on_axis_1, f(D, H), f(T, N, D)), "COUPLED", ("axis_1",), axes=1
)
CASES["split keys"] = Case(
    lambda: (split_keys, f(D), {"x": f(N, D)}), "MEAN", ("split_keys",), random=True
)
CASES["mixup"] = Case(lambda: (mixup, f(D), {"x": f(N, D)}), "COUPLED", ("mixup",), random=True)
