"""Why does BERT with accumulation not train like BERT without, and does it have to?

The seed's open question: batch size B = 8 in one pass (N = 1) against B = 2 accumulated over N = 4.
Masked-language modelling with a tied decoder on real text of unequal length, AdamW, a schedule,
clipping; the same data order, masks and initial weights throughout, in Flax and in PyTorch. The
usual loop departs from the full batch for five causes; each is switched on alone in the exact loop,
and off alone in the usual one. What none explains is the residual.

Command   python -m experiments bert [--full]
Cost      3 minutes on 2 cores, a 2-layer BERT from scratch; --full: 51 minutes, the pretrained
          6-layer MiniLM
Expected  the usual loop ends far from the full batch, in both frameworks; `jaxaccum.value_and_grad`
          and the loop with every cause off lie on it to float64's rounding, in float32 to
          float32's; Flax and torch agree likewise
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import torch
from matplotlib.figure import Figure

from experiments import _report, _text
from experiments._bert_runs import CAUSES, Recipe, Run, Runner
from experiments.models.bert import Config, from_torch
from torch_ref import bert as torch_bert
from torch_ref import train as torch_train

ALL = frozenset(CAUSES)
NONE: frozenset[str] = frozenset()
FULL, EXACT, LOOP, USUAL, OTHER = "full batch", "jaxaccum", "loop, none", "loop, all", "other keys"
WITHOUT_DROPOUT = ALL - {
    "keys",
    "rounding",
}  # the causes that torch's naive loop shares without dropout, in float64
QUICK = {"length": 32, "vocabulary": 500, "steps": 200, "batch_size": 8}
LONG = {"length": 64, "vocabulary": 4000, "steps": 200, "batch_size": 8}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
MINILM = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """The model, its initial weights under Hugging Face's names, and the data, in order."""

    config: Config
    weights: dict[str, np.ndarray]
    batches: Sequence[_text.Batch]
    held_out: _text.Batch
    texts: int
    padding: float
    recipe: Recipe


def run(
    *,
    full: bool = False,
    track: _report.Track = _report.quiet,
    recipe: Recipe | None = None,
    **sizes: int,
) -> _report.Record:
    """Train every way, compare gradients of the first step and held-out losses; `sizes` replace
    those of the data."""
    made = task(full=full, recipe=recipe or Recipe(peak=1e-4 if full else 1e-3), sizes=sizes)
    plans = {**flax_plans(made), **torch_plans(made)}
    runs = all_runs(plans, track=track)
    rows = attribution(runs)
    return _report.Record(
        name="bert",
        question=(
            "Why does BERT with accumulation not train like BERT without, and does it have to?"
        ),
        settings={
            **dataclasses.asdict(made.config),
            **dataclasses.asdict(made.recipe),
            **data_settings(made),
        },
        rows=rows,
        checks=checks(made, runs),
        figure=picture(made, runs),
        text="\n".join(f"{name}: {what}" for name, what in CAUSES.values()),
        data={
            "evaluated_at": evaluated_at(made),
            "losses": {name: run.losses for name, run in runs.items()},
        },
    )


def task(*, full: bool, recipe: Recipe, sizes: dict[str, int]) -> Task:
    """The quick task, a small BERT from scratch; or the full one, MiniLM's weights under a new
    decoder."""
    chosen = {**(LONG if full else QUICK), **sizes}
    corpus = _text.corpus(length=chosen["length"], vocabulary=chosen["vocabulary"])
    shape = {name: chosen.get(name, size) for name, size in (MINILM if full else SIZES).items()}
    positions = 512 if full else chosen["length"]
    config = Config(vocab_size=len(corpus.kept), max_position_embeddings=positions, **shape)
    weights = torch_bert.weights(dataclasses.asdict(config), seed=0)
    held_out, training = corpus.ids[:64], _text.Corpus(corpus.ids[64:], corpus.kept)
    return Task(
        config=config,
        weights={**weights, **pretrained(corpus.kept)} if full else weights,
        batches=_text.batches(
            training, steps=chosen["steps"], batch_size=chosen["batch_size"], seed=1
        ),
        held_out=_text.masked(held_out, np.random.default_rng(2), vocabulary=len(corpus.kept)),
        texts=len(corpus.ids),
        padding=corpus.padding,
        recipe=recipe,
    )


def pretrained(kept: np.ndarray) -> dict[str, np.ndarray]:
    """MiniLM's encoder, its word embeddings reduced to the kept tokens."""
    stored = safetensors.numpy.load_file(_text.PRETRAINED / "model.safetensors")
    words = "embeddings.word_embeddings.weight"
    stored[words] = stored[words][kept]
    used = {
        name: weight
        for name, weight in stored.items()
        if "position_ids" not in name and "pooler" not in name
    }
    return {f"bert.{name}": weight for name, weight in used.items()}


def flax_plans(task: Task) -> dict[str, Callable[[], Run]]:
    """Every run in Flax by name; the first run of each program early, so that compilations
    overlap."""
    runner = Runner(task.config, task.recipe)
    params = from_torch(task.weights)

    def plan(way: str, **options: Any) -> Callable[[], Run]:
        return lambda: runner.run(
            way, params, batches=task.batches, held_out=task.held_out, **options
        )

    plans = {
        FULL: plan(FULL),
        USUAL: plan("loop", causes=ALL),
        EXACT: plan("jaxaccum"),
        LOOP: plan("loop"),
        "on: rounding": plan("jaxaccum", causes=frozenset({"rounding"})),
        OTHER: plan(FULL, seed=1),
    }
    for cause in CAUSES:
        plans.setdefault(f"on: {cause}", plan("loop", causes=frozenset({cause})))
        plans[f"off: {cause}"] = plan("loop", causes=ALL - {cause})
    for name, way, causes in [
        (FULL, FULL, NONE),
        (EXACT, "jaxaccum", NONE),
        (USUAL, "loop", WITHOUT_DROPOUT),
    ]:
        plans[f"flax without dropout: {name}"] = plan(way, causes=causes, dropout=0.0)
    return plans


def torch_plans(task: Task) -> dict[str, Callable[[], Run]]:
    """The three ways in torch: without dropout in float64, to be compared with Flax; with it in
    float32, as usual."""
    ways: dict[str, torch_train.Way] = {FULL: "full batch", EXACT: "exact", USUAL: "naive"}
    plans: dict[str, Callable[[], Run]] = {}
    for name, way in ways.items():
        plans[f"torch without dropout: {name}"] = lambda way=way: torch_run(
            task, way, dropout=False
        )
    for name in (FULL, USUAL):
        plans[f"torch: {name}"] = lambda way=ways[name]: torch_run(task, way, dropout=True)
    return plans


def torch_run(task: Task, way: torch_train.Way, *, dropout: bool) -> Run:
    """One run in torch; its dropout draws from torch's generator, and so differs with the
    partition."""
    recipe, steps = task.recipe, len(task.batches)
    ticks = recipe.num_microbatches if way == "naive" else 1
    config = dataclasses.asdict(task.config)
    examples = len(task.batches[0]["ids"])
    torch.set_num_threads(1)  # two runs share two cores; torch's threads would wait for each other
    torch.manual_seed(0)
    trajectory = torch_train.train(
        torch_bert.loss(config, dropout=dropout),
        {
            name: weight.astype(np.float32 if dropout else np.float64)
            for name, weight in task.weights.items()
        },
        task.batches,
        way=way,
        sizes=[examples // recipe.num_microbatches] * recipe.num_microbatches,
        learning_rates=recipe.learning_rates(steps, ticks=ticks),
        weight_decay=ticks * recipe.weight_decay,
        max_norm=recipe.max_norm,
        eps=1e-6,
    )
    held_out = torch_bert.loss(config)
    moments = set(evaluated_at(task))
    losses = [
        torch_train.evaluate(held_out, leaves, task.held_out)
        for step, leaves in enumerate(trajectory)
        if step in moments
    ]
    return Run(None, losses)


def all_runs(plans: dict[str, Callable[[], Run]], *, track: _report.Track) -> dict[str, Run]:
    """Every run, two at a time: the programs are too small to keep two cores busy alone."""

    def finish(plan: Callable[[], Run]) -> Run:
        # Float64 is a thread's own setting, and so is made in each.
        with jax.enable_x64(True):
            return plan()

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        pending = {name: pool.submit(finish, plan) for name, plan in plans.items()}
        return {name: pending[name].result() for name in track(list(pending), "bert")}


def attribution(runs: dict[str, Run]) -> list[dict[str, Any]]:
    """The table: each cause's share of the gradient and of the loss, alone and missing; then what
    is left over."""
    rows = [
        row(name, difference(runs, f"on: {c}"), difference(runs, f"off: {c}"))
        for c, (name, _) in CAUSES.items()
    ]
    alone = [difference(runs, f"on: {cause}")[1] for cause in CAUSES]
    every = difference(runs, USUAL)
    return [
        *rows,
        row("all five: usual loop", every, difference(runs, LOOP)),
        row("all five less their sum", (None, every[1] - sum(alone)), (None, None)),
        row("none: jaxaccum, the residual", difference(runs, EXACT), (None, None)),
        row("full batch, other dropout seed", difference(runs, OTHER), (None, None)),
    ]


def row(
    cause: str, alone: tuple[float | None, float | None], without: tuple[float | None, float | None]
) -> dict:
    """One row: differences to the full batch with the cause alone, and with the other four."""
    columns = ("Δ gradient alone", "Δ loss alone", "Δ gradient without", "Δ loss without")
    return {"cause": cause, **dict(zip(columns, (*alone, *without), strict=True))}


def difference(runs: dict[str, Run], name: str) -> tuple[float, float]:
    """The first gradient's distance from the full batch's, max|Δ| / max|g|, and the last loss less
    the full batch's."""
    reference = jax.tree.map(np.asarray, runs[FULL].gradient)
    gaps = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - b).max()), runs[name].gradient, reference
    )
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(reference))
    return max(jax.tree.leaves(gaps)) / scale, runs[name].losses[-1] - runs[FULL].losses[-1]


def apart(runs: dict[str, Run], name: str, reference: str) -> float:
    """The largest distance of two runs' losses, relative to the reference's."""
    losses, expected = np.array(runs[name].losses), np.array(runs[reference].losses)
    return float(np.max(np.abs(losses - expected) / expected))


def checks(task: Task, runs: dict[str, Run]) -> list[_report.Check]:
    """Real data; exact to rounding; the usual loop far away; both frameworks alike."""
    naive, ways = apart(runs, USUAL, FULL), (FULL, EXACT, USUAL)
    frameworks = max(
        apart(runs, f"flax without dropout: {name}", f"torch without dropout: {name}")
        for name in ways
    )
    gradient = difference(runs, EXACT)[0]
    smallest = min(
        difference(runs, f"on: {cause}")[0] for cause in ("keys", "weighting", "clipping")
    )
    # Each step rounds anew, a few times the last bit of the loss; training that amplified it would
    # show here.
    drift = 16 * len(task.batches) * float(np.finfo(np.float64).eps)
    return [
        _report.Check("texts missing from 500", 500 - task.texts, 0),
        _report.Check("padding missing from 30 %", 0.30 - task.padding, 0),
        _report.Check("jaxaccum's gradient from the full batch's", gradient, 1e-12),
        _report.Check(
            "the corrected loop's gradient from the full batch's", difference(runs, LOOP)[0], 1e-12
        ),
        _report.Check(
            "jaxaccum's loss from the full batch's, at every evaluation",
            apart(runs, EXACT, FULL),
            drift,
        ),
        _report.Check(
            "the same in float32, over the usual loop's",
            apart(runs, "on: rounding", FULL) / naive,
            1e-3,
        ),
        _report.Check(
            "jaxaccum's gradient over the least of three causes'", gradient / smallest, 1e-9
        ),
        _report.Check("Flax's losses from torch's, without dropout", frameworks, drift),
    ]


def data_settings(task: Task) -> dict[str, Any]:
    """What the data are."""
    steps, (batch_size, length) = len(task.batches), task.batches[0]["ids"].shape
    shape = {"steps": steps, "batch_size": batch_size, "length": length}
    return {**shape, "texts": task.texts, "padding": task.padding}


def evaluated_at(task: Task) -> list[int]:
    """The steps after which the held-out loss is taken."""
    steps = len(task.batches)
    return [*range(0, steps, task.recipe.evaluate_every), steps]


def picture(task: Task, runs: dict[str, Run]) -> Figure:
    """The curves, then their distances to the full batch on a logarithmic scale."""
    figure, (curves, distances) = _report.panels(2, height=4.0)
    steps = evaluated_at(task)
    wide: dict[str, Any] = {"linewidth": 5, "alpha": 0.25}
    curves.plot(
        steps, runs[FULL].losses, color=_report.BLACK, label="full batch, B = 8, N = 1", **wide
    )
    curves.plot(steps, runs[EXACT].losses, color=_report.BLUE, label="jaxaccum, B = 2, N = 4")
    curves.plot(steps, runs[USUAL].losses, color=_report.RED, label="usual loop, B = 2, N = 4")
    for name, color in ((FULL, _report.BLACK), (USUAL, _report.RED)):
        style: dict[str, Any] = {
            "linestyle": "none",
            "marker": "o",
            "markerfacecolor": "none",
            "color": color,
        }
        label = "full batch, torch" if name == FULL else "usual loop, torch"
        curves.plot(steps, runs[f"torch: {name}"].losses, label=label, **style)
    curves.set(xlabel="optimizer step", ylabel="held-out loss (nats / token)")
    curves.legend(frameon=False, fontsize=9)
    plot_distances(distances, steps, runs)
    return figure


def plot_distances(panel: Any, steps: list[int], runs: dict[str, Run]) -> None:
    """|loss − full batch's| for every cause alone, and for none."""
    shown = {
        "all five: usual loop": (USUAL, _report.RED),
        "schedule and decay": ("on: ticks", _report.ORANGE),
        "weighting": ("on: weighting", _report.SKY),
        "clipping": ("on: clipping", _report.PINK),
        "dropout keys": ("on: keys", _report.GREEN),
        "float32: jaxaccum": ("on: rounding", _report.BLACK),
        "none: jaxaccum": (EXACT, _report.BLUE),
    }
    expected = np.array(runs[FULL].losses)[1:]
    for label, (name, color) in shown.items():
        # A difference of exactly zero has no logarithm: it is drawn at the last bit of the loss.
        gap = np.maximum(np.abs(np.array(runs[name].losses)[1:] - expected), np.spacing(expected))
        wide: dict[str, Any] = {"linewidth": 6, "alpha": 0.3} if name == USUAL else {"marker": "."}
        panel.semilogy(steps[1:], gap, color=color, label=label, **wide)
    panel.set(xlabel="optimizer step", ylabel="|held-out loss − full batch's|")
    panel.legend(frameon=False, fontsize=8.5, ncols=2, loc="center", bbox_to_anchor=(0.5, 0.27))
