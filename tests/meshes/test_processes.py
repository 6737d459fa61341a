"""Several processes: each loads its own shard, the gradients are one process's, a death is clear,
and a run resumes."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.meshes import process_worker as worker
from tests.support.helpers import EXACT, normwise

ROOT = pathlib.Path(__file__).parents[2]
COUNT, STEPS = 2, 3
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
}


def start(folder, steps, *rest):
    """All processes of one run; each has two devices."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", worker.__name__]
    return [
        subprocess.Popen(
            list(map(str, [*command, rank, COUNT, port, folder, steps, *rest])),
            cwd=ROOT, env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(COUNT)
    ]  # fmt: skip


def finished(processes):
    """Each process's exit code and output; none waits for ever."""
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def one_process():
    """The same training on the whole batch in this process, by JAX alone."""
    parts = [worker.shard(rank, COUNT) for rank in range(COUNT)]
    x, weight = (jnp.asarray(np.concatenate(each)) for each in zip(*parts, strict=True))
    weight = jnp.where(weight > 0, weight, 0.0)
    plain = lambda w: jnp.sum((jnp.tanh(x @ w["a"]) @ w["b"]) ** 2 * weight) / jnp.sum(weight)
    w = jax.tree.map(jnp.asarray, worker.initial())
    for _ in range(STEPS):
        w = jax.tree.map(lambda p, g: p - 0.1 * g, w, jax.grad(plain)(w))
    return w, jax.grad(plain)(w)


def result(folder):
    with np.load(folder / "result.npz") as saved:
        trees = [{name: saved[f"{kind}_{name}"] for name in ("a", "b")} for kind in "wg"]
        return int(saved["first"]), tuple(trees)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose second process died before the third step."""
    folder = tmp_path_factory.mktemp("run")
    return folder, *finished(start(folder, STEPS, 2))


def test_a_death_is_clear(run):
    folder, codes, outputs = run
    assert codes[1] == 17
    assert codes[0] not in (0, 17)
    says = ("task", "peer", "connection", "heartbeat", "coordination", "gloo")
    assert any(word in outputs[0].lower() for word in says), outputs[0]
    assert not (folder / "result.npz").exists()


def test_the_run_resumes_and_two_processes_compute_one_processs_gradients(run):
    folder, *_ = run
    codes, outputs = finished(start(folder, STEPS))
    assert codes == [0, 0], "\n".join(outputs)
    first, trees = result(folder)
    assert first == 2  # two steps were saved before the death
    assert normwise(trees, one_process()) < EXACT


def test_the_shards_differ():
    """The negative control: a process that trained on its own shard alone would be told apart."""
    x, weight = map(jnp.asarray, worker.shard(0, COUNT))
    w = jax.tree.map(jnp.asarray, worker.initial())
    alone = jax.grad(
        lambda w: worker.loss(w, (x, weight)).total / worker.loss(w, (x, weight)).weight
    )(w)
    assert normwise(alone, one_process()[1]) > 1e-2
