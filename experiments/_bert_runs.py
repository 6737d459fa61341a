"""The runs of the BERT experiment: three gradients in Flax, and why they differ.

A cause is one thing that the usual accumulation loop does and one pass over the batch does not. The
hand-written loop takes them as switches at run time, so that one compilation serves every
combination.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxaccum
from experiments.models.bert import BertForMaskedLM, Config, Rate

Params = Any
Batch = dict[str, Any]  # numpy outside, traced inside
Switches = dict[str, Any]  # cause -> whether the usual loop has it
Gradient = Callable[
    ..., Params
]  # (params, batch, key, dropout, causes) -> the gradient that reaches the optimizer

CAUSES = {  # name in the code -> name in the table, and what the usual loop does
    "keys": ("dropout keys", "a key for each microbatch, not for each example"),
    "weighting": ("weighting", "the mean of the microbatches' means, not one denominator"),
    "rounding": ("rounding", "float32, not float64"),
    "clipping": ("clipping", "each microbatch's gradient, not their sum"),
    "ticks": ("schedule and decay", "advanced each microbatch, not each optimizer step"),
}
ADAM = optax.scale_by_adam(eps=1e-6)  # BERT's eps
IN_AXES = (None, 0, jaxaccum.EXAMPLE_KEY, None)  # params, batch, keys, dropout's rate


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What every run shares."""

    num_microbatches: int = 4
    peak: float = 1e-3
    warmup: float = 0.1
    floor: float = 0.1
    weight_decay: float = 0.01
    max_norm: float = 1.0
    evaluate_every: int = 20

    def learning_rate(self, tick: int, *, steps: int) -> float:
        """Linear warm-up, then a cosine down to `floor` of the peak, where it stays."""
        if tick < self.warmup * steps:
            return self.peak * (tick + 1) / (self.warmup * steps + 1)
        progress = min(1.0, (tick - self.warmup * steps) / ((1 - self.warmup) * steps))
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + np.cos(np.pi * progress)))

    def learning_rates(self, steps: int, *, ticks: int) -> list[float]:
        """The rate of each optimizer step where the schedule advances `ticks` times per step."""
        return [self.learning_rate(step * ticks, steps=steps) for step in range(steps)]


class Run(NamedTuple):
    """The first step's gradient, and the held-out loss before training and at every evaluation."""

    gradient: Params
    losses: list[float]


class Runner:
    """Trains one model from the same weights on the same batches, each way compiled once for each
    dtype."""

    def __init__(self, config: Config, recipe: Recipe) -> None:
        self.recipe = recipe
        loss = masked_loss(BertForMaskedLM(config))
        n, max_norm = recipe.num_microbatches, recipe.max_norm
        self.gradients = {
            "full batch": full_batch(loss, max_norm=max_norm),
            "jaxaccum": microbatched(loss, num_microbatches=n, max_norm=max_norm),
            "loop": usual_loop(loss, num_microbatches=n, max_norm=max_norm),
        }
        self.gradients = {name: jax.jit(gradient) for name, gradient in self.gradients.items()}
        self.evaluate = jax.jit(
            lambda params, batch: _ratio(loss(params, batch, _no_keys(batch), dropout=0.0))
        )

    def run(
        self,
        way: str,
        params: Params,
        *,
        batches: Sequence[Batch],
        held_out: Batch,
        causes: frozenset[str] = frozenset(),
        dropout: float = 0.1,
        seed: int = 0,
    ) -> Run:
        """Train in float64, or in float32 where rounding is among the causes; losses are evaluated
        in float64."""
        dtype = jnp.float32 if "rounding" in causes else jnp.float64
        ticks = self.recipe.num_microbatches if "ticks" in causes else 1
        rates = self.recipe.learning_rates(len(batches), ticks=ticks)
        params = _cast(params, dtype)
        state = ADAM.init(params)
        switches = {name: np.bool_(name in causes) for name in CAUSES}
        key, first, losses = jax.random.key(seed), None, [self.loss(params, held_out)]
        for step, (batch, rate) in enumerate(zip(batches, rates, strict=True), start=1):
            step_key = jax.random.fold_in(key, step)
            grads = self.gradients[way](
                params, batch, step_key, np.float32(dropout), causes=switches
            )
            first = grads if first is None else first
            params, state = adamw(params, state, grads, rate, ticks * self.recipe.weight_decay)
            if step % self.recipe.evaluate_every == 0 or step == len(batches):
                losses.append(self.loss(params, held_out))
        return Run(_cast(first, jnp.float64), losses)

    def loss(self, params: Params, held_out: Batch) -> float:
        """The mean loss of held-out texts, without dropout."""
        return float(self.evaluate(_cast(params, jnp.float64), held_out))


def masked_loss(model: BertForMaskedLM) -> Callable[..., jaxaccum.Mean]:
    """The cross-entropy of the tokens to predict, over their number; `keys` holds one dropout key
    an example."""

    def loss(params: Params, batch: Batch, keys: jax.Array, dropout: Rate) -> jaxaccum.Mean:
        def scores(ids: jax.Array, attention: jax.Array, key: jax.Array) -> jax.Array:
            out: Any = model.apply(
                params, ids[None], attention[None], dropout=dropout, rngs={"dropout": key}
            )
            return out[0]

        log_probs = jax.nn.log_softmax(jax.vmap(scores)(batch["ids"], batch["attention"], keys))
        picked = jnp.take_along_axis(log_probs, batch["labels"][..., None], axis=-1)[..., 0]
        weight = jnp.asarray(batch["weight"], picked.dtype)
        return jaxaccum.Mean(-jnp.sum(weight * picked), jnp.sum(weight))

    return loss


def full_batch(loss: Callable[..., jaxaccum.Mean], *, max_norm: float) -> Gradient:
    """B = 8, N = 1: one pass."""
    grad = jax.grad(jaxaccum.full_batch(loss, in_axes=IN_AXES))
    return lambda *args, causes: clipped(grad(*args), max_norm)


def microbatched(
    loss: Callable[..., jaxaccum.Mean], *, num_microbatches: int, max_norm: float
) -> Gradient:
    """B = 2, N = 4, exact: the one line that changes."""
    grad = jaxaccum.grad(loss, num_microbatches=num_microbatches, in_axes=IN_AXES)
    return lambda *args, causes: clipped(grad(*args), max_norm)


def usual_loop(
    loss: Callable[..., jaxaccum.Mean], *, num_microbatches: int, max_norm: float
) -> Gradient:
    """B = 2, N = 4 as it is usually written; with every cause off, the same loop put right by
    hand."""
    n = num_microbatches

    def gradient(
        params: Params, batch: Batch, key: jax.Array, dropout: Rate, *, causes: Switches
    ) -> Params:
        dtype = jax.tree.leaves(params)[0].dtype
        share = jnp.sum(batch["weight"]).astype(dtype) / n
        limit = jnp.where(causes["clipping"], max_norm, jnp.inf).astype(dtype)

        def body(carry: Params, microbatch: tuple[Batch, jax.Array]) -> tuple[Params, None]:
            def mean(params: Params) -> jax.Array:
                term = loss(params, *microbatch, dropout)
                return term.total / jnp.where(causes["weighting"], term.weight, share)

            return jax.tree.map(jnp.add, carry, clipped(jax.grad(mean)(params), limit)), None

        microbatches = jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), batch)
        keys = _loop_keys(key, len(batch["ids"]), num_microbatches=n, per_microbatch=causes["keys"])
        total, _ = lax.scan(body, jax.tree.map(jnp.zeros_like, params), (microbatches, keys))
        return clipped(jax.tree.map(lambda leaf: leaf / n, total), max_norm)

    return gradient


def clipped(grads: Params, limit: Any) -> Params:
    """The gradients, scaled so that their joint norm is at most `limit`."""
    scale = 1 / jnp.maximum(optax.tree.norm(grads) / limit, 1)
    return jax.tree.map(lambda leaf: leaf * scale, grads)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def adamw(
    params: Params, state: Any, grads: Params, rate: float, decay: float
) -> tuple[Params, Any]:
    """AdamW's step p − rate · (u + decay · p), its rate and decay from the host."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on its own
        updates, state = ADAM.update(grads, state)

    def step(leaf: jax.Array, update: jax.Array) -> jax.Array:
        return leaf - jnp.asarray(rate, leaf.dtype) * (
            update + jnp.asarray(decay, leaf.dtype) * leaf
        )

    return jax.tree.map(step, params, updates), state


def _loop_keys(
    key: jax.Array, examples: int, *, num_microbatches: int, per_microbatch: jax.Array
) -> jax.Array:
    # The fold of the example's index is EXAMPLE_KEY's own rule, written out.
    of_example = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(examples)).reshape(
        num_microbatches, -1
    )
    of_microbatch = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_microbatches))
    drawn = jax.vmap(lambda key: jax.random.split(key, examples // num_microbatches))(of_microbatch)
    return jnp.where(per_microbatch, drawn, of_example)


def _no_keys(batch: Batch) -> jax.Array:
    return jax.random.split(jax.random.key(0), len(batch["ids"]))


def _ratio(term: jaxaccum.Mean) -> jax.Array:
    return term.total / term.weight


def _cast(tree: Params, dtype: Any) -> Params:
    # A copy in every case: the optimizer step donates its arguments.
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype), tree)
