"""Plain JAX: a mean over the characters of texts of unequal length.

Command   python -m experiments.recipes.masked_tokens
"""

import jax
import jax.numpy as jnp
import optax

import jaxaccum
from experiments.recipes import _check, _texts
from experiments.recipes._language import cross_entropy, parameters

OPT = optax.sgd(0.1, momentum=0.9)


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
    """The usual loop: each microbatch divides by its own tokens, and gradients are averaged."""

    def loss_fn(params, batch):
        ce, mask = cross_entropy(params, batch)
        return jnp.sum(ce * mask) / jnp.sum(mask)

    grads = _check.mean([jax.grad(loss_fn)(params, part) for part in _check.parts(batch, 4)])
    updates, opt_state = OPT.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def check() -> _check.Errors:
    """One step from the same parameters, 24 texts."""
    params = parameters()
    args = params, OPT.init(params), _texts.tokens(24, 64)
    steps = [jax.jit(step)(*args)[0] for step in (plain, accumulated, usual)]
    return _check.errors(start=params, full=steps[0], ours=steps[1], usual=steps[2])


if __name__ == "__main__":
    _check.main(check)
