"""Flax nnx: only the LoRA parameters are trained, on tokens of unequal number.

Command   python -m experiments.recipes.nnx_lora
"""

import jax.numpy as jnp
import optax
from flax import nnx

import jaxaccum
import jaxaccum.nnx
from experiments.recipes import _check, _texts

LORA = nnx.DiffState(0, nnx.LoRAParam)


class Net(nnx.Module):
    """The next character from the one before; the hidden layer is adapted."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(128, 16, rngs=rngs)
        self.hidden = nnx.LoRALinear(16, 32, lora_rank=4, rngs=rngs)
        self.hidden.lora.lora_b[...] = nnx.initializers.normal(0.1)(rngs(), (4, 32), jnp.float32)
        self.out = nnx.Linear(32, 128, rngs=rngs)

    def __call__(self, ids):
        """The logits."""
        return self.out(nnx.tanh(self.hidden(self.embed(ids))))


def made():
    """The model, in float64, and the optimizer of its LoRA parameters."""
    model = Net(nnx.Rngs(0))
    nnx.update(model, _check.wide(nnx.state(model)))
    return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)


def cross_entropy(model, batch):
    """One number for each character, and the mask."""
    logits, labels = model(batch["ids"][:, :-1]), batch["ids"][:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), batch["mask"][:, 1:]


def plain(model, optimizer, batch):
    """The training step as anybody would write it."""

    def loss_fn(model, batch):
        ce, mask = cross_entropy(model, batch)
        return jnp.sum(ce * mask) / jnp.sum(mask)

    grad_fn = nnx.value_and_grad(loss_fn, argnums=LORA)
    loss, grads = grad_fn(model, batch)
    optimizer.update(model, grads)
    return loss


def accumulated(model, optimizer, batch):
    """The same step in 4 microbatches."""

    def loss_fn(model, batch):
        ce, mask = cross_entropy(model, batch)
        return jaxaccum.Mean(jnp.sum(ce * mask), jnp.sum(mask))

    grad_fn = jaxaccum.nnx.value_and_grad(loss_fn, argnums=LORA, num_microbatches=4)
    loss, grads = grad_fn(model, batch)
    optimizer.update(model, grads)
    return loss


def usual(model, optimizer, batch):
    """The usual loop: each microbatch divides by its own tokens."""

    def loss_fn(model, batch):
        ce, mask = cross_entropy(model, batch)
        return jnp.sum(ce * mask) / jnp.sum(mask)

    grad_fn = nnx.grad(loss_fn, argnums=LORA)
    grads = [grad_fn(model, part) for part in _check.parts(batch, 4)]
    optimizer.update(model, _check.mean(grads))


def check() -> _check.Errors:
    """One step on 16 texts: all parameters, also those that are not trained."""
    batch, ends = _texts.tokens(16, 48), []
    for step in (plain, accumulated, usual):
        model, optimizer = made()
        nnx.jit(step)(model, optimizer, batch)
        ends.append(nnx.as_pure(nnx.state(model, nnx.Param)))
    start = nnx.as_pure(nnx.state(made()[0], nnx.Param))
    return _check.errors(start=start, full=ends[0], ours=ends[1], usual=ends[2])


if __name__ == "__main__":
    _check.main(check)
