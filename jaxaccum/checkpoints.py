"""Checkpoints of a training state that survive a kill: whole or refused, and bitwise.

The arrays are Orbax's. Beside them stands a small file, written last, with the name, shape and
dtype of each leaf and the checksum of each file: a checkpoint without it was never finished, and
one that disagrees with it is refused.
"""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._base.trees import leaves_with_names
from jaxaccum._base.types import PyTree

try:
    import orbax.checkpoint as ocp
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "jaxaccum.checkpoints writes its arrays with Orbax, which is not installed: "
        "pip install 'jaxaccum[checkpoints]', or pip install orbax-checkpoint."
    ) from error

__all__ = ["restore", "save", "steps"]


def save(directory: str | os.PathLike[str], step: int, state: PyTree) -> None:
    """Write the whole training state: parameters, optimizer with its open window, keys, and where
    the data is.

    Args:
        directory: of all checkpoints of the run.
        step: the number that names this one; one that is there already is replaced.
        state: a pytree of arrays, PRNG keys and numbers.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> from jaxaccum import checkpoints
        >>> state = {"w": jnp.arange(3.0), "key": jax.random.key(0), "next": 7}
        >>> directory = tempfile.mkdtemp()
        >>> checkpoints.save(directory, 1, state)
        >>> checkpoints.steps(directory), checkpoints.restore(directory, state)["next"].item()
        ([1], 7)
    """
    folder, note = _paths(directory, step)
    note.unlink(missing_ok=True)
    leaves = _leaves(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, {str(i): x for i, (_, x) in enumerate(leaves)}, force=True)
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps({"leaves": _entries(state), "files": _checksums(folder)}))
    os.replace(partial, note)


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """The checkpoints that were finished, oldest first."""
    return sorted(
        int(path.stem) for path in pathlib.Path(directory).glob("*.json") if path.stem.isdigit()
    )


def restore(directory: str | os.PathLike[str], like: PyTree, *, step: int | None = None) -> PyTree:
    """The saved state, bitwise.

    Args:
        directory: of all checkpoints of the run.
        like: a state of the same structure, shapes and dtypes, such as the one a new run starts
            with. A PRNG key must be of the kind that was saved: neither another kind nor an array.
        step: which; None is the newest that was finished.

    Raises:
        FileNotFoundError: where there is no finished checkpoint.
        ValueError: where it does not fit `like`, or was truncated or changed; it names the leaf or
            file, and the older checkpoints.
    """
    found = steps(directory)
    if step is None and found:
        step = found[-1]
    if step is None or step not in found:
        raise FileNotFoundError(
            f"no finished checkpoint {'' if step is None else step} in {directory}; found {found}."
        )
    folder, note = _paths(directory, step)
    older = (
        f"Older checkpoints: {[other for other in found if other < step]}, as restore(…, step=…)."
    )
    try:
        saved = json.loads(note.read_text())
    except ValueError as error:
        raise ValueError(
            f"checkpoint {step} is damaged: {note.name} cannot be read ({error}). {older}"
        ) from None
    expected = _leaves(like)
    _check_fits(step, saved["leaves"], _entries(like), older)
    found_files = _checksums(folder)
    for name in sorted({*saved["files"], *found_files}):
        if saved["files"].get(name) != found_files.get(name):
            raise ValueError(
                f"checkpoint {step} is damaged: its file {name} is not what was written. {older}"
            )
    template = {str(i): jax.ShapeDtypeStruct(x.shape, x.dtype) for i, (_, x) in enumerate(expected)}
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder, template)
    values = [_as(arrays[str(i)], x) for i, x in enumerate(jax.tree.leaves(like))]
    return jax.tree.unflatten(jax.tree.structure(like), values)


def _check_fits(
    step: int, saved: list[dict[str, Any]], expected: list[dict[str, Any]], older: str
) -> None:
    if [x["name"] for x in saved] != [x["name"] for x in expected]:
        names = {x["name"] for x in saved}, {x["name"] for x in expected}
        raise ValueError(
            f"checkpoint {step} is of another state: it has {sorted(names[0] - names[1])} beside, "
            f"and lacks {sorted(names[1] - names[0])}. {older}"
        )
    for own, other in zip(saved, expected, strict=True):
        if (own["shape"], own["dtype"]) != (other["shape"], other["dtype"]):
            hint = _hint(own["dtype"], other["dtype"])
            raise ValueError(
                f"checkpoint {step} is of another state: {own['name']} is "
                f"{own['dtype']}{own['shape']} in it and {other['dtype']}{other['shape']} here. "
                f"{hint}{older}"
            )


def _hint(saved: str, here: str) -> str:
    """What to do where a PRNG key meets another kind of key, or an array."""
    if saved == here or not (saved.startswith("key<") or here.startswith("key<")):
        return ""
    return (
        "A PRNG key comes back as the kind that was saved: pass a state with such a key, made by "
        "jax.random.key(seed, impl=…). key<fry> is impl='threefry2x32', key<rbg> is 'rbg', "
        "key<urbg> is 'unsafe_rbg'. "
    )


def _paths(directory: str | os.PathLike[str], step: int) -> tuple[pathlib.Path, pathlib.Path]:
    folder = pathlib.Path(directory).absolute() / str(step)
    return folder, folder.with_suffix(".json")


def _leaves(state: PyTree) -> list[tuple[str, Any]]:
    """The leaves as numpy arrays, keys as their data."""
    return [(name, np.asarray(_data(x))) for name, x in leaves_with_names(state, "state")]


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _data(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _as(array: Any, like: Any) -> Any:
    return (
        jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
        if _is_key(like)
        else jnp.asarray(array)
    )


def _entries(state: PyTree) -> list[dict[str, Any]]:
    """What the file says of each leaf; the dtype of a PRNG key names its kind, as ``key<fry>``."""
    return [_entry(name, x) for name, x in leaves_with_names(state, "state")]


def _entry(name: str, leaf: Any) -> dict[str, Any]:
    x = leaf if _is_key(leaf) else np.asarray(leaf)
    return {"name": name, "shape": list(x.shape), "dtype": str(x.dtype)}


def _checksums(folder: pathlib.Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}
