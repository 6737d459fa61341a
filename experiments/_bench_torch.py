"""The same models in PyTorch under three loops: eager, `torch.compile`, and Accelerate.

Run as a program it prints the peak of resident memory of one step, in a process that does nothing
else:

    python -m experiments._bench_torch CASE N LOOP OPTIONS
"""

import ctypes
import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._bench_cases import CASES, HEADS, Batch, Case, Params
from experiments._bench_rivals import FIRST_MOMENT, Way, cut

LOOPS = ("torch eager", "torch.compile", "Accelerate")


def loops(case: Case, *, full: bool) -> tuple[str, ...]:
    """Those that run here. Compiling takes torch a minute or so for each program: with `full`
    alone."""
    if not case.has_torch or importlib.util.find_spec("torch") is None:
        return ()
    accelerate = LOOPS[2:] if importlib.util.find_spec("accelerate") else ()
    return (LOOPS[0], *(LOOPS[1:2] if full else ()), *accelerate)


def made(name: str, case: Case, n: int, options: dict[str, Any]) -> Way:
    """A training step by one of the loops."""
    step, gradient = loop(name, case, n)
    return Way(step, gradient, peak_resident(name, case, n, options))


def loop(name: str, case: Case, n: int) -> tuple[Callable[[], None], Callable[[], Params]]:
    """One optimizer step over all microbatches; and the gradient of the first, as AdamW kept it."""
    import torch

    model = module(case)
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-3, weight_decay=1e-4, fused=True
    )  # optax's defaults
    parts = [jax.tree.map(torch.from_numpy, rows) for rows in rows_of(case.batch, n)]
    run = accelerated(model, optimizer, parts) if name == "Accelerate" else eager(
        torch.compile(model) if name == "torch.compile" else model, optimizer, parts
    )  # fmt: skip

    def gradient() -> Params:
        moments = [optimizer.state[leaf]["exp_avg"].numpy() / FIRST_MOMENT for leaf in model.leaves]
        return jax.tree.unflatten(jax.tree.structure(case.params), moments)

    return run, gradient


def module(case: Case) -> Any:
    """The parameters as a module, whose call is the loss of some rows."""
    import torch

    structure, loss = jax.tree.structure(case.params), LOSSES[case.name]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            arrays = map(np.array, jax.tree.leaves(case.params))
            self.leaves = torch.nn.ParameterList(torch.from_numpy(array) for array in arrays)
            self.tree = jax.tree.unflatten(structure, list(self.leaves))

        def forward(self, rows: Any) -> Any:
            return loss(self.tree, rows)

    return Model()


def eager(model: Any, optimizer: Any, parts: list[Any]) -> Callable[[], None]:
    """The loop of PyTorch's documentation: every loss divided by their number."""

    def run() -> None:
        for rows in parts:
            (model(rows) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def accelerated(model: Any, optimizer: Any, parts: list[Any]) -> Callable[[], None]:
    """Accelerate's context, which divides, and skips the optimizer until the last microbatch."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(parts))
    prepared, stepping = accelerator.prepare(model, optimizer)

    def run() -> None:
        for rows in parts:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(rows))
                stepping.step()
                stepping.zero_grad()

    return run


def rows_of(batch: Batch, n: int) -> Iterator[Batch]:
    """The rows of each microbatch; torch wants labels of 64 bits."""
    wide = lambda leaf: (
        leaf.astype(np.int64) if np.issubdtype(leaf.dtype, np.integer) else np.array(leaf)
    )
    parts = jax.tree.map(wide, cut(batch, n))
    for i in range(n):
        yield jax.tree.map(lambda leaf, i=i: leaf[i], parts)


# -- the models ------------------------------------------------------------------------------------


def norm(x: Any) -> Any:
    """Zero mean and unit variance over the width."""
    import torch.nn.functional as F

    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


def block(layer: Params, x: Any, *, causal: bool) -> Any:
    """A transformer layer, with torch's own attention."""
    import torch.nn.functional as F

    examples, length, width = x.shape
    split = lambda y: y.reshape(examples, length, HEADS, width // HEADS).transpose(1, 2)
    q, k, v = map(split, (norm(x) @ layer["qkv"]).chunk(3, dim=-1))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    x = x + attended.transpose(1, 2).reshape(x.shape) @ layer["out"]
    return x + F.gelu(norm(x) @ layer["up"], approximate="tanh") @ layer["down"]


def cross_entropy(logits: Any, labels: Any) -> Any:
    """The mean over all labels."""
    import torch.nn.functional as F

    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def transformer(params: Params, x: Any) -> Any:
    """As `_bench_cases.transformer`."""
    for layer in params:
        x = block(layer, x, causal=False)
    return (norm(x)[..., 0] * x[..., 1]).mean()


def deep(params: Params, x: Any) -> Any:
    """As `_bench_cases.scanned` and `untied`: the layers of the first are slices of one tensor."""
    if isinstance(params, dict):
        params = [{"w": w, "b": b} for w, b in zip(params["w"], params["b"], strict=True)]
    for leaf in params:
        x = x + (x @ leaf["w"] + leaf["b"]).tanh()
    return (x**2).mean()


def cnn(params: Params, rows: Any) -> Any:
    """As `_bench_cases.cnn`."""
    import torch.nn.functional as F

    x, labels = rows[0].permute(0, 3, 1, 2), rows[1]
    for i, kernel in enumerate(params["kernels"]):
        x = F.conv2d(x, kernel.permute(3, 2, 0, 1), stride=1 if i == 0 else 2, padding=1).relu()
    return cross_entropy(x.mean(dim=(2, 3)) @ params["head"], labels)


def embedding(params: Params, rows: Any) -> Any:
    """As `_bench_cases.embedding`."""
    import torch.nn.functional as F

    x = F.embedding(rows[0], params["table"]).mean(dim=1)
    return cross_entropy((x @ params["hidden"]).tanh() @ params["head"], rows[1])


def tied_lm(params: Params, ids: Any) -> Any:
    """As `_bench_cases.tied_lm`."""
    import torch.nn.functional as F

    x = F.embedding(ids[:, :-1], params["table"]) + params["positions"]
    for layer in params["layers"]:
        x = block(layer, x, causal=True)
    return cross_entropy(norm(x) @ params["table"].T, ids[:, 1:])


def tiny(params: Params, rows: Any) -> Any:
    """As `_bench_cases.tiny`."""
    return cross_entropy((rows[0] @ params["hidden"]).tanh() @ params["head"], rows[1])


LOSSES: dict[str, Callable[[Params, Any], Any]] = {
    "transformer": transformer,
    "scanned MLP": deep,
    "untied layers": deep,
    "CNN": cnn,
    "embedding": embedding,
    "tied LM": tied_lm,
    "tiny": tiny,
}


# -- memory ----------------------------------------------------------------------------------------


def peak_resident(name: str, case: Case, n: int, options: dict[str, Any]) -> int | None:
    """Bytes beyond parameters, AdamW's state and the batch, at the peak of the second step; None if
    not told."""
    arguments = [case.name, str(n), name, json.dumps(options)]
    command = [sys.executable, "-m", "experiments._bench_torch", *arguments]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def measured(run: Callable[[], None]) -> int | None:
    """How far a step raises what is resident. The first step makes AdamW's state, and loads what
    torch loads."""
    run()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, and is not reused unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        run()
        return resident("VmHWM") - before
    except (OSError, AttributeError):
        return None  # neither Linux nor glibc


def resident(field: str) -> int:
    """A field of the process's own status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    chosen, number, way, sizes = sys.argv[1:]
    print(json.dumps(measured(loop(way, CASES[chosen](**json.loads(sizes)), int(number))[0])))
