"""What cannot be compiled for is said in one line: an unknown device, a missing extra, a topology
that a compiler refuses, a program that no device holds."""

import importlib.metadata
import re
import types

import jax
import pytest

from experiments import __main__ as cli
from experiments import _compiled_devices as places
from experiments import _compiled_steps as steps
from experiments import gpu

pytestmark = pytest.mark.optimized


def line(call, *words):
    """The message of a refusal: one line that holds the words."""
    with pytest.raises(places.NoSuchDevice) as refused:
        call()
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize(
    "place", ["h200:1x1x8", "v5e:2x2", "h100", "h100:8", "h100:1x1x0", "h100:1x1x-1", "", "gpu"]
)
def test_an_unknown_gpu(place):
    line(
        lambda: places.described(place, "gpu"),
        f"unknown GPU {place!r}",
        "'h100:1x1x8'",
        "the chips are h100",
    )


@pytest.mark.parametrize("place", ["v9:2x2", "h100:1x1x8", "v5e", "v5e:big", "v5e:0x2", "tpu"])
def test_an_unknown_tpu(place):
    line(
        lambda: places.described(place, "tpu"),
        f"unknown TPU {place!r}",
        "'v5e:2x2'",
        "v5e, v5p, v6e",
    )


def test_a_topology_that_libtpu_does_not_know():
    version = importlib.metadata.version("libtpu")
    line(
        lambda: places.described("v5e:3x5", "tpu"),
        f"libtpu {version} does not know the topology 'v5e:3x5'",
        "layout",
    )
    assert len(places.described("v5e:2x2", "tpu").ravel()) == 4


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_a_missing_extra(kind, monkeypatch):
    monkeypatch.setattr(places, "_importable", lambda module: False)
    command = f"pip install 'jaxaccum[experiments,{kind}]'"
    line(
        lambda: places.described(places.EXAMPLES[kind], kind),
        f"the compiler for {kind.upper()}s",
        command,
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            NotImplementedError("topology not implemented for cuda"),
            ["does not load", importlib.metadata.version("jaxlib")],
        ),
        (
            RuntimeError("INTERNAL: bad shape\nand a trace"),
            ["does not know the topology 'h100:1x1x8'", "bad shape"],
        ),
    ],
    ids=["another version", "another shape"],
)
def test_a_plug_in_that_refuses(error, words, monkeypatch):
    def refuses(place, kind):
        raise error

    monkeypatch.setattr(places, "installed", lambda kind: True)
    monkeypatch.setattr(places, "compiler", lambda kind: "a plug-in 1.0")
    monkeypatch.setattr(places, "_topology", refuses)
    line(lambda: places.described("h100:1x1x8", "gpu"), *words)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["gpu", "--on", "h200:1x1x8"], "unknown GPU 'h200:1x1x8'"),
        (["tpu", "--on", "v9:2x2"], "unknown TPU 'v9:2x2'"),
        (["toy", "--on", "v5e:2x2"], "--on is an option of gpu and tpu"),
    ],
    ids=["gpu", "tpu", "another"],
)
def test_the_command_line_says_it_and_ends(names, says, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(names)
    assert refused.value.code == 2
    assert f"error: {says}" in capsys.readouterr().err.splitlines()[-1]


# -- a program that was traced, and then is not compiled -------------------------------------------


def traced(compile):
    return types.SimpleNamespace(lower=lambda: types.SimpleNamespace(compile=compile))


def raising(text):
    def compile():
        raise jax.errors.JaxRuntimeError(text)

    return traced(compile)


def needing(size):
    analysis = types.SimpleNamespace(peak_memory_in_bytes=size)
    return traced(lambda: types.SimpleNamespace(memory_analysis=lambda: analysis))


@pytest.mark.parametrize(
    "text",
    [
        "UNAVAILABLE: No PTX compilation provider is available.",
        "INTERNAL: libdevice not found at ./libdevice.10.bc",
    ],
)
def test_a_compiler_without_its_parts(text):
    line(
        lambda: steps._compiled(raising(text), "h100:1x1x8"),
        "pip install 'jaxaccum[experiments,gpu]'",
    )


def test_what_a_device_cannot_hold_has_a_row_without_numbers():
    """XLA refuses it for a TPU. For a GPU it compiles it, so that we compare."""
    refused = raising("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.0G of 15.7G hbm.")
    assert steps._compiled(refused, "v5e:2x2") == (None, "Used 20.0G of 15.7G")
    assert steps._compiled(needing(120e9), "h100:1x1x8") == (None, "120 of 85 GB")
    assert steps._compiled(needing(80e9), "h100:1x1x8")[0] is not None
    assert (
        steps._compiled(needing(120e9), "here")[0] is not None
    )  # it is there, and will say so itself
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        steps._compiled(raising("INTERNAL: another"), "h100:1x1x8")


def test_the_description_and_the_figures_are_of_one_gpu():
    text = (places.Path(places.__file__).parent / "h100.txtpb").read_text()
    found = re.search(r"device_memory_size: (\d+)", text)
    assert int(found[1]) == places.CHIPS["h100"].memory


def test_devices_that_are_here_run_the_steps_and_are_timed(monkeypatch):
    here = jax.devices()[:2]
    monkeypatch.setattr(places, "present", lambda kind: True)
    monkeypatch.setattr(jax, "devices", lambda: here)
    with jax.enable_x64(False):
        record = gpu.run(models=("scanned",), num_microbatches=(2,), examples=4)
    assert record.settings["topologies"] == ["here"]
    assert record.settings["compiled by"] == here[0].device_kind
    assert all(row["note"] == "measured" and row["seconds"] > 0 for row in record.rows)
