"""The audit of every loss in optax, of a residual network, of transformers in linen and nnx;
nothing is compiled."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from optax import losses

import jaxaccum
from tests.audit.test_zoo import audited
from tests.audit.zoo import C, Case, D, H, N, T, cross_entropy, f, i
from tests.audit.zoo_models import Block, initialized

REAL, CLASS, SIGN = f(N, D), i(N), f(N)


def mean_of(loss):
    return lambda p, b: jnp.mean(loss(b["x"] @ p, b["y"]))


def fenchel_young(logits, labels):
    return losses.make_fenchel_young_loss(lambda x: jax.nn.logsumexp(x, axis=-1))(logits, labels)


def ctc(logits, labels):
    paddings = jnp.zeros(logits.shape[:2]), jnp.zeros(labels.shape)
    return losses.ctc_loss_with_forward_probs(logits, paddings[0], labels, paddings[1])[0]


ROWWISE = (D, C), {"x": f(N, D), "y": f(N, C)}
LABELS = (D, C), {"x": f(N, D), "y": CLASS}
SCALARS = (D,), {"x": f(N, D), "y": SIGN}
SERIES = (D, C), {"x": f(N, T, D), "y": i(N, 3)}
IMAGES = (D, C), {"x": f(N, T, D), "y": f(N, T, C)}
OPTAX = {
    "binary_dice_loss": ("MEAN", losses.binary_dice_loss, ((D,), {"x": f(N, T, D), "y": f(N, T)})),
    "convex_kl_divergence": ("MEAN", losses.convex_kl_divergence, ROWWISE),
    "cosine_distance": ("MEAN", losses.cosine_distance, ROWWISE),
    "cosine_similarity": ("MEAN", losses.cosine_similarity, ROWWISE),
    "ctc_loss": (
        "MEAN",
        lambda z, y: losses.ctc_loss(z, jnp.zeros(z.shape[:2]), y, jnp.zeros(y.shape)),
        SERIES,
    ),
    "ctc_loss_with_forward_probs": ("MEAN", ctc, SERIES),
    "dice_loss": ("MEAN", losses.dice_loss, IMAGES),
    "generalized_kl_divergence": ("MEAN", losses.generalized_kl_divergence, ROWWISE),
    "hinge_loss": ("MEAN", losses.hinge_loss, SCALARS),
    "huber_loss": ("MEAN", losses.huber_loss, ROWWISE),
    "kl_divergence": ("MEAN", losses.kl_divergence, ROWWISE),
    "kl_divergence_with_log_targets": ("MEAN", losses.kl_divergence_with_log_targets, ROWWISE),
    "l2_loss": ("MEAN", losses.l2_loss, ROWWISE),
    "log_cosh": ("MEAN", losses.log_cosh, ROWWISE),
    "make_fenchel_young_loss": ("MEAN", fenchel_young, ROWWISE),
    "multiclass_generalized_dice_loss": (
        "COUPLED",
        losses.multiclass_generalized_dice_loss,
        IMAGES,
    ),
    "multiclass_hinge_loss": ("MEAN", losses.multiclass_hinge_loss, LABELS),
    "multiclass_perceptron_loss": ("MEAN", losses.multiclass_perceptron_loss, LABELS),
    "multiclass_sparsemax_loss": ("MEAN", losses.multiclass_sparsemax_loss, LABELS),
    "ntxent": ("COUPLED", losses.ntxent, LABELS),
    "perceptron_loss": ("MEAN", losses.perceptron_loss, SCALARS),
    "poly_loss_cross_entropy": ("MEAN", losses.poly_loss_cross_entropy, ROWWISE),
    "ranking_softmax_loss": ("MEAN", losses.ranking_softmax_loss, ROWWISE),
    "safe_softmax_cross_entropy": ("MEAN", losses.safe_softmax_cross_entropy, ROWWISE),
    "sigmoid_binary_cross_entropy": ("MEAN", losses.sigmoid_binary_cross_entropy, ROWWISE),
    "sigmoid_focal_loss": ("MEAN", losses.sigmoid_focal_loss, ROWWISE),
    "smooth_labels": (
        "MEAN",
        lambda z, y: cross_entropy(z, y) + losses.smooth_labels(z, 0.1).sum(-1),
        LABELS,
    ),
    "softmax_cross_entropy": ("MEAN", losses.softmax_cross_entropy, ROWWISE),
    "softmax_cross_entropy_with_integer_labels": ("MEAN", cross_entropy, LABELS),
    "sparsemax_loss": ("MEAN", losses.sparsemax_loss, SCALARS),
    "squared_error": ("MEAN", losses.squared_error, ROWWISE),
    "triplet_margin_loss": (
        "MEAN",
        lambda z, y: losses.triplet_margin_loss(z, y, z[:, ::-1]),
        ROWWISE,
    ),
}


def test_every_loss_of_optax_is_here():
    public = {
        name
        for name, value in vars(losses).items()
        if inspect.isroutine(value) and not name.startswith("_")
    }
    assert public <= set(OPTAX)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
@pytest.mark.filterwarnings("ignore:The function convex_kl_divergence:DeprecationWarning")
@pytest.mark.parametrize("name", OPTAX)
def test_losses_of_optax(name):
    verdict, loss, (shape, batch) = OPTAX[name]
    report = audited(Case(lambda: (mean_of(loss), f(*shape), batch), verdict, ()))
    assert (report.verdict, report.exact) == (verdict, verdict == "MEAN"), report


# -- models ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A bottleneck block with strides and a projection, as in ResNet."""

    width: int
    strides: int
    axis_name: str | None

    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)
        y = nn.relu(norm(nn.Conv(self.width, (1, 1))(x)))
        y = nn.relu(norm(nn.Conv(self.width, (3, 3), (self.strides, self.strides))(y)))
        y = norm(nn.Conv(4 * self.width, (1, 1))(y))
        return nn.relu(y + norm(nn.Conv(4 * self.width, (1, 1), (self.strides, self.strides))(x)))


class ResNet(nn.Module):
    """Four stages of two blocks."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(8, (7, 7), (2, 2))(x)), (3, 3), (2, 2), "SAME")
        for stage in range(4):
            for block in range(2):
                x = Residual(8 * 2**stage, 2 if stage and not block else 1, self.axis_name)(x)
        return nn.Dense(C)(x.mean((1, 2)))


def residual_network(axis_name):
    images = f(N, 32, 32, 3)
    variables = initialized(ResNet(), images)
    state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables["batch_stats"])

    def loss(params, batch):
        variables = {"params": params, "batch_stats": state}
        logits, _ = ResNet(axis_name).apply(variables, batch["x"], mutable=["batch_stats"])
        return cross_entropy(logits, batch["y"]).mean()

    return loss, variables["params"], {"x": images, "y": CLASS}


def test_a_residual_network():
    report = audited(Case(lambda: residual_network(None), "COUPLED", ()))
    assert (report.verdict, report.exact) == ("COUPLED", False)
    assert any("axis_name" in finding.fix for finding in report.findings)
    assert all(finding.use.file == __file__ for finding in report.findings)
    report = audited(Case(lambda: residual_network("microbatch"), "COUPLED", ()))
    assert (report.verdict, report.exact) == ("COUPLED", True)


class Layer(nnx.Module):
    """A transformer's block in nnx."""

    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(H, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(2, H, rngs=rngs, decode=False)
        self.layers = nnx.List([nnx.Linear(H, 2 * H, rngs=rngs), nnx.Linear(2 * H, H, rngs=rngs)])

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.layers[1](nnx.gelu(self.layers[0](self.norms[1](x))))


def test_a_transformer_in_nnx():
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: Layer(nnx.Rngs(0))), nnx.Param, ...)
    del rest  # what is left has no arrays in it

    def loss(params, batch):
        x = nnx.merge(graph, params)(batch["x"])
        return jaxaccum.Mean(
            jnp.sum(jnp.square(x).mean(-1) * batch["mask"]), jnp.sum(batch["mask"])
        )

    report = audited(Case(lambda: (loss, params, {"x": f(N, T, H), "mask": f(N, T)}), "RATIO", ()))
    assert (report.verdict, report.exact) == ("RATIO", True), report


class Deep(nn.Module):
    """Twenty-four blocks."""

    @nn.compact
    def __call__(self, tokens, mask):
        x = nn.Embed(11, H)(tokens)
        for _ in range(24):
            x = Block()(x, mask)
        return nn.Dense(11)(x)


def test_twenty_four_layers_compile_nothing():
    params = initialized(Deep(), i(N, T), f(N, T))

    def loss(p, b):
        ce = cross_entropy(Deep().apply(p, b["tokens"], b["mask"]), b["targets"])
        return jaxaccum.Mean(jnp.sum(ce * b["mask"]), jnp.sum(b["mask"]))

    compiled: list[str] = []
    listener = lambda name, duration, **_: (
        compiled.append(name) if "backend_compile" in name else None
    )
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        batch = {"tokens": i(N, T), "targets": i(N, T), "mask": f(N, T)}
        report = audited(Case(lambda: (loss, params, batch), "RATIO", ()))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert (report.verdict, report.exact) == ("RATIO", True), report
    assert report.counts["dot_general"] > 24 * 6
    assert not compiled
