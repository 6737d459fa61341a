"""The devices to compile for: those that are here, or GPUs and TPUs that are only described.

The compilers of XLA need a description of a device, not the device. libtpu knows the TPUs by name.
The CUDA plug-in takes a file with the numbers of a GPU, and compiles for as many as are wanted. A
described place is written as chip and shape: `v5e:2x2` is four chips in a square, `h100:1x4x8` is
one partition of four hosts with eight GPUs each.
"""

import dataclasses
import glob
import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path

import jax
import numpy as np

PLUGINS = {"jax_plugins.xla_cuda13": "jax-cuda13-pjrt", "jax_plugins.xla_cuda12": "jax-cuda12-pjrt"}
"""The modules that bring XLA's compiler for GPUs, and their distributions."""


class NoSuchDevice(ValueError):
    """What was asked for cannot be compiled for; the message is one line that says why."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip: its kind, bfloat16 operations a second, bytes a second over
    its links, bytes of memory."""

    kind: str
    flops: float
    link: float
    memory: float


CHIPS = {
    "v5e": Chip("tpu", 197e12, 200e9, 16 * 2**30),
    "v5p": Chip("tpu", 459e12, 600e9, 95 * 2**30),
    "v6e": Chip("tpu", 918e12, 448e9, 32 * 2**30),
    # NVLink. A host's eight network cards together, 400e9, are about as fast: hosts count alike.
    "h100": Chip("gpu", 989e12, 450e9, 84942979072),
}
EXAMPLES = {"tpu": "v5e:2x2", "gpu": "h100:1x1x8"}
SHAPES = {"tpu": r"[1-9]\d*(x[1-9]\d*)*", "gpu": r"[1-9]\d*(x[1-9]\d*){2}"}


def present(kind: str) -> bool:
    """Whether devices of this kind, `tpu` or `gpu`, are here: then programs also run."""
    _prepare()
    return jax.default_backend() == kind


def chip(place: str) -> Chip | None:
    """The figures of a described place's chip; None of the devices that are here."""
    return CHIPS.get(place.partition(":")[0])


def compiler(kind: str) -> str:
    """The compiler of described devices, and its version."""
    if kind == "tpu":
        return f"libtpu {importlib.metadata.version('libtpu')}"
    plugin = next(name for name in PLUGINS if _importable(name))
    return f"{PLUGINS[plugin]} {importlib.metadata.version(PLUGINS[plugin])}"


def described(place: str, kind: str) -> np.ndarray:
    """The devices of a place that is only described, of the given kind.

    Raises:
        NoSuchDevice: the chip or its shape is unknown, or the compiler is not installed.
    """
    known = [name for name, one in CHIPS.items() if one.kind == kind]
    name, _, shape = place.partition(":")
    if name not in known or not re.fullmatch(SHAPES[kind], shape):
        raise NoSuchDevice(
            f"unknown {kind.upper()} {place!r}: write a chip and its shape, such as "
            f"{EXAMPLES[kind]!r}; the chips are {', '.join(known)}"
        )
    if not installed(kind):
        raise NoSuchDevice(missing(kind))
    _prepare()
    try:
        return np.array(_topology(place, kind).devices)
    except NotImplementedError:
        version = importlib.metadata.version("jaxlib")
        raise NoSuchDevice(
            f"JAX does not load its CUDA plug-in: its version must be jaxlib's, {version}"
        ) from None
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise NoSuchDevice(
            f"{compiler(kind)} does not know the topology {place!r}, but {EXAMPLES[kind]!r}: "
            f"{reason}"
        ) from None


def installed(kind: str) -> bool:
    """Whether the compiler for described devices of this kind is."""
    return any(map(_importable, ("libtpu",) if kind == "tpu" else PLUGINS))


def missing(kind: str) -> str:
    """What to install."""
    return (
        f"the compiler for {kind.upper()}s is not installed: "
        f"pip install 'jaxaccum[experiments,{kind}]'"
    )


def _topology(place: str, kind: str):
    from jax.experimental import topologies

    if kind == "tpu":
        return topologies.get_topology_desc(place, platform="tpu")
    name, _, shape = place.partition(":")
    description = (Path(__file__).parent / f"{name}.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=description, topology=shape)


def _prepare() -> None:
    """Before JAX begins: its plug-ins look for devices, and give up where there are none."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if not glob.glob("/dev/nvidia[0-9]*"):  # without a GPU its libraries need not be there either
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False
