"""PPO: advantages are normalized over the batch, not over a microbatch.

Command   python -m experiments.recipes.ppo
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum
from experiments.recipes import _check

OPT = optax.sgd(0.1)


def rollouts(poles, steps):
    """Random pushes against an inverted pendulum, one row per step."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(poles):
        angle, speed, pole = rng.normal(0, 0.5), 0.0, []
        for _ in range(steps):
            action = rng.normal()
            obs = np.array([np.sin(angle), np.cos(angle), speed])
            pole.append({"obs": obs, "action": action, "return": np.cos(angle)})
            speed += 0.05 * (15 * np.sin(angle) + 3 * action)
            angle += 0.05 * speed
        for now, later in zip(pole[-2::-1], pole[:0:-1], strict=True):
            now["return"] += 0.95 * later["return"]
        rows += pole
    return jax.tree.map(lambda *x: jnp.stack(x), *rows)


def outputs(params, obs):
    """The mean action, and the value."""
    hidden = jnp.tanh(obs @ params["hidden"])
    return hidden @ params["action"], hidden @ params["value"]


def terms(params, batch, advantage):
    """The clipped objective of each step, and the value's error; actions were drawn around 0."""
    mean, value = outputs(params, batch["obs"])
    ratio = jnp.exp((batch["action"] ** 2 - (batch["action"] - mean) ** 2) / 2)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    objective = jnp.minimum(ratio * advantage, clipped * advantage)
    return 0.5 * (value - batch["return"]) ** 2 - objective


def plain(params, batch):
    """The training step as anybody would write it."""

    def loss_fn(params, batch):
        advantage = batch["return"] - jax.lax.stop_gradient(outputs(params, batch["obs"])[1])
        advantage -= jnp.mean(advantage)
        advantage /= jnp.sqrt(jnp.mean(advantage**2) + 1e-8)
        return jnp.mean(terms(params, batch, advantage))

    grads = jax.grad(loss_fn)(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def accumulated(params, batch):
    """The same step in 4 microbatches."""

    def loss_fn(params, batch):
        advantage = batch["return"] - jax.lax.stop_gradient(outputs(params, batch["obs"])[1])
        advantage -= jax.lax.pmean(jnp.mean(advantage), "microbatch")
        advantage /= jnp.sqrt(jax.lax.pmean(jnp.mean(advantage**2), "microbatch") + 1e-8)
        return jnp.mean(terms(params, batch, advantage))

    grads = jaxaccum.grad(loss_fn, num_microbatches=4)(params, batch)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def usual(params, batch):
    """The usual loop: each microbatch normalizes its own advantages."""
    return _check.mean([plain(params, part) for part in _check.parts(batch, 4)])


def check() -> _check.Errors:
    """One step on 4 poles, 32 steps of each."""
    params = _check.normal(hidden=(3, 16), action=(16,), value=(16,))
    full, ours, other = (
        jax.jit(step)(params, rollouts(4, 32)) for step in (plain, accumulated, usual)
    )
    return _check.errors(start=params, full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
