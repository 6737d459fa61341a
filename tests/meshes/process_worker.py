"""One process of a distributed run: its own shard of the data, gradients of the whole batch, a
checkpoint every step.

    python -m tests.meshes.process_worker RANK COUNT PORT FOLDER STEPS [DIES_AT]

Each step's parameters go to FOLDER by Orbax, and the last parameters and first gradient of rank 0
to FOLDER/result.npz.
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum

ROWS, WIDTH = 16, 5


def shard(rank, count):
    """What this process loads: nobody holds the whole batch."""
    size = ROWS // count
    rows = np.arange(rank * size, (rank + 1) * size)
    return np.sin(rows[:, None] * 1.7 + np.arange(WIDTH)[None]), np.cos(rows * 0.3)


def loss(w, batch):
    x, weight = batch
    weight = jnp.where(weight > 0, weight, 0.0)
    return jaxaccum.Mean(jnp.sum((jnp.tanh(x @ w["a"]) @ w["b"]) ** 2 * weight), jnp.sum(weight))


def initial():
    return {"a": np.cos(np.arange(WIDTH * 3.0)).reshape(WIDTH, 3), "b": np.sin(np.arange(3.0) + 1)}


def main(rank, count, port, folder, steps, dies_at=None):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, rank, heartbeat_timeout_seconds=10)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Explicit,))
    batch = tuple(
        jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), x)
        for x in shard(rank, count)
    )
    everywhere = NamedSharding(mesh, P())
    w = jax.tree.map(lambda x: jax.make_array_from_process_local_data(everywhere, x), initial())
    step = jax.jit(jaxaccum.value_and_grad(loss, num_microbatches=2))
    with ocp.CheckpointManager(pathlib.Path(folder).resolve() / "checkpoints") as manager:
        first = 0
        if (latest := manager.latest_step()) is not None:
            w, first = manager.restore(latest, args=ocp.args.StandardRestore(w)), latest
        for number in range(first, steps):
            if number == dies_at and rank == count - 1:
                os._exit(17)  # a machine that is gone says nothing
            _, grads = step(w, batch)
            w = jax.tree.map(lambda p, g: p - 0.1 * g, w, grads)
            manager.save(number + 1, args=ocp.args.StandardSave(w))
            manager.wait_until_finished()
        _, grads = step(w, batch)
        if rank == 0:
            own = {
                f"{kind}_{k}": np.asarray(x)
                for kind, tree in (("w", w), ("g", grads))
                for k, x in tree.items()
            }
            np.savez(pathlib.Path(folder) / "result.npz", first=first, **own)
    jax.distributed.shutdown()


if __name__ == "__main__":
    rank, count, port, folder, steps, *rest = sys.argv[1:]
    main(int(rank), int(count), int(port), folder, int(steps), *map(int, rest))
