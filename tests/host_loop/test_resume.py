"""A run killed with SIGKILL at random points and resumed ends bitwise where the uninterrupted one
does."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum as ja
from jaxaccum import checkpoints
from tests.support.helpers import refused, same

ROOT = pathlib.Path(__file__).parents[2]
DEEP = hypothesis.settings().max_examples >= 1000
MODES = ("scan", "host")
KILLS = 20 if DEEP else 1  # in each mode


def launch(directory, *modes):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    command = [sys.executable, "-m", "tests.host_loop.resumable", str(directory), *modes]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(directory):
    """The end state of a run in each mode: one process, whose start takes longer than the runs."""
    _, err = launch(directory, *MODES).communicate(timeout=300)
    assert "Error" not in err
    found = []
    for mode in MODES:
        with np.load(directory / f"{mode}.npz") as arrays:
            found.append([arrays[name] for name in arrays.files])
    return found


def kill(directory, mode, draw):
    """Start the run and kill it within a few saves: between them, or in the middle of one."""
    process = launch(directory, mode)
    for _ in range(draw.randint(1, 3)):
        process.stdout.readline()
    time.sleep(draw.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_ends_bitwise_where_the_whole_one_does(tmp_path):
    truth = finish(tmp_path / "whole")
    draw = {mode: random.Random(f"{mode} {KILLS}") for mode in MODES}
    for first in range(0, KILLS, 3):  # several kills of one run
        directory = tmp_path / f"run {first}"
        for mode in MODES:
            for _ in range(min(3, KILLS - first)):
                kill(directory, mode, draw[mode])
        for whole, end in zip(truth, finish(directory), strict=True):
            assert all(a.tobytes() == b.tobytes() for a, b in zip(whole, end, strict=True))


def partial_window():
    """A state in the middle of a window, with float64, bfloat16, keys and counters."""
    params = {"w": jnp.arange(6.0).reshape(2, 3), "h": jnp.ones(40, jnp.bfloat16)}
    multi = ja.MultiSteps(optax.adamw(0.1), 3)
    with jax.numpy_dtype_promotion("standard"):
        _, opt = multi.update(jax.tree.map(jnp.sin, params), multi.init(params), params, weight=2.5)
    return {
        "params": params,
        "opt": opt,
        "key": jax.random.key(3),
        "legacy": jax.random.PRNGKey(4),
        "next": 11,
    }


def test_a_state_in_the_middle_of_a_window_comes_back_bitwise(tmp_path):
    state = partial_window()
    checkpoints.save(tmp_path, 5, state)
    back = checkpoints.restore(tmp_path, jax.tree.map(lambda x: x, state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert same(jax.random.key_data(back.pop("key")), jax.random.key_data(state.pop("key")))
    assert int(back.pop("next")) == state.pop("next")
    assert same(back, state)


@pytest.fixture
def saved(tmp_path):
    state = partial_window()
    for step, scale in ((1, 1.0), (2, 2.0)):
        state["params"]["w"] = scale * state["params"]["w"]
        checkpoints.save(tmp_path, step, state)
    return tmp_path, state


def test_a_truncated_checkpoint_is_refused_and_the_older_one_loads(saved):
    directory, state = saved
    older = checkpoints.restore(directory, state, step=1)
    files = [
        path for path in (directory / "2").rglob("*") if path.is_file() and path.stat().st_size
    ]
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        for damaged in (whole[: len(whole) // 2], flipped):
            path.write_bytes(damaged)
            refused(
                lambda: checkpoints.restore(directory, state),
                "checkpoint 2 is damaged",
                path.name,
                "[1]",
            )
        path.write_bytes(whole)
    assert same(checkpoints.restore(directory, state)["params"], state["params"])
    assert same(checkpoints.restore(directory, state, step=1)["params"], older["params"])
    note = directory / "2.json"
    note.write_text(note.read_text()[:40])
    refused(
        lambda: checkpoints.restore(directory, state), "checkpoint 2 is damaged", "2.json", "[1]"
    )
    shutil.rmtree(directory / "2")
    note.unlink()
    assert checkpoints.steps(directory) == [1]
    assert same(checkpoints.restore(directory, state)["params"], older["params"])


def test_a_checkpoint_of_another_state_is_refused(saved):
    directory, state = saved
    other = lambda **params: state | {"params": state["params"] | params}
    refused(
        lambda: checkpoints.restore(directory, other(w=jnp.ones((3, 3)))),
        "['w']",
        "[2, 3]",
        "[3, 3]",
        "[1]",
    )
    refused(
        lambda: checkpoints.restore(directory, other(w=state["params"]["w"].astype(jnp.float32))),
        "['w']",
        "float32",
    )
    refused(lambda: checkpoints.restore(directory, other(extra=jnp.ones(1))), "lacks", "['extra']")
    with pytest.raises(FileNotFoundError, match="found \\[1, 2\\]"):
        checkpoints.restore(directory, state, step=9)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        checkpoints.restore(directory / "nowhere", state)


KEYS = {
    "key<fry>": jax.random.key(3),
    "key<rbg>": jax.random.key(3, impl="rbg"),
    "key<urbg>": jax.random.key(3, impl="unsafe_rbg"),
    "uint32[2]": jax.random.PRNGKey(3),
    "uint32[4]": jax.random.PRNGKey(3, impl="rbg"),
}
"""Two kinds have two words, and three have four: the numbers do not tell them apart."""


@pytest.mark.parametrize("here", KEYS)
@pytest.mark.parametrize("there", KEYS)
def test_a_key_comes_back_as_the_kind_that_was_saved(there, here, tmp_path):
    checkpoints.save(tmp_path, 1, {"key": KEYS[there]})
    restore = lambda: checkpoints.restore(tmp_path, {"key": KEYS[here]})["key"]
    if there != here:
        refused(restore, "state['key']", there, here)
        return
    assert restore().dtype == KEYS[there].dtype
    assert same(numbers(restore()), numbers(KEYS[there]))


def numbers(key):
    return jax.random.key_data(key) if "key<" in str(key.dtype) else key


def test_the_key_of_an_optimizer_comes_back(tmp_path):
    """A key deep in the state of optax, of a kind that is not the default."""
    noisy = lambda impl: optax.noisy_sgd(0.1, key=jax.random.key(1, impl=impl))
    multi, params = ja.MultiSteps(noisy("rbg"), 2), jnp.ones(3)
    with jax.numpy_dtype_promotion("standard"):
        _, state = multi.update(params, multi.init(params), params)
        checkpoints.save(tmp_path, 1, state)
        back = checkpoints.restore(tmp_path, multi.init(params))
        assert same(multi.update(params, back, params)[0], multi.update(params, state, params)[0])
    other = ja.MultiSteps(noisy("unsafe_rbg"), 2).init(params)
    refused(lambda: checkpoints.restore(tmp_path, other), "key<rbg>", "key<urbg>", "impl=")


def test_numbers_of_64_bits_come_back_whole(tmp_path):
    state = {"tokens": 2**40 + 3, "rows": np.array([2**33, 2**33 + 1]), "rate": np.float64(0.1)}
    with jax.enable_x64(False):
        checkpoints.save(tmp_path, 0, state)
        found = checkpoints.restore(tmp_path, state)
        assert (
            jnp.asarray(found["rows"]).tolist() != found["rows"].tolist()
        )  # as JAX would cut them
    assert found["tokens"].item() == 2**40 + 3
    assert found["rows"].tolist() == [2**33, 2**33 + 1]
    assert found["rate"].item() == 0.1


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"w": jnp.zeros((0, 3))},
        {"w": jnp.ones(2), "of integers": np.zeros(2, jax.dtypes.float0)},
    ],
    ids=["nothing", "no entries", "float0"],
)
def test_what_is_empty_comes_back(state, tmp_path):
    checkpoints.save(tmp_path, 3, state)
    found = checkpoints.restore(tmp_path, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def test_a_state_is_restored_from_its_shapes(tmp_path):
    make = lambda: {"w": jnp.arange(3.0), "key": jax.random.key(1)}
    checkpoints.save(tmp_path, 1, make())
    found = checkpoints.restore(tmp_path, jax.eval_shape(make))
    assert found["w"].tolist() == [0.0, 1.0, 2.0]
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(make()["key"])).all()


def test_a_negative_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        checkpoints.save(tmp_path, -1, {"w": jnp.ones(2)})
