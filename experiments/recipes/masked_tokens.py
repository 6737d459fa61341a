"""Plain JAX: the next character of texts of unequal length, a mean over the characters that are not padding.

    python -m experiments.recipes.masked_tokens
"""

import jax
import jax.numpy as jnp
import optax

import jaxaccum
from experiments.recipes import _check, _data

OPT = optax.sgd(0.1, momentum=0.9)


def cross_entropy(params, batch):
    """One number for each character: how badly the two before it tell it. And its mask."""
    before, after = params["embed"][batch["ids"][:, :-2]], params["embed"][batch["ids"][:, 1:-1]]
    logits = jnp.tanh(before @ params["first"] + after @ params["second"]) @ params["out"]
    labels, mask = batch["ids"][:, 2:], batch["mask"][:, 2:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels), mask


def plain(params, opt_state, batch):
    """The training step as anybody would write it."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jnp.sum(ce * mask) / jnp.sum(mask)

    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = OPT.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def accumulated(params, opt_state, batch):
    """The same step in microbatches of 6."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jaxaccum.Mean(jnp.sum(ce * mask), jnp.sum(mask))

    loss, grads = jaxaccum.value_and_grad(loss_fn, microbatch_size=6)(params, batch)
    updates, opt_state = OPT.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def usual(params, opt_state, batch):
    """The loop that is usually written: each microbatch divides by its own tokens, and the gradients are averaged."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jnp.sum(ce * mask) / jnp.sum(mask)

    grads = _check.mean([jax.grad(loss_fn)(params, part) for part in _check.parts(batch, 4)])
    updates, opt_state = OPT.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def check() -> _check.Errors:
    """One step from the same parameters, 24 texts."""
    shapes = {"embed": (128, 16), "first": (16, 32), "second": (16, 32), "out": (32, 128)}
    keys = dict(zip(shapes, jax.random.split(jax.random.key(0), len(shapes)), strict=True))
    params = {name: jax.random.normal(keys[name], shape) / 4 for name, shape in shapes.items()}
    args = params, OPT.init(params), _data.tokens(24, 64)
    steps = [jax.jit(step)(*args)[0] for step in (plain, accumulated, usual)]
    return _check.errors(start=params, full=steps[0], ours=steps[1], usual=steps[2])


if __name__ == "__main__":
    _check.main(check)
