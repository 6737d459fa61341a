"""GRPO: a microbatch holds whole groups of answers, and all tokens weigh the same.

Command   python -m experiments.recipes.grpo

A row of the batch is a group: the answers to one prompt, whose rewards are compared.
"""

import jax
import jax.numpy as jnp
import optax

import jaxaccum
from experiments.recipes import _check, _texts
from experiments.recipes._language import cross_entropy, parameters

OPT = optax.sgd(0.1)


def objective(params, groups):
    """The clipped objective of each token, and the mask; an answer is rewarded for its e's."""
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), groups)
    ce, mask = cross_entropy(params, flat)
    ratio = jnp.exp(-ce - flat["logp"])
    reward = jnp.mean(groups["ids"] == ord("e"), axis=-1)
    advantage = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True) + 1e-4)
    advantage = advantage.reshape(-1, 1)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage), mask


def plain(params, groups):
    """The training step as anybody would write it."""

    def loss_fn(params, groups):
        tokens, mask = objective(params, groups)
        return jnp.sum(tokens * mask) / jnp.sum(mask)

    grads = jax.grad(loss_fn)(params, groups)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def accumulated(params, groups):
    """The same step, 2 groups at a time."""

    def loss_fn(params, groups):
        tokens, mask = objective(params, groups)
        return jaxaccum.Mean(jnp.sum(tokens * mask), jnp.sum(mask))

    grads = jaxaccum.grad(loss_fn, microbatch_size=2)(params, groups)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def usual(params, groups):
    """The usual loop: each microbatch divides by its own tokens."""
    return _check.mean([plain(params, part) for part in _check.parts(groups, 3)])


def check() -> _check.Errors:
    """One step on 6 groups of 4 answers, which an older policy gave."""
    params, flat = parameters(), _texts.tokens(24, 48)
    older = jax.tree.map(lambda x: 0.9 * x, params)
    flat["logp"] = -cross_entropy(older, flat)[0]
    groups = jax.tree.map(lambda x: x.reshape(6, 4, -1), flat)
    full, ours, other = (jax.jit(step)(params, groups) for step in (plain, accumulated, usual))
    return _check.errors(start=params, full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
