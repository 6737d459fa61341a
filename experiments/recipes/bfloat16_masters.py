"""bfloat16 with master weights: gradients are bfloat16, and their sum is float32.

Command   python -m experiments.recipes.bfloat16_masters

The oracle takes the same 128 gradients, one by one, and adds them in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum
from experiments.recipes import _check, _texts

RATE = 0.125


def half(params):
    """The parameters that the model computes with."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def loss_fn(params, batch):
    """The cross entropy of the texts, a mean."""
    logits = jnp.tanh(batch["x"].astype(jnp.bfloat16) @ params["hidden"]) @ params["out"]
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def plain(masters, batch):
    """The training step as anybody would write it."""
    grads = jax.grad(loss_fn)(half(masters), batch)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return jax.tree.map(lambda w, g: w - RATE * g, masters, grads)


def accumulated(masters, batch):
    """The same step, one example at a time; its gradient is not rounded at the end."""
    exact = jaxaccum.accumulators.in_place(jnp.float32)
    grads = jaxaccum.grad(loss_fn, microbatch_size=1, accumulator=exact)(half(masters), batch)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    return jax.tree.map(lambda w, g: w - RATE * g, masters, grads)


def usual(masters, batch):
    """The usual loop: gradients are added in their own dtype, which stalls."""
    rows = jax.tree.map(lambda x: x[:, None], batch)

    def add(sums, row):
        return jax.tree.map(jnp.add, sums, jax.grad(loss_fn)(half(masters), row)), None

    sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, half(masters)), rows)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / len(batch["x"]), sums)
    return jax.tree.map(lambda w, g: w - RATE * g, masters, grads)


def check() -> _check.Errors:
    """One step on 128 texts."""
    params, batch = _check.normal(hidden=(26, 16), out=(16, 10)), _texts.letters(128)
    masters = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    rows = jax.tree.map(lambda x: x[:, None], batch)
    each = jax.lax.map(lambda row: jax.grad(loss_fn)(half(masters), row), rows)
    wide = jax.tree.map(lambda g: np.asarray(g, np.float64), each)
    full = jax.tree.map(lambda w, g: np.asarray(w, np.float64) - RATE * g.mean(0), masters, wide)
    ours, other = (jax.jit(step)(masters, batch) for step in (accumulated, usual))
    start = jax.tree.map(lambda x: np.asarray(x, np.float64), masters)
    return _check.errors(start=start, full=full, ours=ours, usual=other, bound=bound(wide, start))


def bound(each, masters):
    """128 additions in float32, and the rounding of the new masters, over the largest change."""
    eps = float(jnp.finfo(jnp.float32).eps)
    largest = lambda tree: max(float(np.max(x)) for x in jax.tree.leaves(tree))
    sums = largest(jax.tree.map(lambda g: np.abs(g).mean(0), each))
    change = largest(jax.tree.map(lambda g: np.abs(g.mean(0)), each))
    return eps * (128 * sums + largest(jax.tree.map(np.abs, masters)) / RATE) / change


if __name__ == "__main__":
    _check.main(check)
