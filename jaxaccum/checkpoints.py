"""Checkpoints of a training state that survive a kill: whole or refused, and bitwise.

Orbax writes the arrays. A small file is written last. It holds the name, shape and dtype of each
leaf and the checksum of each file. A checkpoint without it was never finished, and one that
disagrees with it is refused.
"""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._base.trees import as_key, dtype_of, key_data, key_impl, leaves_with_names
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
    """Write the whole training state.

    It holds the parameters, the state of the optimizer with its open window, the keys, and the
    place in the data.

    Args:
        directory: of all checkpoints of the run.
        step: the number that names this one, from 0; one that is there already is replaced.
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
    if step < 0:
        raise ValueError(f"step must not be negative; got {step}.")
    folder, note = _paths(directory, step)
    note.unlink(missing_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, _written(map(_array, jax.tree.leaves(state))), force=True)
    leaves = [leaf._asdict() for leaf in _leaves(state)]
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps({"leaves": leaves, "files": _checksums(folder)}))
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
            with, or its shapes from ``jax.eval_shape``. Numbers and numpy arrays come back as numpy
            arrays, which keep 64 bits. A PRNG key must be of the kind that was saved: neither
            another kind nor an array.
        step: which checkpoint; None is the newest that was finished.

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
    older = f"Older checkpoints: {found[: found.index(step)]}, as restore(…, step=…)."
    try:
        saved = json.loads(note.read_text())
    except ValueError as error:
        raise ValueError(
            f"checkpoint {step} is damaged: {note.name} cannot be read ({error}). {older}"
        ) from None
    _check_fits(step, [_Leaf(**leaf) for leaf in saved["leaves"]], _leaves(like), older)
    found_files = _checksums(folder)
    for name in sorted({*saved["files"], *found_files}):
        if saved["files"].get(name) != found_files.get(name):
            raise ValueError(
                f"checkpoint {step} is damaged: its file {name} is not what was written. {older}"
            )
    leaves, treedef = jax.tree.flatten(jax.tree.map(_with_kind, like))
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder, _written(map(_shape, leaves)))
    values = [_restored(arrays.get(str(i)), x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, values)


class _Leaf(NamedTuple):
    """What the file says of one leaf; the dtype of a PRNG key names its kind, as ``key<fry>``."""

    name: str
    shape: list[int]
    dtype: str


def _check_fits(step: int, saved: list[_Leaf], expected: list[_Leaf], older: str) -> None:
    names = [leaf.name for leaf in saved]
    wanted = [leaf.name for leaf in expected]
    if names != wanted:
        raise ValueError(
            f"checkpoint {step} is of another state: it also has {sorted({*names} - {*wanted})}, "
            f"and lacks {sorted({*wanted} - {*names})}. {older}"
        )
    for own, other in zip(saved, expected, strict=True):
        if (own.shape, own.dtype) != (other.shape, other.dtype):
            raise ValueError(
                f"checkpoint {step} is of another state: {own.name} is {own.dtype}{own.shape} in "
                f"it and {other.dtype}{other.shape} here. {_hint(own.dtype, other.dtype)}{older}"
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


def _written(leaves: Iterable[Any]) -> dict[str, Any]:
    """What Orbax writes: arrays by their places. It writes no empty array, no float0, and not
    nothing."""
    held = {str(i): x for i, x in enumerate(leaves) if x.size and x.dtype != jax.dtypes.float0}
    return held or {"nothing": np.zeros(1, np.int8)}


def _array(leaf: Any) -> np.ndarray:
    """The array that is written for a leaf; for a key its data."""
    return np.asarray(key_data(leaf))


def _shape(leaf: PyTree) -> jax.ShapeDtypeStruct:
    """The shape and dtype of that array."""
    if key_impl(leaf) is not None:
        return jax.eval_shape(jax.random.key_data, leaf)
    x = _with_shape(leaf)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _restored(written: np.ndarray | None, like: PyTree) -> PyTree:
    """A leaf of the state, from the array that was written; None where nothing was."""
    x = np.zeros(like.shape, like.dtype) if written is None else written
    of_jax = isinstance(like, jax.Array | jax.ShapeDtypeStruct)
    return as_key(jnp.asarray(x), like) if of_jax and x.dtype != jax.dtypes.float0 else x


def _with_kind(leaf: PyTree) -> PyTree:
    """A leaf of which JAX tells the kind of key, which it does not of a key's shape alone."""
    is_key = jnp.issubdtype(dtype_of(leaf), jax.dtypes.prng_key)
    return jnp.empty(leaf.shape, leaf.dtype) if is_key else leaf


def _with_shape(leaf: Any) -> Any:
    """A leaf that has a shape and a dtype: a number as an array."""
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _leaves(state: PyTree) -> list[_Leaf]:
    return [_leaf(name, x) for name, x in leaves_with_names(state, "state")]


def _leaf(name: str, leaf: PyTree) -> _Leaf:
    x = _with_shape(leaf)
    return _Leaf(name, list(x.shape), str(x.dtype))


def _checksums(folder: pathlib.Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in files}
