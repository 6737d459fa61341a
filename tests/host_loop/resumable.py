"""Training runs that may be killed at any point: ``python -m tests.host_loop.resumable DIRECTORY
MODE...``, where a mode is scan or host.

Each saves after every batch (scan) or microbatch (host, in the middle of windows too), resumes from
the newest checkpoint, and writes its end state as DIRECTORY/MODE.npz. Data order and dropout come
from a key that is part of the state.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum
from jaxaccum import checkpoints

BATCHES, EXAMPLES, K = 10, 24, 3
X = np.random.default_rng(0).normal(size=(EXAMPLES, 4)).astype(np.float32)
OPT = optax.adamw(optax.linear_schedule(0.1, 0.01, BATCHES))


def loss(params, x, keys):
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (4,)))(keys)
    hidden = jnp.tanh(jnp.where(keep, x, 0.0) @ params["w"] + params["b"][None])
    weight = jnp.abs(x[:, 0])
    return jaxaccum.Mean(jnp.sum(jnp.sum(hidden**2, axis=1) * weight), jnp.sum(weight))


def start(mode):
    params = {"w": jnp.ones((4, 3)) / 3, "b": jnp.zeros(3)}
    opt = jaxaccum.MultiSteps(OPT, K) if mode == "host" else OPT
    return {
        "params": params,
        "opt": opt.init(params),
        "key": jax.random.key(7),
        "next": jnp.int32(0),
    }


def rows_of(state, size):
    """The next `size` examples in the order of their epoch, which is drawn from the state's key."""
    first = int(state["next"]) * size
    epoch = jax.random.permutation(jax.random.fold_in(state["key"], first // EXAMPLES), EXAMPLES)
    return X[np.asarray(epoch)[first % EXAMPLES : first % EXAMPLES + size]]


def steps(mode):
    """One optimizer step (scan), or one microbatch (host), as a jitted function of state and
    rows."""
    in_axes = (None, 0, jaxaccum.EXAMPLE_KEY)
    multi = jaxaccum.MultiSteps(OPT, K)
    gradient = jaxaccum.grad(loss, in_axes=in_axes, microbatch_size=4 if mode == "scan" else 12)

    def step(state, x):
        params = state["params"]
        grads = gradient(params, x, jax.random.fold_in(state["key"], 1000 + state["next"]))
        if mode == "scan":
            updates, opt = OPT.update(grads, state["opt"], params)
        else:
            updates, opt = multi.update(
                grads, state["opt"], params, weight=jnp.sum(jnp.abs(x[:, 0]))
            )
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt": opt, "key": state["key"], "next": state["next"] + 1}

    return jax.jit(step), (12 if mode == "scan" else 4), BATCHES * (1 if mode == "scan" else K) - 1


def main(root, *modes):
    for mode in modes:
        run(mode, pathlib.Path(root, mode), pathlib.Path(root, f"{mode}.npz"))


def run(mode, directory, output):
    state, (step, size, total) = start(mode), steps(mode)
    if checkpoints.steps(directory):
        state = checkpoints.restore(directory, state)
    print("from", int(state["next"]), flush=True)
    while int(state["next"]) < total:
        state = step(state, rows_of(state, size))
        checkpoints.save(directory, int(state["next"]), state)
        print("saved", int(state["next"]), flush=True)
    data = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(state)
    ]
    np.savez(output, *map(np.asarray, data))


if __name__ == "__main__":
    main(*sys.argv[1:])
